"""What every op does with tensors as callers have them: in any layout, empty, without a target, on another device.

The Triton bodies: TRITON_INTERPRET=1 pytest -m triton tests/kernels/test_op_edges.py
"""

import ast
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import kernels
from kernels import linear_logprob as head_module
from kernels.group_advantage import group_advantages, group_advantages_reference
from kernels.grpo_loss import grpo_loss, grpo_loss_reference
from kernels.grpo_terms import GRPOLoss
from kernels.launch import launch, on_device_of, padded_power, runs_triton
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

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning", "ignore:All-NaN slice", "ignore:invalid value"),
]

LOSS = GRPOLoss("grpo", beta=0.1)
BY_SEQUENCE = GRPOLoss("grpo", beta=0.1, importance_sampling_level="sequence")


class Op(NamedTuple):
    """A public op: it and its reference take `tensors` by name, and `options`."""

    op: Callable[..., Any]
    reference: Callable[..., Any]
    tensors: dict[str, Tensor]
    options: dict[str, Any]


def token_tensors(rows: int, tokens: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logprobs = -4 * torch.rand(rows, tokens, generator=generator)
    old, ref = (logprobs + 0.3 * torch.randn(rows, tokens, generator=generator) for _ in range(2))
    tensors = {"advantages": torch.randn(rows, generator=generator), "mask": torch.ones(rows, tokens)}
    tensors["mask"][:1, tokens // 2 + 1 :] = 0
    policy = torch.rand(rows, tokens, generator=generator)
    return tensors | {"old_logprobs": old, "ref_logprobs": ref, "policy_mask": policy}


def ops(rows: int = 3, tokens: int = 1) -> dict[str, Op]:
    """Every public op on small tensors; `rows` are completions, prompts or groups."""
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    hidden, weight = randn(rows, tokens, 16), 0.5 * randn(33, 16)
    ids = torch.randint(0, 33, (rows, tokens), generator=generator)
    given, head = token_tensors(rows, tokens), {"hidden": hidden, "weight": weight, "target_ids": ids}
    logprobs, _ = linear_logprob_reference(hidden.flatten(0, 1), weight, ids.flatten())
    on_head = given | {name: given[name] * 0.1 + logprobs.view(rows, tokens) for name in ("old_logprobs", "ref_logprobs")}
    image, pe, R = randn(rows, 12, 16), randn(12, 16), 2 * 3
    norm = {"norm_weight": 1 + 0.1 * randn(16), "norm_bias": randn(16)}
    attended = {
        "image": image,
        "image_pe": pe,
        "keys": randn(rows, R, 16) / 4,
        "key_bias": randn(rows, R),
        "values": randn(rows, R, 16),
    }
    steps = {"weight1": randn(16, 16, 2, 2) / 4, "bias1": randn(16), "norm_weight": 1 + 0.1 * randn(16), "norm_bias": randn(16)}
    steps |= {"weight2": randn(16, 16, 2, 2) / 4, "bias2": randn(16), "hyper": randn(rows, 2, 16)}
    flat = {"hidden": hidden.flatten(0, 1), "weight": weight, "target_ids": ids.flatten()}
    given = {"logprobs": given["old_logprobs"] + 0.1} | given
    rows_of_tokens = {"queries": randn(rows, 5, 16), "image": image, "image_pe": pe}
    by_sequence = {"loss": BY_SEQUENCE}
    routed = {"hidden": hidden.flatten(0, 1), "gate_weight": randn(4, 16)}
    experts = {"gate_proj": randn(4, 8, 16) / 4, "up_proj": randn(4, 8, 16) / 4, "down_proj": randn(4, 16, 8) / 4}
    mixture = {"hidden": routed["hidden"]} | experts
    length = 5 + 2 * tokens
    row = {"query": randn(rows, 4, length, 16), "key": randn(rows, 2, length, 16), "value": randn(rows, 2, length, 16)}
    row["start"] = torch.arange(rows)
    step = {"new_query": randn(2 * rows, 4, 1, 16), "prompt_key": row["key"], "prompt_value": row["value"]}
    step |= {name: randn(2 * rows, 2, 3, 16) for name in ("own_key", "own_value")}
    step |= {"start": row["start"], "position": torch.tensor([1])}
    return {
        "advantages": Op(group_advantages, group_advantages_reference, {"rewards": randn(4 * rows)}, {"num_generations": 4}),
        "loss": Op(grpo_loss, grpo_loss_reference, given, {"loss": LOSS}),
        "loss by sequence": Op(grpo_loss, grpo_loss_reference, given, by_sequence),
        "head": Op(linear_grpo_loss, linear_grpo_loss_reference, head | on_head, {"loss": LOSS}),
        "head by sequence": Op(linear_grpo_loss, linear_grpo_loss_reference, head | on_head, by_sequence),
        "log-probs": Op(linear_logprob, linear_logprob_reference, flat, {}),
        "token to image": Op(token_to_image, token_to_image_reference, rows_of_tokens, {}),
        "image to token": Op(image_to_token, image_to_token_reference, attended | norm, {"num_heads": 2}),
        "upscale": Op(mask_upscale, mask_upscale_reference, {"image": image} | steps, {"height": 3}),
        "mixture": Op(moe_mlp, moe_mlp_reference, mixture, {"routing": route_reference(*routed.values(), 2)}),
        "router": Op(route, route_reference, routed, {"top_k": 2}),
        "prefix attention": Op(prefix_attention, prefix_attention_reference, row, {"prompt_length": 5, "num_answers": 2}),
        "sample": Op(
            sample, sample_reference, {"logits": randn(rows, 33), "uniform": torch.rand(rows, generator=generator)}, {"top_p": 0.8}
        ),
        "decode": Op(prefix_decode, prefix_decode_reference, step, {"bounds": 2 * torch.arange(rows + 1)}),
    }


NAMES = list(ops())
CONSTANT = ("image_pe", "advantages", "mask", "old_logprobs", "ref_logprobs", "policy_mask", "rewards", "target_ids", "start")
# Decoding and sampling have no gradients
CONSTANT += ("new_query", "prompt_key", "prompt_value", "own_key", "own_value", "position", "logits", "uniform")


def values(function: Callable[..., Any], tensors: dict[str, Tensor], options: dict[str, Any], seed: Any = None) -> list[Tensor]:
    """The differentiable outputs and the gradients of all leaves; `seed` makes the gradient of an output."""
    leaves = {name: x for name, x in tensors.items() if name not in CONSTANT}
    views = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    result = function(**(tensors | views), **options)
    outputs = [y for y in (result if isinstance(result, tuple) else (result,)) if isinstance(y, Tensor) and y.requires_grad]
    if not views:
        return [*(result if isinstance(result, tuple) else (result,))]
    gradients = torch.autograd.grad(outputs, list(views.values()), [(seed or torch.ones_like)(y) for y in outputs])
    return [*(y.detach() for y in outputs), *gradients]


def sliced(x: Tensor) -> Tensor:
    """One of three columns, or every third element."""
    return torch.stack([x, x + 1, x - 1], -1)[..., 0]


def transposed(x: Tensor) -> Tensor:
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


def offset(x: Tensor) -> Tensor:
    """The same values one element into a larger storage: not aligned."""
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def narrowed(x: Tensor) -> Tensor:
    """The front of wider rows; a scalar has none."""
    if not x.dim():
        return x
    return torch.cat([x, x + 1], -1)[..., : x.shape[-1]]


def check_layouts(name: str, tokens: int) -> None:
    op = ops(tokens=tokens)[name]
    expected = values(op.op, op.tensors, op.options)
    exact = values(op.reference, op.tensors, op.options)
    for mine, theirs in zip(expected, exact, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-5)
    for layout in (sliced, transposed, offset, narrowed):
        for argument, tensor in op.tensors.items():
            mine = values(op.op, op.tensors | {argument: layout(tensor)}, op.options)
            for a, b in zip(mine, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=argument, k=layout: f"{k.__name__} {n}: {m}")
    for argument, tensor in op.tensors.items():  # stride 0: the first row, again and again
        whole = op.tensors | {argument: tensor[:1].expand(tensor.shape)}
        alike = op.tensors | {argument: tensor[:1].expand(tensor.shape).contiguous()}
        for a, b in zip(values(op.op, whole, op.options), values(op.op, alike, op.options), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, n=argument: f"expanded {n}: {m}")


def check_layouts_of_gradients(name: str) -> None:
    op = ops(tokens=2)[name]

    def drawn(y: Tensor) -> Tensor:
        return torch.randn(y.shape, generator=torch.Generator().manual_seed(3))

    seeds = {layout.__name__: (drawn, lambda y, k=layout: k(drawn(y))) for layout in (sliced, transposed, offset, narrowed)}
    seeds["expanded"] = (torch.ones_like, lambda y: torch.ones(()).expand(y.shape))
    for plain, laid_out in seeds.values():
        if name not in (
            "advantages",
            "decode",
            "loss",
            "loss by sequence",
            "head",
            "head by sequence",
        ):  # those have a loss without layout
            pairs = zip(values(op.op, op.tensors, op.options, laid_out), values(op.op, op.tensors, op.options, plain), strict=True)
            for a, b in pairs:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_any_layout_of_any_tensor_gives_the_same(name, tokens):
    check_layouts(name, tokens)


@pytest.mark.parametrize("name", NAMES)
def test_any_layout_of_a_gradient_gives_the_same(name):
    check_layouts_of_gradients(name)


def check_empty(name: str, rows: int, tokens: int) -> None:
    op = ops(rows, tokens)[name]
    if name in ("image to token", "upscale", "token to image", "advantages", "prefix attention", "decode", "sample") and rows:
        return
    results = values(op.op, op.tensors, op.options)
    assert all(x.dtype == (torch.float32 if x.is_floating_point() else torch.int64) and not x.any() for x in results)
    leaves = [x for argument, x in op.tensors.items() if argument not in CONSTANT]
    assert [x.shape for x in results[len(results) - len(leaves) :]] == [x.shape for x in leaves]


@pytest.mark.parametrize(("rows", "tokens"), [(0, 4), (3, 0), (0, 0)])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_has_a_loss_of_zero_and_gradients_of_zeros(name, rows, tokens):
    check_empty(name, rows, tokens)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo"])
def test_no_row_has_metrics_of_no_token(loss_type):
    kind = GRPOLoss(loss_type, max_completion_length=4)
    empty, (rows, head) = torch.empty(0, 4), (torch.empty(0, 4, 8), torch.randn(5, 8))
    loss, metrics = grpo_loss(empty, torch.empty(0), empty, kind)
    on_head, _, same = linear_grpo_loss(rows, head, torch.empty(0, 4, dtype=torch.int64), torch.empty(0), empty, kind)
    assert loss == on_head == 0 == grpo_loss_reference(empty, torch.empty(0), empty, kind)
    assert all(value == 0 or (value.isnan() and name.endswith(("min", "max"))) for name, value in metrics.items())
    assert set(metrics) | {"entropy"} == set(same)


def check_no_tokens_and_no_masks() -> None:
    """A prompt without tokens leaves the image to its norm; no mask is asked for."""
    op = ops()["image to token"]
    tensors = op.tensors | {name: op.tensors[name][:, :0] for name in ("keys", "key_bias", "values")}
    ours, exact = values(op.op, tensors, op.options), values(op.reference, tensors, op.options)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    op = ops()["upscale"]
    y, *gradients = values(op.op, op.tensors | {"hyper": op.tensors["hyper"][:, :0]}, op.options)
    assert y.shape == (3, 0, 12, 16) and not any(x.any() for x in gradients)
    op = ops()["token to image"]
    y, *gradients = values(op.op, op.tensors | {"queries": op.tensors["queries"][:, :0]}, op.options)
    assert y.shape == (3, 0, 16) and not any(x.any() for x in gradients)


def test_no_tokens_and_no_masks():
    check_no_tokens_and_no_masks()


def test_an_image_without_tokens_is_refused():
    with pytest.raises(ValueError, match=r"image must have tokens, not \[2, 0, 16\]"):
        token_to_image(torch.ones(2, 3, 16), torch.ones(2, 0, 16), torch.ones(0, 16))


def check_targets(name: str) -> None:
    """A target outside the vocabulary counts as little as a masked token, wherever it would point to."""
    op = ops(tokens=4)[name]
    for wrong in (-100, -1, 33, 2**40):
        ids = op.tensors["target_ids"].clone()
        ids.view(-1)[2] = wrong
        bad = op.tensors | {"target_ids": ids}
        ours, exact = values(op.op, bad, op.options), values(op.reference, bad, op.options)
        for a, b in zip(ours, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
        if "mask" in op.tensors:
            masked = op.tensors["mask"].clone()
            masked.view(-1)[2] = 0
            for a, b in zip(ours, values(op.op, op.tensors | {"mask": masked}, op.options), strict=True):
                assert torch.equal(a, b)
        gradient = ours[2 if name == "log-probs" else 1]
        assert not gradient.reshape(-1, 16)[2].any()


@pytest.mark.parametrize("name", ["head", "head by sequence", "log-probs"])
def test_a_target_outside_the_vocabulary_masks_its_token(name):
    check_targets(name)


def test_narrow_integers_are_targets_too():
    for name in ("head", "log-probs"):
        op = ops(tokens=4)[name]
        narrow = op.tensors | {"target_ids": op.tensors["target_ids"].int()}
        for a, b in zip(values(op.op, narrow, op.options), values(op.op, op.tensors, op.options), strict=True):
            assert torch.equal(a, b)


def test_a_mask_of_any_numbers_is_where_they_are_not_zero():
    op = ops(tokens=4)["loss"]
    for loss_type in ("grpo", "dapo"):
        options = {"loss": GRPOLoss(loss_type, beta=0.1)}
        for mask in (op.tensors["mask"].bool(), (255 * op.tensors["mask"]).to(torch.uint8), -2 * op.tensors["mask"]):
            for function in (op.op, op.reference):
                pairs = (values(function, op.tensors | {"mask": m}, options) for m in (mask, op.tensors["mask"]))
                for a, b in zip(*pairs, strict=True):
                    torch.testing.assert_close(a, b)


def test_half_precision_logprobs_are_computed_in_float32():
    op = ops(tokens=64)["loss"]
    half = op.tensors["logprobs"].bfloat16()
    loss, gradient = values(op.op, op.tensors | {"logprobs": half}, op.options)
    expected, exact = values(op.op, op.tensors | {"logprobs": half.float()}, op.options)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected) and torch.equal(gradient, exact.bfloat16())


def test_a_second_derivative_is_refused_and_not_wrong():
    """The loss times something of the same hidden states has one, and the op does not know it."""
    op = ops(tokens=4)["head"]
    hidden = op.tensors["hidden"].clone().requires_grad_()
    loss, _, _ = linear_grpo_loss(**(op.tensors | {"hidden": hidden}), **op.options)
    [gradient] = torch.autograd.grad(loss * hidden.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


@pytest.mark.parametrize(("gemm", "total"), [("mm", None), ("addmm", torch.ones(5, 4))])
def test_a_gemm_that_sums_wide_is_tried_once_and_done_without(monkeypatch, gemm, total):
    """A CPU has none: this is the way that a GPU without it would go."""
    tried: list[tuple] = []
    original = getattr(torch, gemm)
    monkeypatch.setattr(torch, gemm, lambda *a, **k: tried.append(k["out_dtype"]) or original(*a, **k))
    monkeypatch.setattr(head_module, "_WITHOUT_WIDE_SUM", set())
    left, right = torch.randn(6, 5).bfloat16(), torch.randn(6, 4).bfloat16()
    before = 0 if total is None else total.clone()
    total = head_module.add_outer(total, left, right, torch.float32)
    total = head_module.add_outer(total, left, right, torch.float32)
    assert tried == [torch.float32]
    torch.testing.assert_close(total, before + 2 * (left.T @ right).float())


@pytest.mark.parametrize(("gemm", "total"), [("mm", None), ("addmm", torch.ones(5, 4))])
def test_no_room_is_not_taken_for_a_missing_gemm(monkeypatch, gemm, total):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, gemm, full)
    monkeypatch.setattr(head_module, "_WITHOUT_WIDE_SUM", set())
    with pytest.raises(torch.OutOfMemoryError):
        head_module.add_outer(total, torch.ones(6, 5).bfloat16(), torch.ones(6, 4).bfloat16(), torch.float32)
    assert not head_module._WITHOUT_WIDE_SUM


def test_rows_of_logits_begin_at_whole_lines():
    """With an odd vocabulary the GEMMs over logits would take single elements."""
    buffer = head_module.logit_buffer(torch.empty(0, dtype=torch.bfloat16, device="meta"), 3, 50257)
    assert buffer.shape == (3, 50257) and buffer.stride() == (50304, 1)
    assert head_module.logit_buffer(torch.empty(0), 3, 50257).stride() == (50257, 1)
    assert head_module.row_stride(151936) == 151936


@pytest.mark.parametrize("name", ["head", "log-probs"])
def test_bfloat16_reads_nothing_beyond_a_row(name):
    """Of an odd vocabulary, in memory that was NaN: processors with products of bfloat16 read rows to whole lines."""
    op = ops(rows=40)[name]
    tensors = {name: x.bfloat16() if name in ("hidden", "weight") else x for name, x in op.tensors.items()}
    assert all(x.isfinite().all() for x in values(op.op, tensors, op.options))


class OnCuda(torch.Tensor):
    """A tensor that says to be on the second GPU."""

    is_cuda, device = True, torch.device("cuda:1")


def test_what_runs_within_a_launch_has_the_device_of_its_tensors():
    guard = on_device_of(torch.ones(1).as_subclass(OnCuda))
    assert isinstance(guard, torch.cuda.device) and guard.idx == 1
    with on_device_of(torch.ones(1)) as nothing:
        assert nothing is None


def test_every_launch_goes_through_the_one_that_knows_the_device():
    """`kernel[grid](...)` is written once, in `launch`."""
    folders = [Path(kernels.__file__).parent, Path(kernels.__file__).parents[1] / "bench"]
    found = []
    for path in sorted(path for folder in folders for path in folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript) and "kernel" in ast.unparse(node.func.value):
                found.append(path.name)
    assert set(found) == {"launch.py"}


def test_padded_power_is_the_next_power_of_two():
    for size in (*range(1, 70), 1000, 1025):
        power = padded_power(size)
        assert power >= size and power & (power - 1) == 0 and (power == 1 or power // 2 < size)
        assert padded_power(size, 64) == min(power, 64)


def test_a_traced_size_leaves_short_guards(hopper):
    """Guards are evaluated at every call, and twiddled bits of a symbol fill pages."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from kernels.grpo_loss import grpo_loss_forward
    from kernels.mask_attention import _image_to_token, _token_to_image

    def guards_of(op: Any, tensors: list[Tensor | None], *rest: Any) -> list[str]:
        shapes = ShapeEnv()
        with FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True) as mode:
            fake = [x if x is None else mode.from_tensor(x) for x in tensors]
            on_cuda = [x if x is None else torch.empty_like(x, device="cuda") for x in fake]
            traced = dispatch_functionalize(lambda *a: op._opoverload(*a, *rest), FunctionalTensorMode())
            make_fx(traced)(*on_cuda)
        return [str(guard.expr) for guard in shapes.guards]

    tokens = torch.empty(6, 300)
    loss = [tokens, torch.empty(6), torch.empty(6, 300, dtype=torch.int64), tokens, tokens, None, None, None]
    image, pe, rows, norm = torch.empty(2, 400, 256), torch.empty(400, 256), torch.empty(2, 56, 256), torch.empty(256)
    half = [x.bfloat16() for x in (image, pe, rows, torch.empty(2, 56), rows, norm, norm)]
    found = guards_of(grpo_loss_forward, loss, 3.0, LOSS.text)
    found += guards_of(_image_to_token, half, 8, 1e-5) + guards_of(_token_to_image, [half[2], half[0], half[1]])
    assert found and max(map(len, found)) < 400, max(found, key=len)[:1000]


def test_float64_is_computed_in_float64_wherever_it_is():
    assert not runs_triton(torch.ones(1, dtype=torch.float64).as_subclass(OnCuda))


@pytest.mark.triton
@pytest.mark.parametrize("name", NAMES)
def test_triton_bodies_in_any_layout(name):
    check_layouts(name, 1)
    check_layouts_of_gradients(name)


@pytest.mark.triton
@pytest.mark.parametrize("name", NAMES)
def test_triton_bodies_of_nothing(name):
    for rows, tokens in ((0, 4), (3, 0), (0, 0)):
        check_empty(name, rows, tokens)


@pytest.mark.triton
@pytest.mark.parametrize("name", ["head", "head by sequence", "log-probs"])
def test_triton_bodies_of_targets_outside_the_vocabulary(name):
    check_targets(name)


@pytest.mark.triton
def test_triton_bodies_without_tokens_and_masks():
    check_no_tokens_and_no_masks()


@pytest.mark.triton
@pytest.mark.parametrize("wrong", [-100, 7])
def test_a_body_writes_nothing_outside_its_row(wrong):
    """Called past the ops, which leave such rows out: around the row is what was there, in it a gradient of zeros."""
    around = torch.full((3, 7), 5.0)
    row, ids, one = around[1:2], torch.tensor([wrong]), torch.ones(1)
    softmax = head_module.SoftmaxStats(one, one, one)
    constants = {"ENTROPY": True} | head_module.GRADIENT_CONSTANTS
    launch(head_module._gradient_kernel, (1,), row, 7, 7, 1.0, ids, softmax, one, one, **constants)
    assert not around[1].any() and (around[[0, 2]] == 5).all()


def test_every_module_with_a_kernel_is_tried_here():
    modules = {
        path.stem for path in Path(kernels.__file__).parent.glob("*.py") if "launch_configs(" in path.read_text(encoding="utf-8")
    }
    tried = {op.op.__module__.split(".")[-1] for op in ops().values()}
    public = {stem for stem in modules if stem != "launch"}
    assert public == tried and all(importlib.import_module(f"kernels.{stem}") for stem in public)
