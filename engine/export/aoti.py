"""AOTInductor packages: a part traced by torch.export and compiled to a library that runs without Python.

The weights stay outside, so that several packages share them. On a CPU the compiled code needs the instruction set of the machine
that compiled it, which the package itself names.
"""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from engine.errors import InputError
from engine.export.part import Part, Ranges, Run, as_tuple, dimensions_of, example_sizes

# Weights by name and not in the library; small ones too, which would otherwise become numbers in the code.
SETTINGS: dict[str, Any] = {"aot_inductor.package_constants_in_so": False, "always_keep_tensor_constants": True}
SEED = 20261127  # of the inputs that are traced


def trace(part: Part, ranges: Ranges, device: torch.device) -> ExportedProgram:
    """The part as a graph of tensors' operations, for every size that its dimensions may have."""
    used = dimensions_of(part, ranges)
    named = {name: Dim(name, min=low, max=high) for name, (low, high) in used.items()}
    sample = part.sample(example_sizes(used), torch.Generator().manual_seed(SEED))
    shapes = tuple(
        {axis: named[entry] for axis, entry in enumerate(shape) if isinstance(entry, str)} for shape in part.inputs.values()
    )
    inputs = tuple(sample[name].to(device) for name in part.inputs)
    with torch.no_grad():
        return torch.export.export(part.module, inputs, dynamic_shapes=shapes)


def constants_of(program: ExportedProgram) -> dict[str, Tensor]:
    """Parameters, buffers and what else of tensors a traced part holds, by the names that its package has for them."""
    others = {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}
    return {**program.state_dict, **others}


def compile_package(program: ExportedProgram, file: Path) -> None:
    """Write the package of a traced part; InputError where there is no C++ compiler that can."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=SETTINGS)
    except torch._inductor.exc.InvalidCxxCompiler as error:
        raise InputError("--target aoti: no C++ compiler was found (Debian: apt-get install g++; CXX names another)") from error


class Package:
    """A package that was loaded, to be run by name."""

    def __init__(self, file: Path, device: torch.device):
        self._loaded = torch._inductor.aoti_load_package(str(file), run_single_threaded=True, device_index=device.index or -1)

    def constant_names(self) -> list[str]:
        """The constants that the package reads."""
        return list(self._loaded.get_constant_fqns())

    def use(self, constants: dict[str, Tensor]) -> None:
        """Read these very tensors from now on; nothing is copied."""
        self._loaded.load_constants(constants, check_full_update=True, user_managed=True)
        self._constants = constants

    def runner(self, part: Part) -> Run:
        """What runs the package with the part's inputs by name."""
        return lambda inputs: as_tuple(self._loaded(*(inputs[name] for name in part.inputs)))


def instruction_set(file: Path) -> str:
    """What the package says that its CPU code needs, e.g. "AVX512 AVX512_VNNI"; empty where it has none for a CPU."""
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name.endswith("wrapper_metadata.json"):
                return str(json.loads(archive.read(name)).get("AOTI_CPU_ISA", ""))
    return ""
