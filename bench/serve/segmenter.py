"""A segmenter: a file of an image and a box to the file of a mask, by each of several processes."""

import base64
import io
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from bench.medsam_dice import read_images
from bench.serve.providers import Server, Worker, closing_all, cpu_seconds, data_uri, peer_python, resident_mb, start_all
from engine.errors import InputError
from engine.files import cache_folder
from engine.progress import progress
from models.sam.frame import Frame, as_pixels
from models.sam.loading import load_sam, sam_kind

PEERS = ("onnxruntime", "openvino")
LEAST_IOU = 0.995
Start = Callable[[Path], Worker]  # of a provider's process, given a file for its log


class Case(NamedTuple):
    """An image with a box, and what the peers are given of it."""

    image: Path
    box: list[float]
    inputs: Path
    frame: Frame


def providers(binary: Path, bundle: Path, onnx: Path, checkpoint: Path) -> dict[str, Start]:
    """How each of them is started."""
    return {
        "cpp": lambda log: Server([str(binary), str(bundle), "--serve", "0", "--images", "1"], log),
        **{kind: lambda log, kind=kind: python_worker(kind, checkpoint, log) for kind in ("eager", "compiled")},
        **{peer: lambda log, peer=peer: peer_worker(peer, onnx / "onnx", log) for peer in PEERS},
    }


def prepare(data: Path, number: int, checkpoint: Path, work: Path) -> list[Case]:
    """The first image of each modality that has masks, then the second, with the box of its first mask."""
    model = load_sam(sam_kind(checkpoint), checkpoint)
    by_modality: dict[str, list[tuple[Image.Image, list[np.ndarray]]]] = {}
    for modality, image, masks in read_images(data):
        by_modality.setdefault(modality, []).append((image, masks))
    longest = max(map(len, by_modality.values()))
    turns = [images[turn] for turn in range(longest) for images in by_modality.values() if turn < len(images)]
    cases = []
    for i, (image, masks) in enumerate(turns[:number]):
        y, x = np.nonzero(masks[0])
        box = [float(value) for value in (x.min(), y.min(), x.max(), y.max())]
        file, inputs = work / f"{i}.png", work / f"{i}.npz"
        image.save(file)
        frame = Frame.fit((image.height, image.width), model.image_size, model.fit)
        pixels = frame.pad(model.normalise(frame.resize(as_pixels(image))))[None]
        corners = frame.points(torch.tensor(box).view(1, 2, 2)).numpy()
        labels = np.array([[2, 3]], dtype=np.float32)
        np.savez(inputs, image=pixels.numpy(), point_coords=corners, point_labels=labels)
        cases.append(Case(file, box, inputs, frame))
    return cases


def python_worker(kind: str, checkpoint: Path, log: Path) -> Worker:
    return Worker([sys.executable, "-m", "bench.serve.segmenter_worker", kind, str(checkpoint)], log)


def peer_worker(peer: str, onnx: Path, log: Path) -> Worker:
    python = peer_python(peer, cache_folder() / "bench")
    return Worker([str(python), str(Path(__file__).with_name("segmenter_peer.py")), peer, str(onnx)], log)


def ask(name: str, worker: Worker, case: Case, work: Path) -> np.ndarray:
    """The mask [H, W] bool of one image, as a provider gives it."""
    output = work / f"{name}.png"
    if isinstance(worker, Server):
        answer = worker.ask({"route": "/segment", "json": {"image": data_uri(case.image), "boxes": [case.box]}})
        return mask_of(answer)
    if name not in PEERS:
        worker.ask({"image": str(case.image), "box": case.box, "output": str(output)})
        return np.asarray(Image.open(output)) > 0
    worker.ask({"inputs": str(case.inputs), "output": str(output.with_suffix(".npy"))})
    logits = torch.from_numpy(np.load(output.with_suffix(".npy")))
    return (case.frame.masks(logits) > 0)[0, 0].numpy()


def mask_of(answer: dict[str, Any]) -> np.ndarray:
    """The mask of an answer of /segment."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["masks"][0]["png"])))) > 0


def iou(one: np.ndarray, other: np.ndarray) -> float:
    either = (one | other).sum()
    return float((one & other).sum() / either) if either else 1.0


def compare(starts: dict[str, Start], cases: list[Case], repetitions: int, work: Path) -> dict:
    """Masks are compared, then timed: the segmenter's part of the last line."""
    workers: dict[str, Worker] = {}
    with closing_all(workers):
        left_out = start_all(starts, workers, work)
        expected = [ask("eager", workers["eager"], case, work) for case in cases]
        agreement: dict[str, float] = {}
        for name in list(workers):
            try:
                agreement[name] = min(
                    iou(ask(name, workers[name], case, work), mask) for case, mask in zip(cases, expected, strict=True)
                )
            except RuntimeError as error:
                left_out[name] = str(error)
                workers.pop(name).close()
        if bad := {name: value for name, value in agreement.items() if value < LEAST_IOU}:
            raise InputError(f"masks differ from eager's: smallest IoU {bad} (expected at least {LEAST_IOU})")

        milliseconds: dict[str, list[float]] = {name: [] for name in workers}
        for _ in progress(range(repetitions), desc="time", unit="round"):
            for name, worker in workers.items():
                before = cpu_seconds(worker.watched)
                for case in cases:
                    ask(name, worker, case, work)
                milliseconds[name].append(1e3 * (cpu_seconds(worker.watched) - before) / len(cases))
        resident, beyond = resident_mb(workers["cpp"].watched)
    return headline({name: statistics.median(values) for name, values in milliseconds.items()}, left_out) | {
        "seg_rss_mb": round(resident, 1),
        "seg_rss_beyond_libtorch_mb": round(beyond, 1),
        "seg_min_iou": round(min(agreement.values()), 5),
    }


def headline(milliseconds: dict[str, float], left_out: dict[str, str]) -> dict:
    """Ratios and the best peer, and a line for each provider."""
    peers = {name: value for name, value in milliseconds.items() if name in ("compiled", *PEERS)}
    best = min(peers, key=lambda name: peers[name], default=None)
    for name, value in sorted(milliseconds.items(), key=lambda item: item[1]):
        print(f"{name:12} {value:8.1f} ms of CPU time an image")
    for name, why in left_out.items():
        print(f"{name:12} left out: {why}")
    ours = milliseconds["cpp"]
    return {
        "seg_ms_cpp": round(ours, 1),
        "seg_ms_eager": round(milliseconds["eager"], 1),
        "seg_ms_best_peer": round(peers[best], 1) if best else None,
        "seg_best_peer": best,
        "seg_ms": {name: round(value, 1) for name, value in milliseconds.items()},
        "seg_speedup_eager": round(milliseconds["eager"] / ours, 2),
        "seg_speedup_best_peer": round(peers[best] / ours, 2) if best else None,
        "seg_left_out": left_out,
    }
