"""The loss cases of the golden data: TRL's loss, gradient of the logits and metrics on seeded inputs, in float64."""

import json
from dataclasses import dataclass, field

import numpy as np
import torch

from kernels.grpo_terms import LOSS_TYPES, GRPOLoss

PROMPT = 3


@dataclass
class Case:
    """One golden case: `logits` (B, T, V) and `target_ids` of the completions, the loss, what it is given, and what TRL made."""

    name: str
    logits: torch.Tensor
    target_ids: torch.Tensor
    advantages: torch.Tensor
    mask: torch.Tensor
    temperature: float
    loss: GRPOLoss
    given: dict
    value: float
    gradient: torch.Tensor
    metrics: dict = field(default_factory=dict)

    def logprobs(self, logits):
        """Log-probs of the targets and entropies, differentiable."""
        every = (logits / self.temperature).log_softmax(-1)
        return every.gather(-1, self.target_ids[..., None])[..., 0], -(every.exp() * every).sum(-1)


def read(folder):
    """(arrays, cases) of golden/grpo."""
    arrays = {name: torch.from_numpy(array) for name, array in np.load(folder / "grpo" / "grpo_golden.npz").items()}
    return arrays, json.loads((folder / "grpo" / "grpo_golden_cases.json").read_text())


def _supported(case):
    return case.get("loss_type") in LOSS_TYPES and case["off_policy_mask_threshold"] is None and not case["entropy_coef"]


def loss_cases(folder):
    """Every case of our loss types; importance-sampling ratios and entropy masks go in as `policy_mask`."""
    arrays, described = read(folder)
    cases = described["cases"]
    for name, case in cases.items():
        if not _supported(case) or name.startswith("medr1_"):
            continue
        mask = arrays["in/completion_mask"].clone()
        if case["mask"] == "row2_masked":
            mask[2] = 0
        advantages = arrays["in/advantages"]
        if name == "grpo_zero_adv":
            advantages = torch.zeros_like(advantages)
        if name.startswith("trl_medr1"):
            advantages = arrays[name.replace("trl_medr1_equiv", "medr1_loss") + "/advantages"]
        given = {"num_items": case["num_items_in_batch"], "ref_logprobs": arrays["in/ref_logps"]}
        given["old_logprobs"] = arrays["in/old_logps"] if case["has_old"] else None
        if case["is_ratio"]:
            ratio = arrays[name.replace("grpo_tis", "tis") + "/ratio"]
            given["policy_mask"] = ratio.expand(mask.shape).contiguous()
        # TRL divides all losses but the dapo family by the gradient accumulation steps
        scale = 1 if case["loss_type"] in ("dapo", "cispo") else case["grad_accum"]
        made = Case(
            name,
            arrays["in/logits"][:, PROMPT - 1 : -1],
            arrays["in/input_ids"][:, PROMPT:],
            advantages,
            mask,
            case["temperature"],
            GRPOLoss(**{name: case[name] for name in GRPOLoss.names()}),
            given,
            arrays[f"{name}/loss"].item() * scale,
            arrays[f"{name}/grad_logits"][:, PROMPT - 1 : -1] * scale,
            case.get("metrics", {}),
        )
        if case["top_entropy_quantile"] < 1:
            entropies = made.logprobs(made.logits)[1]
            threshold = entropies[mask.bool()].float().quantile(1 - case["top_entropy_quantile"])
            given["policy_mask"] = (entropies >= threshold).double()
        yield made
