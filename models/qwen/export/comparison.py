"""The exported parts, run one after another as the binary runs them, against transformers' `generate`: logits and greedy tokens."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from models.exported import Run
from models.qwen.export.image_layout import patch_positions, patch_windows
from models.qwen.export.networks import attention
from models.qwen.policy import QwenVLPolicy
from models.qwen.processor import Message
from models.qwen.prompts import EncodedPrompt

TOLERANCE, HALF_TOLERANCE = 1e-4, 2e-2  # of logits: the largest difference; in half types that, relative to the largest logit
NUM_TOKENS = 12
QUESTIONS = ["What is shown?", "Which imaging technique is this?\nA) CT, B) MRI", "No image here. Answer briefly."]
IMAGES = [(84, 140), (211, 97), None]  # width and height


class Comparison:
    """Of a policy in eval mode; `cache`: the shape of a layer's cache."""

    def __init__(self, policy: QwenVLPolicy, cache: tuple[int, ...]):
        self.policy, self.cache = policy, cache
        self.model: Any = policy.base

    @torch.no_grad()
    def compare(self, runs: Mapping[str, Run]) -> dict[str, Any]:
        """Greedy answers to three prompts; ValueError, one line, where logits or tokens are not those of `generate`."""
        worst, half = 0.0, self.model.lm_head.weight.dtype != torch.float32
        for number, (question, size) in enumerate(zip(QUESTIONS, IMAGES, strict=True)):
            encoded = self._encode(question, size)
            tokens, logits = self._expected(encoded)
            found = self._run(encoded, tokens, runs)
            error = (found.double() - logits.double()).abs().max().item() / (logits.abs().max().item() if half else 1.0)
            if not error <= (HALF_TOLERANCE if half else TOLERANCE):
                raise ValueError(f"prompt {number}: logits differ from generate's by {error:.3g}; nothing is written")
            if not half and found.argmax(-1).tolist() != tokens:
                raise ValueError(f"prompt {number}: the greedy tokens are not generate's; nothing is written")
            worst = max(worst, error)
        return {"logits_error": worst, "greedy_prompts": len(QUESTIONS), "greedy_tokens_equal": not half}

    def _encode(self, question: str, size: tuple[int, int] | None) -> EncodedPrompt:
        text = [{"type": "text", "text": question}]
        prompt: list[Message] = [{"role": "user", "content": [{"type": "image"}, *text] if size else text}]
        return self.policy.processor.encode(prompt, [_picture(*size)] if size else [])

    def _expected(self, encoded: EncodedPrompt) -> tuple[list[int], Tensor]:
        """transformers' greedy tokens, as far as they go, and the logits (steps, V) that they were taken from."""
        batch = self.policy.batch([encoded])
        images: dict[str, Any] = {}
        if batch.pixel_values:
            images = {"pixel_values": torch.cat(batch.pixel_values), "image_grid_thw": torch.stack(batch.image_grid_thw)}
        with ExitStack() as stack:
            for module in (self.model.model.visual, self.model.model.language_model):
                stack.enter_context(attention(module, "sdpa"))
            out: Any = self.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                mm_token_type_ids=(batch.input_ids == self.model.config.image_token_id).int(),
                **images,
                max_new_tokens=NUM_TOKENS,
                do_sample=False,
                repetition_penalty=1.0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        return out.sequences[0, batch.input_ids.shape[1] :].tolist(), torch.cat(out.logits)

    def _run(self, encoded: EncodedPrompt, tokens: list[int], runs: Mapping[str, Run]) -> Tensor:
        """The exported parts' logits (steps, V) where the answer goes on with these tokens."""
        batch = self.policy.batch([encoded])
        device, dtype = self.policy.device, self.model.lm_head.weight.dtype
        features = torch.zeros(1, self.model.lm_head.in_features, device=device, dtype=dtype)
        if batch.pixel_values:
            features = self._features(batch.pixel_values[0], batch.image_grid_thw[0], runs)
        layers = range(self.model.config.text_config.num_hidden_layers)
        caches = {f"cache_{layer}": torch.zeros(self.cache, device=device, dtype=dtype) for layer in layers}
        given = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "features": features}
        logits = [runs["prefill"](given | caches)[0]]
        for step, token in enumerate(tokens[:-1]):
            length = batch.input_ids.shape[1] + step + 1
            position = (batch.next_position + step).expand(3, 1, 1).contiguous()
            one = {"input_ids": torch.tensor([[token]], device=device), "position_ids": position}
            logits.append(runs["decode"](one | {"slots": torch.arange(length, device=device)} | caches)[0])
        return torch.cat(logits)

    def _features(self, values: Tensor, grid: Tensor, runs: Mapping[str, Run]) -> Tensor:
        of = self.policy.processor.image_processor
        _, rows, columns = grid.tolist()
        positions = patch_positions(rows, columns, of.merge_size)
        given = {"patches": values.view(*positions.shape[:2], -1).to(self.model.lm_head.weight.dtype), "positions": positions}
        tower = self.model.config.vision_config
        if self.model.config.model_type == "qwen2_5_vl":
            windows, slots = patch_windows(positions, columns, tower.window_size // tower.patch_size)
            given |= {"windows": windows, "slots": slots}
        return runs["vision"]({name: x.to(self.policy.device) for name, x in given.items()})[0]


def _picture(width: int, height: int) -> Image.Image:
    """Colours that run across it."""
    x, y = torch.meshgrid(torch.linspace(0, 255, width), torch.linspace(0, 255, height), indexing="xy")
    return Image.fromarray(torch.stack([x, y, (x + y) / 2], dim=-1).to(torch.uint8).numpy())
