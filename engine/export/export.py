"""A model becomes a bundle: its parts exported, compared with eager, sealed by a manifest."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import __version__ as safetensors_version
from safetensors.torch import load_file

from engine.errors import input_errors
from engine.export.aoti import Package, compile_package, constants_of, instruction_set, trace
from engine.export.bundle import WEIGHTS, new_folder, seal
from engine.export.parity import Parity, check_parity
from engine.export.part import Exportable, Part, Run, Shape, example_sizes
from engine.export.weights import WeightStore
from engine.files import write_whole
from engine.progress import progress

VERSION = "0.1.0"  # setup.py's


def export_bundle(model: Exportable, target: str, device: torch.device, dtype: torch.dtype, out: Path) -> dict[str, Any]:
    """Write the bundle `out`, whole or not at all; returns its manifest.

    The parts' modules are on `device` and in `dtype` already. InputError, one line, where a part is not what eager is.
    """
    with new_folder(out) as folder:
        packages, runs, facts = TARGETS[target](model, device, folder)
        parity = Parity()
        for part in progress(model.parts, desc="compare", unit="part"):
            parity = parity.worst_of(check_parity(part, runs[part.name], model.dimensions, device, dtype))
        with input_errors("parity"):
            whole = model.check(runs)
        for name, content in model.files.items():
            write_whole(folder / name, content)
        manifest = {
            "kind": model.kind,
            "target": target,
            "device": device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "instruction_set": "",
            "versions": {"vesalius": VERSION, "torch": torch.__version__.split("+")[0], "safetensors": safetensors_version},
            **facts,
            "packages": packages,
            "dimensions": {name: list(limits) for name, limits in model.dimensions.items()},
            **model.facts,
            "parity": {**parity.as_entry(dtype), **whole},
        }
        return seal(folder, json.loads(json.dumps(manifest)))


def export_aoti(model: Exportable, device: torch.device, folder: Path) -> tuple[dict[str, Any], dict[str, Run], dict[str, Any]]:
    """Packages that AOTInductor compiled, their weights beside them: the manifest's entries, and what runs each of them."""
    store = WeightStore()
    packages: dict[str, dict[str, Any]] = {}
    loaded: dict[str, Package] = {}
    for part in progress(model.parts, desc="compile", unit="part"):
        file = f"packages/{part.name}.pt2"
        program = trace(part, model.dimensions, device)
        compile_package(program, folder / file)
        loaded[part.name] = Package(folder / file, device)
        constants = constants_of(program)
        names = store.add(part.name, {name: constants[name] for name in loaded[part.name].constant_names()})
        packages[part.name] = {"file": file, **described(part, model), "constants": names}
    store.save(folder / WEIGHTS)
    tensors = load_file(folder / WEIGHTS, device=str(device))  # what is compared is what was written, and all packages share it
    for name, package in loaded.items():
        package.use({constant: tensors[stored] for constant, stored in packages[name]["constants"].items()})
    runs = {part.name: loaded[part.name].runner(part) for part in model.parts}
    needed = instruction_set(folder / packages[model.parts[0].name]["file"])
    return packages, runs, {"weights": WEIGHTS, "instruction_set": needed}


def described(part: Part, model: Exportable) -> dict[str, list[dict[str, Any]]]:
    """The manifest's `inputs` and `outputs` of a part; types are those of a run."""
    sample = part.sample(example_sizes(model.dimensions), torch.Generator().manual_seed(0))
    given = {name: _entry(name, shape, sample[name].dtype) for name, shape in part.inputs.items()}
    dtype = next(part.module.parameters()).dtype
    return {"inputs": list(given.values()), "outputs": [_entry(name, shape, dtype) for name, shape in part.outputs.items()]}


def _entry(name: str, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    return {"name": name, "dtype": str(dtype).removeprefix("torch."), "shape": list(shape)}


TARGETS = {"aoti": export_aoti}
