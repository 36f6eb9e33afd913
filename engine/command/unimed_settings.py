"""Flags of Uni-MedVLM's recipes: the networks that it is put together from, and what earlier stages have made of them."""

from dataclasses import dataclass
from pathlib import Path

from engine.command.settings import refuse, setting
from engine.errors import InputError

# What each stage leaves behind, and who makes it.
ARTIFACTS = {
    1: ("stage1_projector_cvfm.bin", "unimed_stage1_align"),
    2: ("stage2", "unimed_stage2_vqa"),
    3: ("stage3", "unimed_stage3_grounding"),
    4: ("stage4", "unimed_stage4_router"),
}


@dataclass
class NetworkArguments:
    """Which networks it is put together from. None of them named: small ones, which a minute makes."""

    model_name_or_path: str | None = setting(None, "Language model, folder or hub name (meta-llama/Llama-3.1-8B-Instruct).")
    vision_tower: str | None = setting(None, "CLIP (openai/clip-vit-large-patch14-336).")
    convnext: str | None = setting(None, "ConvNeXt (facebook/convnext-large-384).")
    sam_ckpt: str | None = setting(None, "SAM-Med2D's checkpoint (sam-med2d_b.pth).", metavar="FILE")
    projector: str = setting("linear", "The projector of Uni-MedVLM, or MedPLIB's.", choices=["linear", "mlp2x_gelu"])
    tiling: bool = setting(False, "Keep an image's aspect, in up to four tiles and a global view (FILA).")
    compat: str = setting("default", "Train well, or with the quirks of the published code.", choices=["default", "reference"])

    def __post_init__(self):
        named = [self.model_name_or_path, self.vision_tower, self.convnext, self.sam_ckpt]
        words = "--model_name_or_path, --vision_tower, --convnext and --sam_ckpt belong together"
        refuse([(all(named) or not any(named), f"{words}: give all of them, or none for the small networks")])

    @property
    def are_small(self) -> bool:
        """Whether they are the small ones."""
        return self.model_name_or_path is None


def artifact(stage: int, given: str | None) -> Path:
    """What stage `stage` has left: `given`, or the newest in its recipe's runs.

    InputError, which names the command that makes it, where there is none.
    """
    name, recipe = ARTIFACTS[stage]
    made_by = f"python -m recipes.{recipe} makes it"
    if given is not None:
        path = Path(given)
        found = path / name if path.is_dir() and (path / name).exists() else path
        if not found.exists():
            raise InputError(f"--stage{stage} {given}: no such file or folder (expected {name}; {made_by})")
        return found
    runs = sorted(Path("runs", recipe).glob(f"*/{name}"), key=lambda path: path.stat().st_mtime)
    if not runs:
        raise InputError(f"--stage{stage} is missing, and runs/{recipe} holds none: expected {name} ({made_by})")
    return runs[-1]
