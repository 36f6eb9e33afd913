"""Fixtures: the reference data that lies beside the checkout, and one thread for everything."""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        pytest.skip(f"{what} is not here ({path})")
    return path


@pytest.fixture(scope="session")
def golden() -> Path:
    """Outputs of the original code on seeded inputs: `VESALIUS_GOLDEN`, by default beside the checkout."""
    return _folder(Path(os.environ.get("VESALIUS_GOLDEN", ROOT.parent / "shared" / "reference" / "golden")), "golden data")


@pytest.fixture(scope="session")
def mini_data() -> Path:
    """A few real images in the published data formats, beside the checkout."""
    return _folder(ROOT.parent / "shared" / "data" / "mini", "the mini data set")
