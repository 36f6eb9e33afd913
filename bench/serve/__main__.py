"""Our binaries against Python and against other runtimes: the same weights and images, one CPU thread, processes of their own.

    python -m bench.serve --binaries build [--bundle DIR] [--onnx DIR] [--vlm DIR] [--images 9] [--repetitions 5]

A segmenter answers a file of an image and a box with the file of a mask:

    cpp          `vesalius-seg --serve` with the bundle of `--bundle`, by HTTP; it keeps one embedding, so that none serves twice
    eager        models/sam/predictor.py
    compiled     the same, image encoder and mask decoder compiled by Inductor
    onnxruntime  the ONNX files of `--onnx` in ONNX Runtime, and
    openvino     in OpenVINO, each in an environment that is made for it (a download); they are given the image as the network takes
                 it and return logits, and neither file nor image is their work

A VLM answers a question about a file of an image: cpp is `vesalius-vlm --serve` with the bundle of `--vlm`, eager transformers'
generate with the starter policy; mistralrs, xllamacpp (llama.cpp, by GGUF files in float32) and onnxruntime-genai have the same
weights in environments of their own.

Bundles that are not named are exported first, which takes minutes. Masks must agree with eager's (IoU at least 0.995) before any is
timed, and the binary's greedy answers be eager's; of a peer's is said how many are. Then each does all images in turn,
`--repetitions` times; a time is the process's own CPU time, as the system counts it: the median. The last line is JSON: seg_ms_cpp,
seg_ms_eager, seg_ms_best_peer, seg_best_peer, seg_ms (of each), seg_speedup_eager, seg_speedup_best_peer, seg_rss_mb (resident in
cpp), seg_rss_beyond_libtorch_mb, seg_min_iou, seg_left_out (whoever could not run, and why), vlm_tokens_per_s_cpp,
vlm_tokens_per_s_eager, vlm_tokens_per_s_best_peer, vlm_best_peer, vlm_tokens_per_s (of each), vlm_speedup_eager, vlm_same_answers,
vlm_left_out, vlm_rss_mb, and the device.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from bench.measure import environment
from bench.medsam_dice import MINI
from bench.serve import segmenter, vlm
from engine.command.main import run_command
from engine.errors import InputError
from models.loading import STARTER_POLICY
from models.sam.loading import lite_medsam_checkpoint


def main(argv: list[str]) -> dict:
    parser = argparse.ArgumentParser("python -m bench.serve", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--binaries", type=Path, required=True, help="where cmake built vesalius-seg and vesalius-vlm")
    parser.add_argument("--checkpoint", type=Path, default=None, help="of a SAM; default: LiteMedSAM's, of the wheel")
    parser.add_argument("--bundle", type=Path, default=None)
    parser.add_argument("--onnx", type=Path, default=None)
    parser.add_argument("--vlm", type=Path, default=None)
    parser.add_argument("--only", choices=["segmenter", "vlm"], default=None)
    parser.add_argument("--data", type=Path, default=MINI)
    parser.add_argument("--images", type=int, default=9, choices=range(2, 92), metavar="2-91")
    parser.add_argument("--repetitions", type=int, default=5)
    without = ["compiled", *segmenter.PEERS, *vlm.PEERS]
    parser.add_argument("--without", nargs="*", choices=without, default=[], help="compiled: Inductor takes minutes")
    args = parser.parse_args(argv)
    for name, other in (("vesalius-seg", "vlm"), ("vesalius-vlm", "segmenter")):
        if args.only != other and not (args.binaries / name).is_file():
            raise InputError(f"{args.binaries / name}: no such file (expected what `cmake --build` made)")
    result: dict = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if args.only != "vlm":
            checkpoint = args.checkpoint or lite_medsam_checkpoint()
            bundle = args.bundle or exported(checkpoint, "aoti", work)
            onnx = args.onnx or exported(checkpoint, "onnx", work)
            starts = segmenter.providers(args.binaries / "vesalius-seg", bundle, onnx, checkpoint)
            starts = {name: start for name, start in starts.items() if name not in args.without}
            cases = segmenter.prepare(args.data, args.images, checkpoint, work)
            result |= segmenter.compare(starts, cases, args.repetitions, work)
        if args.only != "segmenter":
            bundle = args.vlm or exported(STARTER_POLICY, "aoti", work)
            questions = vlm.prepare(args.data, args.images, work)
            starts = vlm.providers(args.binaries / "vesalius-vlm", bundle, STARTER_POLICY, work)
            starts = {name: start for name, start in starts.items() if name not in args.without}
            result |= vlm.compare(starts, questions, args.repetitions, work)
    return result | {"environment": environment(torch.device("cpu"))}


def exported(checkpoint: Path, target: str, work: Path) -> Path:
    """A bundle of the checkpoint, made now."""
    from recipes.export import main as export

    out = work / f"{checkpoint.stem}-{target}"
    export(["--model", str(checkpoint), "--target", target, "--out", str(out)])
    return out


if __name__ == "__main__":
    run_command(main)
