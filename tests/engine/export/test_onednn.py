"""A part whose products are oneDNN's, and a single row's a sum, against the network in float64."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.export import onednn
from engine.export.aoti import Package, compile_package, constants_of, trace
from kernels.moe_cpu import has_onednn
from models.exported import Part

CPU, C = torch.device("cpu"), 32


class Mixed(nn.Module):
    """[1, H, W, C] in windows of the padding's kind, seen as channels first by convolutions, and its mean row."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.row = nn.Linear(C, 4 * C), nn.Linear(4 * C, C), nn.Linear(C, 5)
        self.depthwise = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.wide, self.tanh = nn.Conv2d(C, 2 * C, 3, stride=2, padding=1, bias=False), nn.Conv2d(2 * C, C, 1)

    def forward(self, x):
        x = x + self.down(F.gelu(self.up(x)))
        x = (2 * x).permute(0, 3, 1, 2)
        y = F.gelu(self.tanh(F.gelu(self.wide(x + self.depthwise(x)))), approximate="tanh")
        return y, self.row(y.mean((2, 3)))


@pytest.fixture(scope="module")
def part():
    torch.manual_seed(0)
    draw = lambda sizes, generator: {"x": torch.randn(1, 64, 66, C, generator=generator)}  # noqa: E731
    return Part("mixed", Mixed().eval(), {"x": (1, 64, 66, C)}, {"y": (1, C, 32, 33), "row": (1, 5)}, draw)


@pytest.mark.skipif(not has_onednn(torch.float32), reason="a CPU without AVX-512, where nothing is replaced")
def test_a_package_of_onednns_products_computes_what_the_network_does(part, tmp_path):
    program = trace(part, {}, CPU)
    onednn.use_onednn(program)
    used = Counter(str(node.target) for node in program.graph.nodes)
    assert used["mkldnn._linear_pointwise.default"] == 2 and used["mkldnn._convolution_pointwise.default"] == 3
    assert used["aten.gelu.default"] == 1 and used["aten.linear.default"] == used["aten.conv2d.default"] == 0
    compile_package(program, tmp_path / "mixed.pt2")
    package = Package(tmp_path / "mixed.pt2", CPU)
    package.use({name: constants_of(program)[name] for name in package.constant_names()})
    given = part.sample({}, torch.Generator().manual_seed(1))
    exact = Mixed().double()
    exact.load_state_dict(part.module.state_dict())
    with torch.no_grad():
        for ours, theirs in zip(package.runner(part)(given), exact(given["x"].double()), strict=True):
            assert (ours - theirs).abs().max() <= 5e-6


def test_without_avx512_the_graph_stays_as_it_was_traced(part, monkeypatch):
    monkeypatch.setattr(onednn, "has_onednn", lambda dtype: False)
    program = trace(part, {}, CPU)
    before = str(program.graph)
    onednn.use_onednn(program)
    assert str(program.graph) == before
