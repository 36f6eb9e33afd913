"""Two processes that train a mixture together, of which one gives an expert no tokens."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from models.uni_medvlm.experts import MixtureOfExperts, RoutingOptions, SwiGLU
from models.uni_medvlm.projections import PROJECTIONS
from tests.conftest import ROOT

H, TOKENS = 16, 12
SCRIPT = """
import torch
from engine.processes import close, join, rank
from torch.nn.parallel import DistributedDataParallel
from tests.models.uni_medvlm.test_mixture_processes import build, train, tokens
join()
for kind in ("whole", "lora"):
    layer = build(kind)
    train(DistributedDataParallel(layer), [tokens()[rank()]])
    torch.save({"state": layer.state_dict(), "counts": layer.mixture.ledger.counts()[0]}, f"{kind}{rank()}.pt")
close()
"""


class Layer(nn.Module):
    """A mixture whose ledger begins anew with every call."""

    def __init__(self, mixture: MixtureOfExperts):
        super().__init__()
        self.mixture = mixture

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        self.mixture.ledger.begin()
        return self.mixture(hidden)


def build(kind):
    """Three experts; the third is nobody's, the second that of tokens whose first feature is negative."""
    torch.manual_seed(0)
    experts: list[nn.Module] = [SwiGLU(H, 24) for _ in range(3)]
    if kind == "lora":
        config = LoraConfig(r=2, lora_alpha=4, target_modules=list(PROJECTIONS), init_lora_weights=False)
        experts = [inject_adapter_in_model(config, expert) for expert in experts]
    mixture = MixtureOfExperts(experts, H, RoutingOptions(1, renormalize=False))
    with torch.no_grad():
        mixture.router.zero_()
        mixture.router[:, 0] = torch.tensor([1.0, -1.0, 0.0])
    return Layer(mixture)


def tokens():
    """(2, 1, TOKENS, H): a process's each. The second's all go to the first expert."""
    x = torch.randn(2, 1, TOKENS, H, generator=torch.Generator().manual_seed(1))
    x[..., 0] = 3.0
    x[0, :, ::2, 0] = -3.0
    return x


def train(model, batches):
    """Two steps of SGD on the mean of the batches' losses; every parameter has a gradient in each."""
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(learning, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        for batch in batches:
            (model(batch).square().mean() / len(batches)).backward()
        assert all(parameter.grad is not None for parameter in learning)
        optimizer.step()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "script.py").write_text(SCRIPT, encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "script.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_an_expert_without_tokens_in_one_process_learns_what_one_process_would_teach_it(processes, kind):
    first, second = (torch.load(processes / f"{kind}{rank}.pt", weights_only=True) for rank in range(2))
    assert first["counts"].tolist() == [TOKENS, TOKENS, 0] and second["counts"].tolist() == [2 * TOKENS, 0, 0]
    alone, before = build(kind), build(kind).state_dict()
    train(alone, list(tokens()))
    moved = set()
    for name, value in alone.state_dict().items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        torch.testing.assert_close(first["state"][name], value, rtol=1e-5, atol=1e-7)
        moved |= {name.split("experts.")[1][0]} if "experts." in name and not torch.equal(value, before[name]) else set()
    assert moved == {"0", "1"}
