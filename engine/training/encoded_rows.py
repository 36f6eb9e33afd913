"""Rows of a data set, opened and encoded: the part of a step that a data loader's workers do (`--dataloader_num_workers`)."""

import copy
from typing import Any, cast

import torch
from torch.utils.data import Dataset

from engine.data.loaders.dali import Pictures
from engine.data.rows import Rows
from engine.errors import InputError
from engine.rollout.policy import Processor
from engine.tasks.task import Task


class EncodedRows(Dataset):
    """`[i]` is row i of `rows`, and also

    index: i, from which the randomness of its answers follows       prompt: its chat messages
    encoded: the prompt with its images, for `Policy.batch`          answer_ids: the tokens of the answer to learn (`targets`)

    `[None]` is an empty row, of a step that takes up an earlier one's (`StepSampler`).
    """

    def __init__(self, rows: Rows, task: Task, processor: Processor, *, targets: bool = False, loader: str = "torch"):
        """`loader`: with "dali", `encoded` is without pixels, which `PatchMaker.fill` brings."""
        self.rows, self.task, self.processor, self.targets, self.undecoded = rows, task, processor, targets, loader == "dali"
        if self.undecoded and not hasattr(processor, "encode_sizes"):
            raise InputError("--loader dali: it does not make this model's images (expected Qwen2-VL, Qwen2.5-VL or PRS-Med)")

    def __getstate__(self) -> dict[str, Any]:
        """For a worker that is spawned: without what scores, which may hold a model, or be a function that cannot be sent."""
        task = copy.copy(self.task)
        for name in ("rewards", "overlap"):
            vars(task).pop(name, None)
        return vars(self) | {"task": task}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | None) -> dict[str, Any]:
        if index is None:
            return {}
        row = self.rows.undecoded(index) if self.undecoded else self.rows[index]
        prompt, key = self.task.prompt(row), row.get("image_id")
        if self.undecoded:
            encoded = cast(Any, self.processor).encode_sizes(prompt, [(i.height, i.width) for i in row["images"]], key)
        else:
            encoded = self.processor.encode(prompt, row["images"], key)
        row = {**row, "index": index, "prompt": prompt, "encoded": encoded}
        return row | {"answer_ids": self.processor.answer_ids([self.task.target(row)])[0]} if self.targets else row


class PatchMaker:
    """The pixels of rows of `EncodedRows(loader="dali")`, made on `device` by the processor's `view`."""

    def __init__(self, processor: Any, device: torch.device):
        self.pictures = Pictures(processor.view, device)

    def fill(self, batches: list[list[dict]]) -> list[list[dict]]:
        """The same micro-batches with pixels. ImageError, naming the file, for one that is damaged."""
        rows = [row for batch in batches for row in batch if row]
        made = iter(self.pictures([image for row in rows for image in row["images"]]))
        for row in rows:
            row["encoded"] = row["encoded"].with_pixels([next(made) for _ in row["images"]])
        return batches
