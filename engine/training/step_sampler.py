"""The order of training rows: shuffled by epoch, in whole optimizer steps."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Sampler

from engine.errors import InputError


class StepSampler(Sampler):
    """Shuffled rows in blocks of one optimizer step; an incomplete last block is left out.

    Each block stands for `repeats` steps: after its rows come as many `None` for each of the others, which need no row opened.

    The order follows from the seed and the epoch alone, so that a resumed run sees what an uninterrupted one sees.
    """

    def __init__(self, num_rows: int, block: int, repeats: int, seed: int, epoch: Callable[[], int]):
        self.num_rows, self.block, self.repeats, self.seed, self.epoch = num_rows, block, repeats, seed, epoch
        if num_rows < block:
            raise InputError(f"the training set has {num_rows} rows; one optimizer step needs {block} prompts")

    @classmethod
    def of(cls, trainer: Any, repeats: int = 1) -> "StepSampler":
        """The sampler of a `transformers.Trainer`'s training set, by its arguments."""
        args = trainer.args
        block = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        seed = args.data_seed if args.data_seed is not None else args.seed
        return cls(len(trainer.train_dataset), block, repeats, seed, lambda: int(trainer.state.epoch or 0))

    def __len__(self) -> int:
        return self.num_rows // self.block * self.block * self.repeats

    def __iter__(self) -> Iterator[int | None]:
        order = torch.randperm(self.num_rows, generator=torch.Generator().manual_seed(self.seed + self.epoch())).tolist()
        for start in range(0, self.num_rows - self.block + 1, self.block):
            yield from order[start : start + self.block]
            yield from [None] * (self.block * (self.repeats - 1))
