"""A decode step: what it copies and casts, and that it gives what whole forwards give."""

import contextlib
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import repeat_kv

from models.decoder.decoding import casts_weights
from models.decoder.shared_prefix import shared_prefix_attention
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


def steps_of(policy, *, autocast, static=False, num_answers=4, max_new_tokens=64):
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


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("heads", [(16, 2), (4, 4), (6, 1)])
def test_heads_that_share_keys_are_rows_over_them(heads, masked):
    torch.manual_seed(0)
    h, k = heads
    query, key, value = torch.randn(5, h, 1, 8), torch.randn(5, k, 77, 8), torch.randn(5, k, 77, 8)
    mask = torch.rand(5, 1, 1, 77) > 0.3 if masked else None
    expected = F.scaled_dot_product_attention(query, repeat_kv(key, h // k), repeat_kv(value, h // k), attn_mask=mask, scale=0.3)
    ours, _ = shared_prefix_attention(torch.nn.Module(), query, key, value, mask, scaling=0.3)
    torch.testing.assert_close(ours, expected.transpose(1, 2), atol=1e-6, rtol=1e-6)


def test_a_step_never_expands_the_cache(tmp_path):
    """Two query heads a key head: nothing that a step makes is as large as the cache, let alone that times the heads."""
    policy = load_policy(save_tiny(tmp_path))
    watched, state, _ = steps_of(policy, autocast=False, num_answers=8, max_new_tokens=512)
    keys = state.cache.rollout_layers[0].keys[:, :, : state.cache.length]
    logits = len(keys) * policy.base.lm_head.out_features
    assert keys.numel() > logits  # else this says nothing
    assert watched.largest <= logits


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
