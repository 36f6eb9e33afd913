"""Where an image's patches stand, and which share a window: numbers that the exported vision tower is given.

Patches come as the image processor makes them: squares of m x m, left to right and top to bottom, and within a square likewise.
Qwen2.5-VL's windows are of `side` x `side` patches, smaller at the right and lower edge.

Letters: n squares (tokens) of an image, m side of a square in patches, W windows of at most L patches.
"""

import torch
from torch import Tensor


def patch_positions(rows: int, columns: int, merge: int) -> Tensor:
    """Row and column of each patch, [n, m*m, 2], of an image of `rows` x `columns` patches."""
    grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)
    squares = grid.unflatten(1, (columns // merge, merge)).unflatten(0, (rows // merge, merge)).transpose(1, 2)
    return squares.reshape(-1, merge * merge, 2)


def patch_windows(positions: Tensor, columns: int, side: int) -> tuple[Tensor, Tensor]:
    """The patches of each window [W, L], -1 where it has fewer, and the slot of each patch [n, m*m] among these W*L."""
    across = -(-columns // side)
    window = (positions[..., 0] // side * across + positions[..., 1] // side).flatten()
    order = window.argsort(stable=True)
    counts = window.bincount()
    place = torch.arange(len(order)) - (counts.cumsum(0) - counts)[window[order]]  # within its window
    slots = torch.empty_like(order)
    slots[order] = window[order] * side * side + place
    windows = torch.full((len(counts) * side * side,), -1)
    windows[slots] = torch.arange(len(slots))
    return windows.view(len(counts), -1), slots.view(positions.shape[:2])
