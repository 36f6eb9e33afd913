"""A training step with compiled layers (`--torch_compile`) against the same step as it is written, on one CPU thread.

    python -m bench.compile [--repetitions 5] [--tokens 64] [--side 392] [--backend inductor]

Case: the Qwen2.5-VL of bench.grpo_step (hidden 256, 4 layers, vision depth 2, vocabulary 4096, float32), all weights trained.
Four ragged micro-batches, of 2 prompts or 1, whose images, texts and answers (8 a prompt) differ in length; of each the
log-probabilities without gradients, as a reference's, then the single-pass GRPO loss and all gradients.

First losses, log-probabilities and gradients are compared (`max_rel_error`: the norm of a tensor's difference over its norm). Then
process CPU time, interleaved, median over repetitions of all micro-batches. `compilations` is the most that a region, with
gradients or without, was compiled; `compile_seconds` what the first pass took by the clock more than a later one, from an empty
cache. It ends with 1 where a graph breaks, a region is compiled more than twice, or the error is above 1e-5.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache

from bench.grpo_step import QUESTION, images, save_model
from bench.measure import cpu_seconds, environment, relative_errors
from engine.training.compiled.layers import CompiledLayers
from kernels.grpo_terms import GRPOLoss
from kernels.linear_grpo import linear_grpo_loss
from kernels.linear_logprob import linear_logprob
from models.qwen.policy import QwenVLPolicy, load_qwen_vl
from models.qwen.prompts import PromptBatch

ANSWERS = 8
LOSS = GRPOLoss("grpo", beta=0.04)
SHAPES = ((2, 1.0), (2, 0.75), (1, 0.9), (2, 0.5))  # prompts of a micro-batch, and their share of the longest answer


class MicroBatch(NamedTuple):
    """answer_ids (B, G, T), advantages (B * G,)."""

    prompts: PromptBatch
    answer_ids: Tensor
    advantages: Tensor


def micro_batches(policy: QwenVLPolicy, tokens: int, side: int) -> list[MicroBatch]:
    """Of SHAPES; images have the given side, or 28 or 56 pixels less."""
    made, generator = [], torch.Generator().manual_seed(0)
    pictures = iter(images(sum(prompts for prompts, _ in SHAPES)))
    for number, (prompts, share) in enumerate(SHAPES):
        encoded = []
        for i in range(prompts):
            smaller = side - 28 * ((number + i) % 3)
            text = QUESTION + " Think first." * (number + 2 * i)
            prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
            encoded.append(policy.processor.encode(prompt, [next(pictures).resize((smaller, side))]))
        ids = torch.randint(10, 4000, (prompts, ANSWERS, max(2, int(tokens * share))), generator=generator)
        made.append(MicroBatch(policy.batch(encoded), ids, torch.randn(prompts * ANSWERS, generator=generator)))
    return made


def one_pass(policy: QwenVLPolicy, micro: MicroBatch) -> list[Tensor]:
    """[loss, log-probabilities, gradients of all weights]."""
    ids = micro.answer_ids.flatten(0, 1)

    def logprobs(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_logprob(hidden.flatten(0, 1), weight, ids.flatten())[0].view(ids.shape)

    with torch.no_grad():
        reference = policy.model(**policy.answer_inputs(micro.prompts, micro.answer_ids), head=logprobs)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        mask = torch.ones(ids.shape)
        return linear_grpo_loss(hidden, weight, ids, micro.advantages, mask, LOSS, ref_logprobs=reference - 0.1)[0]

    value = policy.model(**policy.answer_inputs(micro.prompts, micro.answer_ids), head=loss)
    weights = [weight for weight in policy.model.parameters() if weight.requires_grad]
    return [value.detach(), reference, *torch.autograd.grad(value, weights)]


@contextmanager
def running(compiled: CompiledLayers | None) -> Iterator[None]:
    with compiled.running() if compiled else nullcontext():
        yield


def all_passes(policy: QwenVLPolicy, batches: list[MicroBatch], compiled: CompiledLayers | None) -> list[Tensor]:
    with running(compiled):
        return [tensor for micro in batches for tensor in one_pass(policy, micro)]


def measure(policy: QwenVLPolicy, batches: list[MicroBatch], backend: str, repetitions: int) -> dict[str, Any]:
    """The numbers of the last line."""
    compiled = CompiledLayers([policy], backend)
    breaks = sum(counters["graph_break"].values())
    with fresh_cache():
        start = time.perf_counter()
        found = all_passes(policy, batches, compiled)
        first = time.perf_counter() - start
    error = relative_errors(found, all_passes(policy, batches, None)).max().item()
    start = time.perf_counter()
    all_passes(policy, batches, compiled)
    later = time.perf_counter() - start
    providers = {"eager": None, "compiled": compiled}
    times = cpu_seconds({name: partial(all_passes, policy, batches, how) for name, how in providers.items()}, repetitions)
    made = compiled.metrics()
    return {
        "graph_breaks": sum(counters["graph_break"].values()) - breaks,
        "compilations": int(made["compile/most_of_a_region"]),
        "all_compilations": int(made["compile/compilations"]),
        "eager_calls": int(made["compile/eager_calls"]),
        "max_rel_error": error,
        "step_ratio": times["compiled"] / times["eager"],
        "compile_seconds": first - later,
        "eager_s": times["eager"],
        "compiled_s": times["compiled"],
    }


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64, help="of the longest answers [64]")
    parser.add_argument("--side", type=int, default=392, help="of the largest images, in pixels [392]")
    parser.add_argument("--backend", default="inductor", help="torch.compile's [inductor]")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        save_model(folder)
        policy = load_qwen_vl(folder)
    policy.model.train()
    result = measure(policy, micro_batches(policy, args.tokens, args.side), args.backend, args.repetitions)
    result |= {"backend": args.backend, **environment(torch.device("cpu"))}
    print(json.dumps({name: round(value, 8) if isinstance(value, float) else value for name, value in result.items()}))
    return result


if __name__ == "__main__":
    result = main()
    sys.exit(result["graph_breaks"] > 0 or result["compilations"] > 2 or not result["max_rel_error"] <= 1e-5)
