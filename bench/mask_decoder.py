"""SAM's mask decoder, 1 to 64 prompts of one image: transformers' formulation, that compiled, and ours.

    python -m bench.mask_decoder [--prompts 1 8 64] [--repeats 5] [--dtype float32] [--no_compile]

A case is a 64 x 64 image embedding and one box a prompt (7 tokens), one mask each. Providers hold the same weights and run
interleaved in this process; their masks are compared before anything is timed. On a CPU the clock is the process's CPU time
with one thread, on a GPU device events. Measured in float32 on a shared two-core Xeon, 2026-11-24: 2.2, 4.0 and 4.3 times
transformers at 1, 8 and 64 prompts (1.4, 2.2 and 2.5 times torch.compile). The last line is JSON: speedup_N
(transformers / ours) for each N, max_abs_error.
"""

import argparse
import sys
from functools import partial

import torch
from tqdm.auto import tqdm
from transformers import SamConfig
from transformers.models.sam.modeling_sam import SamMaskDecoder

from bench.measure import cpu_seconds, cuda_seconds, environment
from engine.command.main import run_command
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


def build_case(num_prompts: int, device: torch.device, dtype: torch.dtype, side: int = 64) -> dict:
    """Inputs of one image: embedding [1, 256, side, side], its positions, and the tokens of `num_prompts` boxes."""
    torch.manual_seed(0)
    encoder = PromptEncoder((side, side), 16 * side)
    corners = torch.rand(1, num_prompts, 2, 2).sort(dim=2).values * 16 * side
    with torch.no_grad():
        sparse, dense = encoder(boxes=corners.flatten(2))
        case = {"image": torch.randn(1, 256, side, side), "pe": encoder.dense_pe(), "sparse": sparse, "dense": dense}
    return {name: tensor.to(device, dtype) for name, tensor in case.items()}


def build_decoder(device: torch.device, dtype: torch.dtype) -> MaskDecoder:
    """Ours with random weights, the same each time."""
    torch.manual_seed(0)
    return MaskDecoder(TwoWayTransformer()).eval().to(device, dtype)


def as_provider(decoder: MaskDecoder | SamMaskDecoder):
    """A decoder as a function of a case; transformers' takes positions and dense prompts of each image."""

    def ours(image, pe, sparse, dense, multimask=False):
        return decoder(image, pe, sparse, dense, multimask)

    def transformers(image, pe, sparse, dense, multimask=False):
        dense = dense[0].expand(len(image), -1, -1, -1)
        return decoder(image, pe[None], sparse, dense, multimask_output=multimask)

    return ours if isinstance(decoder, MaskDecoder) else transformers


def build_providers(device: torch.device, dtype: torch.dtype, compile: bool) -> dict:
    ours = build_decoder(device, dtype)
    providers = {"transformers": as_provider(to_transformers(ours).to(device, dtype)), "ours": as_provider(ours)}
    if compile:
        providers["torch.compile"] = torch.compile(providers["transformers"])
    return providers


def main(argv: list[str]) -> dict:
    parser = argparse.ArgumentParser(
        "python -m bench.mask_decoder", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--no_compile", action="store_true")
    args = parser.parse_args(argv)
    device, dtype = torch.device("cuda" if torch.cuda.is_available() else "cpu"), getattr(torch, args.dtype)
    if device.type == "cpu":
        torch.set_num_threads(1)
    clock = cpu_seconds if device.type == "cpu" else cuda_seconds

    providers = build_providers(device, dtype, not args.no_compile)
    where = environment(device)
    result = {name: where[name] for name in ("device", "torch", "triton")} | {"dtype": args.dtype, "max_abs_error": 0.0}
    with torch.inference_mode():
        for num_prompts in tqdm(args.prompts, desc="numbers of prompts", file=sys.stderr):
            torch._dynamo.reset()  # each number of prompts is compiled for itself
            case = build_case(num_prompts, device, dtype)
            masks = {name: provider(**case)[0].flatten(0, -3).float() for name, provider in providers.items()}
            error = (masks["ours"] - masks["transformers"]).abs().max().item()
            result["max_abs_error"] = max(result["max_abs_error"], error)
            times = clock({name: partial(provider, **case) for name, provider in providers.items()}, args.repeats)
            for name, median in times.items():
                result[f"seconds_{num_prompts}_{name}"] = median
                each = median / num_prompts
                tqdm.write(f"{num_prompts:4} prompts  {name:14} {median * 1e3:10.2f} ms  {each * 1e3:8.2f} ms a prompt")
            result[f"speedup_{num_prompts}"] = times["transformers"] / times["ours"]
    return result


if __name__ == "__main__":
    run_command(main)
