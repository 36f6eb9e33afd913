"""Plain JPEG and PNG files decoded by NVIDIA's DALI: JPEG on a GPU by its own decoder, or all of them on a CPU, with no driver.

What else there is (DICOM, 16 bits, palettes, files that are turned) comes decoded by `engine.data.images`. What a network reads of
the pixels is made where they are, by `engine.data.loaders.views`. The order of images is the caller's: its data loader divides rows
among processes and resumes them.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engine.data.loaders.undecoded import Undecoded
from engine.data.loaders.views import View, make_view, mask_view
from engine.errors import InputError

MOST = 32  # images that are decoded at once: what is held of them is bounded
Picture = Undecoded | Image.Image


def has_dali() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def require_dali() -> None:
    """InputError where DALI is not installed."""
    if not has_dali():
        raise InputError("--loader dali: nvidia-dali is not installed (pip install 'vesalius[dali]')")


class Pictures:
    """Images as `view` has them (`make_view`), on `device`."""

    def __init__(self, view: View, device: torch.device | str = "cpu"):
        require_dali()
        self.view, self.device = view, torch.device(device)
        self._pipeline: Any = None

    def __call__(self, images: Sequence[Picture]) -> list[Tensor]:
        """ImageError, naming the file, for one that is damaged."""
        made: dict[int, Tensor] = {}
        for i, image in enumerate(images):
            if not isinstance(image, Undecoded):
                made[i] = self._view(torch.from_numpy(np.array(image.convert("RGB"))))
        files = [i for i in range(len(images)) if i not in made]
        for start in range(0, len(files), MOST):
            places = files[start : start + MOST]
            made |= dict(zip(places, map(self._view, self.decode([images[i] for i in places])), strict=True))
        return [made[i] for i in range(len(images))]

    def with_masks(self, images: Sequence[Picture], masks: Sequence[np.ndarray]) -> list[tuple[Tensor, Tensor]]:
        """(image, mask) of each, masks [H, W] uint8 of their images' sizes; errors as above."""
        drawn = [mask_view(torch.from_numpy(np.array(mask)).to(self.device), self.view) for mask in masks]
        return list(zip(self(images), drawn, strict=True))

    def _view(self, pixels: Tensor) -> Tensor:
        return make_view(pixels.to(self.device), self.view)

    def decode(self, images: list[Any]) -> list[Tensor]:
        """The pixels of at most MOST `Undecoded`, [H, W, 3] uint8 each, where the pipeline left them."""
        self._pipeline = self._pipeline or _build(self.device)
        self._pipeline.feed_input("files", [np.frombuffer(image.data, np.uint8) for image in images])
        try:
            [decoded] = self._pipeline.run()
        except RuntimeError:
            self._pipeline = None  # it is of no use any more
            return [torch.from_numpy(np.array(image.open())) for image in images]  # an ImageError names the damaged file
        # a copy: the pipeline writes the next images to the same place
        return [torch.from_dlpack(decoded[i]).clone() for i in range(len(images))]


def _build(device: torch.device) -> Any:
    """The pipeline from `files`, each the bytes of one, to pixels on `device`."""
    from nvidia import dali
    from nvidia.dali.pipeline import Pipeline

    fn, types = dali.fn, cast(Any, dali.types)
    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=MOST,
        num_threads=max(1, torch.get_num_threads()),
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=1,
        exec_pipelined=False,
        exec_async=False,
    )
    with pipeline:
        files = fn.external_source(name="files", ndim=1, dtype=types.UINT8)
        pipeline.set_outputs(fn.decoders.image(files, device="mixed" if on_gpu else "cpu", output_type=types.RGB))
    pipeline.build()
    return pipeline
