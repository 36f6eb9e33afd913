"""Rows of a data set, opened and encoded: the part of a step that a data loader's workers do (`--dataloader_num_workers`)."""

from typing import Any

from torch.utils.data import Dataset

from engine.data.rows import Rows
from engine.rollout.policy import Processor
from engine.tasks.task import Task


class EncodedRows(Dataset):
    """`[i]` is row i of `rows`, and also

    index: i, from which the randomness of its answers follows       prompt: its chat messages
    encoded: the prompt with its images, for `Policy.batch`          answer_ids: the tokens of the answer to learn (`targets`)
    """

    def __init__(self, rows: Rows, task: Task, processor: Processor, *, targets: bool = False):
        self.rows, self.task, self.processor, self.targets = rows, task, processor, targets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        prompt = self.task.prompt(row)
        encoded = self.processor.encode(prompt, row["images"], row.get("image_id"))
        row = {**row, "index": index, "prompt": prompt, "encoded": encoded}
        return row | {"answer_ids": self.processor.answer_ids([self.task.target(row)])[0]} if self.targets else row
