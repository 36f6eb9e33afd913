"""SAM's two-way transformer: prompt tokens attend to the image and the image to them (arXiv 2304.02643, appendix A).

Shape letters: G prompts of all images, X images (or G where every prompt has its own image tokens), T tokens of a prompt,
N image tokens, C channels (256).

Prompts of an image share its tokens until the first block has written to them. Keys and values of the first block are
therefore projected once an image, and its prompts' tokens stand side by side as query rows of one attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.mask_attention import image_to_token, token_to_image


class Projections(nn.Module):
    """The projections of an attention with `inner` channels over the heads."""

    def __init__(self, channels: int, inner: int, num_heads: int):
        super().__init__()
        self.num_heads, self.scale = num_heads, (inner // num_heads) ** -0.5
        self.q_proj = nn.Linear(channels, inner)
        self.k_proj = nn.Linear(channels, inner)
        self.v_proj = nn.Linear(channels, inner)
        self.out_proj = nn.Linear(inner, channels)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


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
        absorbed = torch.einsum("gthd,hdc->ghtc", self._heads(self.q_proj(tokens) * self.scale), self._by_head(self.k_proj))
        y = token_to_image(absorbed.flatten(1, 2), image, image_pe).view(G, self.num_heads, T, C)
        y = torch.einsum("ghtc,hdc->gthd", y, self._by_head(self.v_proj)).flatten(2)
        return self.out_proj(y + self.v_proj.bias)

    def _by_head(self, projection: nn.Linear) -> Tensor:
        return projection.weight.unflatten(0, (self.num_heads, -1))


class ImageToToken(Projections):
    """Image tokens [X, N, C] attend to tokens [G, T, C]: z [G, N, C] = norm(image + attention)."""

    def forward(self, image: Tensor, image_pe: Tensor, keys: Tensor, values: Tensor, norm: nn.LayerNorm) -> Tensor:
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
