"""The files that stages 1 to 3 leave for those after them, written whole and read strictly.

| stage | file | holds |
|---|---|---|
| 1 | stage1_projector_cvfm.bin | `model.mm_projector.*`, `model.vision_tower.cvfm_modules.*` |
| 2 | adapter_model.safetensors, adapter_config.json | PEFT's, of the language model |
| 2 | non_lora_trainables.bin | `model.region_fea_adapter.*` |
| 3 | adapter_model.safetensors, adapter_config.json | PEFT's, of the language model |
| 3 | stage3_grounding_weights.bin | `model.visual_model.mask_decoder.*`, `model.text_hidden_fcs.*`, `model.token_rows.*` |
| 3 | stage3.json | `merged`: whether stage 2's adapter was merged into the language model that it began with |

A .bin is a dict of tensors by torch.save, as published; the published stage-1 file can be read. A file that is not there is an
OSError of one line, which names the command that makes it.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from models.checkpoint import ADAPTER, CheckpointError, check_keys, read_json, read_state_dict, reading
from models.lora import adapter_weights, read_adapters
from models.uni_medvlm.checkpoints.saving import refuse_broken, save_adapters
from models.uni_medvlm.checkpoints.staging import written_whole
from models.uni_medvlm.encoder.loading import load_published
from models.uni_medvlm.model import UniMedVLM

STAGE1, STAGE2, STAGE3, RECORD = (
    "stage1_projector_cvfm.bin",
    "non_lora_trainables.bin",
    "stage3_grounding_weights.bin",
    "stage3.json",
)
COMMANDS = {
    1: "python -m recipes.unimed_stage1_align",
    2: "python -m recipes.unimed_stage2_vqa",
    3: "python -m recipes.unimed_stage3_grounding",
    4: "python -m recipes.unimed_stage4_router",
}
PREFIX = "model."
AROUND = re.compile(r"^(?:module\.|base_model\.model\.)*(?:model\.)?")
PROJECTOR, CVFMS, REGION = ("mm_projector.",), ("vision_tower.cvfm_modules.",), ("region_fea_adapter.",)
GROUNDING = ("visual_model.mask_decoder.", "text_hidden_fcs.", "token_rows.")

Source = str | Path


# ---- writing --------------------------------------------------------------------------------------------------------


def save_stage1(model: UniMedVLM, folder: Source) -> Path:
    """The projector and the CVFMs; the file."""
    with written_whole(folder, STAGE1) as staging:
        torch.save(_tensors(model, PROJECTOR + CVFMS), staging / STAGE1)
    return Path(folder) / STAGE1


def save_stage2(model: UniMedVLM, folder: Source) -> Path:
    """The language model's adapters and the region adapter; the folder. ValueError where there are no adapters."""
    _refuse_bare(model, 2)
    with written_whole(folder, ADAPTER) as staging:
        save_adapters(model, staging)
        torch.save(_tensors(model, REGION), staging / STAGE2)
    return Path(folder)


def save_stage3(model: UniMedVLM, folder: Source) -> Path:
    """The language model's adapters and all that draws and says `<SEG>`; the folder. ValueError where there are no adapters."""
    _refuse_bare(model, 3)
    with written_whole(folder, ADAPTER) as staging:
        save_adapters(model, staging)
        torch.save(_tensors(model, GROUNDING), staging / STAGE3)
        record = {"llm": model.origin.llm, "merged": model.origin.merged is not None}
        (staging / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return Path(folder)


def _refuse_bare(model: UniMedVLM, stage: int) -> None:
    if not isinstance(model.language_model, PeftModel):
        raise ValueError(f"the language model has no adapters, so there are none of stage {stage}")


def _tensors(model: nn.Module, parts: tuple[str, ...]) -> dict[str, Tensor]:
    return {PREFIX + key: x.detach().cpu().clone() for key, x in model.state_dict().items() if key.startswith(parts)}


# ---- reading --------------------------------------------------------------------------------------------------------


def load_stage1(model: UniMedVLM, path: Source) -> None:
    """Put a stage-1 file, or that of a folder, into `model`. CheckpointError where it does not hold exactly its tensors."""
    file = _artifact(path, STAGE1, 1)
    state = _read(file)
    projector = {key: state.pop(key) for key in list(state) if key.startswith(PROJECTOR)}
    _check(model, projector, PROJECTOR, file)
    strange = next((key for key in state if not key.startswith((*CVFMS, "cvfm_modules."))), None)
    if strange is not None:
        raise CheckpointError(f"{file}: {strange} unexpected (expected the projector and the CVFMs alone)")
    load_published(model.vision_tower, state, file)
    model.load_state_dict(projector, strict=False)


def load_stage2(model: UniMedVLM, folder: Source, *, merge: bool = True) -> None:
    """Put stage 2's adapters around the bare language model, or into it, and the region adapter's weights in their place.

    Merged, they leave a language model that can be given the next stage's. CheckpointError where they do not fit.
    """
    source = stage_folder(folder, 2)
    state = _read(source / STAGE2)
    _check(model, state, REGION, source / STAGE2)
    _put_adapters(model, source, merge)
    model.load_state_dict(state, strict=False)


def load_stage3(model: UniMedVLM, folder: Source) -> None:
    """Put stage 3's adapters around the language model, which is stage 2's where it was then, and its other weights in their place.

    ValueError where the language model has stage 2 merged, and stage 3's had not, or the other way round.
    """
    source = stage_folder(folder, 3)
    if (model.origin.merged is not None) != began_merged(source):
        then, now = ("with", "without") if began_merged(source) else ("without", "with")
        raise ValueError(f"{source}: began {then} stage 2's adapters in the language model, which is {now} them here")
    load_grounding(model, source)
    _put_adapters(model, source, merge=False)


def load_grounding(model: UniMedVLM, folder: Source) -> None:
    """Stage 3's weights outside the language model: mask decoder, text_hidden_fcs and the rows of the new tokens."""
    file = stage_folder(folder, 3) / STAGE3
    state = _read(file)
    _check(model, state, GROUNDING, file)
    model.load_state_dict(state, strict=False)


def load_regions(model: UniMedVLM, folder: Source) -> None:
    """Stage 2's weights outside the language model: the region adapter."""
    file = stage_folder(folder, 2) / STAGE2
    state = _read(file)
    _check(model, state, REGION, file)
    model.load_state_dict(state, strict=False)


def merged_adapters(llm: nn.Module, folder: Path) -> nn.Module:
    """The bare language model with the adapters of `folder` merged into its layers, in place; frozen."""
    adapted = read_adapters(llm, folder)
    with reading(folder):  # not every kind of LoRA can be merged
        merge: Any = adapted.merge_and_unload
        return merge(safe_merge=True)


def began_merged(folder: Path) -> bool:
    """Whether stage 3 of this folder began with a language model that stage 2's adapters were merged into."""
    file = folder / RECORD
    merged = read_json(file).get("merged")
    if not isinstance(merged, bool):
        raise CheckpointError(f"{file}: merged is {str(merged)[:20]!r}: expected true or false")
    return merged


def stage_folder(folder: Source, stage: int) -> Path:
    """The folder of stage 2 or 3, with all its files; OSError, which names the command that makes it, where one is missing."""
    source = Path(folder)
    _artifact(source, ADAPTER, stage)
    _artifact(source, adapter_weights(source).name, stage)
    for name in [STAGE2] if stage == 2 else [STAGE3, RECORD]:
        _artifact(source, name, stage)
    return source


def _artifact(path: Source, name: str, stage: int) -> Path:
    """The file `path`, or that of this name in the folder `path`."""
    file = Path(path)
    file = file if file.is_file() else file / name
    if not file.is_file():
        raise FileNotFoundError(f"{path}: nothing of stage {stage} there (expected {name}; make it with: {COMMANDS[stage]})")
    return file


def _put_adapters(model: UniMedVLM, folder: Path, merge: bool) -> None:
    if isinstance(model.language_model, PeftModel):
        raise ValueError("the language model has adapters already: merge them first")
    if merge:
        model.language_model, model.origin.merged = merged_adapters(model.language_model, folder), str(folder.resolve())
    else:
        model.language_model = read_adapters(model.language_model, folder)


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file under the model's own keys, without what published ones have before them."""
    state = {AROUND.sub("", key): tensor for key, tensor in read_state_dict(file).items()}
    refuse_broken(state, file)
    return state


def _check(model: nn.Module, state: dict[str, Tensor], parts: tuple[str, ...], file: Path) -> None:
    expected = {key: tensor for key, tensor in model.state_dict().items() if key.startswith(parts)}
    check_keys(expected, state, f"{file}: not the weights of this model")
