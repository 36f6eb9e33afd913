"""A model repository for Triton Inference Server: a folder a part, with config.pbtxt and the ONNX graph as version 1.

    tritonserver --model-repository BUNDLE

The server cannot load AOTInductor's packages; it runs the graphs with its ONNX Runtime. `device` says whether on CPUs or on GPUs.
"""

from pathlib import Path
from typing import Any

import torch

from engine.export.manifest import Packages
from engine.export.onnx import write_graphs
from engine.export.part import Exportable
from engine.files import write_whole

TYPES = {"float32": "TYPE_FP32", "float16": "TYPE_FP16", "int64": "TYPE_INT64", "int32": "TYPE_INT32", "bool": "TYPE_BOOL"}


def export_parts(model: Exportable, device: torch.device, folder: Path) -> Packages:
    """NAME/config.pbtxt and NAME/1/model.onnx of each part."""
    packages = write_graphs(model, folder, lambda part: f"{part.name}/1/model.onnx")
    for name, entry in packages.entries.items():
        write_whole(folder / name / "config.pbtxt", config(name, entry, device))
    return packages


def config(name: str, entry: dict[str, Any], device: torch.device) -> str:
    """The server's description of a part; a dimension that has a range is -1. The server adds no dimension for batches."""
    kind = "KIND_GPU" if device.type == "cuda" else "KIND_CPU"
    tensors = "".join(_tensors(which, entry[f"{which}s"]) for which in ("input", "output"))
    return f'name: "{name}"\nbackend: "onnxruntime"\nmax_batch_size: 0\n{tensors}instance_group [{{ count: 1, kind: {kind} }}]\n'


def _tensors(which: str, entries: list[dict[str, Any]]) -> str:
    lines = []
    for entry in entries:
        dims = ", ".join(str(size) if isinstance(size, int) else "-1" for size in entry["shape"])
        lines.append(f'  {{ name: "{entry["name"]}", data_type: {TYPES[entry["dtype"]]}, dims: [{dims}] }}')
    return f"{which} [\n" + ",\n".join(lines) + "\n]\n"
