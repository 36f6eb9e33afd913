"""Flags of Uni-MedVLM's recipes: the networks that it is put together from, and what earlier stages have made of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.command.run_folder import newest_output
from engine.command.settings import refuse, setting
from engine.errors import InputError, input_errors

# Of each stage the recipe, and a file by which what it leaves behind is known.
STAGES = {
    1: ("unimed_stage1_align", "stage1_projector_cvfm.bin"),
    2: ("unimed_stage2_vqa", "stage2/adapter_config.json"),
    3: ("unimed_stage3_grounding", "stage3/adapter_config.json"),
    4: ("unimed_stage4_router", "stage4/unimed.json"),
    5: ("unimed_stage5_grpo", "stage5/unimed.json"),
}


@dataclass
class NetworkArguments:
    """Which networks it is put together from. None of them named: small ones, which are made in two minutes and kept."""

    model_name_or_path: str | None = setting(None, "Language model, folder or hub name (meta-llama/Llama-3.1-8B-Instruct).")
    vision_tower: str | None = setting(None, "CLIP (openai/clip-vit-large-patch14-336).")
    convnext: str | None = setting(None, "ConvNeXt (facebook/convnext-large-384).")
    sam_ckpt: str | None = setting(None, "SAM-Med2D's checkpoint (sam-med2d_b.pth).", metavar="FILE")
    projector: str = setting("linear", "The projector of Uni-MedVLM, or MedPLIB's.", choices=["linear", "mlp2x_gelu"])
    tiling: bool = setting(False, "Keep an image's aspect, in up to four tiles and a global view (FILA).")
    compat: str = setting("default", "CVFM as the identity at first, or as published.", choices=["default", "reference"])

    def __post_init__(self):
        named = [self.model_name_or_path, self.vision_tower, self.convnext, self.sam_ckpt]
        words = "--model_name_or_path, --vision_tower, --convnext and --sam_ckpt belong together"
        refuse([(all(named) or not any(named), f"{words}: give all of them, or none for the small networks")])
        own = self.projector == "linear" and not self.tiling and self.compat == "default"
        refuse([(bool(self.model_name_or_path) or own, "the small networks have no --projector, --tiling or --compat")])

    def load(
        self,
        build_unimed: Callable[..., Any],
        load_pretrained: Callable[[Path], Any],
        make_small: Callable[[], Path],
        args: Any,
    ) -> Any:
        """The policy of these networks, the small ones from the folder that `make_small` makes; `args`: the run's settings.

        InputError if one of them cannot be used.
        """
        import torch  # here, as below: the flags are read before torch is needed

        from engine.device import one_thread_if_small

        if self.model_name_or_path is None:
            one_thread_if_small(True, args.device)
            policy = load_pretrained(make_small())
            torch.manual_seed(args.seed)  # of what is put into it next: adapters, routers
            return policy
        torch.manual_seed(args.seed)  # of its new parts too
        with input_errors("--model_name_or_path, --vision_tower, --convnext, --sam_ckpt"):
            return build_unimed(
                self.model_name_or_path,
                self.vision_tower,
                self.convnext,
                self.sam_ckpt,
                dtype=torch.bfloat16 if args.bf16 else torch.float32,
                projector=self.projector,
                tiling=self.tiling,
                compat=self.compat,
            )


def newest_whole() -> Path:
    """The newest whole checkpoint: of stage 5, or else of stage 4."""
    try:
        return left_by(5, None)
    except InputError:
        return left_by(4, None)


def left_by(stage: int, given: str | None) -> Path:
    """What a stage has left: `given`, or the newest of its runs here. InputError that names its command where there is none."""
    recipe, name = STAGES[stage]
    made = f"python -m recipes.{recipe} makes one"
    if given is None:
        try:
            found = newest_output(recipe, name)
        except InputError:
            raise InputError(f"--stage{stage} is missing, and there is none in runs/{recipe} ({made})") from None
        return found / name if stage == 1 else found
    for path in (Path(given), Path(given) / name, Path(given) / Path(name).parent):
        if path.is_file() if stage == 1 else (path / Path(name).name).is_file():
            return path
    raise InputError(f"--stage{stage} {given}: no {name} there ({made})")
