"""Uni-MedVLM as a policy: what rollouts, GRPO and training with masks need. Fulfils `engine.rollout.policy.GroundingPolicy`.

Letters: B prompts, G answers a prompt, N = B * G, T answer tokens, H hidden size, V tokens, M masks.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from models.decoder.decoding import Decoding, Rooms
from models.decoder.feature_cache import FeatureCache
from models.decoder.kv_cache import RolloutCache
from models.decoder.shared_prefix import UNREAD_MASK, attend_by_prefix, prefix_layout
from models.decoder.starting_point import StartingPoint
from models.uni_medvlm.experts import MixtureOfExperts
from models.uni_medvlm.model import UniMedVLM
from models.uni_medvlm.processor import UniMedProcessor
from models.uni_medvlm.prompts import EncodedPrompt, ImageInputs, PromptBatch
from models.uni_medvlm.tokens import SEG

FEATURE_CACHE_BYTES = 1 << 30  # of the towers' features, 1.2 MB an image in bf16, and as much for SAM's


class UniMedPolicy:
    """A model and its processor."""

    def __init__(self, model: UniMedVLM, processor: UniMedProcessor):
        self.model, self.processor = model, processor
        model.processor = processor
        self.features, self.embeddings = FeatureCache(FEATURE_CACHE_BYTES), FeatureCache(FEATURE_CACHE_BYTES)
        self.rooms = Rooms()

    @property
    def device(self) -> torch.device:
        return self.model.llm.get_output_embeddings().weight.device

    @property
    def layers(self) -> nn.ModuleList:
        """The language model's."""
        return self.model.llm.get_decoder().layers

    @property
    def repeated_layers(self) -> dict[str, list[nn.Module]]:
        """The language model's and the ViT's. Of layers with experts the attention alone: they note their routing by number."""
        return {
            "language model": [layer.self_attn if _has_experts(layer) else layer for layer in self.layers],
            "vision tower": [*self.model.vision_tower.vision_tower.encoder.layers],
        }

    def attend_by(self, provider: str) -> None:
        """Have its language model attend by another of `kernels.prefix_providers.PROVIDERS`."""
        attend_by_prefix(self.model.llm.get_decoder().config, provider)

    @property
    def eos_token_ids(self) -> list[int]:
        """Every id that ends an answer: the generation config's and the tokenizer's."""
        return self.model.end_ids

    @property
    def pad_token_id(self) -> int:
        pad = self.processor.tokenizer.pad_token_id
        return pad if pad is not None else self.processor.tokenizer.eos_token_id

    @property
    def repetition_penalty(self) -> float:
        return self.model.llm.generation_config.repetition_penalty or 1.0

    @property
    def seg_token_id(self) -> int:
        """The token for which a mask is drawn."""
        return self.model.token_id(SEG)

    def batch(self, encoded: list[EncodedPrompt]) -> PromptBatch:
        """What `processor.encode` made of B prompts, on the model's device."""
        ids = pad_sequence([one.input_ids for one in encoded], True, self.pad_token_id, "left")
        mask = pad_sequence([torch.ones_like(one.input_ids) for one in encoded], True, 0, "left")
        return PromptBatch(ids, mask, [one.image for one in encoded]).to(self.device)

    def prefill(self, batch: PromptBatch, num_answers: int, max_new_tokens: int) -> tuple[Decoding, Tensor]:
        """One pass over each prompt -> (decoding state of N answers, logits of their first token (N, V))."""
        parts = self.model.decoding_parts()
        cache = RolloutCache(len(self.model.llm.get_decoder().layers))
        if self.model.ledger is not None:
            self.model.ledger.real_tokens = batch.attention_mask
        out = parts.decoder(
            inputs_embeds=self.model.embed_prompt(batch, self.image_features(batch)),
            position_ids=batch.position_ids,
            attention_mask=UNREAD_MASK,
            past_key_values=cache,
            use_cache=True,
            layout=prefix_layout(batch.attention_mask, 0),
        )
        logits = parts.head(out.last_hidden_state[:, -1]).float()
        decoding = self.rooms.begin(parts, cache, batch.attention_mask, batch.next_position, num_answers, max_new_tokens)
        return decoding, logits.repeat_interleave(num_answers, 0)

    def image_features(self, batch: PromptBatch) -> list[Tensor]:
        """Of each image its features; while the towers and CVFMs are frozen, those of images with a key are kept across steps."""
        if not self._towers_are_frozen:
            return self.model.image_features(batch.shown)
        return self._kept(self.features, batch.shown, torch.no_grad()(self.model.image_features))

    @property
    def _towers_are_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.model.vision_tower.parameters())

    @staticmethod
    def _kept(cache: FeatureCache, images: list[ImageInputs], compute: Any) -> list[Tensor]:
        if not all(image.key for image in images):
            return list(compute(images))
        keys = [(image.key, len(image.views.images_vit)) for image in images]
        if images and images[0].sam_pixels.device.type == "cpu":
            # One by one: rounding depends on a batch's size, and a resumed run, which has kept none, is the same to the last bit.
            return cache.of(keys, lambda places: [compute([images[place]])[0] for place in places])
        return cache.of(keys, lambda places: compute([images[place] for place in places]))

    def answer_inputs(self, batch: PromptBatch, answer_ids: Tensor) -> dict[str, Any]:
        """Keyword arguments for `model(...)`: the shared-prefix forward of answers (B, G, T) after their prompts."""
        return {
            "prompt": batch,
            "answer_ids": answer_ids,
            "features": self.image_features(batch) if self._towers_are_frozen else None,
        }

    def mask_logits(self, batch: PromptBatch, states: Tensor, rows: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """states (M, H) that predict a `<SEG>`, each of the prompt rows[m] -> M mask logits [height, width], each of its image's
        size, float32, and the IoU (M,) that the decoder expects of them. To be called where `model(...)` calls its head.

        ValueError for a prompt without an image.
        """
        images = [image for image in (batch.images[row] for row in rows) if image is not None]
        if len(images) < len(rows):
            raise ValueError("a mask of a prompt that has no image")
        return self.model.decode_masks(states, self._kept(self.embeddings, images, self.model.sam_embeddings), images)

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether its layers have experts."""
        return self.model.ledger is not None

    def auxiliary_loss(self) -> Tensor | None:
        """What the routers of the last forward add to any loss; None without experts."""
        ledger, settings = self.model.ledger, self.model.settings
        return None if ledger is None else ledger.auxiliary_loss(settings.balance, settings.z)

    def forget_images(self) -> None:
        """Drop kept image features: the weights have changed from outside."""
        self.features.clear()
        self.embeddings.clear()

    def reference(self) -> "UniMedPolicy":
        """This policy as it is now, seen through the same networks: only what is trained is copied."""
        return _AsItWas(self)

    def as_reference(self) -> AbstractContextManager[None]:
        """Context in which `model(...)` computes with this policy's own weights."""
        return nullcontext()


def _has_experts(layer: Any) -> bool:
    return isinstance(layer.mlp, MixtureOfExperts)


class _AsItWas(UniMedPolicy):
    def __init__(self, policy: UniMedPolicy):
        vars(self).update(vars(policy))
        self._start = StartingPoint(policy.model)

    def as_reference(self) -> AbstractContextManager[None]:
        return self._start.in_place()
