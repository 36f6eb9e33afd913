"""Image tokens to mask logits: SAM's two transposed convolutions and the hyper-network's dot product, in one pass.

    u = GELU(LayerNorm(x W1 + b1))      a stride 2, kernel 2 transposed convolution does not overlap:
    m = hyper . GELU(u W2 + b2)         token -> 4 pixels x C1 -> 16 pixels x C2 -> 16 logits of each mask

With v = GELU(q), q = u W2 + b2, n = LayerNorm(a), a = x W1 + b1 the gradients are, pixel by pixel,
    dv = dm hyper, dhyper = dm^T v, dq = dv GELU'(q), dW2 = u^T dq, dn = (dq W2^T) GELU'(n), da = norm'(dn)
and of the whole da = [N, 4 C1]: dW1 = x^T da, dx = da W1^T, two plain products.

G prompts, N = h w image tokens of C channels, C1 = C / 4, C2 = C / 8, M masks (only those that are asked for).
Per token 2 C 4 C1 + 4 . 2 C1 4 C2 + 16 . 2 C2 M FLOPs; x is read once and 16 M logits written. SAM's formulation also
writes and reads [4N, C1] and [16N, C2] five times over and computes all four masks. The backward recomputes: it reads x and
dm and writes da.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.language import tl, triton
from kernels.launch import LARGE_SHARED, LaunchConfig, exports_reference, launch, runs_triton, shared_bytes, triton_op
from kernels.mask_attention import in_one_type

MANY_TOKENS, FEW_TOKENS, BACKWARD_TOKENS = 128, 32, 32  # image tokens of a tile; in the backward more spill
PROGRAMS = 256  # two a multiprocessor; in the backward each keeps one partial sum of every weight's gradient
MASKS = 4  # more are computed eagerly
ROWS = 16  # of a matrix tile, to which the backward pads the masks
CPU_TOKENS = 512  # image tokens of a band on a CPU: their 16 pixels each take one megabyte


def mask_upscale_reference(
    image: Tensor,
    height: int,
    weight1: Tensor,
    bias1: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    hyper: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """Logits [G, M, 4h, 4w] of image [G, h w, C], weight1 [C, C1, 2, 2], weight2 [C1, C2, 2, 2], hyper [G, M, C2]."""
    x = image.transpose(1, 2).unflatten(2, (height, -1))
    a = F.conv_transpose2d(x, weight1, bias1, stride=2).permute(0, 2, 3, 1)
    u = F.gelu(F.layer_norm(a, a.shape[-1:], norm_weight, norm_bias, eps)).permute(0, 3, 1, 2)
    v = F.gelu(F.conv_transpose2d(u, weight2, bias2, stride=2))
    return (hyper @ v.flatten(2)).unflatten(2, v.shape[2:])


@triton.jit
def _tail(a):
    # Phi(-a) for a >= 0 to 1.1e-7, as 2 to a polynomial: a third of the instructions of erf, which has a branch for each range
    p = -1.3918950e-6
    p = p * a + 2.2386847e-5
    p = p * a - 1.0731741e-4
    p = p * a - 3.2187975e-4
    p = p * a + 7.2966558e-3
    p = p * a - 5.2651461e-2
    p = p * a - 4.5915863e-1
    p = p * a - 1.1511111
    p = p * a - 0.99999988
    return tl.exp2(p)


@triton.jit
def _short_tail(a):
    # Phi(-a) to 1.1e-4 of itself, where a Phi(-a) > 2e-5: what is rounded to a half type loses 2.4e-4 (fp16) or 2e-3 (bf16)
    # of itself. The polynomial falls for all a > 0, so that its argument needs no bound
    p = -3.0106847e-4
    p = p * a + 5.6309979e-3
    p = p * a - 4.7552444e-2
    p = p * a - 4.6508136e-1
    p = p * a - 1.1487119
    p = p * a - 1.0001571
    return tl.exp2(p)


@triton.jit
def _gelu(x, SHORT: tl.constexpr):
    # x Phi(x) = max(x, 0) - |x| Phi(-|x|); SHORT where the result is rounded to a half type
    a = tl.abs(x)
    if SHORT:
        tail = a * _short_tail(a)
    else:
        a = tl.minimum(a, 5.5)
        tail = a * _tail(a)
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - tail


@triton.jit
def _gelu_and_slope(x):
    # x Phi(x) and Phi(x) + x Phi'(x)
    a = tl.minimum(tl.abs(x), 5.5)
    tail = _tail(a)
    slope = tl.where(x > 0, 1.0 - tail, tail) + x * tl.exp2(-0.7213475204 * x * x) * 0.3989422804
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - a * tail, slope


@triton.jit
def _first_step(x, weight1, bias1, i, C: tl.constexpr, C1: tl.constexpr, eps):
    # The channels of subpixel i of the first step, normalised without gain
    column = tl.arange(0, C1)
    w1 = tl.load(weight1 + i * C * C1 + tl.arange(0, C)[:, None] * C1 + column[None, :])
    a = tl.dot(x, w1) + tl.load(bias1 + column).to(tl.float32)[None, :]
    a -= (tl.sum(a, 1) / C1)[:, None]
    rstd = tl.rsqrt(tl.sum(a * a, 1) / C1 + eps)
    return a * rstd[:, None], rstd


@triton.jit
def _pixels(tokens, i, j, width):
    # Offsets in a [4h, 4w] mask of the second step's subpixels j of subpixel i of each token: [TOKENS, j]
    y = (4 * (tokens // width) + 2 * (i // 2))[:, None] + j[None, :] // 2
    x = (4 * (tokens % width) + 2 * (i % 2))[:, None] + j[None, :] % 2
    return y * 4 * width + x


@triton.jit
def _upscale_kernel(
    image, weight1, bias1, norm_weight, norm_bias, weight2, bias2, hyper, logits, N, width, eps,
    C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, TOKENS: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    # A tile of one prompt's tokens: a quarter of its pixels in the first step, and a half of those in the second at a time. So
    # a thread needs 128 registers at most, and two programs of 8 warps fit a multiprocessor
    SHORT: tl.constexpr = image.dtype.element_ty != tl.float32
    g = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = (tokens < N)[:, None]
    inner, outer = tl.arange(0, C1), tl.arange(0, 2 * C2)
    x = tl.load(image + (g * N + tokens)[:, None] * C + tl.arange(0, C)[None, :], mask=inside, other=0.0)
    b2 = tl.load(bias2 + outer % C2).to(tl.float32)
    gain, shift = tl.load(norm_weight + inner).to(tl.float32), tl.load(norm_bias + inner).to(tl.float32)
    for i in range(4):
        normal, _ = _first_step(x, weight1, bias1, i, C, C1, eps)
        u = _gelu(normal * gain[None, :] + shift[None, :], SHORT).to(x.dtype)
        for half in tl.static_range(2):
            w2 = tl.load(weight2 + inner[:, None] * (4 * C2) + half * 2 * C2 + outer[None, :])
            v = _gelu(tl.dot(u, w2) + b2[None, :], SHORT)
            offset = _pixels(tokens, i, half * 2 + tl.arange(0, 2), width)
            for mask in tl.static_range(M):
                h = tl.load(hyper + (g * M + mask) * C2 + outer % C2).to(tl.float32)
                m = tl.sum(tl.reshape(v * h[None, :], [TOKENS, 2, C2]), 2)
                tl.store(logits + (g * M + mask) * 16 * N + offset, m.to(logits.dtype.element_ty), mask=inside)


@triton.jit
def _upscale_backward_kernel(
    grad_logits, image, weight1, bias1, norm_weight, norm_bias, weight2, bias2, hyper,
    grad_first, grad_weight2, grad_bias2, grad_norm, grad_hyper, N, width, eps,
    C: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, TOKENS: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # Every num_programs-th tile of one prompt: da of its tokens, and this program's share of the small gradients
    g = tl.program_id(1).to(tl.int64)
    inner, outer, channels = tl.arange(0, C1), tl.arange(0, 4 * C2), tl.arange(0, C)
    row = tl.arange(0, ROWS)  # of the masks, padded to a matrix tile
    w2 = tl.load(weight2 + inner[:, None] * (4 * C2) + outer[None, :])
    b2 = tl.load(bias2 + outer % C2).to(tl.float32)
    gain, shift = tl.load(norm_weight + inner).to(tl.float32), tl.load(norm_bias + inner).to(tl.float32)
    dw2 = tl.zeros([C1, 4 * C2], tl.float32)
    db2 = tl.zeros([4 * C2], tl.float32)
    dgain = tl.zeros([C1], tl.float32)
    dshift = tl.zeros([C1], tl.float32)
    dh = tl.zeros([ROWS, C2], tl.float32)
    for first in range(tl.program_id(0) * TOKENS, N, tl.num_programs(0) * TOKENS):
        tokens = first + tl.arange(0, TOKENS)
        inside = (tokens < N)[:, None]
        rows = (g * N + tokens)[:, None]
        x = tl.load(image + rows * C + channels[None, :], mask=inside, other=0.0)
        for i in range(4):
            normal, rstd = _first_step(x, weight1, bias1, i, C, C1, eps)
            u, u_slope = _gelu_and_slope(normal * gain[None, :] + shift[None, :])
            u = u.to(x.dtype)
            v, v_slope = _gelu_and_slope(tl.dot(u, w2) + b2[None, :])
            v = tl.reshape(v, [TOKENS * 4, C2]).to(x.dtype)
            offset = _pixels(tokens, i, tl.arange(0, 4), width)
            here = tl.reshape(offset, [TOKENS * 4])[None, :] + (g * M + row)[:, None] * 16 * N
            valid = tl.reshape(tl.broadcast_to(inside, [TOKENS, 4]), [TOKENS * 4])[None, :] & (row < M)[:, None]
            dh += tl.dot(tl.load(grad_logits + here, mask=valid, other=0.0).to(x.dtype), v)
            dv = tl.zeros([TOKENS, 4, C2], tl.float32)
            for mask in tl.static_range(M):
                dm = tl.load(grad_logits + (g * M + mask) * 16 * N + offset, mask=inside, other=0.0).to(tl.float32)
                h = tl.load(hyper + (g * M + mask) * C2 + tl.arange(0, C2)).to(tl.float32)
                dv += dm[:, :, None] * h[None, None, :]
            dq = tl.reshape(dv, [TOKENS, 4 * C2]) * v_slope
            db2 += tl.sum(dq, 0)
            dq = dq.to(x.dtype)
            dw2 += tl.dot(tl.trans(u), dq)
            dn = tl.dot(dq, tl.trans(w2)) * u_slope
            dgain += tl.sum(dn * normal, 0)
            dshift += tl.sum(dn, 0)
            dn *= gain[None, :]
            da = dn - (tl.sum(dn, 1) / C1)[:, None] - normal * (tl.sum(dn * normal, 1) / C1)[:, None]
            da = (da * rstd[:, None]).to(x.dtype)
            tl.store(grad_first + rows * 4 * C1 + i * C1 + inner[None, :], da, mask=inside)
    program = g * tl.num_programs(0) + tl.program_id(0)
    tl.store(grad_weight2 + program * C1 * 4 * C2 + inner[:, None] * (4 * C2) + outer[None, :], dw2)
    tl.store(grad_bias2 + program * 4 * C2 + outer, db2)
    tl.store(grad_norm + program * 2 * C1 + inner, dgain)
    tl.store(grad_norm + program * 2 * C1 + C1 + inner, dshift)
    tl.store(grad_hyper + program * ROWS * C2 + row[:, None] * C2 + tl.arange(0, C2)[None, :], dh)


def _tokens(num_tokens: int, shared: int) -> int:
    """Image tokens of a tile: 128, where a token takes 366 warp instructions on sm_90 and two programs fit a multiprocessor (16
    warps over 64 tokens would hold every value in four of them and take three times as many); or few, where shared memory is
    small or there would not be a tile for every multiprocessor."""
    return MANY_TOKENS if shared > 112 << 10 and num_tokens >= PROGRAMS * MANY_TOKENS else FEW_TOKENS


def _constants(C: int, C1: int, C2: int, masks: int, tokens: int) -> dict[str, Any]:
    return {"C": C, "C1": C1, "C2": C2, "TOKENS": tokens, "M": masks, "num_warps": 8, "num_stages": 1}


def launch_configs() -> Iterator[LaunchConfig]:
    """SAM's decoder: 256 channels, 64 x 64 tokens; one mask and three, of one prompt and of 64."""
    x, vector = torch.empty(0, dtype=torch.bfloat16, device="meta"), torch.empty(0, device="meta")
    sizes = (4096, 64, 1e-6)
    for masks in (1, 3):
        name = f"upscale to {masks} mask{'s' if masks > 1 else ''}"
        for end, tokens, archs in (("", 4096 * 64, (80, 90, 100)), (", few tokens", 4096, (80, 89, 90, 100))):
            constants = _constants(256, 64, 32, masks, _tokens(tokens, LARGE_SHARED))
            yield LaunchConfig(name + end, _upscale_kernel, (*[x] * 9, *sizes), constants, archs)
        constants = _constants(256, 64, 32, masks, BACKWARD_TOKENS) | {"ROWS": ROWS}
        yield LaunchConfig(f"{name}, backward", _upscale_backward_kernel, (*[x] * 10, *[vector] * 4, *sizes), constants)


def _takes(image: Tensor, weight1: Tensor, weight2: Tensor, hyper: Tensor) -> bool:
    """Whether the kernels run: widths that are powers of two and fill a matrix tile; half types, in the interpreter also fp32."""
    (C, C1), C2 = weight1.shape[:2], weight2.shape[1]
    narrow = image.dtype in (torch.bfloat16, torch.float16) or not image.is_cuda
    powers = all(16 <= width <= 256 and width & (width - 1) == 0 for width in (C, C1, C2))
    return runs_triton(image) and narrow and powers and 1 <= hyper.shape[1] <= MASKS


def _by_subpixel(weight1: Tensor, weight2: Tensor) -> tuple[Tensor, Tensor]:
    """Both weights as matrices: [4, C, C1] and [C1, 4 C2]."""
    first = weight1.permute(2, 3, 0, 1).flatten(0, 1)
    return first.contiguous(), weight2.permute(0, 2, 3, 1).flatten(1).contiguous()


def _bands(image: Tensor, height: int) -> Iterator[tuple[int, slice, slice]]:
    """(prompt, slice of tokens, slice of mask rows) of whole rows of one prompt at a time."""
    G, N, _ = image.shape
    width = N // height
    rows = max(1, CPU_TOKENS // width)
    for g in range(G):
        for y in range(0, height, rows):
            yield g, slice(y * width, min(y + rows, height) * width), slice(4 * y, 4 * min(y + rows, height))


def _to_pixels(values: Tensor, width: int) -> Tensor:
    """[n, 4, 4, M] by token and subpixels -> [M, 4 n / width, 4 width]."""
    grid = values.unflatten(2, (2, 2)).unflatten(1, (2, 2)).unflatten(0, (-1, width))  # y x, then y x of each step
    return grid.permute(6, 0, 2, 4, 1, 3, 5).flatten(4, 6).flatten(1, 3)


def _from_pixels(mask: Tensor) -> Tensor:
    """The inverse of `_to_pixels`: [M, 4 h, 4 w] -> [h w, 4, 4, M]."""
    grid = mask.unflatten(2, (-1, 2, 2)).unflatten(1, (-1, 2, 2))  # M, h, y1, y2, w, x1, x2
    return grid.permute(1, 4, 2, 5, 3, 6, 0).flatten(4, 5).flatten(2, 3).flatten(0, 1)


def _upscale_in_bands(image, height, weight1, bias1, norm_weight, norm_bias, weight2, bias2, hyper, eps):
    (C1, C2), width = weight2.shape[:2], image.shape[1] // height
    first, second = _by_subpixel(weight1, weight2)
    first = first.permute(1, 0, 2).flatten(1)
    logits = image.new_empty(len(image), hyper.shape[1], 4 * height, 4 * width)
    for g, tokens, rows in _bands(image, height):
        a = torch.addmm(bias1.repeat(4), image[g, tokens], first).view(-1, C1)
        u = F.gelu(F.layer_norm(a, (C1,), norm_weight, norm_bias, eps))
        v = F.gelu(torch.addmm(bias2.repeat(4), u, second))
        logits[g, :, rows] = _to_pixels((v.view(-1, C2) @ hyper[g].t()).view(-1, 4, 4, hyper.shape[1]), width)
    return logits


@triton_op("vesalius::mask_upscale")
def _upscale(
    image: Tensor,
    height: int,
    weight1: Tensor,
    bias1: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    hyper: Tensor,
    eps: float,
) -> Tensor:
    if not image.numel() or not hyper.numel():
        return image.new_empty(len(image), hyper.shape[1], 4 * height, 4 * image.shape[1] // height)
    if not _takes(image, weight1, weight2, hyper):
        eager = mask_upscale_reference if image.is_cuda else _upscale_in_bands
        return eager(image, height, weight1, bias1, norm_weight, norm_bias, weight2, bias2, hyper, eps)
    (G, N, C), M = image.shape, hyper.shape[1]
    first, second = _by_subpixel(weight1, weight2)
    logits = image.new_empty(G, M, 4 * height, 4 * N // height)
    tensors = (image, first, bias1, norm_weight, norm_bias, second, bias2, hyper, logits)
    tokens = _tokens(G * N, shared_bytes(image.device))
    C1, C2 = weight2.shape[:2]
    constants = _constants(C, C1, C2, M, tokens)
    launch(_upscale_kernel, (triton.cdiv(N, tokens), G), *tensors, N, N // height, eps, **constants)
    return logits


def _gelu_slope_eager(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x * 2**-0.5)) + x * torch.exp(-0.5 * x * x) * 0.3989422804014327


def _backward_eager(grad_logits, image, height, first, bias1, norm_weight, norm_bias, second, bias2, hyper, eps):
    """da [G, N, 4 C1], dW2 [C1, 4 C2], db2 [4 C2], gain's and shift's gradients [2, C1], dhyper [G, M, C2]."""
    (G, N, _), C1, C2 = image.shape, first.shape[2], hyper.shape[2]
    dm = torch.stack([_from_pixels(mask) for mask in grad_logits]).view(G, 16 * N, -1).to(image.dtype)
    a = image @ first.permute(1, 0, 2).flatten(1) + bias1.repeat(4)
    a = a.view(G * 4 * N, C1)
    centred = a - a.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normal = centred * rstd
    n = normal * norm_weight + norm_bias
    u = F.gelu(n)
    q = u @ second + bias2.repeat(4)
    dq = (dm @ hyper).view(q.shape) * _gelu_slope_eager(q)
    dn = (dq @ second.t()) * _gelu_slope_eager(n)
    grad_norm = torch.stack([(dn * normal).sum(0), dn.sum(0)])
    dn = dn * norm_weight
    da = (dn - dn.mean(-1, keepdim=True) - normal * (dn * normal).mean(-1, keepdim=True)) * rstd
    grad_hyper = dm.transpose(1, 2) @ F.gelu(q).view(G, 16 * N, C2)
    return da.view(G, N, 4 * C1), u.t() @ dq, dq.sum(0), grad_norm, grad_hyper


@triton_op("vesalius::mask_upscale_backward")
def _upscale_backward(
    grad_logits: Tensor,
    image: Tensor,
    height: int,
    weight1: Tensor,
    bias1: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    hyper: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (G, N, C), M, (C1, C2) = image.shape, hyper.shape[1], weight2.shape[:2]
    if not grad_logits.numel():
        zeros = [tensor.new_zeros(tensor.shape) for tensor in (image, weight1, bias1, weight2, bias2, hyper)]
        return zeros[0], zeros[1], zeros[2], norm_weight.new_zeros(2, C1), zeros[3], zeros[4], zeros[5]
    first, second = _by_subpixel(weight1, weight2)
    tensors = (image, first, bias1, norm_weight, norm_bias, second, bias2, hyper)
    if not _takes(image, weight1, weight2, hyper):
        da, dw2, db2, dnorm, dhyper = _backward_eager(grad_logits, image, height, *tensors[1:], eps)
    else:
        programs = min(triton.cdiv(N, BACKWARD_TOKENS), triton.cdiv(PROGRAMS, G))
        da = image.new_empty(G, N, 4 * C1)
        shapes = ((C1, 4 * C2), (4 * C2,), (2, C1), (ROWS, C2))
        small = [image.new_empty(G, programs, *shape, dtype=torch.float32) for shape in shapes]
        arguments = (grad_logits.contiguous(), *tensors, da, *small, N, N // height, eps)
        launch(_upscale_backward_kernel, (programs, G), *arguments, **_constants(C, C1, C2, M, BACKWARD_TOKENS), ROWS=ROWS)
        dw2, db2, dnorm = (partial.sum((0, 1)) for partial in small[:3])
        dhyper = small[3].sum(1)[:, :M]
    dx = da @ first.transpose(1, 2).flatten(0, 1)
    dw1 = image.flatten(0, 1).t() @ da.flatten(0, 1)
    dw1 = dw1.view(C, 2, 2, C1).permute(0, 3, 1, 2).contiguous()
    dw2 = dw2.view(C1, 2, 2, C2).permute(0, 3, 1, 2).to(weight2.dtype).contiguous()
    db1, db2 = da.sum((0, 1)).view(4, C1).sum(0), db2.view(4, C2).sum(0).to(bias2.dtype)
    return dx, dw1, db1, dnorm.to(norm_weight.dtype), dw2, db2, dhyper.to(hyper.dtype).contiguous()


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    image, ctx.height, *tensors, ctx.eps = inputs
    ctx.save_for_backward(image, *tensors)


def _gradient(ctx: Any, grad_logits: Tensor) -> tuple[Tensor | None, ...]:
    image, *tensors = ctx.saved_tensors
    dx, dw1, db1, dnorm, dw2, db2, dhyper = _upscale_backward(grad_logits, image, ctx.height, *tensors, ctx.eps)
    return dx, None, dw1, db1, dnorm[0], dnorm[1], dw2, db2, dhyper, None


_upscale.register_autograd(_gradient, setup_context=_setup)


def mask_upscale(
    image: Tensor,
    height: int,
    weight1: Tensor,
    bias1: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    hyper: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """Mask logits [G, M, 4h, 4w] of image tokens [G, h w, C]; `hyper` [G, M, C2] holds the masks that are wanted.

    weight1 [C, C1, 2, 2] and weight2 [C1, C2, 2, 2] are the transposed convolutions'. ValueError naming the argument.
    """
    (G, N, C), (C1, C2) = image.shape, weight2.shape[:2]
    if height < 1 or N % height:
        raise ValueError(f"height must divide the {N} image tokens, not {height}")
    shapes = {"weight1": (C, C1, 2, 2), "bias1": (C1,), "norm_weight": (C1,), "norm_bias": (C1,), "weight2": (C1, C2, 2, 2)}
    shapes |= {"bias2": (C2,), "hyper": (G, hyper.shape[1], C2)}
    tensors = (weight1, bias1, norm_weight, norm_bias, weight2, bias2, hyper)
    for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, not {list(tensor.shape)}")
    image, *others = in_one_type(image, *tensors)
    upscale: Any = mask_upscale_reference if exports_reference(image) else _upscale
    return upscale(image, height, *others, eps)
