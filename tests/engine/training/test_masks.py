"""The mask trainer: its losses, resuming to the bit, gradient accumulation, and the published schedule."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from engine.errors import InputError
from engine.tasks.masks import MaskTask
from engine.training.config.masks import MaskConfig
from engine.training.losses.masks import (
    MASK_LOSSES,
    bce_dice_loss,
    dice_loss,
    published_structure_loss,
    structure_loss,
    summed_cross_entropy,
)
from engine.training.masks import MaskTrainer
from tests.conftest import ROOT
from tests.models.prs_med.test_model import build, rows


def make_trainer(folder, *, data=None, **settings) -> MaskTrainer:
    """Four images a step in two passes, learning fast, for three steps."""
    defaults = {
        "output_dir": str(folder),
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "save_strategy": "no",
        "disable_tqdm": True,
        "report_to": "none",
    }
    return MaskTrainer(build(), MaskTask(), MaskConfig(**(defaults | settings)), data or rows() * 4)


def in_double(module, arguments, options):
    """A module's inputs, those in float32 made float64."""

    def double(x):
        return x.double() if isinstance(x, torch.Tensor) and x.dtype == torch.float32 else x

    return tuple(map(double, arguments)), {name: double(x) for name, x in options.items()}


def test_structure_loss_is_its_equation():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 40, 50, generator=generator, dtype=torch.float64)
    masks = (torch.rand(3, 1, 40, 50, generator=generator) > 0.7).double()
    masks[2] = 0  # an empty mask
    expected = []
    for x, m in zip(logits[:, 0], masks[:, 0], strict=True):
        padded, w = F.pad(m, (15, 15, 15, 15)), torch.empty_like(m)
        for i in range(40):
            for j in range(50):
                w[i, j] = 1 + 5 * (padded[i : i + 31, j : j + 31].mean() - m[i, j]).abs()
        p = x.sigmoid()
        bce = -(m * p.log() + (1 - m) * (1 - p).log())
        iou = ((w * p * m).sum() + 1) / ((w * (p + m - p * m)).sum() + 1)
        expected.append((w * bce).sum() / w.sum() + 1 - iou)
    assert torch.allclose(structure_loss(logits, masks), torch.stack(expected).mean())
    assert structure_loss(logits, masks, edge_weights=False) != structure_loss(logits, masks)


def test_losses_of_perfect_masks_vanish_and_nothing_to_count_is_zero():
    masks = (torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    perfect = (masks - 0.5) * 100
    assert structure_loss(perfect, masks) < 1e-5 and dice_loss(perfect, masks) < 1e-5
    assert bce_dice_loss(perfect, masks) < 1e-5
    logits = torch.randn(2, 6, requires_grad=True)
    summed_cross_entropy(logits, torch.tensor([-100, -100])).backward()
    assert torch.equal(logits.grad, torch.zeros(2, 6))
    some = summed_cross_entropy(logits, torch.tensor([-100, 2]))
    assert torch.allclose(some, F.cross_entropy(logits[1:], torch.tensor([2])))


def test_everything_that_should_learn_learns_and_nothing_else(tmp_path):
    trainer = make_trainer(tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, before[name])}
    expected = {name for name in before if "lora_" in name or not name.startswith("vlm.")} - {
        name for name in before if name.startswith("mask_decoder.ffn.norm1.")
    }
    assert changed == expected
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 3 and all(entry[f"loss/{part}"] > 0 for entry in logged for part in ("mask", "class", "text"))
    whole = logged[0]["loss/mask"] + 0.5 * logged[0]["loss/class"] + logged[0]["loss/text"]
    assert logged[0]["loss"] == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("mask_loss", list(MASK_LOSSES))
def test_accumulation_is_the_bigger_batch(tmp_path, mask_loss):
    """Answers of different lengths, one row without a data set: what one step changes does not depend on how it is divided. In
    float64: the gradients of random weights grow to where float32's rounding is seen."""
    data = rows(["Top left.", "The dark lesion lies in the center of this image, far from the top and near the bottom right."])
    settings = {"mask_loss": mask_loss, "max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    settings |= {"weight_decay": 0.0, "lr_scheduler_type": "constant"}
    steps, losses = [], []
    for batch, passes in ((2, 1), (1, 2)):
        settings |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": passes}
        trainer = make_trainer(tmp_path, data=data, **settings)
        trainer.model.frozen_norms = True
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            module.register_forward_pre_hook(in_double, with_kwargs=True)
        trainer.model.double()
        before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
        trainer.train()
        steps.append({name: (parameter.detach() - before[name]) for name, parameter in trainer.model.named_parameters()})
        losses.append({key: value for key, value in trainer.state.log_history[0].items() if key.startswith("loss")})
    for part in ("lora_", "cls.", "mask_decoder.", "image_encoder."):
        whole, divided = (torch.cat([step[name].flatten() for name in step if part in name]) for step in steps)
        assert whole.norm() > 0 and (whole - divided).norm() < 1e-12 * whole.norm(), part
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_processes_end_with_the_same_statistics_of_batch_norm(tmp_path):
    """They have seen different images; what is evaluated on either is what the first one saves."""
    script = """
import torch
from engine.processes import close, join, rank
from tests.engine.training.test_masks import make_trainer
from tests.models.prs_med.test_model import image, rows
def run():
    data = [row | {"image": image(i)} for i, row in enumerate(rows() * 4)]
    trainer = make_trainer("run", data=data, max_steps=2)
    trainer.train()
    assert any("running_var" in name for name, _ in trainer.model.named_buffers())
    torch.save(trainer.model.state_dict(), f"rank{rank()}.pt")
join()
run()
close()
"""
    (tmp_path / "script.py").write_text(script)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "script.py"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_resume_is_bit_exact(tmp_path):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for (name, one), other in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_the_class_term_counts_for_its_epochs_only(tmp_path):
    """Two steps an epoch: after the first epoch the class head no longer learns, though it still has a (zero) gradient."""
    trainer = make_trainer(tmp_path, class_epochs=1, max_steps=2)
    start = trainer.model.cls[-1].weight.detach().clone()
    trainer.train()
    learnt = trainer.model.cls[-1].weight.detach().clone()
    assert not torch.equal(start, learnt)
    later = make_trainer(tmp_path, class_epochs=0, max_steps=2, weight_decay=0.0)
    later.train()
    assert torch.equal(later.model.cls[-1].weight, start)


def test_the_published_schedule_ends_after_twenty_epochs_whatever_the_run(tmp_path):
    """Eight rows are two steps; the published code sets the rate once an epoch, ours follows the run to its end."""
    trainer = make_trainer(tmp_path / "a", cosine_epochs=20, max_steps=-1, num_train_epochs=2, learning_rate=1e-4)
    trainer.create_optimizer_and_scheduler(4)
    rates = []
    for _ in range(41):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[0] == rates[1] == 1e-4 and rates[2] < 1e-4
    assert rates[20] == pytest.approx((1e-4 + 1e-6) / 2) and rates[40] == pytest.approx(1e-6)
    ours = make_trainer(tmp_path / "b", learning_rate=1e-4, max_steps=4)
    ours.train()
    assert ours.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-6)


def test_every_mask_loss_has_its_flag_and_trains(tmp_path):
    logged = {}
    for name in MASK_LOSSES:
        trainer = make_trainer(tmp_path, mask_loss=name, max_steps=1)
        trainer.train()
        logged[name] = trainer.state.log_history[0]["loss/mask"]
    assert len(set(logged.values())) == len(MASK_LOSSES) == 3
    logits, masks = torch.randn(1, 1, 40, 40), torch.zeros(1, 1, 40, 40)
    masks[..., 10:20, 10:20] = 1
    assert published_structure_loss(logits, masks) == structure_loss(logits, masks, edge_weights=False)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mask_loss": "iou"}, "--mask_loss iou: expected one of structure, published_structure, bce_dice"),
        ({"fp16": True}, "--fp16 is not supported: use --bf16"),
        ({"eval_strategy": "steps"}, "--eval_strategy is not supported"),
        ({"auto_find_batch_size": True}, "--auto_find_batch_size is not supported"),
        ({"use_liger_kernel": True, "use_cpu": True}, "--use_liger_kernel needs a GPU"),
    ],
)
def test_settings_that_cannot_work_are_errors(tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        MaskConfig(output_dir=str(tmp_path), **settings)
