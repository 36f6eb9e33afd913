"""What a checkpoint says of itself, in manifest.json, which is written last: its step, its files with their sizes, and the settings
that decide what training does. What is not as it says is damaged, and what is trained otherwise cannot go on from it.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState

from engine.data.formats.text import LFS_POINTER
from engine.data.rows import Rows
from engine.errors import InputError
from engine.files import plain, read_bounded, write_json

MANIFEST, STATE = "manifest.json", "trainer_state.json"
LARGEST = 1 << 26  # bytes of a manifest
# Of the Trainer's own settings, those that decide what is learnt. Of ours all do, but those named below.
DECIDING = frozenset(
    "per_device_train_batch_size gradient_accumulation_steps learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps "
    "optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm neftune_noise_alpha "
    "bf16 seed data_seed full_determinism train_sampling_strategy".split()
)
FREE = frozenset(
    "rollout_batch_size log_completions attention attn_implementation image_cache allow_burned_in on_bad_row warm_up_steps "
    "eval_dataset_name eval_limit eval_split dataset_test_split".split()
)


@dataclass(frozen=True)
class Manifest:
    """`files` {name: bytes}; `settings` {name: value in JSON's types}; `rows` {"training", "held-out"}: their `row_identity`;
    `only_model`: saved by --save_only_model."""

    step: int
    only_model: bool
    files: dict[str, int]
    settings: dict[str, Any]
    rows: dict[str, str | None]

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, vars(self))

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """InputError, which offers the checkpoint before it, where the folder's is missing or not what `write` writes."""
        try:
            value = json.loads(read_bounded(folder / MANIFEST, LARGEST))
            kinds = {"step": int, "only_model": bool, "files": dict, "settings": dict, "rows": dict}
            if not isinstance(value, dict) or any(type(value.get(name)) is not kind for name, kind in kinds.items()):
                raise ValueError("not what training writes")
            if not all(type(size) is int for size in value["files"].values()):
                raise ValueError("not what training writes")
        except FileNotFoundError:
            raise damaged(folder, f"no {MANIFEST}, which is written last: not a whole checkpoint") from None
        except OSError as error:
            raise damaged(folder, f"{MANIFEST} cannot be read ({error.strerror})") from None
        except (ValueError, RecursionError) as error:
            raise damaged(folder, f"{MANIFEST} is damaged ({' '.join(str(error).split())[:160]})") from None
        return cls(**{name: value[name] for name in kinds})


# ---- whole or damaged -----------------------------------------------------------------------------------------------


def sizes(folder: Path) -> dict[str, int]:
    """{name: bytes} of all files in a folder and in those beneath it."""
    found = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}


def fault_of(folder: Path, manifest: Manifest) -> str | None:
    """The first file that is not as the manifest says, in words; None where all are."""
    for name, size in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing" if not path.exists() else f"{name} is not a file"
        there = path.stat().st_size
        if there != size:
            with open(path, "rb") as file:
                if file.read(len(LFS_POINTER)) == LFS_POINTER:
                    return f"{name} is a Git LFS pointer, not the file itself (`git lfs pull` fetches it)"
            return f"{name} has {there:,} bytes (expected {size:,})"
    if not manifest.only_model:
        try:
            state = TrainerState.load_from_json(str(folder / STATE))
            if state.global_step != manifest.step or not isinstance(state.stateful_callbacks, dict):
                raise ValueError(f"it is not that of step {manifest.step}")
        except Exception as error:  # a damaged one has any values, and these any exception
            return f"{STATE} is damaged ({' '.join(str(error).split())[:160]})"
    return None


def check_whole(folder: Path) -> Manifest:
    """The manifest of a checkpoint that training can go on from; else InputError, which offers the checkpoint before it."""
    if not (folder / STATE).exists() and not (folder / MANIFEST).exists():
        raise InputError(f"{folder}: not a training checkpoint (no {STATE})")
    manifest = Manifest.read(folder)
    if fault := fault_of(folder, manifest):
        raise damaged(folder, fault)
    if manifest.only_model:
        raise InputError(f"{folder}: holds only the model (--save_only_model); training cannot resume from it")
    return manifest


def damaged(folder: Path, fault: str) -> InputError:
    """The error of a checkpoint that cannot be gone on from, with the newest whole one before it."""
    for before in reversed(checkpoints(folder.parent)):
        if step_of(before) < step_of(folder) and is_whole(before):
            return InputError(f"{folder}: {fault}; the one before it is whole: --resume_from_checkpoint {before}")
    return InputError(f"{folder}: {fault}; no whole one is before it: start anew with another --output_dir")


def is_whole(folder: Path) -> bool:
    """Whether training can go on from it."""
    try:
        manifest = Manifest.read(folder) if (folder / MANIFEST).is_file() else None
    except InputError:
        return False
    return manifest is not None and not manifest.only_model and fault_of(folder, manifest) is None


def checkpoints(output_dir: Path) -> list[Path]:
    """The folders `checkpoint-<step>`, by their steps."""
    return sorted((path for path in output_dir.glob("checkpoint-*") if step_of(path) >= 0), key=step_of)


def step_of(folder: Path) -> int:
    """The step that a checkpoint's name says; -1 of another name."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isascii() and number.isdigit() and number != folder.name else -1


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Inside, whatever a library raises over what `folder` holds becomes an InputError that offers the checkpoint before it."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise damaged(folder, f"cannot be loaded ({type(error).__name__}{': ' if reason else ''}{reason})") from error


# ---- the same training, or another ----------------------------------------------------------------------------------


def deciding_settings(groups: Iterable[Any], processes: int) -> dict[str, Any]:
    """{name: value in JSON's types} of the settings in dataclasses that decide what training does, and the number of processes.

    How long a run is does not: it may be made longer.
    """
    theirs = {declared.name for declared in fields(TrainingArguments)} - DECIDING
    found: dict[str, Any] = {}
    for group in groups:
        names = [declared.name for declared in fields(group) if declared.name not in theirs and declared.name not in FREE]
        found |= {name: plain(getattr(group, name)) for name in names}
        if hasattr(group, "deepspeed"):
            found["deepspeed"] = bool(group.deepspeed)
    return found | {"number of processes": processes}


def check_same(folder: Path, manifest: Manifest, settings: Mapping[str, Any], training_rows: str | None = None) -> None:
    """InputError, in one line that names setting, old and new value, where training would not go on as it was begun.

    `training_rows`: their `row_identity`, where it is known.
    """
    for name, new in settings.items():
        old = manifest.settings.get(name, new)
        if old != new and not _is_same_place(old, new):
            flag = name if " " in name else f"--{name}"
            raise InputError(
                f"{folder}: was trained with {flag} {_shown(old)}, not {_shown(new)}: expected the same, or another --output_dir"
            )
    before = manifest.rows.get("training")
    if training_rows and before and before != training_rows:
        told = f"{before.split()[0]} training rows, now there are {training_rows.split()[0]}"
        if before.split()[0] == training_rows.split()[0]:
            told = "other training rows, though as many"
        raise InputError(f"{folder}: was trained on {told}: expected the same rows, or another --output_dir")


def _is_same_place(old: Any, new: Any) -> bool:
    """Whether both name one file or folder that is there."""
    if not (isinstance(old, str) and isinstance(new, str)):
        return isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and all(map(_is_same_place, old, new))
    return os.path.exists(new) and os.path.realpath(old) == os.path.realpath(new)


def _shown(value: Any) -> str:
    text = " ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 160 else f"{text[:160]}..."


def row_identity(rows: Rows | None) -> str | None:
    """How many they are, and a digest of what stands in them, wherever their files lie; None of none."""
    if rows is None:
        return None
    digest = hashlib.sha256()
    for record in rows.records:
        told = {key: value for key, value in record.items() if key != "source"}
        digest.update(json.dumps(plain(told), sort_keys=True).encode())
    return f"{len(rows)} {digest.hexdigest()}"
