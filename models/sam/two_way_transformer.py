"""SAM's two-way transformer: prompt tokens attend to the image and the image to them (arXiv 2304.02643, appendix A).

Shape letters: G prompts of all images, X images (or G where every prompt has its own image tokens), T tokens of a prompt,
N image tokens, C channels (256).

Prompts of an image share its tokens until the first block has written to them. Keys and values of the first block are
therefore projected once an image, and its prompts' tokens stand side by side as query rows of one attention.

Elsewhere the image side's projections move to the token side (kernels/mask_attention.py), where they follow or precede another
one. In evaluation on a GPU the two are one matrix a head, made once and kept: see `Projections.folded`.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.mask_attention import image_to_token, token_to_image

FOLDED_ON = ("cuda",)  # where a launch saved is worth eight times the work on the tokens: 72 launches instead of 97 for a prompt


class Projections(nn.Module):
    """The projections of an attention with `inner` channels over the heads."""

    def __init__(self, channels: int, inner: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale = num_heads, (inner // num_heads) ** -0.5
        self.q_proj = nn.Linear(channels, inner)
        self.k_proj = nn.Linear(channels, inner)
        self.v_proj = nn.Linear(channels, inner)
        self.out_proj = nn.Linear(inner, channels)
        self._made_from: list[tuple[Tensor, int]] = []
        self._made: tuple[Tensor, ...] = ()

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))

    def fold(self) -> tuple[Tensor, ...]:
        """What `folded` keeps: a function of the weights alone."""
        raise NotImplementedError

    def folded(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """`fold()` of the weights as they are, for an input x, computed once and kept until they change or `train` is called.

        None on a CPU and where the projections themselves are needed: for gradients, in training, in a traced graph, under
        autocast (whose casts follow each weight), and where they are not all plain linear layers. A change is seen by where a
        weight lies and by its version; writing through `weight.data` in evaluation changes neither.
        """
        device = x.device.type
        if device not in FOLDED_ON or self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        plain = all(type(child) is nn.Linear for child in self.children())
        weights = [weight.detach() for weight in self.parameters()]
        if not plain or torch.is_autocast_enabled(device) or any(weight.is_inference() for weight in weights):
            return None
        # What they were made from is held, so that no other weights can come to lie there.
        made_from = self._made_from or [(torch.empty(0), 0)] * len(weights)
        pairs = zip(weights, made_from, strict=True)
        if any(a.data_ptr() != b.data_ptr() or a._version != version for a, (b, version) in pairs):
            self._made, self._made_from = self.fold(), [(weight, weight._version) for weight in weights]
        return self._made

    def train(self, mode: bool = True) -> Self:
        self._made, self._made_from = (), []
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        """Of copies and pickles, which make their own matrices."""
        return self.__dict__ | {"_made": (), "_made_from": []}


def folded_matrices(module: nn.Module) -> list[Tensor]:
    """All that its parts keep by `Projections.folded`."""
    return [matrix for part in module.modules() if isinstance(part, Projections) for matrix in part._made]


class Attention(Projections):
    """[X, rows, C], [X, keys, C], [X, keys, C] -> [X, rows, C]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (self._heads(x).transpose(1, 2) for x in (self.q_proj(q), self.k_proj(k), self.v_proj(v)))
        y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class TokenToImage(Attention):
    """Tokens [G, T, C] attend to image tokens [X, N, C]."""

    def forward(self, tokens: Tensor, image: Tensor, image_pe: Tensor) -> Tensor:
        X, (G, T, C) = image.shape[0], tokens.shape
        if G > X:
            return super().forward(tokens.reshape(X, -1, C), image + image_pe, image).view(G, T, C)
        # One prompt an image: the key projection moves to the queries, the value projection behind the sum (mask_attention).
        if folded := self.folded(tokens):
            to_rows, row_bias, to_output, output_bias = folded
            rows = F.linear(tokens, to_rows, row_bias).view(G, -1, C)  # a token's heads side by side: rows have no order
            y = token_to_image(rows, image, image_pe)
            return F.linear(y.view(G, T, -1), to_output, output_bias)
        absorbed = torch.einsum("gthd,hdc->ghtc", self._heads(self.q_proj(tokens) * self.scale), self._by_head(self.k_proj))
        y = token_to_image(absorbed.flatten(1, 2), image, image_pe).view(G, self.num_heads, T, C)
        y = torch.einsum("ghtc,hdc->gthd", y, self._by_head(self.v_proj)).flatten(2)
        return self.out_proj(y + self.v_proj.bias)

    def fold(self) -> tuple[Tensor, ...]:
        """scale Wk^T Wq [heads C, C] and its bias, Wo Wv [C, heads C] and its bias, summed in float32 or wider."""
        weights = (
            self._by_head(self.q_proj),
            self._by_head(self.k_proj),
            self._by_head(self.v_proj),
            self._heads(self.out_proj.weight),
        )
        q, k, v, out = (wide(weight) for weight in weights)
        q_bias = wide(self._heads(self.q_proj.bias))
        to_rows = self.scale * torch.einsum("hdk,hdc->hkc", k, q).flatten(0, 1)
        row_bias = self.scale * torch.einsum("hdk,hd->hk", k, q_bias).flatten()
        to_output = torch.einsum("ohd,hdc->ohc", out, v).flatten(1)
        output_bias = torch.einsum("ohd,hd->o", out, wide(self._heads(self.v_proj.bias))) + wide(self.out_proj.bias)
        return tuple(made.to(self.q_proj.weight.dtype) for made in (to_rows, row_bias, to_output, output_bias))

    def _by_head(self, projection: nn.Linear) -> Tensor:
        return projection.weight.unflatten(0, (self.num_heads, -1))


class ImageToToken(Projections):
    """Image tokens [X, N, C] attend to tokens [G, T, C]: z [G, N, C] = norm(image + attention)."""

    def forward(self, image: Tensor, image_pe: Tensor, keys: Tensor, values: Tensor, norm: nn.LayerNorm) -> Tensor:
        if folded := self.folded(keys):
            to_key, shift_key, to_bias, shift_bias, to_value, shift_value = folded
            absorbed_k, absorbed_v = self._by_head(keys, to_key, shift_key), self._by_head(values, to_value, shift_value)
            key_bias = self._by_head(keys, to_bias, shift_bias).squeeze(-1)
        else:
            k, v = self._heads(self.k_proj(keys) * self.scale), self._heads(self.v_proj(values))  # [G, T, heads, d]
            absorbed_k = torch.einsum("gthd,hdc->ghtc", k, self.q_proj.weight.unflatten(0, (self.num_heads, -1)))
            absorbed_v = torch.einsum("gthd,chd->ghtc", v, self.out_proj.weight.unflatten(1, (self.num_heads, -1)))
            absorbed_v = absorbed_v + self.out_proj.bias / self.num_heads  # a head's weights sum to 1
            key_bias = torch.einsum("gthd,hd->ght", k, self._heads(self.q_proj.bias))
        return image_to_token(
            image,
            image_pe,
            absorbed_k.flatten(1, 2),
            key_bias.flatten(1),
            absorbed_v.flatten(1, 2),
            norm.weight,
            norm.bias,
            self.num_heads,
            norm.eps,
        )

    def fold(self) -> tuple[Tensor, ...]:
        """Of each head scale Wk^T Wq [heads, C, C], scale Wk^T bq [heads, C, 1] and Wv^T Wo^T [heads, C, C], each with its bias."""
        q, k, v = (wide(linear.weight.unflatten(0, (self.num_heads, -1))) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q_bias, k_bias, v_bias = (wide(self._heads(linear.bias))[:, None] for linear in (self.q_proj, self.k_proj, self.v_proj))
        k, k_bias, out = (
            self.scale * k.transpose(1, 2),
            self.scale * k_bias,
            wide(self._heads(self.out_proj.weight)).permute(1, 2, 0),
        )
        value = v.transpose(1, 2) @ out
        shift = v_bias @ out + wide(self.out_proj.bias) / self.num_heads  # a head's weights sum to 1
        column = q_bias.transpose(1, 2)
        return tuple(made.to(self.q_proj.weight.dtype) for made in (k @ q, k_bias @ q, k @ column, k_bias @ column, value, shift))

    def _by_head(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """[G, T, C], [heads, C, D] and [heads, 1, D] -> [G, heads, T, D]."""
        rows = x.flatten(0, 1).expand(self.num_heads, -1, -1)
        return torch.baddbmm(bias, rows, weight).unflatten(1, x.shape[:2]).transpose(0, 1)


def wide(x: Tensor) -> Tensor:
    """In float32, or in float64 where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class FeedForward(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.lin1 = nn.Linear(channels, hidden)
        self.lin2 = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin2(F.relu(self.lin1(x)))


class TwoWayBlock(nn.Module):
    """Self-attention of tokens, tokens to image, feed-forward of tokens, image to tokens."""

    def __init__(self, channels: int, num_heads: int, hidden: int):
        super().__init__()
        self.self_attn = Attention(channels, channels, num_heads)
        self.norm1 = nn.LayerNorm(channels)
        self.cross_attn_token_to_image = TokenToImage(channels, channels // 2, num_heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = FeedForward(channels, hidden)
        self.norm3 = nn.LayerNorm(channels)
        self.norm4 = nn.LayerNorm(channels)
        self.cross_attn_image_to_token = ImageToToken(channels, channels // 2, num_heads)

    def forward(self, tokens: Tensor, token_pe: Tensor, image: Tensor, image_pe: Tensor, first: bool) -> tuple[Tensor, Tensor]:
        # The first block's tokens are their own positions: no residual and nothing to add.
        q = tokens if first else tokens + token_pe
        attended = self.self_attn(q, q, tokens)
        tokens = self.norm1(attended if first else tokens + attended)

        tokens = self.norm2(tokens + self.cross_attn_token_to_image(tokens + token_pe, image, image_pe))
        tokens = self.norm3(tokens + self.mlp(tokens))
        image = self.cross_attn_image_to_token(image, image_pe, tokens + token_pe, tokens, self.norm4)
        return tokens, image


class TwoWayTransformer(nn.Module):
    def __init__(self, channels: int = 256, num_heads: int = 8, hidden: int = 2048, depth: int = 2):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(channels, num_heads, hidden) for _ in range(depth))
        self.final_attn_token_to_image = TokenToImage(channels, channels // 2, num_heads)
        self.norm_final_attn = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor, image: Tensor, image_pe: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [G, T, C], image [X, N, C], image_pe [N, C] -> tokens [G, T, C] and image tokens [G, N, C]."""
        token_pe = tokens
        for i, layer in enumerate(self.layers):
            tokens, image = layer(tokens, token_pe, image, image_pe, first=i == 0)
        tokens = tokens + self.final_attn_token_to_image(tokens + token_pe, image, image_pe)
        return self.norm_final_attn(tokens), image
