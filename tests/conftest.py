"""Fixtures: the reference data that lies beside the checkout, and one thread for everything.

Tests marked `triton` run where TRITON_INTERPRET=1 is set, in a process of their own: `TRITON_INTERPRET=1 pytest -m triton`.
With VESALIUS_REQUIRE_GOLDEN=1 (as in .ci/run) a test whose reference data are absent fails instead of being skipped.
"""

import os
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def _folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        absent = pytest.fail if os.environ.get("VESALIUS_REQUIRE_GOLDEN") == "1" else pytest.skip
        absent(f"{what} is not here ({path})")
    return path


def pytest_collection_modifyitems(items):
    if os.environ.get("TRITON_INTERPRET") != "1":
        for item in items:
            if item.get_closest_marker("triton"):
                item.add_marker(pytest.mark.skip(reason="runs in the Triton interpreter: TRITON_INTERPRET=1 pytest -m triton"))


@pytest.fixture(scope="session")
def golden() -> Path:
    """Outputs of the original code on seeded inputs: `VESALIUS_GOLDEN`, by default beside the checkout."""
    return _folder(Path(os.environ.get("VESALIUS_GOLDEN", ROOT.parent / "shared" / "reference" / "golden")), "golden data")


@pytest.fixture(scope="session")
def published_rows() -> Path:
    """Every distinct question that Med-R1 and MedVLM-R1 publish, as JSON lines, beside the checkout."""
    return _folder(ROOT.parent / "shared" / "data" / "published_rows", "the published questions") / "questions.jsonl.gz"


@pytest.fixture(scope="session")
def mini_data() -> Path:
    """A few real images in the published data formats, beside the checkout."""
    return _folder(ROOT.parent / "shared" / "data" / "mini", "the mini data set")
