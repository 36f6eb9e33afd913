"""FILA's tiling (arXiv:2412.08378): an image keeps its aspect on a canvas of up to four tiles, and is seen whole once more.

A canvas is a grid of square tiles. The ViT reads each tile at 336 pixels, the ConvNeXt the whole canvas at 768 a tile; a tile is
fused with its own window of the ConvNeXt's map. The global view is the canvas, padded to a square and scaled down to one tile; its
map is the canvas's, padded likewise. Views are ordered: the global one, then the tiles row by row.

Sizes are (width, height) in pixels, as Pillow's; boxes (left, top, right, bottom).
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

CANVASES = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))  # (columns, rows); the smaller comes first where two fit as well
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Layout:
    """A canvas of `columns` x `rows` tiles, in whose middle an image takes `width` and `height` of its sides (at most 1)."""

    columns: int
    rows: int
    width: float
    height: float

    @classmethod
    def fit(cls, size: tuple[int, int]) -> "Layout":
        """The canvas on which an image of `size` leaves the smallest share empty; ValueError where a side is not positive."""
        width, height = size
        if min(size) <= 0:
            raise ValueError(f"an image must have pixels, not {width} x {height}")

        def layout(columns: int, rows: int) -> Layout:
            scale = min(columns / width, rows / height)
            return cls(columns, rows, min(1.0, width * scale / columns), min(1.0, height * scale / rows))

        return max((layout(*canvas) for canvas in CANVASES), key=lambda fitted: fitted.width * fitted.height)

    @property
    def num_views(self) -> int:
        return self.columns * self.rows + 1

    def box(self, tile: int) -> Box:
        """Where the image lies on the canvas of tiles `tile` pixels wide."""
        return self._middle(self.columns * tile, self.rows * tile, tile)

    def global_box(self, tile: int) -> Box:
        """Where it lies in the global view, `tile` pixels wide."""
        return self._middle(tile, tile, tile / max(self.columns, self.rows))

    def _middle(self, width: int, height: int, tile: float) -> Box:
        inner_width = max(1, round(self.width * self.columns * tile))
        inner_height = max(1, round(self.height * self.rows * tile))
        left, top = (width - inner_width) // 2, (height - inner_height) // 2
        return left, top, left + inner_width, top + inner_height


def windows(canvas: Tensor, columns: int, rows: int) -> Tensor:
    """[C, rows * h, columns * w] -> [rows * columns, C, h, w], row by row."""
    channels, height, width = canvas.shape
    cut = canvas.reshape(channels, rows, height // rows, columns, width // columns)
    return cut.permute(1, 3, 0, 2, 4).flatten(0, 1)


def squared(canvas: Tensor) -> Tensor:
    """[C, h, w] -> [C, s, s] with s the longer side: zeros around the middle, where the canvas is."""
    height, width = canvas.shape[-2:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(canvas, (left, side - width - left, top, side - height - top))
