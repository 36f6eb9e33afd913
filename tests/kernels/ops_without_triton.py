"""The program of test_without_triton.py: runs where `import triton` fails, and compares every op with its reference."""

import importlib
import pkgutil
import sys
import warnings

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._triton import has_triton, has_triton_package

import kernels
from kernels.group_advantage import group_advantages, group_advantages_reference
from kernels.grpo_loss import grpo_loss, grpo_loss_reference
from kernels.grpo_terms import GRPOLoss
from kernels.language import HAS_TRITON
from kernels.launch import runs_triton
from kernels.linear_grpo import linear_grpo_loss, linear_grpo_loss_reference
from kernels.linear_logprob import linear_logprob, linear_logprob_reference
from kernels.mask_attention import image_to_token, image_to_token_reference, token_to_image, token_to_image_reference
from kernels.mask_upscale import mask_upscale, mask_upscale_reference
from kernels.moe_dispatch import moe_mlp, moe_mlp_reference
from kernels.moe_router import route
from kernels.moe_routing import route_reference
from kernels.prefix_attention import prefix_attention, prefix_attention_reference
from kernels.prefix_decode import prefix_decode, prefix_decode_reference
from kernels.sample import sample, sample_reference

LOSS = GRPOLoss("grpo", beta=0.04)


def cases():
    """(name, call(op, *leaves), op, reference, leaves) of every op."""
    torch.manual_seed(0)
    randn, ids, ones = torch.randn, torch.randint(0, 33, (3, 5)), torch.ones(9, 16)
    rest, ref = (randn(3), torch.ones(3, 5)), randn(3, 5) - 3

    def loss(op, logprobs):
        return op(logprobs, *rest, LOSS, ref_logprobs=ref)

    def head(op, hidden, weight):
        return op(hidden, weight, ids, *rest, LOSS, ref_logprobs=ref)

    def logprobs(op, hidden, weight):
        return sum(op(hidden, weight, ids[0]))

    def attend(op, queries, image):
        return op(queries, image, ones)

    def attended(op, image, *others):
        return op(image, ones, *others, 2)

    def upscale(op, image, *others):
        return op(image, 2, *others)

    def routed(op, hidden, gate):
        weights, *_, balance, z, _ = op(hidden, gate, 2)
        return weights.sum(0) + balance + z

    def mixed(op, hidden, gate, *projections):
        return op(hidden, route(hidden, gate, 2), *projections)

    def row(op, *states):
        return op(*states, 5, 2, torch.tensor([0, 2]))

    tokens = [randn(2, 4, 16), randn(2, 4), randn(2, 4, 16), 1 + 0.1 * randn(16), randn(16)]
    steps = [randn(16, 4, 2, 2), randn(4), randn(4), randn(4), randn(4, 2, 2, 2), randn(2), randn(2, 3, 2)]
    yield "loss", loss, grpo_loss, grpo_loss_reference, [randn(3, 5) - 3]
    yield "head", head, linear_grpo_loss, linear_grpo_loss_reference, [randn(3, 5, 8), randn(33, 8)]
    yield "log-probs", logprobs, linear_logprob, linear_logprob_reference, [randn(5, 8), randn(33, 8)]
    yield "token to image", attend, token_to_image, token_to_image_reference, [randn(2, 4, 16), randn(2, 9, 16)]
    yield "image to token", attended, image_to_token, image_to_token_reference, [randn(2, 9, 16), *tokens]
    yield "upscale", upscale, mask_upscale, mask_upscale_reference, [randn(2, 6, 16), *steps]
    yield "router", routed, route, route_reference, [randn(9, 8), randn(4, 8)]
    experts = [randn(4, 6, 8), randn(4, 6, 8), randn(4, 8, 6)]
    states = [randn(2, 4, 11, 16), randn(2, 2, 11, 16), randn(2, 2, 11, 16)]
    yield "prefix attention", row, prefix_attention, prefix_attention_reference, states
    yield "mixture", mixed, moe_mlp, moe_mlp_reference, [randn(9, 8), randn(4, 8), *experts]


def values(call, op, leaves):
    """The output, and the gradient of its square by every leaf."""
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y = call(op, *leaves)
    y = y[0] if isinstance(y, tuple) else y
    return [y, *torch.autograd.grad(y.square().sum(), leaves)]


def main() -> None:
    warnings.simplefilter("error")
    torch.set_default_dtype(torch.float64)
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"kernels.{module.name}")
    assert not (HAS_TRITON or has_triton_package() or has_triton() or runs_triton(torch.zeros(1)))

    for name, call, op, reference, leaves in cases():
        expected, compiled = values(call, reference, leaves), torch.compile(call, fullgraph=True, backend="aot_eager")
        for ours in (values(call, op, leaves), values(compiled, op, leaves)):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    rewards = torch.rand(8)
    step = [torch.rand(4, 4, 1, 16), *torch.rand(2, 2, 2, 7, 16), *torch.rand(2, 4, 2, 3, 16)]
    step += [torch.tensor([0, 3, 4]), torch.tensor([2, 0]), torch.tensor([1])]
    torch.testing.assert_close(prefix_decode(*step), prefix_decode_reference(*step))
    torch.testing.assert_close(
        sample(step[0][0, 0], rewards[:1], top_p=0.9), sample_reference(step[0][0, 0], rewards[:1], top_p=0.9)
    )
    torch.testing.assert_close(group_advantages(rewards, 4), group_advantages_reference(rewards, 4))

    with FakeTensorMode():
        on_a_gpu = torch.empty(8, device="cuda")
    try:
        runs_triton(on_a_gpu)
    except UserWarning as warning:
        print(warning)
    assert not [name for name, module in sys.modules.items() if name.split(".")[0] == "triton" and module is not None]


if __name__ == "__main__":
    main()
