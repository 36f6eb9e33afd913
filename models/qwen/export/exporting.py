"""A Qwen-VL policy as what a bundle is made of: parts, the ranges of their dimensions, and what the binaries read of it.

Letters as in `models.qwen.export.networks`.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from models.exported import Exported, Part, Source
from models.qwen.export.chat import chat_segments
from models.qwen.export.comparison import Comparison
from models.qwen.export.networks import Decode, Prefill, VisionTower
from models.qwen.policy import QwenVLPolicy
from models.qwen.processor import IMAGE_TOKEN, MAX_ASPECT

MOST_TOKENS = 4096  # of prompt and answer: what the caches have room for
MOST_IMAGE_TOKENS = 1024  # larger images are made smaller, as the processor does with images beyond its own limit


def export_qwen(policy: QwenVLPolicy, source: Source) -> Exported:
    """The parts of a policy in eval mode, without adapters; `source` is where its weights come from.

    The policy's processor is given the bundle's limit of pixels. CheckpointError where the chat template has another form.
    """
    model, processor = policy.base.eval(), policy.processor
    config: Any = model.config
    capacity = min(config.text_config.max_position_embeddings, MOST_TOKENS)
    _limit_pixels(processor.image_processor, min(MOST_IMAGE_TOKENS, capacity // 2))
    sizes = _Sizes(policy, capacity)
    facts = {
        "preprocessing": _preprocessing(policy, sizes.side),
        "chat": {
            **chat_segments(processor),
            "image_token": IMAGE_TOKEN,
            "image_token_id": config.image_token_id,
            "eos_token_ids": policy.eos_token_ids,
            "repetition_penalty": policy.repetition_penalty,
        },
        **source.facts(config.model_type),
    }
    files = {"tokenizer.json": processor.tokenizer.backend_tokenizer.to_str().encode("utf-8")}
    return Exported("vlm", sizes.parts(), sizes.ranges(), facts, files, Comparison(policy, sizes.cache).compare)


def _limit_pixels(image_processor: Any, most_tokens: int) -> None:
    size = dict(image_processor.size)
    size["longest_edge"] = min(size["longest_edge"], most_tokens * (image_processor.patch_size * image_processor.merge_size) ** 2)
    size["shortest_edge"] = min(size["shortest_edge"], size["longest_edge"])
    image_processor.size = type(image_processor.size)(**size)


def _preprocessing(policy: QwenVLPolicy, side: int) -> dict[str, Any]:
    """What the image processor does, in words and numbers: Pillow's filter on whole numbers, then (x * scale - mean) / std."""
    of = policy.processor.image_processor
    return {
        "kind": "qwen",
        "patch_size": of.patch_size,
        "merge_size": of.merge_size,
        "temporal_patch_size": of.temporal_patch_size,
        "window_size": side,  # in patches; 0: no windows
        "min_pixels": of.size["shortest_edge"],
        "max_pixels": of.size["longest_edge"],
        "most_aspect": MAX_ASPECT,
        "filter": {2: "bilinear", 3: "bicubic"}[int(of.resample)],
        "antialias": True,
        "scale": of.rescale_factor,
        "mean": list(of.image_mean),
        "std": list(of.image_std),
    }


class _Sizes:
    """The parts with their shapes, and seeded inputs for any sizes of their dimensions."""

    def __init__(self, policy: QwenVLPolicy, capacity: int):
        self.model, self.processor, self.capacity = policy.base, policy.processor.image_processor, capacity
        config: Any = self.model.config
        text, tower = config.text_config, config.vision_config
        self.dtype = self.model.lm_head.weight.dtype
        self.hidden, self.vocabulary = self.model.lm_head.in_features, self.model.lm_head.out_features
        self.cache = (2, text.num_key_value_heads, capacity, text.hidden_size // text.num_attention_heads)
        self.names = [f"cache_{layer}" for layer in range(text.num_hidden_layers)]
        self.square = self.processor.merge_size**2
        self.values = 3 * self.processor.temporal_patch_size * self.processor.patch_size**2
        windowed = config.model_type == "qwen2_5_vl"
        self.side = tower.window_size // tower.patch_size if windowed else 0
        self.most_image_tokens = min(policy.processor._most_tokens(), capacity - 2)

    def ranges(self) -> dict[str, tuple[int, int]]:
        """A cache has room for one token more than any run fills, so that no size is all of it, which a graph would be bound to."""
        image, most = (1, self.most_image_tokens), self.capacity - 1
        windows = {"windows": image} if self.side else {}
        return {"image_tokens": image, **windows, "features": (1, most), "tokens": (2, most), "length": (2, most)}

    def parts(self) -> list[Part]:
        caches = dict.fromkeys(self.names, self.cache)
        windows = {"windows": ("windows", self.side**2), "slots": ("image_tokens", self.square)} if self.side else {}
        patches = {"patches": ("image_tokens", self.square, self.values), "positions": ("image_tokens", self.square, 2), **windows}
        prompt = {"input_ids": (1, "tokens"), "position_ids": (3, 1, "tokens"), "features": ("features", self.hidden), **caches}
        token = {"input_ids": (1, 1), "position_ids": (3, 1, 1), "slots": ("length",), **caches}
        logits = {"logits": (1, self.vocabulary)}
        features = {"features": ("image_tokens", self.hidden)}
        return [
            Part("vision", VisionTower(self.model).eval(), patches, features, self.draw_image),
            Part("prefill", Prefill(self.model).eval(), prompt, logits, self.draw_prompt),
            Part("decode", Decode(self.model).eval(), token, logits, self.draw_token),
        ]

    def draw_image(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        n, square = sizes["image_tokens"], self.square
        drawn = {
            "patches": torch.randn(n, square, self.values, generator=generator).to(self.dtype),
            "positions": torch.randint(0, 2 * n, (n, square, 2), generator=generator),
        }
        if not self.side:
            return drawn
        # Any patches may share a window here; the first has one at least, and none is empty.
        windows = torch.randint(-1, n * square, (sizes["windows"], self.side**2), generator=generator)
        windows[:, 0] = torch.randint(0, n * square, (sizes["windows"],), generator=generator)
        slots = torch.randint(0, windows.numel(), (n, square), generator=generator)
        return {**drawn, "windows": windows, "slots": slots}

    def draw_prompt(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        T, most = sizes["tokens"], sizes["features"]
        ids = torch.randint(0, self.vocabulary, (1, T), generator=generator)
        ids[0, 1 : 1 + min(most, T // 2)] = self.model.config.image_token_id
        positions = torch.randint(0, T, (3, 1, T), generator=generator)
        features = torch.randn(most, self.hidden, generator=generator).to(self.dtype)
        return {"input_ids": ids, "position_ids": positions, "features": features, **self._caches(generator)}

    def draw_token(self, sizes: Mapping[str, int], generator: torch.Generator) -> dict[str, Tensor]:
        length = sizes["length"]
        ids = torch.randint(0, self.vocabulary, (1, 1), generator=generator)
        positions = torch.full((3, 1, 1), length)
        return {"input_ids": ids, "position_ids": positions, "slots": torch.arange(length), **self._caches(generator)}

    def _caches(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.randn(self.cache, generator=generator).to(self.dtype) for name in self.names}
