"""A part whose products are oneDNN's, and a single row's a sum, against the network in float64."""

import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.export import onednn
from engine.export.aoti import Package, compile_package, constants_of, trace
from models.exported import Part

SHAPE = (1, 64, 66, 32)


class Mixed(nn.Module):
    """[1, H, W, C], then seen as channels first by convolutions, and its mean row."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.row = nn.Linear(32, 128), nn.Linear(128, 32), nn.Linear(32, 5)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.wide, self.last = nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.Conv2d(64, 32, 1)

    def forward(self, x):
        x = 2 * (x + self.down(F.gelu(self.up(x))))
        x = x.permute(0, 3, 1, 2)
        y = F.gelu(self.last(F.gelu(self.wide(x + self.depthwise(x)))), approximate="tanh")
        return y, self.row(y.mean((2, 3)))


@pytest.mark.skipif(not onednn.has_onednn(torch.float32), reason="a CPU without AVX-512, where nothing is replaced")
def test_a_package_of_onednns_products_computes_what_the_network_does(tmp_path):
    torch.manual_seed(0)
    part = Part("mixed", Mixed().eval(), {"x": SHAPE}, {"y": (), "row": ()}, lambda *_: {"x": torch.randn(SHAPE)})
    program = trace(part, {}, torch.device("cpu"))
    onednn.use_onednn(program)
    used = Counter(str(node.target) for node in program.graph.nodes)
    assert used["mkldnn._linear_pointwise.default"] == 2 and used["mkldnn._convolution_pointwise.default"] == 3
    assert used["aten.gelu.default"] == 1 and used["aten.linear.default"] == used["aten.conv2d.default"] == 0
    compile_package(program, tmp_path / "mixed.pt2")
    package = Package(tmp_path / "mixed.pt2", torch.device("cpu"))
    package.use({name: constants_of(program)[name] for name in package.constant_names()})
    given = part.sample({}, torch.Generator())
    for ours, exact in zip(package.runner(part)(given), copy.deepcopy(part.module).double()(given["x"].double()), strict=True):
        assert (ours - exact).abs().max() <= 5e-6
