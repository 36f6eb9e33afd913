"""The ops inside torch.compile: no graph break on the CPU, registered rightly, and on CUDA one launch each."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from kernels.group_advantage import _group_advantages
from kernels.grpo_loss import grpo_loss, grpo_loss_forward
from kernels.grpo_terms import GRPOLoss
from kernels.linear_grpo import linear_grpo_forward, linear_grpo_loss
from kernels.linear_logprob import linear_logprob, linear_logprob_backward, linear_logprob_forward

B, T, H, V = 3, 5, 8, 33


LOSS = GRPOLoss("grpo", beta=0.04)


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    mask = torch.ones(B, T)
    mask[1, 3:] = 0
    old = torch.randn(B, T) * 0.1 - 3
    return {
        "hidden": torch.randn(B, T, H, requires_grad=True),
        "weight": torch.randn(V, H, requires_grad=True),
        "ids": torch.randint(0, V, (B, T)),
        "advantages": torch.randn(B),
        "mask": mask,
        "old": old,
        "ref": old + 0.1,
    }


@pytest.mark.parametrize(
    ("single_pass", "dynamic", "backend"),
    [(True, False, "inductor"), (True, True, "aot_eager"), (False, False, "aot_eager"), (False, True, "aot_eager")],
)
def test_a_model_step_compiles_without_a_graph_break(inputs, single_pass, dynamic, backend):
    torch._dynamo.reset()
    torch.manual_seed(1)
    body = torch.nn.Linear(H, H)
    given = {"old_logprobs": inputs["old"], "ref_logprobs": inputs["ref"]}

    def step(hidden, weight, ids, advantages, mask):
        hidden = body(hidden).relu()
        if single_pass:
            loss, _, metrics = linear_grpo_loss(hidden, weight, ids, advantages, mask, LOSS, **given)
        else:
            logprobs, entropy = linear_logprob(hidden.flatten(0, 1), weight, ids.flatten())
            logprobs, entropy = logprobs.view(mask.shape), entropy.view(mask.shape)
            loss, metrics = grpo_loss(logprobs, advantages, mask, LOSS, entropies=entropy, **given)
        return 2 * loss, metrics

    results = []
    for function in (step, torch.compile(step, fullgraph=True, dynamic=dynamic, backend=backend)):
        body.zero_grad()
        loss, metrics = function(*[inputs[name] for name in ("hidden", "weight", "ids", "advantages", "mask")])
        gradients = torch.autograd.grad(loss, [inputs["hidden"], inputs["weight"], body.weight])
        results.append([loss.detach(), *gradients, *metrics.values()])
    for compiled, eager in zip(*reversed(results), strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_opcheck_of_the_losses(inputs, level):
    old, ref, advantages, mask = (inputs[name] for name in ("old", "ref", "advantages", "mask"))
    logprobs = (old + 0.2).requires_grad_()
    text = GRPOLoss("grpo", beta=0.04, importance_sampling_level=level).text
    torch.library.opcheck(grpo_loss_forward, (logprobs, advantages, mask, old, ref, None, None, None, 3.0, text))
    head = (inputs["hidden"], inputs["weight"], inputs["ids"], advantages, mask, old, ref, None, None, 3.0, 1.0, 7)
    torch.library.opcheck(linear_grpo_forward, (*head, True, True, text))


def test_opcheck_of_the_head_and_the_advantages(inputs):
    hidden, ids = inputs["hidden"].detach().flatten(0, 1), inputs["ids"].flatten()
    weight = inputs["weight"].detach()
    torch.library.opcheck(linear_logprob_forward, (hidden.clone().requires_grad_(), inputs["weight"], ids, 1.0, 4))
    logprobs, entropy, stats = linear_logprob_forward(hidden, weight, ids, 1.0, 4)
    torch.library.opcheck(linear_logprob_backward, (logprobs, entropy, hidden, weight, ids, stats, 1.0, 4, True, True))
    torch.library.opcheck(_group_advantages, (torch.rand(8), 4, "batch", 1e-4))


def test_on_cuda_the_loss_and_the_advantages_are_one_launch(hopper):
    """What torch.compile would see on CUDA tensors, traced with fake ones."""
    with FakeTensorMode():

        def on_cuda(*shape, dtype=torch.float32):
            return torch.empty(*shape, device="cuda", dtype=dtype)

        tokens = on_cuda(B, T)
        loss = (tokens, on_cuda(B), on_cuda(B, T, dtype=torch.int64), tokens, tokens, None, None, None, 3.0, LOSS.text)
        for op, arguments in ((grpo_loss_forward, loss), (_group_advantages, (on_cuda(8), 4, "batch", 1e-4))):
            traced = dispatch_functionalize(lambda *a, op=op: op._opoverload(*a), FunctionalTensorMode())
            graph = make_fx(traced)(*arguments).graph
            calls = [str(getattr(node.target, "__name__", node.target)) for node in graph.nodes if node.op == "call_function"]
            assert calls.count("triton_kernel_wrapper_functional") == 1
            allocations = {"empty_like.default", "new_empty.default", "zeros.default", "getitem"}  # zeros: the 4-byte ticket
            assert set(calls) - allocations == {"triton_kernel_wrapper_functional"}
