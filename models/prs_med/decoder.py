"""PRS-Med's mask decoders: an image embedding that attends to the language model's states becomes a mask (arXiv 2505.11872).

    image embedding [B, C, h, w], prompt states [B, T, H] -> mask logits [B, 1, S, S]

`PromptedMaskDecoder` is the published one, under the keys of `mask_decoder.pth`; `PooledMaskDecoder` is the one the paper's text
describes, on 16 x 16 image tokens. Neither has positional encodings. Two oddities are kept because the published weights were
trained with them: 1 x 1 convolutions with padding 1, whose border (the bias alone) enters the norm; and `ffn.norm1`, which
nothing uses.

Shape letters: B batch, C channels, h w embedding size, N = h * w image tokens, T prompt tokens, H hidden size, S mask size.
"""

import torch.nn.functional as F
from torch import Tensor, nn

NUM_CLASSES = 6  # brain, breast, lung CT, lung X-ray, skin, polyp: the published order of labels is 0, 1, 2, 3, 4, 5


def class_head(channels: int = 256) -> nn.Sequential:
    """Image embedding [B, C, h, w] -> logits of the six data sets [B, 6]; the keys are those of `cls.pth`."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, NUM_CLASSES))
    head.apply(_initialise)
    return head


class PromptedMaskDecoder(nn.Module):
    """`input_norms`: version 5 of the published code normalises image and prompt and keeps the image as a residual of the cross
    attention; version 6 does neither. `upscale` is the factor from the embedding to the mask."""

    def __init__(
        self, prompt_dim: int = 4096, channels: int = 256, upscale: int = 16, input_norms: bool = True, dropout: float = 0.1
    ):
        super().__init__()
        self.upscale = upscale
        self.prompt_projection = nn.Sequential(
            nn.Linear(prompt_dim, 2 * channels),
            nn.LayerNorm(2 * channels),
            nn.ReLU(),
            nn.Linear(2 * channels, channels),
            nn.LayerNorm(channels),
            nn.ReLU(),
        )
        self.image_norm = nn.LayerNorm(channels) if input_norms else None
        self.prompt_norm = nn.LayerNorm(channels) if input_norms else None
        self.attn = nn.MultiheadAttention(channels, 8, batch_first=True)
        self.norm1 = nn.LayerNorm(channels)
        self.encoder_layer = nn.TransformerEncoderLayer(channels, 16, 2 * channels, dropout, batch_first=True)
        self.ffn = FeedForward(channels)
        self.mask_generation = nn.Sequential(
            MaskBlock(channels, channels), MaskBlock(channels, channels // 2), MaskBlock(channels // 2, channels // 4)
        )
        self.out_dec = nn.Conv2d(channels // 4, 1, 1)
        self.prompt_projection.apply(_initialise)

    def forward(self, image_embeddings: Tensor, prompt_states: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
        """prompt_mask [B, T] is true at the states that may be attended to; None: all. -> [B, 1, upscale * h, upscale * w]."""
        prompt = self.prompt_projection(prompt_states)  # [B, T, C]
        image = image_embeddings.flatten(2).transpose(1, 2)  # [B, N, C]
        if self.image_norm is not None and self.prompt_norm is not None:
            prompt, image = self.prompt_norm(prompt), self.image_norm(image)

        ignored = None if prompt_mask is None else ~prompt_mask
        attended, _ = self.attn(image, prompt, prompt, key_padding_mask=ignored, need_weights=False)
        x = self.norm1(attended + image if self.image_norm is not None else attended)
        x = self.ffn(self.encoder_layer(x))

        x = x.transpose(1, 2).view_as(image_embeddings) + image_embeddings
        logits = self.out_dec(self.mask_generation(x))  # [B, 1, h, w]
        return F.interpolate(logits, scale_factor=self.upscale, mode="bilinear", align_corners=True)


class FeedForward(nn.Module):
    """LayerNorm(relu(W2 (relu(W1 x) + x))) on [B, N, C]."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, channels)
        self.fc2 = nn.Linear(channels, channels)
        self.norm = nn.LayerNorm(channels)
        self.norm1 = nn.LayerNorm(channels).requires_grad_(False)  # only a key of the published file

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(F.relu(self.fc2(F.relu(self.fc1(x)) + x)))


class MaskBlock(nn.Module):
    """[B, in_channels, h, w] -> [B, channels, h, w]; between the second and third convolution the map has a border of one pixel."""

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, in_channels, 3, padding=1)
        self.bn1 = nn.InstanceNorm2d(in_channels, affine=True)
        self.conv2 = nn.Conv2d(in_channels, channels, 1, padding=1)
        self.bn2 = nn.InstanceNorm2d(channels, affine=True)
        self.conv3 = nn.Conv2d(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x))) + x
        return self.conv3(self.bn2(self.conv2(x)))


class PooledMaskDecoder(nn.Module):
    """The paper's decoder: 16 x 16 image tokens attend to the prompt, then transposed convolutions double the size to
    `image_size` (six times for 1024)."""

    def __init__(self, prompt_dim: int = 4096, channels: int = 256, image_size: int = 1024):
        super().__init__()
        self.proj_image = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.GELU(), nn.BatchNorm2d(channels))
        self.proj_text = nn.Sequential(nn.Linear(prompt_dim, channels), nn.GELU(), nn.LayerNorm(channels))
        self.norm = nn.LayerNorm(channels)  # of queries and of keys
        self.attn = nn.MultiheadAttention(channels, 8, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
        )
        self.fuse = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.GELU(), nn.BatchNorm2d(channels))
        widths = [max(4, channels >> i) for i in range((image_size // 16).bit_length())]
        stages = [_doubling(a, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
        self.upscale = nn.Sequential(*stages, nn.Conv2d(widths[-1], 1, 1))

    def forward(self, image_embeddings: Tensor, prompt_states: Tensor, prompt_mask: Tensor | None = None) -> Tensor:
        """As `PromptedMaskDecoder.forward`, -> [B, 1, image_size, image_size]."""
        pooled = block_means(image_embeddings, 16)
        image = self.proj_image(pooled).flatten(2).transpose(1, 2)  # [B, 256, C]
        prompt = self.norm(self.proj_text(prompt_states))  # [B, T, C]

        ignored = None if prompt_mask is None else ~prompt_mask
        x = image + self.attn(self.norm(image), prompt, prompt, key_padding_mask=ignored, need_weights=False)[0]
        x = x + self.mlp(x)
        return self.upscale(self.fuse(x.transpose(1, 2).view_as(pooled) + pooled))


def block_means(x: Tensor, side: int) -> Tensor:
    """[B, C, h, w] -> [B, C, side, side], the means of equal blocks; `side` divides h and w.

    Adaptive average pooling, whose gradient has no deterministic implementation on a GPU.
    """
    return x.unflatten(3, (side, -1)).unflatten(2, (side, -1)).mean((3, 5))


def _doubling(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(in_channels, channels, 4, 2, 1), nn.BatchNorm2d(channels), nn.ReLU())


def _initialise(module: nn.Module) -> None:
    """As the published code starts: Xavier weights; biases, and gain and bias of norms, at one."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
    if isinstance(module, nn.Linear | nn.LayerNorm):
        nn.init.ones_(module.bias)
