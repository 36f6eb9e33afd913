"""What the server asks of a model: masks of a slice, for prompts in it. One thread at a time uses it."""

from typing import Any, Protocol

import numpy as np

from engine.data.volumes.propagate import Box, Prompt


class Segmenter(Protocol):
    """A promptable model of slices; `license`: of its weights."""

    license: str

    def look(self, pixels: np.ndarray) -> Any:
        """What prompts on one slice share, e.g. its embedding. `pixels` [H, W] or [H, W, 3] uint8."""

    def segment(self, seen: Any, prompt: Prompt) -> tuple[np.ndarray, float]:
        """The object's mask [H, W] bool in a slice that was looked at, and how good the model believes it to be (0 to 1).

        The prompt has a box, or a point inside, and no mask.
        """


class BoxSegmenter(Protocol):
    """One that reads boxes alone."""

    def look(self, pixels: np.ndarray) -> Any:
        """As `Segmenter.look`."""

    def segment_boxes(self, seen: Any, boxes: list[Box]) -> tuple[np.ndarray, np.ndarray]:
        """Masks [P, H, W] bool of P boxes, and how good the model believes each to be [P]."""
