"""`--full_determinism`: PRS-Med's decoders train the same each time, by operations with deterministic gradients on a GPU too."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from engine.tasks.masks import MaskTask
from engine.training.config.masks import MaskConfig
from engine.training.masks import MaskTrainer
from models.prs_med.decoder import block_means
from tests.models.prs_med.test_model import build, rows

# What torch.use_deterministic_algorithms refuses on a GPU, by the names of the operations that run; bilinear interpolation is not
# among them, since torch takes it apart there.
REFUSED = set(
    "_adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward adaptive_max_pool2d_backward avg_pool2d_backward "
    "avg_pool3d_backward fractional_max_pool2d_backward fractional_max_pool3d_backward max_unpool2d max_unpool3d put_ put histc "
    "upsample_bicubic2d_backward upsample_trilinear3d_backward upsample_linear1d_backward reflection_pad1d_backward bincount "
    "reflection_pad2d_backward reflection_pad3d_backward nll_loss2d_forward nll_loss2d_backward _ctc_loss_backward kthvalue "
    "_embedding_bag_dense_backward median grid_sampler_2d_backward grid_sampler_3d_backward cumsum resize_".split()
)


class Ran(TorchDispatchMode):
    """The names of the operations that have run, forward and backward; of cumsum, only that of floating point."""

    def __init__(self):
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        if name != "cumsum" or args[0].is_floating_point():
            self.names.add(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def restored(monkeypatch):
    """What --full_determinism sets for the whole process is taken back."""
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", os.environ.get("FLASH_ATTENTION_DETERMINISTIC", ""))
    before = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = before


@pytest.mark.parametrize("decoder", ["v5", "v6", "paper"])
def test_training_is_deterministic(restored, tmp_path, decoder):
    settings = {"output_dir": str(tmp_path), "max_steps": 2, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    ended = []
    for _ in range(2):
        args = MaskConfig(**settings, full_determinism=True, learning_rate=1e-3, per_device_train_batch_size=2)
        trainer = MaskTrainer(build(decoder=decoder), MaskTask(), args, rows() * 2)
        assert torch.are_deterministic_algorithms_enabled()
        with Ran() as ran:
            trainer.train()
        assert "convolution_backward" in ran.names and not ran.names & REFUSED
        ended.append(trainer.model.state_dict())
    assert all(torch.equal(weight, ended[1][name]) for name, weight in ended[0].items())


@pytest.mark.parametrize("side", [16, 64])
def test_means_of_blocks_are_adaptive_average_pooling(side):
    """Values and gradients; 64 is the side of TinySAM's embeddings."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 3, side, side, dtype=torch.float64, generator=generator)
    weights = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=generator)
    found = []
    for pool in (block_means, F.adaptive_avg_pool2d):
        leaf = image.clone().requires_grad_()
        pooled = pool(leaf, 16)
        (pooled * weights).sum().backward()
        found.append((pooled.detach(), leaf.grad))
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)
