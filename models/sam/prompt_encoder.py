"""SAM's prompt encoder (arXiv 2304.02643, appendix A): points, boxes, masks, and text embeddings as MedPLIB gives them.

Prompts are batched per image and images are batched: every prompt tensor begins with [B, P].
Shape letters: B images, P prompts of an image, K points of a prompt, L text embeddings of a prompt, C embedding size (256),
h w size of the image embedding, T sparse tokens (K, and 1 more where no box is given; 2 of a box; L).
"""

import math

import torch
from torch import Tensor, nn

from models.sam.layers import LayerNorm2d


class FourierPosition(nn.Module):
    """Random Fourier features of positions in 0-1: [..., 2] as (x, y) -> [..., C]."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, channels // 2))

    def forward(self, position: Tensor) -> Tensor:
        x, y = (2 * position.float() - 1).split(1, dim=-1)
        along_x, along_y = self.positional_encoding_gaussian_matrix.float()
        angle = 2 * math.pi * (x * along_x + y * along_y)  # no matrix product: autocast would round the angle
        return torch.cat([angle.sin(), angle.cos()], dim=-1).to(self.positional_encoding_gaussian_matrix.dtype)


class PromptEncoder(nn.Module):
    """`embedding_size` (h, w) is the image embedding's; `image_size` in pixels is the encoder's input's."""

    def __init__(self, embedding_size: tuple[int, int], image_size: int, channels: int = 256, mask_channels: int = 16):
        super().__init__()
        self.embedding_size, self.image_size = embedding_size, image_size
        self.pe_layer = FourierPosition(channels)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, channels) for _ in range(4))  # negative, positive, two corners
        self.not_a_point_embed = nn.Embedding(1, channels)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_channels // 4, 2, stride=2),
            LayerNorm2d(mask_channels // 4),
            nn.GELU(),
            nn.Conv2d(mask_channels // 4, mask_channels, 2, stride=2),
            LayerNorm2d(mask_channels),
            nn.GELU(),
            nn.Conv2d(mask_channels, channels, 1),
        )
        self.no_mask_embed = nn.Embedding(1, channels)

    def forward(
        self,
        points: Tensor | None = None,
        labels: Tensor | None = None,
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
        text_embeddings: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Sparse tokens [B, P, T, C] and dense embeddings [B, P, C, h, w], or [1, 1, C, h, w] where no mask is given.

        points [B, P, K, 2] as (x, y) in pixels of the encoder's input, labels [B, P, K]: 1 inside, 0 outside, -1 padding;
        boxes [B, P, 4] as x1, y1, x2, y2 in pixels; masks [B, P, 1, 4h, 4w] logits; text_embeddings [B, P, L, C].
        """
        given = [prompt for prompt in (points, boxes, masks, text_embeddings) if prompt is not None]
        if not given or (points is None) != (labels is None):
            raise ValueError("give points with labels, boxes, masks or text_embeddings")
        if len({prompt.shape[:2] for prompt in given}) > 1:
            raise ValueError(f"prompts differ in their [B, P]: {[tuple(prompt.shape[:2]) for prompt in given]}")

        sparse = [self.no_mask_embed.weight.new_zeros(*given[0].shape[:2], 0, self.no_mask_embed.embedding_dim)]
        if points is not None and labels is not None:
            sparse.append(self._embed_points(points, labels, pad=boxes is None))
        if boxes is not None:
            _, _, first, second = self.point_embeddings.parameters()
            sparse.append(self._position(boxes.unflatten(-1, (2, 2))) + torch.cat([first, second]))
        if text_embeddings is not None:
            sparse.append(text_embeddings)

        if masks is not None:
            dense = self.mask_downscaling(masks.flatten(0, 1)).unflatten(0, masks.shape[:2])
        else:
            dense = self.no_mask_embed.weight.view(1, 1, -1, 1, 1).expand(-1, -1, -1, *self.embedding_size)
        return torch.cat(sparse, dim=2), dense

    def _position(self, pixels: Tensor) -> Tensor:
        return self.pe_layer((pixels + 0.5) / self.image_size)

    def _embed_points(self, points: Tensor, labels: Tensor, pad: bool) -> Tensor:
        """[B, P, K (+ 1), C]; without a box one padding point is added, as in training."""
        if pad:
            points = torch.cat([points, torch.zeros_like(points[:, :, :1])], dim=2)
            labels = torch.cat([labels, -torch.ones_like(labels[:, :, :1])], dim=2)
        return self.labelled_points(points, labels)

    def labelled_points(self, points: Tensor, labels: Tensor) -> Tensor:
        """[..., C] of points [..., 2] with labels [...] as `forward` has them, and 2 and 3 for the corners of a box."""
        kinds = torch.cat([self.not_a_point_embed.weight, *self.point_embeddings.parameters()])
        is_point = (labels >= 0).unsqueeze(-1)
        return self._position(points) * is_point + kinds[labels.long() + 1]

    def dense_pe(self) -> Tensor:
        """Position of every cell of the image embedding: [C, h, w]."""
        h, w = self.embedding_size
        device = self.no_mask_embed.weight.device
        y, x = (torch.arange(h, device=device) + 0.5) / h, (torch.arange(w, device=device) + 0.5) / w
        grid = torch.stack([x.expand(h, w), y[:, None].expand(h, w)], dim=-1)
        return self.pe_layer(grid).permute(2, 0, 1)
