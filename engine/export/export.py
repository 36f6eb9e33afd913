"""A model becomes a bundle: its parts exported, compared with eager, sealed by a manifest."""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engine.errors import input_errors
from engine.export.bundle import new_folder, seal
from engine.export.manifest import Packages, type_name, versions
from engine.export.parity import Parity, check_parity
from engine.export.part import Exportable
from engine.files import write_whole
from engine.progress import progress

TARGETS = ("aoti", "onnx", "triton", "tensorrt")  # a module each, with the function `export_parts`


def export_bundle(
    model: Exportable,
    target: str,
    device: torch.device,
    dtype: torch.dtype,
    out: Path,
    accuracy: Sequence[Mapping[str, Any]] = (),
    **options: Any,
) -> dict[str, Any]:
    """Write the bundle `out`, whole or not at all; returns its manifest. `options` are the target's own, and
    `accuracy` is what was measured of the model (`engine.export.provenance.measured`).

    `device` is where the bundle will run. The parts' modules are in `dtype` already; they are on the CPU but for "aoti", whose
    packages are compiled where they run. InputError, one line, where a part is not what eager is.
    """
    with new_folder(out) as folder:
        packages = _exporter(target)(model, device, folder, **options)
        parity = Parity()
        for part in progress(model.parts, desc="compare", unit="part"):
            parity = parity.worst_of(check_parity(part, packages.runs[part.name], model.dimensions, dtype))
        with input_errors("parity"):
            whole = model.check(packages.runs)
        for name, content in model.files.items():
            write_whole(folder / name, content)
        manifest = {
            "kind": model.kind,
            "target": target,
            "device": device.type,
            "dtype": type_name(dtype),
            "instruction_set": "",
            "versions": versions(),
            **packages.facts,
            "packages": packages.entries,
            "dimensions": {name: list(limits) for name, limits in model.dimensions.items()},
            "accuracy": list(accuracy),
            **model.facts,
            "parity": {**parity.as_entry(dtype), **whole},
        }
        return seal(folder, json.loads(json.dumps(manifest)))


def _exporter(target: str) -> Callable[..., Packages]:
    """What exports for a target; imported only where it is asked for, since some need what is not always installed."""
    return importlib.import_module(f"engine.export.{target}").export_parts
