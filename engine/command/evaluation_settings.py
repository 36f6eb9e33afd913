"""Flags of evaluations: which model answers which questions, how, and under which attacks."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.command.settings import ALLOW_BURNED_IN, IMAGE_CACHE, check_ranges, refuse, setting, usable_attention
from engine.errors import input_errors

ATTACKS = ("fgsm", "pgd")


@dataclass
class EvaluationSettings:
    """How rows are asked about."""

    batch_size: int = setting(32, "Rows answered at once.", at_least=1, aliases=["--bsz"])
    max_new_tokens: int = setting(256, "Longest answer in tokens.", at_least=1, at_most=2**17)
    limit: int | None = setting(None, "Ask about at most so many rows, evenly spread.", at_least=1)
    on_bad_row: str = setting("error", "A bad row ends the run, or is skipped, counted and listed.", choices=["error", "skip"])
    output_dir: str | None = setting(None, "Run folder. None: runs/<recipe>/<time>.")
    image_cache: str | None = setting(None, IMAGE_CACHE, metavar="DIR|off")
    allow_burned_in: bool = setting(False, ALLOW_BURNED_IN)

    def __post_init__(self):
        check_ranges(type(self), vars(self))


@dataclass
class PolicyArguments(EvaluationSettings):
    """Which model answers which rows."""

    model: str | None = setting(
        None, "Folder or hub name of a checkpoint or an adapter. None: the starter policy.", aliases=["--model_path"]
    )
    base_model_name_or_path: str | None = setting(None, "Base model of an adapter. None: what its adapter_config.json names.")
    load_in_4bit: bool = setting(False, "Quantize the language model; needs bitsandbytes.")
    attn_implementation: str = setting(
        "sdpa",
        "Attention of the vision tower; the language model uses the engine's own.",
        choices=["auto", "flash_attention_2", "sdpa", "eager"],
    )
    data: list[str] | None = setting(
        None, "Files or folders of rows. None: the starter test rows.", aliases=["--test_data", "--prompt_path"]
    )
    image_root: str | None = setting(
        None,
        "Folder that relative image paths start from. None: that of the file.",
        aliases=["--dataset_root", "--base_path"],
    )
    split: str = setting("test", "Split of a folder that holds several.")
    max_pixels: int | None = setting(
        None, "Largest image area in pixels (as in training: 401408). None: the checkpoint's.", at_least=1
    )

    def load(self, load_policy: Callable[..., Any]) -> Any:
        """The policy `load_policy(path or None, **options)` on this process's device, frozen and in eval mode."""
        from engine.device import inference_dtype, local_device, one_thread_if_small  # torch, which flags do not need

        device = local_device()
        dtype = inference_dtype(device)
        one_thread_if_small(self.model is None, device)
        with input_errors("--model"):
            policy = load_policy(
                self.model,
                dtype=dtype,
                attn_implementation=usable_attention(self.attn_implementation, half=dtype.itemsize == 2),
                max_pixels=self.max_pixels,
                base_model=self.base_model_name_or_path,
                load_in_4bit=self.load_in_4bit,
            )
        policy.model.to(device).eval().requires_grad_(False)  # a frozen tower's image features are kept for the next question
        return policy


@dataclass
class QuestionArguments(PolicyArguments):
    """How answers are read, and where else they are written."""

    output_path: str | None = setting(None, "Write the results to this file too, in the layout of the published script.")
    compat: str = setting("default", "Read answers well, or as the published scripts do.", choices=["default", "reference"])

    def __post_init__(self):
        super().__post_init__()
        is_file = not self.output_path or not Path(self.output_path).is_dir()
        refuse([(is_file, f"--output_path {self.output_path}: a folder (expected the name of a JSON file)")])


@dataclass
class AttackArguments(QuestionArguments):
    """Which attacks on which questions."""

    attacks: list[str] | None = setting(
        None, "fgsm, pgd, or both; clean images are always asked about. None: both.", aliases=["--attack_type"]
    )
    epsilon: float = setting(
        0.03, "Largest change of a pixel, of a range of 0 to 1 (0.03 is 7 levels of 255).", more_than=0, at_most=1
    )
    pgd_alpha: float = setting(0.01, "Change of a step of PGD.", more_than=0)
    pgd_iters: int = setting(10, "Steps of PGD.", at_least=1)
    save_sample_images: int = setting(0, "Keep so many attacked images of each attack as PNG.", at_least=0)
    batch_size: int = setting(8, "Questions attacked and answered at once.", at_least=1, aliases=["--bsz"])

    def __post_init__(self):
        super().__post_init__()
        self.attacks = [name for name in self.attacks or ATTACKS if name != "clean"]
        expected = f"--attacks {' '.join(self.attacks)}: expected {' or '.join(ATTACKS)}"
        refuse([(set(self.attacks) <= set(ATTACKS), expected)])
