"""What each of the five stages trains; all else is frozen.

| stage | what it trains |
|---|---|
| 1 alignment | the CVFMs and the projector |
| 2 questions | LoRA on the language model's seven projections, and the region adapter |
| 3 grounding | LoRA on its FFNs, the mask decoder, text_hidden_fcs, and the rows of the new tokens, to say `<SEG>` with |
| 4 routing | routers, the experts' LoRA, and what 2 and 3 train outside the language model |
| 5 GRPO | the experts' LoRA, and a new one on the attention |

The published code trains no weight in stage 3 that could make the model say `<SEG>`, and has no stages 4 and 5.
"""

from typing import Any

from peft import PeftModel
from torch import nn

from models.lora import LINEARS, add_lora
from models.uni_medvlm.experts import PROJECTIONS, ExpertLoRA, MixtureOfExperts
from models.uni_medvlm.model import UniMedVLM
from models.uni_medvlm.stages.adapters import adapt_attention

# Uni-MedVLM's for questions, MedPLIB's for masks; the paper of GRPO on them names none.
LORA = {2: ExpertLoRA(128, 256, 0.05), 3: ExpertLoRA(8, 16, 0.05), 5: ExpertLoRA(8, 16, 0.05)}
ADAPTED = {2: LINEARS, 3: PROJECTIONS}
HEADS = ("visual_model.mask_decoder.", "text_hidden_fcs.", "token_rows.")
BESIDE_LORA = {
    1: ("vision_tower.cvfm_modules.", "mm_projector."),
    2: ("region_fea_adapter.",),
    3: HEADS,
    4: (*HEADS, "region_fea_adapter."),
    5: (),
}


def prepare_stage(model: UniMedVLM, stage: int, lora: ExpertLoRA | None = None) -> list[str]:
    """Let learn exactly what `stage` trains, and give the language model its new adapters; the names of the parameters.

    `lora` replaces the stage's own. Adapters start without effect and are float32.
    Raises ValueError where a stage needs experts and there are none, or new adapters would lie on others.
    """
    if stage not in BESIDE_LORA:
        raise ValueError(f"there are stages 1 to 5, not {stage}")
    if isinstance(model.language_model, PeftModel):
        raise ValueError(f"stage {stage}: the language model has adapters already: merge them first")
    if stage >= 4 and model.ledger is None:
        raise ValueError(f"stage {stage}: the language model has no experts: build them from stages 2 and 3 first")
    if stage < 4 and model.ledger is not None:
        raise ValueError(f"stage {stage}: the language model has experts, which only stages 4 and 5 train")
    settings = lora or LORA.get(stage)
    if settings is not None and stage in ADAPTED:
        model.language_model = add_lora(
            model.language_model,
            r=settings.r,
            alpha=settings.alpha,
            dropout=settings.dropout,
            target_modules=list(ADAPTED[stage]),
        ).train(model.training)
    elif settings is not None and stage == 5:
        adapt_attention(model.llm, settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(BESIDE_LORA[stage]) or (stage > 1 and _in_language_model(name, stage)))
    if stage == 4:
        _free_whole_experts(model)
    model.origin.stage = stage
    return trainable_names(model)


def _in_language_model(name: str, stage: int) -> bool:
    return name.startswith("language_model.") and (".lora_" in name or (stage == 4 and name.endswith(".mlp.router")))


def _free_whole_experts(model: UniMedVLM) -> None:
    """Experts without adapters learn themselves."""
    for layer in model.llm.get_decoder().layers:
        if isinstance(layer.mlp, MixtureOfExperts) and not hasattr(layer.mlp.experts[0].gate_proj, "lora_A"):
            layer.mlp.experts.requires_grad_(True)


def trainable_names(model: nn.Module) -> list[str]:
    """The names of the parameters that learn."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def trained_by_part(model: nn.Module) -> dict[str, Any]:
    """How many parameters learn, of all, and in which parts: the model's children, the mask decoder, and LoRA wherever it is."""
    by_part: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = "LoRA" if ".lora_" in name else ".".join(name.split(".")[: 2 if name.startswith("visual_model") else 1])
            by_part[part] = by_part.get(part, 0) + parameter.numel()
    trained, every = sum(by_part.values()), sum(parameter.numel() for parameter in model.parameters())
    return {"trained_parameters": trained, "parameters": every, "share": trained / every, "by_part": by_part}
