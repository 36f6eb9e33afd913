"""LLaVA-Med v1.5 (arXiv 2306.00890) from its original checkpoint layout into Hugging Face's `LlavaForConditionalGeneration`.

The original layout (config.json of model type `llava_mistral`) has no class in transformers. CLIP's second to last layer without
its class token goes through a two-layer projector into Mistral-7B; an image of 336 x 336 is 576 tokens.

The original marks an image by the id -200. Here an image is 576 times `image_token_id`, an id after the last of the vocabulary.
The vocabulary is then padded to a multiple of 64; the rows added are the mean embedding, so their logits are the mean of all
others and greedy decoding never chooses them.
"""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedTokenizerBase,
)

from models.checkpoint import CheckpointError, check_keys, local_folder, read_state_dict, weight_files

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
FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt"]


def load_llava(
    path: str, *, vision_tower: str = "checkpoint", dtype: torch.dtype = torch.float32
) -> tuple[LlavaForConditionalGeneration, PreTrainedTokenizerBase]:
    """(LlavaForConditionalGeneration, tokenizer) of a folder or hub name, in the original LLaVA-Med layout or in Hugging Face's.

    `vision_tower`: "checkpoint" takes the checkpoint's own weights, "openai" those of the CLIP model that its config names, which
    is what the reference code of LLaVA-Med and of PRS-Med loads.

    Raises CheckpointError for missing or unexpected keys and for a checkpoint of another kind, OSError for one that cannot be read.
    """
    if vision_tower not in ("checkpoint", "openai"):
        raise CheckpointError(f"vision_tower {vision_tower!r}: expected checkpoint or openai")
    folder = find_folder(path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = config.get("model_type")
    if kind == "llava":
        model = _load_hugging_face(folder, dtype)
        if vision_tower == "openai":
            model.model.vision_tower.load_state_dict(_clip(CLIP_L_336, dtype).state_dict())
    elif kind == "llava_mistral":
        model = load_llava_med(folder, vision_tower=vision_tower, dtype=dtype)
    else:
        raise CheckpointError(f"{path}: model_type {kind!r}; a LLaVA or LLaVA-Med checkpoint is needed (llava, llava_mistral)")
    return model, load_tokenizer(folder)


def find_folder(path: str) -> Path:
    """The folder `path`, or the local copy of the hub repository of that name; OSError where there is neither."""
    folder = local_folder(path)
    if folder is not None:
        return folder
    try:
        return Path(snapshot_download(path, allow_patterns=FILES))
    except Exception as error:  # the hub has a dozen kinds, not all of them OSErrors
        raise OSError(f"{path}: no such folder, and not to be had from the hub ({type(error).__name__})") from None


def _load_hugging_face(folder: Path, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    loaded: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    model, info = loaded  # the annotation of `from_pretrained` does not know the second
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise CheckpointError(f"{folder}: {what.replace('_', ' ')}: {', '.join(map(str, sorted(info[what])[:4]))}")
    return model


def load_llava_med(folder: Path, *, vision_tower: str, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """The original layout, one file of weights after the other; a file's tensors are released before the next is read."""
    original = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = llava_config(original)
    with init_empty_weights(include_buffers=False):
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


def llava_config(original: dict[str, Any]) -> LlavaConfig:
    """The original config.json as a LlavaConfig, its vocabulary with room for the image token."""
    wrong = {
        name: original[name]
        for name, value in {"mm_projector_type": "mlp2x_gelu", "mm_use_im_start_end": False, "mm_use_im_patch_token": False}.items()
        if original.get(name, value) != value
    }
    if wrong:
        raise CheckpointError(f"config.json: {wrong} is not LLaVA-Med v1.5's architecture")
    tower = original["mm_vision_tower"]
    vision: Any = CLIPVisionConfig(**CLIP_L_336_CONFIG) if tower == CLIP_L_336 else CLIPVisionConfig.from_pretrained(tower)
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads max_position_embeddings"
    text = {name: original[name] for name in names.split()}
    text |= {name: original.get(name, default) for name, default in [("bos_token_id", 1), ("eos_token_id", 2), ("pad_token_id", 0)]}
    image_token = original["vocab_size"]
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
    missing = config.get_text_config().vocab_size - tensor.shape[0]
    if key not in VOCABULARY or not 0 < missing <= 64:
        return tensor
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(missing, -1)])


def _clip(name: str, dtype: torch.dtype) -> CLIPVisionModel:
    try:
        return CLIPVisionModel.from_pretrained(name, dtype=dtype)
    except Exception as error:
        raise OSError(f"{name}: the CLIP vision tower cannot be read ({type(error).__name__})") from None


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder."""
    if (folder / "tokenizer.json").is_file():
        return AutoTokenizer.from_pretrained(folder)
    if importlib.util.find_spec("sentencepiece") is None:
        raise CheckpointError(f"{folder}/tokenizer.model: reading it needs sentencepiece (pip install sentencepiece protobuf)")
    return LlamaTokenizer.from_pretrained(folder)
