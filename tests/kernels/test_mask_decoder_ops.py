"""The mask decoder's three ops: outputs and every gradient against float64, eagerly and in Triton's interpreter.

TRITON_INTERPRET=1 pytest -m triton tests/kernels/test_mask_decoder_ops.py
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from kernels import mask_attention, mask_upscale
from kernels.language import tl, triton

# prompts, images, image tokens, channels, heads, tokens of a prompt
ATTENTION = [(2, 2, 40, 32, 2, 3), (4, 2, 70, 16, 4, 5), (1, 1, 130, 32, 8, 9), (3, 1, 17, 16, 1, 1), (2, 2, 33, 64, 3, 7)]
# prompts, height, width, channels of the image, of the first and the second step, masks
UPSCALE = [(2, 3, 5, 64, 16, 16, 3), (1, 1, 1, 16, 16, 16, 1), (3, 8, 9, 32, 16, 32, 4)]


def attention_case(G, X, N, C, heads, tokens):
    """(function, reference, leaves, constants) of both attentions; the first only where each prompt has its own image."""
    torch.manual_seed(0)
    R = heads * tokens
    image, pe = torch.randn(X, N, C), torch.randn(N, C)
    keys, bias, values = torch.randn(G, R, C) / C**0.5, torch.randn(G, R), torch.randn(G, R, C)
    weight, shift = 1 + 0.1 * torch.randn(C), torch.randn(C)

    def order(function):
        return lambda image, keys, bias, values, weight, shift, pe: function(image, pe, keys, bias, values, weight, shift, heads)

    ours, reference = order(mask_attention.image_to_token), order(mask_attention.image_to_token_reference)
    cases = [(ours, reference, [image, keys, bias, values, weight, shift], [pe])]
    if G == X:
        cases.append((mask_attention.token_to_image, mask_attention.token_to_image_reference, [keys, image], [pe]))
    return cases


def upscale_case(G, height, width, C, C1, C2, masks):
    torch.manual_seed(0)
    leaves = [torch.randn(G, height * width, C), torch.randn(C, C1, 2, 2) / C**0.5, 0.1 * torch.randn(C1)]
    leaves += [1 + 0.1 * torch.randn(C1), 0.1 * torch.randn(C1), torch.randn(C1, C2, 2, 2) / C1**0.5, 0.1 * torch.randn(C2)]
    leaves.append(torch.randn(G, masks, C2))

    def at_height(function):
        return lambda image, *rest: function(image, height, *rest)

    return [(at_height(mask_upscale.mask_upscale), at_height(mask_upscale.mask_upscale_reference), leaves, [])]


CASES = [pytest.param(attention_case, sizes, id=f"attention-{sizes}") for sizes in ATTENTION]
CASES += [pytest.param(upscale_case, sizes, id=f"upscale-{sizes}") for sizes in UPSCALE]


def run(function, leaves, constants, dtype):
    """The output and the gradients of all leaves, for one and the same gradient of the output."""
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    y = function(*leaves, *(constant.to(dtype) for constant in constants))
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [y, *torch.autograd.grad(y, leaves, seed)]


def assert_as_exact_as_the_reference(ours, reference, leaves, constants, dtype):
    """At most twice the reference's error against float64, and rounding of the largest value."""
    leaves, constants = ([tensor.to(dtype) for tensor in tensors] for tensors in (leaves, constants))
    exact = run(reference, leaves, constants, torch.float64)
    eager, mine = run(reference, leaves, constants, dtype), run(ours, leaves, constants, dtype)
    for index, (x, y, z) in enumerate(zip(mine, eager, exact, strict=True)):
        assert x.shape == z.shape and x.dtype == dtype
        allowed = 2 * (y - z).abs().max() + 4 * torch.finfo(dtype).eps * z.abs().max()
        assert (x - z).abs().max() <= allowed, f"output {index}: {(x - z).abs().max():.2e} > {allowed:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("build", "sizes"), CASES)
def test_outputs_and_gradients_against_float64(build, sizes, dtype, poisoned_memory):
    for case in build(*sizes):
        assert_as_exact_as_the_reference(*case, dtype)


@pytest.mark.triton
@pytest.mark.parametrize(("build", "sizes"), CASES)
def test_the_triton_bodies_against_float64(build, sizes, poisoned_memory):
    for case in build(*sizes):
        assert_as_exact_as_the_reference(*case, torch.float32)


@pytest.mark.triton
def test_large_tiles_give_what_small_ones_give(monkeypatch, poisoned_memory):
    """Those of many prompts, made for few: 128 tokens a tile."""
    monkeypatch.setattr(mask_upscale, "PROGRAMS", 1)
    assert mask_upscale._tokens(2 * 9 * 15, mask_upscale.LARGE_SHARED) == 128
    for case in upscale_case(2, 9, 15, 64, 16, 16, 2):
        assert_as_exact_as_the_reference(*case, torch.float32)


@triton.jit
def _gelu_kernel(x, y, N, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, mask_upscale._gelu(tl.load(x + offsets, mask=offsets < N), True), mask=offsets < N)


@pytest.mark.triton
@pytest.mark.filterwarnings("ignore:overflow")  # to the infinity that the tail of a large value is 0 by
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gelu_of_half_types_errs_by_less_than_their_rounding(dtype):
    """All finite values: by 1.1e-4 of x Phi(-x), where rounding loses up to 2e-3 (bf16) or 2.4e-4 (fp16) of the result."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    x = x[x.isfinite()]
    y = torch.empty_like(x)
    _gelu_kernel[(triton.cdiv(len(x), 4096),)](x, y, len(x), BLOCK=4096)
    tail = x.double().abs() * torch.special.ndtr(-x.double().abs())
    error = (y.double() - (x.double().clamp(min=0) - tail)).abs()
    single = 2**-23 * x.double().clamp(min=0)  # the difference's own rounding
    assert (error <= 1.1e-4 * tail + 3e-9 + single).all()
    normal = tail > 2e-5
    assert (error[normal] < torch.finfo(dtype).eps / 4 * y[normal].abs().double()).all()  # half a unit in the last place at least


@pytest.mark.triton
def test_the_triton_body_in_a_half_type_against_float64(poisoned_memory):
    for ours, reference, leaves, _ in upscale_case(*UPSCALE[2]):
        leaves = [leaf.half() for leaf in leaves]
        exact = reference(*(leaf.double() for leaf in leaves))
        mine, eager = ours(*leaves), reference(*leaves)
        allowed = 2 * (eager - exact).abs().max() + 4 * torch.finfo(torch.float16).eps * exact.abs().max()
        assert (mine - exact).abs().max() <= allowed


@pytest.mark.triton
@pytest.mark.parametrize("tokens", [3, 9])  # heads that stay on chip, and heads that come in parts
def test_a_program_of_many_tiles_gives_what_many_programs_give(tokens, monkeypatch, poisoned_memory):
    sizes = (2, 1, 130, 16, 8, tokens)
    assert mask_attention._head_constants(16, tokens, 8, mask_upscale.LARGE_SHARED)["KEPT"] == (tokens == 3)
    [(attend, _, leaves, [pe])] = attention_case(*sizes)
    apart = attend(*leaves, pe)
    monkeypatch.setattr(mask_attention, "PROGRAMS", 1)
    assert torch.equal(attend(*leaves, pe), apart)


@pytest.mark.triton
def test_a_nan_stays_one(poisoned_memory):
    [(ours, _, leaves, _)] = upscale_case(*UPSCALE[0])
    leaves[0][0, 3] = torch.nan
    with torch.no_grad():
        logits = ours(*leaves)
    assert logits[0].isnan().sum() == 3 * 16 and logits[1].isfinite().all()


@pytest.mark.parametrize(("build", "sizes"), [(attention_case, ATTENTION[0]), (upscale_case, UPSCALE[0])])
def test_ops_compile_whole_and_pass_opcheck(build, sizes):
    ops = {
        "token": mask_attention._token_to_image,
        "image": mask_attention._image_to_token,
        "upscale": mask_upscale._upscale,
    }
    calls = []
    for ours, _, leaves, constants in build(*sizes):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        for mine, reference in zip(
            run(compiled, leaves, constants, torch.float32), run(ours, leaves, constants, torch.float32), strict=True
        ):
            torch.testing.assert_close(mine, reference)
        calls.append([leaf.clone().requires_grad_() for leaf in leaves] + constants)
    if build is upscale_case:
        (image, *rest) = calls[0]
        torch.library.opcheck(ops["upscale"], (image, sizes[1], *rest, 1e-6))
    else:
        image, keys, bias, values, weight, shift, pe = calls[0]
        torch.library.opcheck(ops["image"], (image, pe, keys, bias, values, weight, shift, sizes[4], 1e-5))
        torch.library.opcheck(ops["token"], tuple(calls[1]))


def test_on_cuda_an_attention_is_one_launch(hopper):
    """What torch.compile would see on CUDA tensors, traced with fake ones."""
    with FakeTensorMode():

        def on_cuda(*shape):
            return torch.empty(*shape, device="cuda", dtype=torch.bfloat16)

        image, pe, rows, norm = on_cuda(2, 4096, 256), on_cuda(4096, 256), on_cuda(2, 56, 256), on_cuda(256)
        calls = [
            (mask_attention._token_to_image, (rows, image, pe), 2),  # with the merge of its splits
            (mask_attention._image_to_token, (image, pe, rows, on_cuda(2, 56), rows, norm, norm, 8, 1e-5), 1),
        ]
        for op, arguments, launches in calls:
            traced = dispatch_functionalize(lambda *a, op=op: op._opoverload(*a), FunctionalTensorMode())
            graph = make_fx(traced)(*arguments).graph
            names = [str(getattr(node.target, "__name__", node.target)) for node in graph.nodes if node.op == "call_function"]
            assert names.count("triton_kernel_wrapper_functional") == launches


def test_wrong_shapes_are_named():
    image, pe, queries = torch.randn(2, 9, 16), torch.randn(9, 16), torch.randn(2, 4, 16)
    with pytest.raises(ValueError, match=r"queries must be \[2, 4, 16\], not \[1, 4, 16\]"):
        mask_attention.token_to_image(queries[:1], image, pe)
    with pytest.raises(ValueError, match=r"image_pe must be \[9, 16\]"):
        mask_attention.token_to_image(queries, image, pe[:8])
    with pytest.raises(ValueError, match="image_pe must not require a gradient"):
        mask_attention.token_to_image(queries, image, pe.clone().requires_grad_())
    norm = torch.ones(16)
    with pytest.raises(ValueError, match="keys must be for a multiple of 2 images and 3 heads"):
        mask_attention.image_to_token(image, pe, queries, queries[..., 0], queries, norm, norm, 3)
    with pytest.raises(ValueError, match=r"key_bias must be \[2, 4\]"):
        mask_attention.image_to_token(image, pe, queries, queries[:, :2, 0], queries, norm, norm, 2)
    [(upscale, _, leaves, _)] = upscale_case(*UPSCALE[0])
    with pytest.raises(ValueError, match=r"hyper must be \[2, 3, 16\], not \[1, 3, 16\]"):
        upscale(*leaves[:-1], leaves[-1][:1])
    with pytest.raises(ValueError, match="height must divide the 15 image tokens, not 4"):
        mask_upscale.mask_upscale(leaves[0], 4, *leaves[1:])
