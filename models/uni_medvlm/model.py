"""Uni-MedVLM's networks, put together: an image and a question are answered in words, and with a mask for each `<SEG>` among them.

    image -> hybrid encoder -> [N, D] -+-> projector ------------------------> image tokens -+
                                       +-> mean over a region -> adapter ----> region token -+-> language model -> answer
    state that predicts <SEG> -> text_hidden_fcs -+
    image -> SAM-Med2D's encoder (frozen) --------+-> mask decoder -> mask logits

The children have the published names. The state is that before `<SEG>`, from which the model says it, as in LISA and MedPLIB.

Letters: B prompts, G answers a prompt, P prompt tokens, T answer tokens, N patches, D width of the ViT, H of the language model, W
tokens, M masks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.decoder.decoding import LanguageModel
from models.decoder.shared_prefix import UNREAD_MASK, attend_by_prefix, prefix_layout
from models.lora import beneath_adapters
from models.sam.sam import Sam
from models.uni_medvlm.checkpoints.saving import Origin, load_trained, save_checkpoint
from models.uni_medvlm.encoder.hybrid_encoder import HybridEncoder
from models.uni_medvlm.ledger import RoutingLedger
from models.uni_medvlm.prompts import ImageInputs, PromptBatch
from models.uni_medvlm.token_rows import averaged_rows
from models.uni_medvlm.tokens import IMAGE, NEW_TOKENS, REGION_FEATURE

TEXT_EMBEDDING = 256  # width of what prompts the mask decoder
PROJECTORS = ("linear", "mlp2x_gelu")


@dataclass(frozen=True)
class UniMedConfig:
    """What the weights do not say. `projector`: Uni-MedVLM's, or MedPLIB's; `compat`: see `models.uni_medvlm`; `tiling`: FILA's.

    `balance` and `z`: what the routers' losses count beside an answer's.
    """

    projector: str = "linear"
    tiling: bool = False
    compat: str = "default"
    balance: float = 0.01
    z: float = 0.0


class UniMedVLM(nn.Module):
    """`language_model`: a Hugging Face causal LM with a decoder of rotary positions, or that within PEFT; `start`: the id of the
    first of NEW_TOKENS."""

    def __init__(self, vision_tower: HybridEncoder, language_model: nn.Module, visual_model: Sam, start: int, config: UniMedConfig):
        super().__init__()
        self.settings, self.start = config, start  # no `config`: of that name transformers looks for its own
        self.vision_tower, self.language_model, self.visual_model = vision_tower, language_model, visual_model.requires_grad_(False)
        vit: Any = vision_tower.vision_tower.config
        embedding, head = (self.llm.get_input_embeddings().weight, self.llm.get_output_embeddings().weight)
        width, hidden = vit.hidden_size, embedding.shape[1]
        self.mm_projector: nn.Module = nn.Linear(width, hidden)
        if config.projector == "mlp2x_gelu":
            self.mm_projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.region_fea_adapter = nn.Linear(width, hidden)
        two = [nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, TEXT_EMBEDDING), nn.Dropout(0.0)]
        layers = [nn.Linear(hidden, TEXT_EMBEDDING)] if config.compat == "reference" else two
        self.text_hidden_fcs = nn.ModuleList([nn.Sequential(*layers)])
        self.token_rows = averaged_rows(embedding, head, start, len(NEW_TOKENS))
        self.ledger: RoutingLedger | None = None
        self.origin = Origin()
        self.processor: Any = None  # the policy's: checkpoints hold its tokenizer
        attend_by_prefix(self.llm.get_decoder().config)

    def train(self, mode: bool = True) -> "UniMedVLM":
        super().train(mode)
        self.visual_model.image_encoder.eval()
        return self

    @property
    def llm(self) -> Any:
        """The language model beneath PEFT; its layers carry the adapters."""
        return beneath_adapters(self.language_model)

    @property
    def end_ids(self) -> list[int]:
        """Every id that ends an answer: the generation config's and the tokenizer's."""
        ids = self.llm.generation_config.eos_token_id
        own = self.processor.tokenizer.eos_token_id if self.processor is not None else None
        return sorted({i for i in [*(ids if isinstance(ids, list) else [ids]), own] if i is not None})

    def token_id(self, token: str) -> int:
        """The id of one of NEW_TOKENS."""
        return self.start + NEW_TOKENS.index(token)

    def input_embeddings(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., H]."""
        return self.token_rows.embed(ids, self.llm.get_input_embeddings())

    def head_weight(self) -> Tensor:
        """[W, H]."""
        return self.token_rows.head_weight(self.llm.get_output_embeddings().weight)

    def decoding_parts(self) -> LanguageModel:
        """What of it decodes."""
        own, waits = self.llm.get_output_embeddings().weight, self.ledger is not None
        return LanguageModel(
            self.llm.get_decoder(),
            self.input_embeddings,
            lambda x: self.token_rows.logits(x, own),
            own,
            waits=waits,
            beside=(self.token_rows,),
        )

    # ---- what the language model reads -----------------------------------------------------------------------------------

    def image_features(self, images: list[ImageInputs]) -> list[Tensor]:
        """Of each image the features of its views' patches, one view after the other: [views * N, D]."""
        if not images:
            return []
        counts = [len(image.views.images_vit) for image in images]
        features = self.vision_tower(torch.cat([i.views.images_vit for i in images]), [i.views.images_convnext for i in images])
        return [own.flatten(0, 1) for own in features.split(counts)]

    def embed_prompt(self, prompt: PromptBatch, features: list[Tensor]) -> Tensor:
        """Embeddings [B, P, H], image and region features in their tokens' places; `features` as `image_features` gives them."""
        embeds = self.input_embeddings(prompt.input_ids)
        if not features:
            return embeds
        embeds = self._put(embeds, prompt.input_ids == self.token_id(IMAGE), self.mm_projector(torch.cat(features)))
        pairs = zip(prompt.shown, features, strict=True)
        regions = [weights.to(own.dtype) @ own[: len(weights)] for image, own in pairs for weights in image.regions]
        if regions:
            places = prompt.input_ids == self.token_id(REGION_FEATURE)
            embeds = self._put(embeds, places, self.region_fea_adapter(torch.stack(regions)))
        return embeds

    @staticmethod
    def _put(embeds: Tensor, places: Tensor, values: Tensor) -> Tensor:
        return embeds.masked_scatter(places[..., None].expand_as(embeds), values.to(embeds.dtype))

    def forward(
        self,
        prompt: PromptBatch,
        answer_ids: Tensor,
        head: Callable[[Tensor, Tensor], Any],
        features: list[Tensor] | None = None,
    ) -> Any:
        """`head(hidden [B * G, T, H], weight [W, H])`: the states that predict each token of answer_ids [B, G, T], and the head.

        One row a prompt, `[prompt | answer 1 | .. | answer G]`. `features`: what `image_features` gives of the prompts' images.
        """
        _, G, T = answer_ids.shape
        features = self.image_features(prompt.shown) if features is None else features
        embeds = torch.cat([self.embed_prompt(prompt, features), self.input_embeddings(answer_ids.flatten(1))], 1)
        embeds = self._all_used(embeds)
        steps = prompt.next_position[:, None, None] + torch.arange(T, device=answer_ids.device)
        positions = torch.cat([prompt.position_ids, steps.expand(-1, G, T).flatten(1)], 1)
        if self.ledger is not None:
            self.ledger.real_tokens = torch.cat([prompt.attention_mask.bool(), self._said(answer_ids).flatten(1)], 1)
        states = self.llm.get_decoder()(
            inputs_embeds=embeds,
            position_ids=positions,
            attention_mask=UNREAD_MASK,
            use_cache=False,
            layout=prefix_layout(prompt.attention_mask, G),
        ).last_hidden_state
        # The prompt's last state predicts every answer's first token; an answer's last state predicts nothing that is scored.
        P = prompt.input_ids.shape[1]
        first = states[:, None, P - 1 : P].expand(-1, G, -1, -1)
        hidden = torch.cat([first, states[:, P:].unflatten(1, (G, T))[:, :, :-1]], 2).flatten(0, 1)
        return head(hidden, self.head_weight())

    def _all_used(self, embeds: Tensor) -> Tensor:
        """The same, with all that is trained between image and language model in its graph: what a batch does not use, such as the
        regions' adapter, has a gradient of zeros then. Processes that train together wait for each other's."""
        parts = self.vision_tower, self.mm_projector, self.region_fea_adapter
        trained = [parameter.flatten()[0] for part in parts for parameter in part.parameters() if parameter.requires_grad]
        return embeds + torch.stack(trained).sum().to(embeds.dtype) * 0.0 if trained else embeds

    def _said(self, answer_ids: Tensor) -> Tensor:
        """Whether a token of [B, G, T] is part of its answer: none is behind an end token."""
        ends = torch.isin(answer_ids, torch.tensor(self.end_ids, device=answer_ids.device))
        return ends.cumsum(-1) - ends.long() == 0

    # ---- masks -----------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sam_embeddings(self, images: list[ImageInputs]) -> list[Tensor]:
        """Of each image what SAM's encoder makes of it: [C, h, w]."""
        return list(self.visual_model.image_encoder(torch.stack([image.sam_pixels for image in images])))

    def decode_masks(self, states: Tensor, embeddings: list[Tensor], images: list[ImageInputs]) -> tuple[list[Tensor], Tensor]:
        """states [M, H] that predict a `<SEG>`, with the embedding and the image of each -> mask logits [height, width] of each in
        its image's own size, without padding, float32; and the IoU [M] that the decoder expects of them. M may be 0."""
        own = next(self.text_hidden_fcs.parameters()).dtype
        if not images:
            return [], states.new_zeros(0, dtype=torch.float32)
        text = self.text_hidden_fcs[0](states.to(own))[:, None, None]  # [M, 1, 1, 256]: a mask of each image, by one embedding
        masks, iou = self.visual_model.decode(torch.stack(embeddings).to(own), multimask_output=False, text_embeddings=text)
        pairs = zip(images, masks.float(), strict=True)
        return [image.frame.masks(mask[None, 0])[0, 0] for image, mask in pairs], iou.float().flatten()

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Recompute the language model's layers in the backward pass; the embeddings carry the gradient to the first of them."""
        self.llm.gradient_checkpointing_enable(**settings)
        self.llm.enable_input_require_grads()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint folder: see `models.uni_medvlm.checkpoints.saving`."""
        save_checkpoint(self, folder)

    def load_trained(self, folder: str | Path) -> None:
        """Read back such a folder, written by this model or one that was built like it."""
        load_trained(self, folder)
