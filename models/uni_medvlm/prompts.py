"""A prompt for Uni-MedVLM, and a batch of them: what the processor makes on the CPU, and what the model reads on its device.

Letters: B prompts, P padded prompt tokens, V views of an image, N patches of a view, S side of the mask decoder's image.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.sam.frame import Frame
from models.uni_medvlm.encoder.pixels import HybridPixels


@dataclass(frozen=True)
class ImageInputs:
    """An image as all towers read it: `views`, and [3, S, S] for the mask decoder, in which it lies as `frame` says.

    `regions`: for each region that the prompt names, the weights [N] of the patches of its first view. `key` identifies the image
    across steps, or is None.
    """

    views: HybridPixels
    sam_pixels: Tensor
    frame: Frame
    regions: list[Tensor]
    key: str | None

    def to(self, device: torch.device | str) -> "ImageInputs":
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "ImageInputs":
        """The same in memory from which a GPU copies by itself."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "ImageInputs":
        views, regions = HybridPixels(*map(change, self.views)), [change(region) for region in self.regions]
        return replace(self, views=views, sam_pixels=change(self.sam_pixels), regions=regions)


@dataclass(frozen=True)
class EncodedPrompt:
    """One prompt, on the CPU: input_ids (P,), where an image has as many tokens as it needs, and its image, if it has one."""

    input_ids: Tensor
    image: ImageInputs | None

    def pin_memory(self) -> "EncodedPrompt":
        """The same in memory from which a GPU copies by itself; a data loader asks for it (`--dataloader_pin_memory`)."""
        return EncodedPrompt(self.input_ids.pin_memory(), self.image and self.image.pin_memory())


@dataclass(frozen=True)
class PromptBatch:
    """B prompts padded on the left: input_ids and attention_mask (B, P), and each one's image, or None."""

    input_ids: Tensor
    attention_mask: Tensor
    images: list[ImageInputs | None]

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def position_ids(self) -> Tensor:
        """(B, P), counted from the first real token."""
        return (self.attention_mask.cumsum(1) - 1).clamp(min=0)

    @property
    def next_position(self) -> Tensor:
        """(B,): where an answer's first token stands."""
        return self.attention_mask.sum(1)

    @property
    def shown(self) -> list[ImageInputs]:
        """The images that there are, in the prompts' order."""
        return [image for image in self.images if image is not None]

    def to(self, device: torch.device | str) -> "PromptBatch":
        """The same batch on `device`."""
        images = [image if image is None else image.to(device) for image in self.images]
        return PromptBatch(self.input_ids.to(device), self.attention_mask.to(device), images)

    def select(self, rows: list[int]) -> "PromptBatch":
        """These prompts only, without the padding they no longer need."""
        pad = int((self.attention_mask[rows] == 0).sum(1).min())
        return PromptBatch(self.input_ids[rows, pad:], self.attention_mask[rows, pad:], [self.images[row] for row in rows])
