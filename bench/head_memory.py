"""The head of a GRPO step on the CPU: peak memory and CPU time of forward and backward, ours against TRL's two paths.

    python -m bench.head_memory [--rows 2048 --hidden 512 --vocabulary 32768 --repetitions 5]

    eager      TRL's selective log-softmax and entropy over materialised logits
    chunked    TRL's chunked log-probs with entropy, 4096 columns at a time (four GEMMs)
    fused      the same with the 32768 columns that TRL's GRPOTrainer uses
    ours       linear_grpo_loss: single pass, chunks of 32 MB of logits

float32, one thread. Memory is the most that a fresh process gains over its inputs (read from /proc, so on Linux only); CPU time is
the median of interleaved repetitions in one process. Gradients are compared before anything is timed. The last line is JSON;
`rss_ratio_*` and `cpu_ratio` are ours over theirs, the latter over the fastest of the three. Exit code 2 where it cannot run.
"""

import argparse
import json
import os
import subprocess
import sys

import torch

from bench.measure import cpu_seconds, environment, peak_resident_bytes
from kernels.grpo_loss import grpo_loss_reference
from kernels.grpo_terms import GRPOLoss
from kernels.linear_grpo import linear_grpo_loss

PROVIDERS = ("eager", "chunked", "fused", "ours")
ANSWER = 64
LOSS = GRPOLoss("grpo", epsilon=0.2)


def inputs(rows: int, hidden: int, vocabulary: int) -> tuple:
    """Leaf hidden states (B, T, H) and weight (V, H), target ids, advantages, mask and old log-probs; seeded."""
    torch.manual_seed(0)
    states = torch.randn(rows // ANSWER, ANSWER, hidden, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden) * hidden**-0.5).requires_grad_()
    ids = torch.randint(0, vocabulary, states.shape[:2])
    advantages = torch.randn(len(states))
    return states, weight, ids, advantages, torch.ones(ids.shape), torch.full(ids.shape, -10.5)


def step(provider: str, states, weight, ids, advantages, mask, old_logprobs) -> None:
    """Forward and backward of one provider; the gradients land in `.grad`."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import selective_log_softmax_and_entropy

    states.grad = weight.grad = None
    if provider == "ours":
        loss, _, _ = linear_grpo_loss(states, weight, ids, advantages, mask, LOSS, old_logprobs=old_logprobs)
    else:
        if provider == "eager":
            logprobs, _ = selective_log_softmax_and_entropy(states @ weight.T, ids, entropy_requires_grad=False)
        else:
            columns = 4096 if provider == "chunked" else 32768
            rows = (states.flatten(0, 1), weight, None, ids.flatten())
            logprobs = ChunkedLogProbFunction.apply(*rows, 1.0, columns, None, 1.0, ("entropy",))[0].view(ids.shape)
        loss = grpo_loss_reference(logprobs, advantages, mask, LOSS, old_logprobs=old_logprobs)
    loss.backward()


def measure_memory(args, provider: str) -> int:
    """Peak resident bytes of one provider, in a fresh process."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("rows", "hidden", "vocabulary")]
    command = [sys.executable, "-m", "bench.head_memory", f"--child={provider}", *sizes]
    environ = {**os.environ, "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=True)
    return int(done.stdout.splitlines()[-1])


def run_child(args) -> None:
    """The fresh process: libraries are warm before its memory counts."""
    step(args.child, *inputs(2 * ANSWER, args.hidden, 1024))
    tensors = inputs(args.rows, args.hidden, args.vocabulary)
    print(peak_resident_bytes(lambda: step(args.child, *tensors)))


def check_gradients(tensors) -> float:
    """Largest relative difference of any provider's gradients to ours."""
    norms, largest = {}, 0.0
    for provider in reversed(PROVIDERS):
        step(provider, *tensors)
        norms[provider] = [tensors[0].grad.clone(), tensors[1].grad.clone()]
        for mine, theirs in zip(norms["ours"], norms[provider], strict=True):
            largest = max(largest, ((mine - theirs).norm() / theirs.norm()).item())
    return largest


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Memory and CPU time of the GRPO head against TRL's.")
    parser.add_argument("--rows", type=int, default=2048, help=f"tokens, a multiple of {ANSWER}")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--child", choices=PROVIDERS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not sys.platform.startswith("linux"):
        print("error: only Linux can say how much memory one step takes (/proc/self/clear_refs)", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    if args.child:
        run_child(args)
        return 0
    memory = {provider: measure_memory(args, provider) for provider in PROVIDERS}
    tensors = inputs(args.rows, args.hidden, args.vocabulary)
    difference = check_gradients(tensors)
    if difference > 1e-4:
        raise SystemExit(f"error: gradients differ by {difference:.1e} relative; nothing was timed")
    seconds = cpu_seconds({provider: lambda p=provider: step(p, *tensors) for provider in PROVIDERS}, args.repetitions)
    flops = 6 * args.rows * args.hidden * args.vocabulary
    for provider in PROVIDERS:
        rate = flops / seconds[provider] / 1e9
        print(f"{provider:8} {seconds[provider]:7.3f} s CPU  {rate:6.1f} GFLOP/s  {memory[provider] >> 20:6d} MB", file=sys.stderr)
    theirs = [name for name in PROVIDERS if name != "ours"]
    summary = {
        "case": f"N={args.rows} H={args.hidden} V={args.vocabulary} float32",
        **{f"rss_ratio_{name}": round(memory["ours"] / memory[name], 3) for name in theirs},
        "cpu_ratio": round(seconds["ours"] / min(seconds[name] for name in theirs), 3),
        "cpu_seconds": {name: round(value, 4) for name, value in seconds.items()},
        "rss_mb": {name: value >> 20 for name, value in memory.items()},
        "largest_gradient_difference": float(f"{difference:.1e}"),
        **environment(torch.device("cpu")),
    }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
