"""PRS-Med's networks, put together: a question about an image is answered in words and with a mask.

    image, question -> LLaVA-Med with LoRA -> states [B, T, H] -> answer
    image -> TinySAM's image encoder -> [B, 256, 64, 64] -+ states of the prompt -> mask decoder -> mask logits [B, 1, S, S]
                                                          +-> class head -> data set logits [B, 6]

The mask decoder reads the language model's last states of the prompt alone. Attention is causal, so in training one pass over
prompt and answer gives both the states that inference has and the loss of the answer. A checkpoint is a folder:

    lora_adapter/ (PEFT)   tokenizer/   image_encoder.pth   mask_decoder.pth   cls.pth      as the published code writes it
    prs_med.json           what the networks are             vlm/       the VLM itself, where it has no other place

Shape letters: B batch, T tokens, H hidden size, V vocabulary, S side of the encoder's input.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn
from transformers import DynamicCache, LlavaForConditionalGeneration, PreTrainedTokenizerBase

from models.checkpoint import CheckpointError, check_keys, read_json, read_state_dict, reading, refuse_folder_of
from models.llava.decoding import LlavaDecoding, greedy_ids
from models.llava.llava_med import load_llava
from models.lora import beneath_adapters
from models.prs_med.adapters import add_adapters, load_adapters, read_adapters, without_adapters
from models.prs_med.decoder import PooledMaskDecoder, PromptedMaskDecoder, class_head
from models.prs_med.processor import PRSMedProcessor
from models.sam.loading import load_sam
from models.sam.sam import tiny_sam
from models.sam.tiny_vit import ConvBN
from models.starter.encoder import StarterEncoder
from models.tokenizer import check_vocabulary, load_tokenizer

ADAPTERS, TOKENIZER, OWN_VLM, SETTINGS = "lora_adapter", "tokenizer", "vlm", "prs_med.json"
PARTS = ("image_encoder", "mask_decoder", "cls")


class EncoderKind(NamedTuple):
    """An image encoder, [B, 3, image_size, image_size] -> [B, channels, image_size / stride, ..].

    `dropout` is that of the mask decoder which reads it: at 0 its attention is several times faster on a CPU.
    """

    build: Callable[[], nn.Module]
    image_size: int
    stride: int
    channels: int
    dropout: float


ENCODERS = {
    "tiny_sam": EncoderKind(lambda: tiny_sam().image_encoder, 1024, 16, 256, 0.1),
    "starter": EncoderKind(StarterEncoder, 128, 8, 64, 0.0),
}
DECODERS = {
    "v5": lambda hidden, kind: PromptedMaskDecoder(hidden, kind.channels, kind.stride, True, kind.dropout),
    "v6": lambda hidden, kind: PromptedMaskDecoder(hidden, kind.channels, kind.stride, False, kind.dropout),
    "paper": lambda hidden, kind: PooledMaskDecoder(hidden, kind.channels, kind.image_size),
}


@dataclass
class PRSMedConfig:
    """What prs_med.json says.

    `vlm`: folder or hub name, None where the checkpoint holds it itself; `compat`: see `models.prs_med`.
    """

    vlm: str | None = None
    vision_tower: str = "checkpoint"
    image_encoder: str = "tiny_sam"
    decoder: str = "v5"
    compat: str = "default"


class Output(NamedTuple):
    """token_logits [B, T', V] predict token_labels [B, T'] (-100: not counted), T' the text after the image."""

    mask_logits: Tensor
    class_logits: Tensor
    token_logits: Tensor
    token_labels: Tensor


class PRSMed(nn.Module):
    """`vlm` is a LlavaForConditionalGeneration, or that within PEFT. With `frozen_norms` the encoder's BatchNorm keeps its
    statistics in training, since those of small batches would spoil a pretrained encoder."""

    def __init__(self, vlm: nn.Module, tokenizer: PreTrainedTokenizerBase, config: PRSMedConfig):
        super().__init__()
        self.config, self.vlm, self.frozen_norms = config, vlm, False
        kind = ENCODERS[config.image_encoder]
        self.processor = PRSMedProcessor(tokenizer, self.base.config, kind.image_size, config.compat)
        self.image_encoder = kind.build()
        self.mask_decoder = DECODERS[config.decoder](self.base.config.get_text_config().hidden_size, kind)
        self.cls = class_head(kind.channels)

    @property
    def base(self) -> LlavaForConditionalGeneration:
        """The VLM beneath PEFT; its layers carry the adapters."""
        return beneath_adapters(self.vlm)

    @property
    def repeated_layers(self) -> dict[str, list[nn.Module]]:
        """The language model's, the vision tower's and the image encoder's blocks, stage by stage."""
        stages: Any = self.image_encoder.layers
        return {
            "language model": [*self.base.model.language_model.layers],
            "vision tower": [*self.base.model.vision_tower.encoder.layers],
            "image encoder": [block for stage in stages for block in stage.blocks],
        }

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, prompt_mask: Tensor, pixel_values: Tensor, images: Tensor, labels: Tensor
    ) -> Output:
        """What `PRSMedProcessor.collate` makes -> logits of masks, classes and tokens."""
        states = self.base.model(
            input_ids=input_ids, attention_mask=attention_mask, pixel_values=pixel_values, use_cache=False
        ).last_hidden_state
        mask_logits, class_logits = self._segment(states, prompt_mask, images)
        start = len(self.processor.image_ids) - 1  # the state of the last image token predicts the first token of the text
        return Output(mask_logits, class_logits, self.base.lm_head(states[:, start:-1]), labels[:, start + 1 :])

    def _segment(self, states: Tensor, prompt_mask: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        embeddings = self.image_encoder(images)
        states = states.to(next(self.cls.parameters()).dtype)  # the language model may be in bfloat16
        return self.mask_decoder(embeddings, states, prompt_mask), self.cls(embeddings)

    def train(self, mode: bool = True) -> "PRSMed":
        super().train(mode)
        for module in self.image_encoder.modules():
            if isinstance(module, ConvBN) and self.frozen_norms:
                module.bn.eval()
        return self

    # ---- inference --------------------------------------------------------------------------------------------------

    def segment(self, image: Image.Image, question: str, *, max_new_tokens: int = 64) -> tuple[str, Tensor]:
        """The answer and mask logits [H, W] in the image's own size; the mask is where they are positive."""
        return self.segment_batch([image], [question], max_new_tokens=max_new_tokens)[0]

    @torch.inference_mode()
    def segment_batch(
        self, images: list[Image.Image], questions: list[str], *, max_new_tokens: int = 64
    ) -> list[tuple[str, Tensor]]:
        """`segment` of several images; answers are greedy. One pass over the prompts serves the masks and the answers;
        with `max_new_tokens` 0 there are masks only. Call it in eval mode."""
        masks, decoding, logits = self.prefill(images, questions)
        answers = greedy_ids(decoding, logits, self.processor.tokenizer.eos_token_id, max_new_tokens)
        return list(zip(map(self.processor.decode, answers), masks, strict=True))

    def prefill(self, images: list[Image.Image], questions: list[str]) -> tuple[list[Tensor], LlavaDecoding, Tensor]:
        """Read N prompts -> (mask logits [H, W] of each image, answers to decode, logits of their first tokens [N, V])."""
        batch = {name: tensor.to(self.base.device) for name, tensor in self.processor.prompts(images, questions).items()}
        attention_mask, cache = batch["attention_mask"], DynamicCache()
        states = self.base.model(
            input_ids=batch["input_ids"],
            attention_mask=attention_mask,
            pixel_values=batch["pixel_values"],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        masks, _ = self._segment(states, batch["prompt_mask"], batch["images"])
        logits = self.base.lm_head(states[torch.arange(len(states)), attention_mask.sum(1) - 1])
        in_own_size = [self.processor.frame(image).masks(mask[None])[0, 0] for image, mask in zip(images, masks, strict=True)]
        return in_own_size, LlavaDecoding(self.base, cache, attention_mask), logits.float()

    # ---- training and checkpoints -------------------------------------------------------------------------------------

    def prepare_training(self, *, r: int, alpha: int, dropout: float, frozen_norms: bool) -> "PRSMed":
        """LoRA on the language model's attention; beside it the image encoder, the mask decoder and the class head learn."""
        self.vlm = add_adapters(self.vlm, r=r, alpha=alpha, dropout=dropout, compat=self.config.compat)
        self.frozen_norms = frozen_norms
        for name, parameter in self.image_encoder.named_parameters():
            parameter.requires_grad_(not name.startswith(("norm_head.", "head.")))  # TinyViT's classifier, which nothing uses
        return self

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """Recompute the language model's layers in the backward pass; the embeddings carry the gradient to the first of them."""
        self.base.model.language_model.gradient_checkpointing_enable(**settings)
        self.base.enable_input_require_grads()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a checkpoint folder; the VLM's own weights only where they have no other place."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.vlm, PeftModel):
            adapters: Any = self.vlm.peft_config["default"]
            adapters.base_model_name_or_path = self.config.vlm or f"../{OWN_VLM}"
            self.vlm.save_pretrained(str(folder / ADAPTERS), save_embedding_layers=False)
        self.processor.tokenizer.save_pretrained(folder / TOKENIZER)
        for name in PARTS:
            prefix = "image_encoder." if name == "image_encoder" else ""
            state = {prefix + key: tensor for key, tensor in getattr(self, name).state_dict().items()}
            torch.save(state, folder / f"{name}.pth")
        if self.config.vlm is None:
            self.base.save_pretrained(folder / OWN_VLM, state_dict=without_adapters(self.base.state_dict()))
            self.processor.tokenizer.save_pretrained(folder / OWN_VLM)
        (folder / SETTINGS).write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")

    def load_trained(self, folder: str | Path) -> None:
        """Read back, into these very networks, what training changes: adapters, image encoder, mask decoder and class head."""
        folder = Path(folder)
        if isinstance(self.vlm, PeftModel):
            load_adapters(self.vlm, folder / ADAPTERS)
        for name, state in read_parts(folder).items():
            module = getattr(self, name)
            check_keys(module.state_dict(), state, f"{folder / name}.pth")
            module.load_state_dict(state)


def read_parts(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The three .pth files. The published image_encoder.pth holds the encoder twice, also as a part of a whole Sam (`sam.*`)."""
    parts = {name: read_state_dict(folder / f"{name}.pth") for name in PARTS}
    encoder = {key: tensor for key, tensor in parts["image_encoder"].items() if not key.startswith("sam.")}
    parts["image_encoder"] = {key.removeprefix("image_encoder."): tensor for key, tensor in encoder.items()}
    for name, state in parts.items():
        broken = [key for key, tensor in state.items() if not tensor.isfinite().all()]
        if broken:
            raise CheckpointError(f"{folder / name}.pth: {broken[0]} is not finite")
    return parts


def read_settings(file: Path) -> PRSMedConfig:
    """What prs_med.json says; CheckpointError for a setting that is unknown, or whose value is."""
    settings = read_json(file)
    known = {
        "vlm": None,
        "vision_tower": ["checkpoint", "openai"],
        "image_encoder": list(ENCODERS),
        "decoder": list(DECODERS),
        "compat": ["default", "reference"],
    }
    for name, value in settings.items():
        if name not in known:
            raise CheckpointError(f"{file}: unknown setting {name[:40]!r}; there are {', '.join(known)}")
        expected = known[name]
        if expected is not None and value not in expected:
            raise CheckpointError(f"{file}: {name} is {str(value)[:40]!r}: expected {' or '.join(expected)}")
    if not (settings.get("vlm") is None or (isinstance(settings["vlm"], str) and settings["vlm"])):
        raise CheckpointError(f"{file}: vlm is {str(settings['vlm'])[:40]!r}: expected a folder, a hub name or null")
    return PRSMedConfig(**settings)


def build_prs_med(vlm_path: str, sam_ckpt: str | None, config: PRSMedConfig, dtype: torch.dtype = torch.float32) -> PRSMed:
    """A model to be trained: a pretrained VLM, TinySAM's image encoder from its published file (None: random), a new decoder.

    Raises CheckpointError or OSError, in one line, for a checkpoint that cannot be used.
    """
    vlm, tokenizer = load_llava(vlm_path, vision_tower=config.vision_tower, dtype=dtype)
    config.vlm = str(Path(vlm_path).resolve()) if Path(vlm_path).is_dir() else vlm_path
    model = PRSMed(vlm, tokenizer, config)
    if sam_ckpt is not None:
        model.image_encoder.load_state_dict(load_sam("tiny_sam", sam_ckpt).image_encoder.state_dict())
    return model


def load_prs_med(
    path: str | Path, *, vlm: str | None = None, dtype: torch.dtype = torch.float32, compat: str = "default"
) -> PRSMed:
    """A trained model for inference, in eval mode, its adapters applied: one of our checkpoints or a published `llm_seg_N`.

    `vlm`: where the VLM is, if not where the checkpoint says; a published one says nothing. `dtype` is that of the VLM.
    `compat`: see `models.prs_med`.
    Raises CheckpointError or OSError, in one line, for a checkpoint that cannot be used.
    """
    folder = Path(path)
    if (folder / SETTINGS).exists():
        config = read_settings(folder / SETTINGS)
    elif (folder / "mask_decoder.pth").is_file():
        version = "v5" if "image_norm.weight" in read_state_dict(folder / "mask_decoder.pth") else "v6"
        config = PRSMedConfig(vlm=vlm, vision_tower="openai", decoder=version)
        if vlm is None:
            raise CheckpointError(f"{path}: a published checkpoint; name the VLM it was trained on as well")
    else:
        refuse_folder_of(folder, SETTINGS, "mask_decoder.pth")
        raise OSError(f"{path}: no PRS-Med checkpoint there (expected prs_med.json or mask_decoder.pth)")
    own = folder / OWN_VLM
    for part in [ADAPTERS, TOKENIZER, *(f"{name}.pth" for name in PARTS), *([OWN_VLM] if (vlm or config.vlm) is None else [])]:
        if not (folder / part).exists():
            raise CheckpointError(f"{folder}: not a whole PRS-Med checkpoint: {part} is missing")
    try:
        bare, _ = load_llava(vlm or config.vlm or str(own), vision_tower=config.vision_tower, dtype=dtype)
    except OSError as error:
        raise OSError(f"{error}; it is the VLM of {folder}: name it with --vlm_path") from None
    tokenizer = load_tokenizer(folder / TOKENIZER)
    check_vocabulary(tokenizer, bare.config.get_text_config().vocab_size, folder / TOKENIZER, start=True)
    config.compat = compat
    adapted = read_adapters(bare, folder / ADAPTERS) if compat == "default" else bare
    with reading(folder):
        model = PRSMed(adapted, tokenizer, config)
    model.load_trained(folder)
    return model.eval()
