"""What opening an image costs: Pillow, our first look at it, and every later one. CPU time of one thread.

    python -m bench.loader [--data ../shared/data/mini] [--images 48] [--repetitions 5]

The images of the mini data set as PNG (RGB) and as JPEG (quality 92), from files to pixels [H, W, 3]:

    pillow       Image.open, RGB
    first        ours in a run that has not seen them: decoded, and kept
    cached       ours from then on: mapped into memory
    compressed   the same, kept by lz4
    off          ours with --image_cache off
    dali         NVIDIA's DALI on a CPU, a batch at a time, where it is installed: `--loader dali`

All give the same pixels, which is looked at first. The last line is JSON: png_first_vs_pil, png_cached_vs_pil, jpeg_first_vs_pil,
cached_compressed_vs_pil (of PNG), png_dali_vs_pil and jpeg_dali_vs_pil, how many times less CPU time each takes than Pillow, and
milliseconds an image of each. With a GPU there are also images a second, by the clock, of DALI's decoder there and of Pillow.
"""

import argparse
import io
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bench.measure import environment
from bench.medsam_dice import MINI
from engine.command.main import run_command
from engine.data.images import decode_image
from engine.data.loaders.dali import MOST, Pictures, has_dali
from engine.data.loaders.decoded import DecodedImages
from engine.data.loaders.pixel_store import PixelStore
from engine.data.loaders.undecoded import read_undecoded
from engine.data.sources import ImageFile
from engine.errors import InputError
from engine.progress import progress
from models.views import View

KINDS = {"png": {}, "jpeg": {"quality": 92}}
ROOM = 1 << 34  # bytes
AS_IT_IS = View(lambda height, width: (height, width), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def main(argv: list[str]) -> dict:
    parser = argparse.ArgumentParser("python -m bench.loader", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, default=MINI)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args(argv)
    found = sorted(args.data.glob("images/**/*.jpg"))
    sources = found[:: max(1, len(found) // args.images)][: args.images]
    if not sources:
        raise InputError(f"--data {args.data}: expected the mini data set, with images/ in it")
    rows, speeds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for kind, options in KINDS.items():
            files = [Path(folder) / f"{i}.{kind}" for i in range(len(sources))]
            for source, file in zip(sources, files, strict=True):
                Image.open(source).convert("RGB").save(file, kind.upper(), **options)
            rows[kind] = measure(files, Path(folder) / f"{kind}-cache", args.repetitions)
            if torch.cuda.is_available() and has_dali():
                speeds[kind] = measure_gpu(files, args.repetitions)
    for kind, times in rows.items():
        print(f"{kind:5}" + "   ".join(f"{name} {value:.3f} ms" for name, value in times.items()))
    png, jpeg = rows["png"], rows["jpeg"]
    return {
        "png_first_vs_pil": round(png["pillow"] / png["first"], 2),
        "png_cached_vs_pil": round(png["pillow"] / png["cached"], 1),
        "jpeg_first_vs_pil": round(jpeg["pillow"] / jpeg["first"], 2),
        "cached_compressed_vs_pil": round(png["pillow"] / png["compressed"], 1),
        **{f"{kind}_dali_vs_pil": round(times["pillow"] / times["dali"], 2) for kind, times in rows.items() if "dali" in times},
        **({"images_a_second": speeds} if speeds else {}),
        "milliseconds": {kind: {name: round(value, 3) for name, value in times.items()} for kind, times in rows.items()},
        "images": len(sources),
        "environment": environment(torch.device("cpu")),
    }


def by_pillow(file: Path) -> np.ndarray:
    with Image.open(io.BytesIO(file.read_bytes())) as image:
        return np.asarray(image.convert("RGB"))


def decoded(by_dali: Callable[[list], list], files: list[Path]) -> list:
    """Pixels by DALI, in batches as its pipeline takes them."""
    images = [read_undecoded(ImageFile(file)) for file in files]
    return [pixels for start in range(0, len(images), MOST) for pixels in by_dali(images[start : start + MOST])]


def measure_gpu(files: list[Path], repetitions: int) -> dict[str, float]:
    """Images a second by the clock, the median: DALI with device="mixed", and Pillow followed by a copy to the GPU."""
    by_dali = Pictures(AS_IT_IS, "cuda").decode
    ways: dict[str, Callable[[], object]] = {
        "dali_mixed": lambda: decoded(by_dali, files),
        "pillow": lambda: [torch.from_numpy(by_pillow(file).copy()).cuda() for file in files],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(repetitions + 1):  # the first warms up
        for name, way in ways.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            way()
            torch.cuda.synchronize()
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: round(len(files) / statistics.median(values), 1) for name, values in seconds.items()}


def measure(files: list[Path], cache: Path, repetitions: int) -> dict[str, float]:
    """Milliseconds an image of each way, the median; they take turns."""
    raw, packed = (DecodedImages(PixelStore(cache / form, ROOM, compress=form == "lz4")) for form in ("raw", "lz4"))
    ways: dict[str, Callable[[Path], np.ndarray]] = {
        "pillow": by_pillow,
        "cached": raw.pixels_of,
        "compressed": packed.pixels_of,
        "off": lambda file: np.asarray(decode_image(file.read_bytes(), file.name)),
    }
    for file in files:
        expected = by_pillow(file)
        for name, way in ways.items():
            if not np.array_equal(way(file), expected):
                raise InputError(f"{name} gives other pixels of {file.name} than Pillow")
    by_dali = Pictures(AS_IT_IS).decode if has_dali() else None
    if by_dali and not all(np.array_equal(*pair) for pair in zip(decoded(by_dali, files), map(by_pillow, files), strict=True)):
        raise InputError("dali gives other pixels than Pillow")
    alone = ("pillow", "first", "cached", "compressed", "off")  # a file at a time
    times: dict[str, list[float]] = {name: [] for name in (*alone, *(["dali"] if by_dali else []))}
    for _ in progress(range(repetitions), desc="time", unit="round"):
        fresh = DecodedImages(PixelStore(cache / "fresh", ROOM))
        for name in alone:
            way = fresh.pixels_of if name == "first" else ways[name]
            start = time.process_time()
            for file in files:
                way(file)
            times[name].append(1e3 * (time.process_time() - start) / len(files))
        shutil.rmtree(cache / "fresh")
        if by_dali:
            start = time.process_time()
            decoded(by_dali, files)
            times["dali"].append(1e3 * (time.process_time() - start) / len(files))
    return {name: statistics.median(values) for name, values in times.items()}


if __name__ == "__main__":
    run_command(main)
