"""Training a model that answers a question with a mask and a sentence (PRS-Med, arXiv:2505.11872).

    loss = mask loss + class_weight * CE(data set)  [the first class_epochs only]  + text_weight * CE(answer tokens)

Each term is a mean over all images, named data sets or answer tokens of an optimizer step: these are counted over its micro-batches
and processes before the first of them runs, so the gradient is that of the whole step however it is divided.

Shape letters: B batch, S side of the masks, T tokens, V vocabulary.
"""

import math
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from engine.data.loaders.dali import Pictures
from engine.data.rows import Rows
from engine.rollout.answers import Answer
from engine.tasks.masks import MaskAnswers
from engine.tasks.task import Task
from engine.training.compiled.layers import HasLayers
from engine.training.config.masks import MIN_LEARNING_RATE, MaskConfig
from engine.training.losses.masks import MASK_LOSSES, summed_cross_entropy
from engine.training.trainer import Trainer

UNDECODED = "undecoded"
IGNORED = -100  # a label that does not count


class Output(Protocol):
    """mask_logits [B, 1, S, S], class_logits [B, classes], token_logits [B, T, V] with token_labels [B, T] (-100: not counted)."""

    mask_logits: Tensor
    class_logits: Tensor
    token_logits: Tensor
    token_labels: Tensor


class MaskProcessor(Protocol):
    """Rows to tensors."""

    def collate(self, rows: list[dict]) -> dict[str, Tensor]:
        """Opened rows -> `forward`'s batch, and masks [B, 1, S, S] and class_labels [B]; a data loader's workers do it.

        Of the batch, `labels` has -100 where `forward`'s token_labels have it or where these do not reach.
        """


class MaskModel(HasLayers, Protocol):
    """What is asked of an `nn.Module` that answers with masks; `model(**batch)` gives an `Output`."""

    @property
    def processor(self) -> MaskProcessor: ...

    def __call__(self, **batch: Tensor) -> Output: ...

    def segment_batch(self, images: list[Image.Image], questions: list[str]) -> list[tuple[str, Tensor]]:
        """The answer to each question, and mask logits [H, W] in its image's size."""

    def save_pretrained(self, folder: str | Path) -> None: ...

    def load_trained(self, folder: str | Path) -> None:
        """Read back what training changes."""


class UndecodedRows(Dataset):
    """Rows whose plain image files nobody has decoded."""

    def __init__(self, rows: Rows):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows.undecoded(index)


class Words:
    """As a processor's `collate`, with the images as they are, under `UNDECODED`."""

    def __init__(self, processor: Any):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        return self.processor.collate_without_images(rows) | {UNDECODED: [row["image"] for row in rows]}


class ViewMaker:
    """What a processor's `views` say of images, made on `device`."""

    def __init__(self, processor: Any, device: torch.device):
        self.pictures = {name: Pictures(view, device) for name, view in processor.views.items()}

    def fill(self, batches: list[dict]) -> list[dict]:
        """The batches of `Words` as those of `collate`. ImageError, naming the file, for one that is damaged."""
        for batch in batches:
            images = batch.pop(UNDECODED)
            batch |= {name: torch.stack(pictures(images)) for name, pictures in self.pictures.items()}
        return batches


class MaskTrainer(Trainer):
    """Trains a `MaskModel` on rows of `engine.data.masked_questions`."""

    args: MaskConfig
    evaluation_batch_size = 8

    def __init__(self, model: MaskModel, task: Task, args: MaskConfig, rows: Rows, **options: Any) -> None:
        by_dali = args.loader == "dali"
        data = UndecodedRows(rows) if by_dali else rows
        collate = Words(model.processor) if by_dali else model.processor.collate
        super().__init__(model, args, data, data_collator=collate, **options)
        self.pictures = ViewMaker(model.processor, args.device) if by_dali else None
        self.answers = MaskAnswers(model.segment_batch)
        self.loss_is_scaled_for_ga = True  # by the counts of the step
        self.terms: list[Tensor] = []  # mask, class and text loss of each micro-batch since the last log, shares of its step's
        self.num_steps = 0  # since the last log

    def networks(self) -> list[HasLayers]:
        return [self.model]

    def answer(self, rows: list[dict]) -> list[Answer]:
        self.model.eval()
        return self.answers(rows)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[dict], Tensor | None]:
        """The micro-batches of one optimizer step, and how many images, named data sets and answer tokens [3] a process has."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return [], None
        self.num_steps += 1
        counted = [(len(b["masks"]), (b["class_labels"] != IGNORED).sum(), (b["labels"] != IGNORED).sum()) for b in batches]
        counts = self.accelerator.reduce(torch.tensor(counted, dtype=torch.float32, device=device).sum(0), "mean")
        return batches, counts.where(counts > 0, 1)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None) -> Tensor:
        """This micro-batch's share of the step's loss; `num_items_in_batch`: the counts of `get_batch_samples`."""
        inputs = dict(inputs)
        masks, class_labels = inputs.pop("masks"), inputs.pop("class_labels")
        output: Output = model(**inputs)
        # The class term stays in the sum when its time is over, so that every parameter has a gradient in every process.
        class_weight = self.args.class_weight if (self.state.epoch or 0) < self.args.class_epochs else 0.0
        sums = torch.stack(
            [
                MASK_LOSSES[self.args.mask_loss](output.mask_logits.float(), masks) * len(masks),
                summed_cross_entropy(output.class_logits, class_labels),
                summed_cross_entropy(output.token_logits, output.token_labels),
            ]
        )
        terms = sums / num_items_in_batch
        self.terms.append(terms.detach())
        return (terms * terms.new_tensor([1.0, class_weight, self.args.text_weight])).sum()

    def step_metrics(self) -> dict[str, float]:
        if not self.terms:
            return {}
        means = self.accelerator.reduce(torch.stack(self.terms).sum(0) / self.num_steps, "mean").tolist()
        self.terms.clear()
        self.num_steps = 0
        return dict(zip(("loss/mask", "loss/class", "loss/text"), means, strict=True))

    def make_schedule(self, num_steps: int, optimizer: Any) -> Any:
        if self.args.cosine_epochs is None:
            return super().make_schedule(num_steps, optimizer)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        steps = math.ceil(len(self.train_dataset) / batch)
        low, period = min(1.0, MIN_LEARNING_RATE / self.args.learning_rate), self.args.cosine_epochs

        def factor(step: int) -> float:
            return low + (1 - low) * (1 + math.cos(math.pi * (step // steps) / period)) / 2

        self.lr_scheduler = LambdaLR(optimizer, factor)
        return self.lr_scheduler
