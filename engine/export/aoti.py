"""AOTInductor packages: a part traced by torch.export and compiled to a library that runs without Python.

The weights stay outside, so that several packages share them. On a CPU the compiled code needs the instruction set of the machine
that compiled it, which the package itself names.
"""

import inspect
import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.export import ExportedProgram

from engine.errors import InputError
from engine.export.bundle import WEIGHTS
from engine.export.manifest import Packages, described, type_name
from engine.export.onednn import use_onednn
from engine.export.part import Exportable, Part, Ranges, Run, as_tuple, example
from engine.export.weights import WeightStore
from engine.progress import progress

# Weights by name and not in the library; small ones too, which would otherwise become numbers in the code.
SETTINGS: dict[str, Any] = {"aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": True}


def trace(part: Part, ranges: Ranges, device: torch.device) -> ExportedProgram:
    """The part as a graph of tensors' operations, for every size that its dimensions may have."""
    inputs, shapes = example(part, ranges)
    with torch.no_grad():
        inputs = tuple(x.to(device) for x in inputs)
        return torch.export.export(part.module, inputs, dynamic_shapes=_by_parameter(part.module, shapes))


def _by_parameter(module: nn.Module, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """A shape a parameter of `forward`, as torch.export wants them: those that end in *parameter are one tuple."""
    parameters = list(inspect.signature(module.forward).parameters.values())
    if not parameters or parameters[-1].kind is not inspect.Parameter.VAR_POSITIONAL:
        return shapes
    named = len(parameters) - 1
    return (*shapes[:named], shapes[named:])


def constants_of(program: ExportedProgram) -> dict[str, Tensor]:
    """Parameters, buffers and what else of tensors a traced part holds, by the names that its package has for them."""
    others = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    return {**program.state_dict, **others}


def output_types(program: ExportedProgram) -> list[str]:
    """Of what a traced part returns, in order."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    return [type_name(values[name].dtype) for name in program.graph_signature.user_outputs]


def compile_package(program: ExportedProgram, file: Path) -> None:
    """Write the package of a traced part; InputError where there is no C++ compiler that can."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=SETTINGS)
    except torch._inductor.exc.InvalidCxxCompiler as error:
        raise InputError("--target aoti: no C++ compiler was found (Debian: apt-get install g++; CXX names another)") from error


def export_parts(model: Exportable, device: torch.device, folder: Path) -> Packages:
    """packages/NAME.pt2 for the device that the parts are on, and their weights beside them."""
    store = WeightStore()
    entries: dict[str, dict[str, Any]] = {}
    loaded: dict[str, Package] = {}
    for part in progress(model.parts, desc="compile", unit="part"):
        file = f"packages/{part.name}.pt2"
        program = trace(part, model.dimensions, device)
        if device.type == "cpu":
            use_onednn(program)
        compile_package(program, folder / file)
        loaded[part.name] = Package(folder / file, device)
        constants = constants_of(program)
        names = store.add(part.name, {name: constants[name] for name in loaded[part.name].constant_names()})
        entries[part.name] = {"file": file, **described(part, model, output_types(program)), "constants": names}
    store.save(folder / WEIGHTS)
    tensors = load_file(folder / WEIGHTS, device=str(device))  # what is compared is what was written, and all packages share it
    for name, package in loaded.items():
        package.use({constant: tensors[stored] for constant, stored in entries[name]["constants"].items()})
    runs = {part.name: loaded[part.name].runner(part) for part in model.parts}
    needed = instruction_set(folder / entries[model.parts[0].name]["file"])
    return Packages(entries, runs, {"weights": WEIGHTS, "instruction_set": needed})


class Package:
    """A package that was loaded, to be run by name."""

    def __init__(self, file: Path, device: torch.device):
        self._file = file
        self._loaded = torch._inductor.aoti_load_package(str(file), run_single_threaded=True, device_index=device.index or -1)

    def constant_names(self) -> list[str]:
        """The constants that the package reads."""
        return list(self._loaded.get_constant_fqns())

    def use(self, constants: dict[str, Tensor]) -> None:
        """Read these very tensors from now on; nothing is copied. InputError where one is missing."""
        # libtorch only warns where it is a buffer, and reads whatever lies in its place.
        if missing := sorted(set(self.constant_names()) - constants.keys()):
            raise InputError(f"{self._file}: needs weights that are not given: {', '.join(missing[:4])}")
        self._loaded.load_constants(constants, check_full_update=True, user_managed=True)
        self._constants = constants

    def runner(self, part: Part) -> Run:
        """What runs the package with the part's inputs by name. Its code takes them for contiguous, as they were traced."""
        return lambda inputs: as_tuple(self._loaded(*(inputs[name].contiguous() for name in part.inputs)))


def instruction_set(file: Path) -> str:
    """What the package says that its CPU code needs, e.g. "AVX512 AVX512_VNNI"; empty where it has none for a CPU."""
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name.endswith("wrapper_metadata.json"):
                return str(json.loads(archive.read(name)).get("AOTI_CPU_ISA", ""))
    return ""
