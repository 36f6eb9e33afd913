"""TensorRT engines of a part's ONNX graph, built by TensorRT where it is installed, else by TensorRT for RTX, which needs no GPU.

    engines/NAME.engine   for one kind of GPU (`gpu`: sm_86) and this version of the library;   onnx/NAME.onnx   what it was made of

Networks are strongly typed: the graph's types are the engine's. Each dimension that has a range becomes an optimisation profile.
What is compared with eager is the graph, by ONNX Runtime: an engine runs on its GPU alone, which need not be here.

Engines are kept in the cache folder by the graph's hash, the library's version, the GPU and the profile, and are not built twice.
"""

import hashlib
import importlib
import json
from pathlib import Path
from typing import Any

import torch

from engine.errors import InputError
from engine.export.bundle import sha256
from engine.export.manifest import Packages
from engine.export.onnx import write_graphs
from engine.export.part import Exportable, Part, Ranges, dimensions_of
from engine.files import cache_folder, write_whole

LIBRARIES = ("tensorrt", "tensorrt_rtx")  # the first that is installed
LONGEST_REASON = 160  # characters of what the library says is wrong


def export_parts(model: Exportable, device: torch.device, folder: Path, gpu: str | None = None) -> Packages:
    """An engine of each part for `gpu`, e.g. sm_86; None: for the one that is here."""
    library = load_library()
    gpu = gpu or local_gpu()
    packages = write_graphs(model, folder, lambda part: f"onnx/{part.name}.onnx")
    entries = {}
    for part in model.parts:
        entry, file = packages.entries[part.name], f"engines/{part.name}.engine"
        write_whole(folder / file, cached_engine(library, folder / entry["file"], part, model.dimensions, gpu))
        entries[part.name] = {**entry, "file": file, "graph": entry["file"]}
    versions = {**packages.facts["versions"], library.__name__: library.__version__}
    return Packages(entries, packages.runs, {"versions": versions, "gpu": gpu, "parity_of": "the ONNX graphs"})


def load_library() -> Any:
    """TensorRT's module; InputError that says what to install where there is none that works."""
    for name in LIBRARIES:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # of a shared library that it lacks
            raise InputError(
                f"--target tensorrt: {name} is installed and does not load ({' '.join(str(error).split())})"
            ) from error
    raise InputError("--target tensorrt: neither tensorrt nor tensorrt_rtx is installed (pip install 'vesalius[export,tensorrt]')")


def local_gpu() -> str:
    """sm_86 of the GPU that is here; InputError where there is none."""
    if not torch.cuda.is_available():
        raise InputError("--gpu is missing: the kind of GPU that the engines are for, e.g. sm_86 (none is here to ask)")
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def cached_engine(library: Any, graph: Path, part: Part, ranges: Ranges, gpu: str) -> bytes:
    """`build_engine`'s, built once."""
    files = sorted(graph.parent.glob(f"{graph.name}*"))  # beside a large graph lie its weights
    used = dimensions_of(part, ranges)
    key = json.dumps([library.__name__, library.__version__, gpu, used, *map(sha256, files)])
    kept = cache_folder() / "engines" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.engine"
    if not kept.exists():
        write_whole(kept, build_engine(library, graph, part, used, gpu))
    return kept.read_bytes()


def build_engine(library: Any, graph: Path, part: Part, ranges: Ranges, gpu: str) -> bytes:
    """The serialised engine of an ONNX graph; InputError with the library's reason where it makes none."""
    logger = library.Logger(library.Logger.ERROR)
    builder = library.Builder(logger)
    network = builder.create_network(1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = library.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        reason = " ".join(str(parser.get_error(0).desc()).split())[:LONGEST_REASON]
        raise InputError(f"--target tensorrt: {library.__name__} cannot read the graph of {part.name} ({reason})")
    config = builder.create_builder_config()
    if ranges:
        config.add_optimization_profile(_profile(builder, part, ranges))
    _aim(library, config, gpu)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise InputError(f"--target tensorrt: {library.__name__} {library.__version__} built no engine of {part.name} for {gpu}")
    return bytes(engine)


def _profile(builder: Any, part: Part, ranges: Ranges) -> Any:
    """Least, likeliest and largest shape of each input; likeliest is the least that is not one."""
    profile = builder.create_optimization_profile()
    sizes = [dict(zip(ranges, ends, strict=True)) for ends in zip(*_ends(ranges), strict=True)]
    for name, shape in part.inputs.items():
        if any(isinstance(entry, str) for entry in shape):
            profile.set_shape(name, *([entry if isinstance(entry, int) else size[entry] for entry in shape] for size in sizes))
    return profile


def _ends(ranges: Ranges) -> list[tuple[int, int, int]]:
    return [(low, max(low, min(2, high)), high) for low, high in ranges.values()]


def _aim(library: Any, config: Any, gpu: str) -> None:
    """Build for `gpu`. TensorRT itself builds for the GPU that is here, and TensorRT for RTX for any that it has a name for."""
    kinds = getattr(library, "ComputeCapability", None)
    if kinds is None:
        if gpu != local_gpu():
            raise InputError(f"--gpu {gpu}: tensorrt builds for the GPU that is here, {local_gpu()} (tensorrt_rtx for others)")
        return
    known = [name for name in kinds.__members__ if name.startswith("SM")]
    name = gpu.upper().replace("_", "")
    if name not in known:
        expected = ", ".join(kind.lower().replace("sm", "sm_") for kind in known)
        raise InputError(f"--gpu {gpu}: {library.__name__} builds for {expected}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(kinds, name), 0)
