"""Checkpoints of any model: where they lie, their tensors by key, and whether those are what a model expects."""

import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

CONTAINERS = ("model", "state_dict")  # keys under which a training checkpoint keeps its weights
SHOWN_KEYS, SHOWN_CHARACTERS = 4, 160  # of what an error quotes


class CheckpointError(ValueError):
    """A checkpoint that is not what it should be; the message is one line that names the file and what differs."""


def local_folder(path: str | Path) -> Path | None:
    """The checkpoint folder that `path` names, or None where it is a hub name: relative, and no folder here.

    Raises OSError where `path` is local and holds no config.json.
    """
    folder = Path(path)
    if not (folder.is_absolute() or str(path).startswith(".") or folder.is_dir()):
        return None
    if not (folder / "config.json").is_file():
        raise OSError(f"{path}: no checkpoint there (expected a folder with config.json)")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """The files of a folder that hold its weights: those that an index names, or the only one."""
    for stem in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{stem}.index.json"
        if index.is_file():
            return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]
        if (folder / stem).is_file():
            return [folder / stem]
    raise CheckpointError(f"{folder}: no weights (expected model.safetensors or pytorch_model.bin, or their index)")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth, .pt or .bin file by key, on the CPU. No code of a pickle is run.

    Raises CheckpointError where the file cannot be read or holds anything but tensors, plainly or in one of CONTAINERS.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path}: not a file of tensors ({reason[0][:SHOWN_CHARACTERS]})") from None
    for key in CONTAINERS:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a state dict of tensors, also under 'model' or 'state_dict'")
    return state


def check_keys(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], what: str) -> None:
    """Raise CheckpointError, `what` and then the keys that are missing, unexpected or of another shape, if there are any."""
    shapes = [
        f"{key} is {list(given[key].shape)} instead of {list(expected[key].shape)}"
        for key in expected
        if key in given and given[key].shape != expected[key].shape
    ]
    found = {
        "missing": [key for key in expected if key not in given],
        "unexpected": [key for key in given if key not in expected],
        "of another shape": shapes,
    }
    if any(found.values()):
        raise CheckpointError(f"{what}: " + "; ".join(f"{_some(names)} {kind}" for kind, names in found.items() if names))


def _some(names: list[str]) -> str:
    more = len(names) - SHOWN_KEYS
    return ", ".join(names[:SHOWN_KEYS]) + (f" and {more} more" if more > 0 else "")
