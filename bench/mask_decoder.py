"""SAM's mask decoder, 1 to 64 prompts of one image: transformers' formulation, that compiled, and ours.

    python -m bench.mask_decoder [--prompts 1 8 64] [--repeats 5] [--dtype float32] [--no_compile]

A case is a 64 x 64 image embedding and one box a prompt (7 tokens), one mask each. Providers hold the same weights and run
interleaved in this process; their masks are compared before anything is timed. On a CPU the clock is the process's CPU time
with one thread, on a GPU device events. Measured in float32 on a shared two-core Xeon, 2026-11-22: 2.5, 4.2 and 3.9 times
transformers at 1, 8 and 64 prompts (1.4, 2.3 and 2.3 times torch.compile). The last line is JSON: speedup_N
(transformers / ours) for each N, max_abs_error.
"""

import argparse
import statistics
import sys
import time
from functools import partial

import torch
import triton
from tqdm.auto import tqdm
from transformers import SamConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder

from engine.run import describe_device, run_command
from models.sam.mask_decoder import MaskDecoder
from models.sam.prompt_encoder import PromptEncoder
from models.sam.two_way_transformer import TwoWayTransformer

RENAMED = {  # ours (the published checkpoints') -> transformers'
    "output_upscaling.0.": "upscale_conv1.",
    "output_upscaling.1.": "upscale_layer_norm.",
    "output_upscaling.3.": "upscale_conv2.",
    "norm_final_attn": "layer_norm_final_attn",
    ".norm": ".layer_norm",
}


def to_transformers(decoder: MaskDecoder) -> SamMaskDecoder:
    """transformers' decoder with the same weights."""
    state = {}
    for key, tensor in decoder.state_dict().items():
        for ours, theirs in RENAMED.items():
            key = key.replace(ours, theirs)
        if "hypernetworks" in key or "iou_prediction_head" in key:
            key = key.replace("layers.0.", "proj_in.").replace("layers.2.", "proj_out.").replace("layers.1.", "layers.0.")
        state[key] = tensor
    config = SamConfig().mask_decoder_config
    config._attn_implementation = "sdpa"  # what SamModel chooses
    theirs = SamMaskDecoder(config)
    theirs.load_state_dict(state, strict=True)
    return theirs.eval()


def build_case(num_prompts: int, device: str, dtype: torch.dtype) -> dict:
    """Inputs of one image: embedding [1, 256, 64, 64], its positions, and the tokens of `num_prompts` boxes."""
    torch.manual_seed(0)
    encoder = PromptEncoder((64, 64), 1024)
    corners = torch.rand(1, num_prompts, 2, 2).sort(dim=2).values * 1024
    with torch.no_grad():
        sparse, dense = encoder(boxes=corners.flatten(2))
        case = {"image": torch.randn(1, 256, 64, 64), "pe": encoder.dense_pe(), "sparse": sparse, "dense": dense}
    return {name: tensor.to(device, dtype) for name, tensor in case.items()}


def build_providers(device: str, dtype: torch.dtype, compile: bool) -> dict:
    torch.manual_seed(0)
    ours = MaskDecoder(TwoWayTransformer()).eval()
    theirs = to_transformers(ours).to(device, dtype)
    ours = ours.to(device, dtype)

    def transformers(image, pe, sparse, dense):
        return theirs(image, pe[None], sparse, dense[0].expand(len(image), -1, -1, -1), multimask_output=False)

    providers = {
        "transformers": transformers,
        "ours": lambda image, pe, sparse, dense: ours(image, pe, sparse, dense, False),
    }
    if compile:
        providers["torch.compile"] = torch.compile(transformers)
    return providers


def seconds(function, device: str) -> float:
    """CPU time on a CPU (other processes do not count), device time on a GPU."""
    if device == "cpu":
        start = time.process_time()
        function()
        return time.process_time() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def main(argv: list[str]) -> dict:
    parser = argparse.ArgumentParser(
        "python -m bench.mask_decoder", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--no_compile", action="store_true")
    args = parser.parse_args(argv)
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    if device == "cpu":
        torch.set_num_threads(1)

    providers = build_providers(device, dtype, not args.no_compile)
    result = {"device": describe_device(), "torch": torch.__version__, "triton": triton.__version__, "dtype": args.dtype}
    result["max_abs_error"] = 0.0
    with torch.inference_mode():
        for num_prompts in args.prompts:
            torch._dynamo.reset()  # each number of prompts is compiled for itself
            case = build_case(num_prompts, device, dtype)
            masks = {name: provider(**case)[0].flatten(0, -3).float() for name, provider in providers.items()}
            error = (masks["ours"] - masks["transformers"]).abs().max().item()
            result["max_abs_error"] = max(result["max_abs_error"], error)
            times = {name: [] for name in providers}
            for _ in tqdm(range(args.repeats), desc=f"{num_prompts} prompts", file=sys.stderr):
                for name, provider in providers.items():
                    times[name].append(seconds(partial(provider, **case), device))
            for name, values in times.items():
                median = statistics.median(values)
                result[f"seconds_{num_prompts}_{name}"] = median
                print(f"{num_prompts:4} prompts  {name:14} {median * 1e3:10.2f} ms  {median / num_prompts * 1e3:8.2f} ms a prompt")
            result[f"speedup_{num_prompts}"] = result[f"seconds_{num_prompts}_transformers"] / result[f"seconds_{num_prompts}_ours"]
    return result


if __name__ == "__main__":
    run_command(main)
