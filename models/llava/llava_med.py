"""LLaVA-Med v1.5 (arXiv 2306.00890) from its original checkpoint layout into Hugging Face's `LlavaForConditionalGeneration`.

The original layout (config.json of model type `llava_mistral`) has no class in transformers. CLIP's second to last layer without
its class token goes through a two-layer projector into Mistral-7B; an image of 336 x 336 is 576 tokens.

The original marks an image by the id -200. Here an image is 576 times `image_token_id`, an id after the last of the vocabulary.
The vocabulary is then padded to a multiple of 64; the rows added are the mean embedding, so their logits are the mean of all
others and greedy decoding never chooses them.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerBase,
)

from models.checkpoint import MODEL, CheckpointError, check_keys, find_folder, read_state_dict, reading, weight_files
from models.pretrained import load_config, load_model, read_config, required
from models.tokenizer import check_vocabulary, load_tokenizer

# original key -> the module's
KEY_MAP = {
    r"^model\.vision_tower\.vision_tower\.vision_model\.": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
    r"^lm_head\.": "lm_head.",
}
VISION = "model.vision_tower."
VOCABULARY = ("model.language_model.embed_tokens.weight", "lm_head.weight")  # with a row for each token
BUFFERS = re.compile(r"\.(position_ids|rotary_emb\.inv_freq)$")  # constants that old versions of transformers saved

CLIP_L_336 = "openai/clip-vit-large-patch14-336"
CLIP_L_336_CONFIG: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def load_llava(
    path: str, *, vision_tower: str = "checkpoint", dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase]:
    """(LlavaForConditionalGeneration, tokenizer) of a folder or hub name, in the original LLaVA-Med layout or in Hugging Face's.

    `vision_tower`: "checkpoint" takes the checkpoint's own weights, "openai" those of the CLIP model that its config names, which
    is what the reference code of LLaVA-Med and of PRS-Med loads.

    Raises CheckpointError for a checkpoint of another kind, or one that is not whole, OSError where there is none.
    """
    if vision_tower not in ("checkpoint", "openai"):
        raise CheckpointError(f"vision_tower {vision_tower!r}: expected checkpoint or openai")
    folder = find_folder(path)
    settings = read_config(folder)
    kind = settings.get("model_type")
    if kind == "llava":
        config = load_config(LlavaConfig, settings, folder)
        tokenizer = _tokenizer(folder, config, config.get_text_config().vocab_size)
        model = load_model(LlavaForConditionalGeneration, folder, config, dtype=dtype, attn_implementation="sdpa")
        if vision_tower == "openai":
            state = _clip(CLIP_L_336, dtype).state_dict()
            check_keys(model.model.vision_tower.state_dict(), state, f"{folder}: its vision tower is not that of {CLIP_L_336}")
            model.model.vision_tower.load_state_dict(state)
    elif kind == "llava_mistral":
        config = llava_config(settings, folder)
        tokenizer = _tokenizer(folder, config, config.image_token_id)
        model = load_llava_med(folder, config, settings, vision_tower=vision_tower, dtype=dtype)
    else:
        raise CheckpointError(
            f"{path}: model_type {str(kind)[:40]!r}; a LLaVA or LLaVA-Med checkpoint is needed (llava, llava_mistral)"
        )
    _try_out(model, tokenizer, folder)
    return model, tokenizer


def _tokenizer(folder: Path, config: LlavaConfig, rows: int) -> PreTrainedTokenizerBase:
    """The checkpoint's, whose ids are below `rows`."""
    tokenizer = load_tokenizer(folder, config)
    check_vocabulary(tokenizer, rows, folder, start=True)
    return tokenizer


@torch.no_grad()
def _try_out(model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """An empty image and a word: CheckpointError where settings and weights do not go together, or weights are not finite."""
    config: Any = model.config
    side = config.vision_config.image_size
    with reading(folder):
        pixels = torch.zeros(1, 3, side, side, dtype=model.dtype, device=model.device)
        (features,) = model.model.get_image_features(pixel_values=pixels).pooler_output
        ids = torch.tensor([tokenizer.encode("?", add_special_tokens=False)[:4]], device=model.device)
        logits = model(input_ids=ids).logits
        rows, image = logits.shape[-1], config.image_token_id
    if not (type(image) is int and 0 <= image < rows):
        raise CheckpointError(f"{folder / MODEL}: image_token_index is {str(image)[:20]}: expected an id below {rows}")
    if len(features) != config.image_seq_length:
        length = config.image_seq_length
        raise CheckpointError(f"{folder / MODEL}: image_seq_length is {length}; its vision tower makes {len(features)} tokens")
    if not (features.isfinite().all() and logits.isfinite().all()):
        raise CheckpointError(f"{folder}: computes what is not finite: are its weights?")


def load_llava_med(
    folder: Path, config: LlavaConfig, original: dict[str, Any], *, vision_tower: str, dtype: torch.dtype
) -> LlavaForConditionalGeneration:
    """The original layout, one file of weights after the other; a file's tensors are released before the next is read.

    `original` is its config.json, `config` what `llava_config` makes of that.
    """
    with reading(folder / MODEL), init_empty_weights(include_buffers=False):
        model = LlavaForConditionalGeneration(config).to(dtype)  # type: ignore[arg-type]  # transformers hides the type of `to`
    expected = model.state_dict()
    found: dict[str, Tensor] = {}  # what was read, without its memory
    for shard in weight_files(folder):
        tensors = {key: _padded(key, tensor, config).to(dtype) for key, tensor in translate(read_state_dict(shard), shard)}
        if vision_tower == "openai":
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith(VISION)}
        found |= {key: tensor.to("meta") for key, tensor in tensors.items()}
        known = {key: tensor for key, tensor in tensors.items() if key in expected and tensor.shape == expected[key].shape}
        model.load_state_dict(known, strict=False, assign=True)
    if not any(key.startswith(VISION) for key in found):  # not wanted, or left out when the checkpoint was saved
        tower = {VISION + key: tensor for key, tensor in _clip(original["mm_vision_tower"], dtype).state_dict().items()}
        found |= tower
        model.load_state_dict(tower, strict=False, assign=True)
    check_keys(expected, found, f"{folder}: not a checkpoint of LLaVA-Med v1.5")
    text = config.get_text_config()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = text.eos_token_id, text.pad_token_id
    return model.eval()


def llava_config(original: dict[str, Any], folder: Path) -> LlavaConfig:
    """The original config.json, of `folder`, as a LlavaConfig, its vocabulary with room for the image token."""
    wrong = {
        name: original[name]
        for name, value in {"mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False, "mm_use_im_patch_token": False}.items()
        if original.get(name, value) != value
    }
    if wrong:
        raise CheckpointError(f"{folder / MODEL}: {str(wrong)[:160]} is not LLaVA-Med v1.5's architecture")
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads max_position_embeddings"
    text = required(original, names, folder / MODEL)
    image_token, tower = required(original, "vocab_size mm_vision_tower", folder / MODEL).values()
    if not isinstance(tower, str):
        raise CheckpointError(f"{folder / MODEL}: mm_vision_tower is {str(tower)[:40]!r}: expected a folder or a hub name")
    vision = load_config(CLIPVisionConfig, CLIP_L_336_CONFIG, folder) if tower == CLIP_L_336 else _clip_config(tower)
    text |= {name: original.get(name, default) for name, default in [("bos_token_id", 1), ("eos_token_id", 2), ("pad_token_id", 0)]}
    with reading(folder / MODEL):
        return LlavaConfig(
            vision_config=vision,
            text_config=MistralConfig(
                **text,
                vocab_size=(image_token // 64 + 1) * 64,
                rms_norm_eps=original.get("rms_norm_eps", 1e-5),
                rope_parameters={"rope_type": "default", "rope_theta": original.get("rope_theta", 1e6)},
                sliding_window=original.get("sliding_window"),
                tie_word_embeddings=False,
            ),
            image_token_index=image_token,
            image_seq_length=(vision.image_size // vision.patch_size) ** 2,
            vision_feature_layer=original.get("mm_vision_select_layer", -2),
            vision_feature_select_strategy="default",
            projector_hidden_act="gelu",
            tie_word_embeddings=False,
        )


def translate(state: dict[str, Tensor], source: Path) -> Iterator[tuple[str, Tensor]]:
    """Original keys -> the module's; raises CheckpointError for a key that the original layout has not."""
    for key, tensor in state.items():
        if not BUFFERS.search(key):
            yield module_key(key, source), tensor


def module_key(key: str, source: Path) -> str:
    """The module's key for one of the original layout, read from the file `source`; CheckpointError where there is none."""
    for pattern, replacement in KEY_MAP.items():
        new, count = re.subn(pattern, replacement, key)
        if count:
            return new
    raise CheckpointError(f"{source}: unexpected key {key}")


def _padded(key: str, tensor: Tensor, config: LlavaConfig) -> Tensor:
    missing = config.get_text_config().vocab_size - len(tensor) if key in VOCABULARY and tensor.ndim else 0
    if not 0 < missing <= 64:
        return tensor
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(missing, -1)])


def _clip(name: str, dtype: torch.dtype) -> CLIPVisionModel:
    """The vision tower alone, of a folder or hub repository that may hold the whole CLIP."""
    return load_model(CLIPVisionModel, _clip_folder(name), _clip_config(name), dtype=dtype, only_part=True)


def _clip_config(name: str) -> Any:
    folder = _clip_folder(name)
    settings = read_config(folder)
    own = settings.get("vision_config") if settings.get("model_type") == "clip" else settings
    return load_config(CLIPVisionConfig, own or {}, folder)


def _clip_folder(name: str) -> Path:
    try:
        return find_folder(name)
    except OSError as error:
        raise OSError(f"the CLIP vision tower cannot be read: {error}") from None
