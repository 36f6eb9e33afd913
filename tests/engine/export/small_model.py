"""A model of two parts that share a weight, small enough to be compiled in seconds."""

import torch
from torch import nn

from models.exported import Exported, Part


class Rows(nn.Module):
    """[B, 8] -> [B, 4], through a table that it shares with `Columns`."""

    def __init__(self, table: nn.Parameter):
        super().__init__()
        self.table, self.scale = table, nn.Parameter(torch.rand(4))

    def forward(self, x):
        return (x @ self.table).tanh() * self.scale


class Columns(nn.Module):
    """[B, T, 8] -> [B, T, 4] and its sum over T."""

    def __init__(self, table: nn.Parameter):
        super().__init__()
        self.table = table

    def forward(self, x):
        y = x @ self.table
        return y, y.sum(1)


def small_model(dtype=torch.float32):
    torch.manual_seed(0)
    table = nn.Parameter(torch.randn(8, 4))

    def draw(*shape):
        def sample(sizes, generator):
            x = torch.randn([sizes.get(entry, entry) for entry in reversed(shape)], generator=generator).to(dtype)
            return {"x": x.permute(*reversed(range(x.ndim)))}  # in memory the other way round: exporters must not rely on it

        return sample

    rows = Part("rows", Rows(table).to(dtype).eval(), {"x": ("batch", 8)}, {"y": ("batch", 4)}, draw("batch", 8))
    columns = Part(
        "columns",
        Columns(rows.module.table).eval(),
        {"x": ("batch", "tokens", 8)},
        {"y": ("batch", "tokens", 4), "total": ("batch", 4)},
        draw("batch", "tokens", 8),
        masks=("y",),
    )
    return Exported("segmenter", (rows, columns), {"batch": (1, 5), "tokens": (2, 9)}, {"model": {"name": "small"}})
