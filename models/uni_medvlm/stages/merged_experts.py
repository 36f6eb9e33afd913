"""Stage 4's language model: in each layer the FFNs that stages 2 and 3 came to, as experts beside one attention (MedPLIB, 3.3).

    expert 0 = FFN with stage 3's LoRA merged (grounding)      expert 1 = FFN with stage 2's LoRA merged (questions)
    attention = the language model's, with stage 2's LoRA merged; shared

Where stage 3 began with stage 2's weights, as MedPLIB's does, expert 0 has both merged, and each expert meets the attention that it
was trained with. Where stage 3 began with stage 1's, as Uni-MedVLM's plan has it, expert 0 meets another one.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from models.checkpoint import CheckpointError, read_state_dict
from models.lora import adapter_weights
from models.uni_medvlm.experts import PROJECTIONS, ExpertLoRA, RoutingOptions, put_experts
from models.uni_medvlm.model import UniMedVLM
from models.uni_medvlm.stages.artifacts import began_merged, load_grounding, load_regions, merged_adapters, stage_folder

GROUNDING_EXPERT, QUESTION_EXPERT = 0, 1


def build_experts(
    model: UniMedVLM,
    stage2: str | Path,
    stage3: str | Path,
    options: RoutingOptions | None = None,
    *,
    lora: ExpertLoRA | None = None,
    layers: Sequence[int] | None = None,
) -> None:
    """Make of a model as stage 1 left it that of stage 4, from the folders that stages 2 and 3 left.

    `layers` (None: all) get experts, each frozen with `lora` of its own (None: MedPLIB's); the others keep stage 2's FFN. What
    stages 2 and 3 trained outside the language model is read too. Raises OSError where an artifact is not there, CheckpointError
    where one does not fit, ValueError where the language model is not the bare one.
    """
    question, grounding = stage_folder(stage2, 2), stage_folder(stage3, 3)
    if model.origin.merged is not None or model.ledger is not None or isinstance(model.language_model, PeftModel):
        raise ValueError("experts are made from a bare language model, without adapters or experts")
    _refuse_attention(grounding)
    decoder: Any = model.llm.get_decoder()
    blocks = decoder.layers
    chosen = sorted(set(range(len(blocks)) if layers is None else layers))
    if not chosen or chosen[0] < 0 or chosen[-1] >= len(blocks):
        raise ValueError(f"layers must be some of 0 to {len(blocks) - 1}, not {chosen}")
    load_regions(model, question)
    load_grounding(model, grounding)
    base = [copy.deepcopy(block.mlp) for block in blocks]
    merged_adapters(model.llm, question)
    model.origin.merged = str(question.resolve())
    questions = [block.mlp for block in blocks]
    for block, own in zip(blocks, questions if began_merged(grounding) else base, strict=True):
        block.mlp = copy.deepcopy(own)
    merged_adapters(model.llm, grounding)
    pairs = {number: _pair(blocks[number].mlp, questions[number]) for number in chosen}
    for block, own in zip(blocks, questions, strict=True):
        block.mlp = own
    model.ledger = put_experts(decoder, pairs, options, lora=lora or ExpertLoRA())


def _pair(grounding: nn.Module, question: nn.Module) -> list[nn.Module]:
    pair = {GROUNDING_EXPERT: grounding, QUESTION_EXPERT: question}
    return [pair[number] for number in sorted(pair)]


def _refuse_attention(folder: Path) -> None:
    """Stage 3's adapters must leave the attention alone, since the experts share it."""
    file = adapter_weights(folder)
    adapted = {key.split(".lora_")[0].rpartition(".")[2] for key in read_state_dict(file) if ".lora_" in key}
    if strange := sorted(adapted - {*PROJECTIONS}):
        raise CheckpointError(
            f"{file}: adapts {', '.join(strange)}: expected {', '.join(PROJECTIONS)} alone, which become an expert"
        )
