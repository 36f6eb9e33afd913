"""One real training step, looked at closely: that losses are sound, and that gradients reach what is trained and nothing else."""

import logging
import math
from typing import Any

import torch
from transformers import TrainerCallback

from engine.errors import InputError
from engine.runs.train import keep_quiet
from engine.training.trainer import Trainer

logger = logging.getLogger(__name__)


class _Gradients(TrainerCallback):
    """The parameters that have a gradient which is not zero, just before the optimizer's step."""

    names: set[str] = frozenset()  # type: ignore[assignment]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **options: Any) -> None:
        self.names = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}


def simulate_step(trainer: Trainer, losses: list[str]) -> dict[str, Any]:
    """Take one step with `trainer`, whose settings ask for one -> what `losses` were, and how many parts were trained.

    InputError where a loss is not finite and positive, where a part that is trained got no gradient or did not change, or where one
    that is not trained did. Parts are modules such as the mask decoder, not all of which one mask needs, and layers with LoRA.
    """
    parameters = dict(trainer.model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items() if p.requires_grad}
    frozen = {name: p.detach().float().sum() for name, p in parameters.items() if not p.requires_grad}
    seen = _Gradients()
    keep_quiet(trainer)
    trainer.add_callback(seen)
    trainer.train()
    logged = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    found = {name.removeprefix("loss/"): logged.get(name) for name in losses}
    for name, value in found.items():
        if value is None or not math.isfinite(value) or value <= 0:
            raise InputError(f"the simulated step: {name} is {value} (expected a loss that is finite and above 0)")
    parts = {_part(name) for name in before}
    reached = {_part(name) for name in seen.names}
    changed = {_part(name) for name, value in before.items() if not torch.equal(value, parameters[name])}
    for what, wrong in {
        "got no gradient": parts - reached,
        "got a gradient, and is not trained": reached - parts,
        "did not change": parts - changed,
        "changed, and is not trained": {n for n, total in frozen.items() if total != parameters[n].detach().float().sum()},
    }.items():
        if wrong:
            raise InputError(f"the simulated step: {sorted(wrong)[0]} {what} ({len(wrong)} in all)")
    logger.info("the step is sound: %s", ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
    return {f"{name}_loss": value for name, value in found.items()} | {
        "trained_parts": len(parts),
        "trained_parameters": sum(value.numel() for value in before.values()),
        "parameters": sum(p.numel() for p in parameters.values()),
    }


def _part(name: str) -> str:
    return name.split(".lora_")[0] if ".lora_" in name else ".".join(name.split(".")[:2])
