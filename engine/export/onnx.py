"""ONNX: a part as a graph with its weights, which ONNX Runtime, OpenVINO, TensorRT and Triton Inference Server read.

It is traced on the CPU, where the references of our ops are ordinary operations. Beyond protobuf's 2 GB the weights lie beside it.
"""

import importlib.util
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.errors import InputError
from engine.export.manifest import Packages, described, versions, weight_type
from engine.export.part import Exportable, Part, Ranges, Run, example
from engine.progress import progress

OPSET = 20  # the first with Gelu
TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(int64)": "int64", "tensor(bool)": "bool"}


def export_parts(model: Exportable, device: torch.device, folder: Path) -> Packages:
    """onnx/NAME.onnx, run by ONNX Runtime on the CPU to be compared."""
    return write_graphs(model, folder, lambda part: f"onnx/{part.name}.onnx")


def write_graphs(model: Exportable, folder: Path, place: Callable[[Part], str]) -> Packages:
    """Each part's graph at its place in the folder."""
    require("onnx", "onnxscript", "onnxruntime")
    import onnx
    import onnxruntime

    entries: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for part in progress(model.parts, desc="to ONNX", unit="part"):
        if weight_type(part) == torch.bfloat16:
            raise InputError("--dtype bfloat16: ONNX Runtime has none on a CPU to compare with (expected float32 or float16)")
        file = folder / place(part)
        write_graph(part, model.dimensions, file)
        loaded = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        runs[part.name] = runner(loaded, part)
        types = [TYPES[output.type] for output in loaded.get_outputs()]  # ONNX keeps some sums of half types in float32
        entries[part.name] = {"file": place(part), **described(part, model, types), "constants": {}}
    return Packages(entries, runs, {"versions": versions(onnx=onnx.__version__, onnxruntime=onnxruntime.__version__)})


def require(*packages: str) -> None:
    """InputError that says what to install where one of the packages is not."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{package} is not installed (pip install 'vesalius[export]')")


def write_graph(part: Part, ranges: Ranges, file: Path) -> None:
    """The part as one file, its dimensions by their names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    inputs, shapes = example(part, ranges)
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):  # torchvision's operators that are not there, constants that stay
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            part.module,
            inputs,
            dynamo=True,
            dynamic_shapes=shapes,
            opset_version=OPSET,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            verbose=False,
        )
    assert program is not None  # with dynamo=True it is not
    program.save(file, external_data=None)


def runner(loaded: Any, part: Part) -> Run:
    """What runs a part's graph that ONNX Runtime has loaded."""

    def run(inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        given = {name: inputs[name].cpu().numpy() for name in part.inputs}
        return tuple(torch.from_numpy(output) for output in loaded.run(list(part.outputs), given))

    return run
