"""A Uni-MedVLM as one folder: what no other folder holds, and where the rest lies.

    unimed.json          what the networks are, and the folders and files that published ones were read from: these are not copied
    model.safetensors    every tensor that lies nowhere else, under the model's own keys
    adapter_model.safetensors, adapter_config.json    PEFT's, where the language model is within PEFT
    the tokenizer's files

`models.uni_medvlm.checkpoints.loading` makes a policy of it; `load_trained` reads it back into the model that wrote it.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from models.checkpoint import CheckpointError, check_keys, read_state_dict
from models.lora import adapter_weights, put_weights
from models.uni_medvlm.checkpoints.staging import written_whole
from models.uni_medvlm.experts import ExpertLoRA, MixtureOfExperts

SETTINGS, WEIGHTS = "unimed.json", "model.safetensors"
# Keys of published networks, by where Origin says they are from. The mask decoder is trained, so it is none of SAM's here.
PUBLISHED = {
    "language_model.": "llm",
    "vision_tower.vision_tower.": "vision_tower",
    "vision_tower.convnext_encoder.": "convnext",
    "visual_model.image_encoder.": "sam_ckpt",
    "visual_model.prompt_encoder.": "sam_ckpt",
}


@dataclass
class Origin:
    """Where a model's networks were read from, None where their weights lie nowhere else; `sam`: what kind of SAM it has.

    `merged`: the adapter that was merged into the language model, whose layers are then no longer those of `llm`. `stage`: which of
    the five it was prepared for last.
    """

    llm: str | None = None
    vision_tower: str | None = None
    convnext: str | None = None
    sam_ckpt: str | None = None
    sam: str = "starter"
    merged: str | None = None
    stage: int | None = None


def save_checkpoint(model: Any, folder: str | Path) -> None:
    """Write a UniMedVLM to `folder`, whole or not at all; OSError where it cannot be written."""
    with written_whole(folder, SETTINGS) as staging:
        save_file({key: tensor.contiguous() for key, tensor in own_tensors(model).items()}, staging / WEIGHTS, {"format": "pt"})
        if isinstance(model.language_model, PeftModel):
            save_adapters(model, staging)
        if model.processor is not None:
            model.processor.save_pretrained(staging)
        (staging / SETTINGS).write_text(json.dumps(described(model), indent=2) + "\n", encoding="utf-8")


def save_adapters(model: Any, folder: Path) -> None:
    """The two files of PEFT, with the language model's folder as their base."""
    model.language_model.peft_config["default"].base_model_name_or_path = model.origin.llm
    model.language_model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's card, with nothing filled in


def load_trained(model: Any, folder: str | Path) -> None:
    """Read back into a UniMedVLM what `save_checkpoint` wrote of one like it.

    CheckpointError where a file or a key is missing, a key unexpected or of another shape, or a number not finite.
    """
    folder = Path(folder)
    if not (folder / SETTINGS).is_file():
        raise CheckpointError(f"{folder}: not a whole Uni-MedVLM checkpoint: {SETTINGS} is missing")
    file, every = folder / WEIGHTS, model.state_dict()
    state = read_state_dict(file)
    own = own_tensors(model) | {key: every[key] for key in state if key in every and from_elsewhere(model, key)}
    check_keys(own, state, f"{file}: not the weights of this model")
    refuse_broken(state, file)
    if isinstance(model.language_model, PeftModel):
        adapters = adapter_weights(folder)
        put_weights(model.language_model, read_state_dict(adapters), adapters)
    model.load_state_dict(state, strict=False)  # strict by check_keys


def refuse_broken(state: dict[str, Tensor], file: str | Path) -> None:
    """CheckpointError that names the first tensor with a number that is not finite."""
    broken = next((key for key, tensor in state.items() if not tensor.isfinite().all()), None)
    if broken is not None:
        raise CheckpointError(f"{file}: {broken} is not finite")


# ---- what is written ------------------------------------------------------------------------------------------------


def own_tensors(model: Any) -> dict[str, Tensor]:
    """The tensors of a UniMedVLM that a checkpoint holds: all but PEFT's adapters, and but published ones that are as they were.

    Tensors under two keys, such as tied embeddings, are there once.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    in_peft = isinstance(model.language_model, PeftModel)
    own: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, tensor in model.state_dict().items():
        adapters = in_peft and key.startswith("language_model.") and ".lora_" in key
        if adapters or (from_elsewhere(model, key) and key not in trained) or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        own[key] = tensor
    return own


def from_elsewhere(model: Any, key: str) -> bool:
    """Whether the folder or file that Origin names holds the tensor of this key."""
    source = next((source for part, source in PUBLISHED.items() if key.startswith(part)), None)
    if source is None or getattr(model.origin, source) is None or ".lora_" in key:
        return False
    changed = model.origin.merged is not None or model.ledger is not None
    return not (source == "llm" and changed and ".layers." in key)


def described(model: Any) -> dict[str, Any]:
    """What unimed.json says: of each network how it is built, of published ones where they are."""
    encoder = model.vision_tower
    networks = {"llm": model.llm, "vision_tower": encoder.vision_tower, "convnext": encoder.convnext_encoder}
    selected = encoder.num_layers - encoder.vision_tower.config.num_hidden_layers - 1
    return {
        "origin": asdict(model.origin),
        "config": asdict(model.settings),
        "start": model.start,
        "fused_after": list(encoder.fused_after),
        "select_layer": selected,
        "dtype": str(model.llm.dtype).removeprefix("torch."),
        "networks": {name: _config(net) for name, net in networks.items() if getattr(model.origin, name) is None},
        "experts": described_experts(model.llm.get_decoder()),
        "attention": described_attention(model),
        "adapters": isinstance(model.language_model, PeftModel),
        "generation": json.loads(model.llm.generation_config.to_json_string(use_diff=False)),
    }


def _config(network: nn.Module) -> dict[str, Any]:
    config: Any = network.config
    assert isinstance(config, PreTrainedConfig)
    return json.loads(config.to_json_string(use_diff=False))


def described_experts(decoder: Any) -> dict[str, Any] | None:
    """The experts of a decoder's layers, which are of one kind; None without."""
    mixtures = {number: layer.mlp for number, layer in enumerate(decoder.layers) if isinstance(layer.mlp, MixtureOfExperts)}
    if not mixtures:
        return None
    first = next(iter(mixtures.values()))
    return {
        "num_experts": len(first.experts),
        "layers": list(mixtures),
        "options": asdict(first.options),
        "lora": described_lora(first.experts[0].gate_proj),
    }


def described_attention(model: Any) -> dict[str, Any] | None:
    """The adapters that stage 5 puts around the attention, outside PEFT's model; None without."""
    if isinstance(model.language_model, PeftModel):
        return None
    return described_lora(model.llm.get_decoder().layers[0].self_attn.q_proj)


def described_lora(layer: Any) -> dict[str, Any] | None:
    """r, alpha and dropout of a layer that PEFT has wrapped; None of another."""
    if not hasattr(layer, "lora_A"):
        return None
    dropout = getattr(layer.lora_dropout["default"], "p", 0.0)
    values = {"r": layer.r["default"], "alpha": layer.lora_alpha["default"], "dropout": dropout}
    assert set(values) == {field.name for field in fields(ExpertLoRA)}
    return values
