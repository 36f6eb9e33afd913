"""Masks of one image at a time: its embedding is computed once, then prompts in its own pixels give masks of its own size."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from models.sam.frame import Frame, as_pixels
from models.sam.replay import Replay
from models.sam.sam import Sam
from models.sam.two_way_transformer import folded_matrices

GRAPHED_PROMPTS = 16  # of more the device computes for longer than the host takes to launch


class Prediction(NamedTuple):
    """P prompts, M masks of a prompt (1, or 3 for ambiguous prompts), [H, W] the image's own size."""

    logits: Tensor  # [P, M, H, W]; the mask is where they are positive
    iou: Tensor  # [P, M], predicted
    low_res_masks: Tensor  # [P, M, 4h, 4w] logits over the model's input, a mask prompt for a next call

    @property
    def masks(self) -> Tensor:
        return self.logits > 0


class Encoded(NamedTuple):
    """An image that was read: where it lies in the model's input, and its embedding [1, C, h, w]."""

    frame: Frame
    embedding: Tensor


class Predictor:
    """Several calls of `predict` after one of `set_image`. On CUDA few prompts, of a kind that came before, replay a graph."""

    def __init__(self, model: Sam):
        self.model = model.eval()
        self.device, self.dtype = model.prompt_encoder.no_mask_embed.weight.device, model.prompt_encoder.no_mask_embed.weight.dtype
        self._frame: Frame | None = None
        self._decode: Callable[..., tuple[Tensor, ...]] = (
            Replay(self._run, self._reads) if self.device.type == "cuda" else self._run
        )

    @property
    def frame(self) -> Frame:
        """Where the image lies in the model's input; RuntimeError where there is none yet."""
        if self._frame is None:
            raise RuntimeError("set_image comes before predict")
        return self._frame

    @torch.inference_mode()
    def set_image(self, image: Image.Image | np.ndarray) -> None:
        """A PIL image, or [H, W] or [H, W, 3] pixels (RGB; uint8, or 16-bit and floating for min-max models)."""
        pixels = as_pixels(image)
        height, width, _ = pixels.shape
        self._frame = Frame.fit((height, width), self.model.image_size, self.model.fit)
        resized = self.model.normalise(self.frame.resize(pixels).to(self.device))
        self._embedding = self.model.image_encoder(self.frame.pad(resized)[None].to(self.dtype))
        self._image_pe = self.model.prompt_encoder.dense_pe()

    @property
    def encoded(self) -> Encoded:
        """What `set_image` has made of the image; set again, `predict` is about it without its being read anew."""
        return Encoded(self.frame, self._embedding)

    @encoded.setter
    def encoded(self, encoded: Encoded) -> None:
        self._frame, self._embedding = encoded
        self._image_pe = self.model.prompt_encoder.dense_pe()

    def masks_of(self, image: Image.Image | np.ndarray, boxes: Sequence[Sequence[float]]) -> np.ndarray:
        """[P, H, W] bool: a mask for each of P boxes (x1, y1, x2, y2; pixels) of an image."""
        self.set_image(image)
        return self.predict(boxes=boxes).masks[:, 0].cpu().numpy()

    @torch.inference_mode()
    def predict(self, *, multimask_output: bool = False, **prompts: ArrayLike) -> Prediction:
        """Masks of P prompts, which are tensors, arrays or lists in pixels of the image.

        points [P, K, 2] as (x, y) with labels [P, K] (1 inside, 0 outside, -1 none); boxes [P, 4] as x1, y1, x2, y2; mask_input
        [P, 1, 4h, 4w], logits of an earlier prediction.
        """
        low_res_masks, iou = self.decode(multimask_output=multimask_output, **prompts)
        return Prediction(self.frame.masks(low_res_masks), iou, low_res_masks)

    @torch.inference_mode()
    def decode(
        self,
        *,
        points: ArrayLike | None = None,
        labels: ArrayLike | None = None,
        boxes: ArrayLike | None = None,
        mask_input: ArrayLike | None = None,
        multimask_output: bool,
    ) -> tuple[Tensor, Tensor]:
        """The low-resolution logits [P, M, 4h, 4w] and IoU [P, M] of `predict`."""
        frame = self.frame
        prompts: dict[str, Tensor] = {}
        if points is not None:
            prompts["points"] = frame.points(self._batch(points))
        if labels is not None:
            prompts["labels"] = self._batch(labels)
        if boxes is not None:
            prompts["boxes"] = frame.points(self._batch(boxes).unflatten(-1, (2, 2))).flatten(-2)
        if mask_input is not None:
            prompts["masks"] = self._batch(mask_input).to(self.dtype)
        few = all(prompt.shape[1] <= GRAPHED_PROMPTS for prompt in prompts.values())
        decode = self._decode if prompts and few else self._run
        low_res_masks, iou = decode(multimask_output, embedding=self._embedding, image_pe=self._image_pe, **prompts)
        return low_res_masks[0].float(), iou[0].float()

    def _run(self, multimask_output: bool, *, embedding: Tensor, image_pe: Tensor, **prompts: Tensor) -> tuple[Tensor, ...]:
        sparse, dense = self.model.prompt_encoder(**prompts)
        return self.model.mask_decoder(embedding, image_pe, sparse, dense, multimask_output)

    def _reads(self) -> list[Tensor]:
        encoder, decoder = self.model.prompt_encoder, self.model.mask_decoder
        return [*encoder.parameters(), *encoder.buffers(), *decoder.parameters(), *folded_matrices(decoder)]

    def _batch(self, prompt: ArrayLike) -> Tensor:
        return torch.as_tensor(prompt, dtype=torch.float32, device=self.device)[None]
