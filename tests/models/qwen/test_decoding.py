"""A decode step: what it copies and casts, and that it gives what whole forwards give."""

import contextlib
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.decoder.decoding import casts_weights
from models.loading import load_policy
from models.qwen.policy import language_model
from tests.tiny_qwen import encode, ragged_prompts, save_tiny

LORA = {"r": 4, "alpha": 8, "dropout": 0.0}


class Watched(TorchDispatchMode):
    """Casts of the given weights, and the largest tensor that anything but a view makes."""

    def __init__(self, weights):
        super().__init__()
        self.weights = {weight.data_ptr(): name for name, weight in weights}
        self.casts, self.largest, self.ops = [], 0, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name
        self.ops[name] += 1
        if name in ("aten::_to_copy", "aten::copy_"):
            self.casts += [self.weights[x.data_ptr()] for x in args if isinstance(x, torch.Tensor) and x.data_ptr() in self.weights]
        fresh = isinstance(out, torch.Tensor) and function._schema.returns[0].alias_info is None
        self.largest = max(self.largest, out.numel() if fresh else 0)
        return out


def steps_of(policy, *, autocast, num_answers=4, max_new_tokens=64):
    """What is watched of the third decode step, and the decoding state after it."""
    policy.model.eval()
    batch = encode(policy, *ragged_prompts(3))
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.no_grad(), context:
        state, logits = policy.prefill(batch, num_answers, max_new_tokens)
        for _ in range(3):
            with Watched(policy.base.named_parameters()) as watched:
                logits = state.step(logits.argmax(-1))
        return watched, state, casts_weights(language_model(policy.base), "cpu")


def test_a_step_never_expands_the_cache(tmp_path):
    """Two query heads a key head: nothing that a step makes is as large as the prompts' keys, let alone those of every answer."""
    policy = load_policy(save_tiny(tmp_path))
    watched, state, _ = steps_of(policy, autocast=False, num_answers=8, max_new_tokens=512)
    layer = state.cache.rollout_layers[0]
    keys, values = layer.prompts()
    assert keys.shape[:2] == values.shape[:2] == (3, 2)  # a prompt's once, for eight answers
    assert layer.keys.shape[:3] == (24, 2, 512)
    logits = 24 * policy.base.lm_head.out_features
    assert 8 * keys.numel() > logits  # else this says nothing
    assert watched.largest <= logits


def test_a_step_with_rows_dropped_is_that_of_the_rows_that_stay(tmp_path):
    """One prompt keeps two answers, one none."""
    policy = load_policy(save_tiny(tmp_path))
    policy.model.eval()
    batch, rows = encode(policy, *ragged_prompts(3)), torch.tensor([1, 3, 8, 9, 10])
    tokens = torch.randint(10, 300, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (whole, _), (dropped, _) = (policy.prefill(batch, 4, 8) for _ in range(2))
        for step, ids in enumerate(tokens):
            expected = whole.step(ids)
            if step == 2:
                dropped.select(rows)
            found = dropped.step(ids if step < 2 else ids[rows])
            torch.testing.assert_close(found, expected if step < 2 else expected[rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("what", ["all weights", "adapters on bfloat16", "adapters on float32"])
def test_under_autocast_a_step_casts_no_weight_where_it_is_captured(what, tmp_path):
    on = torch.bfloat16 if "bfloat16" in what else torch.float32
    policy = load_policy(save_tiny(tmp_path), dtype=on, lora=None if what == "all weights" else LORA)
    watched, state, casts = steps_of(policy, autocast=True)
    assert bool(watched.casts) == casts == (what == "adapters on float32")
    assert watched.ops["aten::_to_copy"]  # casts are seen
    layer = state.cache.rollout_layers[0]
    assert layer.keys.dtype == layer.values.dtype == torch.bfloat16


def test_without_autocast_nothing_is_cast(tmp_path):
    watched, state, casts = steps_of(load_policy(save_tiny(tmp_path)), autocast=False)
    assert not watched.casts and not casts and state.cache.rollout_layers[0].keys.dtype == torch.float32


def test_a_cache_that_autocast_does_not_keep_is_known(tmp_path):
    policy = load_policy(save_tiny(tmp_path))
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert casts_weights(language_model(policy.base), "cpu")
