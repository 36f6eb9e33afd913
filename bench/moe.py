"""A layer with a mixture of experts on the CPU: CPU time and peak memory of forward and backward, ours against what others ship.

    python -m bench.moe [--tokens 2048 --repetitions 5 --only TEXT]

    deepspeed     DeepSpeed's MoE layer, as MedPLIB uses it: top-1, an expert's room 1.5 of its share, experts whole or with LoRA
    eager, ...    Hugging Face's sparse block of Qwen3-MoE, 64 experts and 8 a token, with each way that it has to run its experts
    ours          models/uni_medvlm/experts.py: MixtureOfExperts

The same weights, tokens and float32 on both sides, one thread. Outputs and all gradients are compared before anything is timed.
Memory is the most that a fresh process gains over its inputs and weights (read from /proc, so on Linux only): gradients of the
weights, where there are any, are in it. CPU time is the median of interleaved repetitions in one process. The last line is JSON;
`speedup` and `memory_ratio` are over the fastest and the leanest of the others. Without the extra `scale` there is no DeepSpeed,
which a line says. Exit code 2 where nothing can run.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from bench.measure import cpu_seconds, environment, peak_resident_bytes, relative_errors
from models.uni_medvlm.experts import MixtureOfExperts, RoutingOptions, SwiGLU
from models.uni_medvlm.projections import PROJECTIONS

ALLOWED = 1e-5  # of a tensor's norm


class Case(NamedTuple):
    """The sizes of a layer, and who else has one such."""

    hidden: int
    inner: int
    experts: int
    top_k: int
    others: tuple[str, ...]
    lora: bool = False


CASES = {
    "E=2": Case(1024, 2752, 2, 1, ("deepspeed",)),
    "E=4": Case(1024, 2752, 4, 1, ("deepspeed",)),
    "E=2, LoRA": Case(1024, 2752, 2, 1, ("deepspeed",), lora=True),
    "E=4, LoRA": Case(1024, 2752, 4, 1, ("deepspeed",), lora=True),
    "E=64, top-8": Case(512, 256, 64, 8, ("eager", "grouped_mm")),
}


class Layer(NamedTuple):
    """`run`: tokens (1, S, H) to output. `leaves`: what has gradients, by our names; a part of a stacked tensor is a function."""

    run: Callable[[Tensor], Tensor]
    module: nn.Module
    gradients: Callable[[], dict[str, Tensor]]


def experts_of(case: Case) -> tuple[list[nn.Module], Tensor]:
    """Seeded experts and a router (E, H)."""
    torch.manual_seed(0)
    experts: list[nn.Module] = [SwiGLU(case.hidden, case.inner) for _ in range(case.experts)]
    if case.lora:
        config = LoraConfig(r=8, lora_alpha=16, target_modules=list(PROJECTIONS), init_lora_weights=False)
        experts = [inject_adapter_in_model(config, expert) for expert in experts]
    return experts, torch.randn(case.experts, case.hidden) * case.hidden**-0.5


def named_gradients(router: nn.Parameter, experts: nn.ModuleList) -> dict[str, Tensor]:
    learning = {name: p.grad for name, p in experts.named_parameters() if p.grad is not None}
    return {"router": router.grad, **learning} if router.grad is not None else learning


def ours(case: Case) -> Layer:
    experts, router = experts_of(case)
    capacity = 1.5 if "deepspeed" in case.others else None
    layer = MixtureOfExperts(experts, case.hidden, RoutingOptions(case.top_k, capacity, renormalize=case.top_k > 1))
    layer.router.data = router

    def run(x: Tensor) -> Tensor:
        layer.ledger.begin()
        return layer(x)

    return Layer(run, layer, lambda: named_gradients(layer.router, layer.experts))


def deepspeed(case: Case) -> Layer:
    """Its layer in a world of one process."""
    import deepspeed as package
    from deepspeed.moe.layer import MoE

    if not torch.distributed.is_initialized():
        store = torch.distributed.FileStore(tempfile.mkstemp()[1], 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        package.init_distributed("gloo")
    experts, router = experts_of(case)
    layer = MoE(case.hidden, experts[0], case.experts, k=case.top_k, capacity_factor=1.5, min_capacity=0, use_rts=False)
    layer.set_deepspeed_parallelism()
    inside: Any = layer.deepspeed_moe
    inside.experts.deepspeed_experts = nn.ModuleList(experts)
    inside.gate.wg.weight.data = router
    return Layer(lambda x: layer(x)[0], layer, lambda: named_gradients(inside.gate.wg.weight, inside.experts.deepspeed_experts))


def sparse_block(case: Case, how: str) -> Layer:
    """Hugging Face's block of Qwen3-MoE."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes = {"hidden_size": case.hidden, "moe_intermediate_size": case.inner, "num_experts": case.experts}
    config = Qwen3MoeConfig(**sizes, num_experts_per_tok=case.top_k, norm_topk_prob=True, experts_implementation=how)
    layer = Qwen3MoeSparseMoeBlock(config)
    experts, router = experts_of(case)
    parts = [torch.stack([getattr(expert, name).weight.data for expert in experts]) for name in PROJECTIONS]
    layer.experts.gate_up_proj.data = torch.cat(parts[:2], 1)
    layer.experts.down_proj.data = parts[2]
    layer.gate.weight.data = router

    def gradients() -> dict[str, Tensor]:
        gate, up = layer.experts.gate_up_proj.grad.chunk(2, 1)
        by_name = dict(zip(PROJECTIONS, (gate, up, layer.experts.down_proj.grad), strict=True))
        each = {f"{e}.{name}.weight": grad[e] for e in range(case.experts) for name, grad in by_name.items()}
        return {"router": layer.gate.weight.grad, **each}

    return Layer(layer, layer, gradients)


def build(case: Case, provider: str) -> Layer:
    if provider == "ours":
        return ours(case)
    return deepspeed(case) if provider == "deepspeed" else sparse_block(case, provider)


def inputs(case: Case, tokens: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Tokens (1, S, H), a leaf, and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    x, grad = (torch.randn(1, tokens, case.hidden, generator=generator) for _ in range(2))
    return x.requires_grad_(), grad


def step(layer: Layer, x: Tensor, grad: Tensor) -> Tensor:
    """Forward and backward; gradients land in `.grad` as in the first micro-batch of a step. Returns the output."""
    x.grad = None
    layer.module.zero_grad(set_to_none=True)
    y = layer.run(x)
    y.backward(grad)
    return y.detach()


def compare(case: Case, layers: dict[str, Layer], tokens: int) -> float:
    """The largest relative error of an output or gradient of ours against any other's."""
    x, grad = inputs(case, tokens)
    made = {}
    for name, layer in layers.items():
        y = step(layer, x, grad)
        made[name] = {"y": y, "x": x.grad, **layer.gradients()}
        made[name] = {key: value.clone() for key, value in made[name].items()}
        step(layer, x, grad)
    mine, largest = made.pop("ours"), []
    for theirs in made.values():
        if theirs.keys() != mine.keys():
            raise SystemExit(f"error: gradients of other parameters: {theirs.keys() ^ mine.keys()}")
        largest.append(relative_errors([mine[key] for key in theirs], list(theirs.values())).max())
    return torch.stack(largest).max().item()  # NaN where any is


def measure_memory(name: str, provider: str, tokens: int) -> int:
    """Peak resident bytes of one provider, in a fresh process."""
    command = [sys.executable, "-m", "bench.moe", f"--only={name}", f"--child={provider}", f"--tokens={tokens}"]
    # what is freed goes back to the system at once, and is no memory that a later step finds already there
    environ = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environ, check=True)
    return int(done.stdout.splitlines()[-1])


def run_child(case: Case, provider: str, tokens: int) -> None:
    """The fresh process: libraries are warm, with few tokens, before its memory counts."""
    layer = build(case, provider)
    step(layer, *inputs(case, 64 * case.experts))
    layer.module.zero_grad(set_to_none=True)
    x, grad = inputs(case, tokens)
    gc.collect()
    print(peak_resident_bytes(lambda: step(layer, x, grad)))


def measure(name: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """A case's row."""
    providers = [*case.others, "ours"]
    memory = {provider: measure_memory(name, provider, args.tokens) for provider in providers}
    layers = {provider: build(case, provider) for provider in providers}
    error = compare(case, layers, args.tokens)
    if not error <= ALLOWED:
        raise SystemExit(f"error: {name}: results differ by {error:.1e} relative; nothing was timed")
    # each repetition has other tokens, the same for all, so that experts have other numbers of rows, as in training
    given = [inputs(case, args.tokens, seed) for seed in range(args.repetitions + 1)]
    turns = {provider: iter(given) for provider in providers}
    runs = {provider: lambda p=provider: step(layers[p], *next(turns[p])) for provider in providers}
    seconds = cpu_seconds(runs, args.repetitions)
    for provider in providers:
        print(f"{name:12} {provider:12} {seconds[provider]:7.3f} s CPU  {memory[provider] >> 20:6d} MB", file=sys.stderr)
    return {
        "case": f"{name} S={args.tokens} H={case.hidden} F={case.inner} float32",
        "speedup": round(min(seconds[other] for other in case.others) / seconds["ours"], 2),
        "memory_ratio": round(memory["ours"] / min(memory[other] for other in case.others), 2),
        "max_relative_error": float(f"{error:.1e}"),
        "cpu_seconds": {provider: round(value, 4) for provider, value in seconds.items()},
        "rss_mb": {provider: value >> 20 for provider, value in memory.items()},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="CPU time and memory of a mixture of experts against others' layers.")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not sys.platform.startswith("linux"):
        print("error: only Linux can say how much memory one step takes (/proc/self/clear_refs)", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    if args.child:
        run_child(CASES[args.only], args.child, args.tokens)
        return 0
    chosen = {name: case for name, case in CASES.items() if args.only in name}
    version = importlib.util.find_spec("deepspeed") and importlib.metadata.version("deepspeed")
    if not version:
        print("DeepSpeed is not installed (pip install -e '.[scale]'): its cases are left out", file=sys.stderr)
        chosen = {name: case for name, case in chosen.items() if "deepspeed" not in case.others}
    if not chosen:
        print(f"error: no case is left of {', '.join(CASES)}", file=sys.stderr)
        return 2
    rows = [measure(name, case, args) for name, case in chosen.items()]
    print(json.dumps({"cases": rows, "deepspeed": version, **environment(torch.device("cpu"))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
