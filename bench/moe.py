"""A layer with a mixture of experts on the CPU: CPU time and peak memory of forward and backward, ours against what others ship.

    python -m bench.moe [--tokens 2048 --repetitions 5 --only TEXT --tiny]

    deepspeed     DeepSpeed's MoE layer, as MedPLIB uses it: top-1, an expert's room 1.5 of its share, experts whole or with LoRA
    grouped_mm    Hugging Face's sparse block of Qwen3-MoE with the experts it ships by default, 64 of them and 8 a token
    ours          models/uni_medvlm/experts.py: MixtureOfExperts

The same weights, tokens and float32 on both sides, one thread. Outputs and all gradients are compared before anything is timed;
`max_abs_error` is the largest difference of an element. CPU time is the median of interleaved repetitions in one process.
`products_seconds` is what the experts' matrix products take by themselves, for the rows that each side gives them: `speedup_bound`,
the other's time over our products', is what no order of work around them can exceed.

Memory is the most that a fresh process gains over its tokens, its weights and their gradients (read from /proc, so on Linux only):
the gradients are there before, as in each micro-batch of a step but the first, and both sides add to them. `first_memory_ratio` is
of the first, in which gradients are made and count. The last line is JSON; each ratio is over the fastest or the leanest of the
others, and beside the cases stand the worst of them. Without the extra `scale` there is no DeepSpeed, which a line says. Exit code
2 where nothing can run.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import math
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
from kernels.moe_cpu import product
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
    "E=64, top-8": Case(512, 256, 64, 8, ("grouped_mm",)),
}
TINY = {"hidden": 32, "inner": 48}


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
        package.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, for minutes, for other processes
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


def step(layer: Layer, x: Tensor, grad: Tensor, first: bool = True) -> Tensor:
    """Forward and backward, the output of it. Gradients of weights are made, as in a step's `first` micro-batch, or added to."""
    x.grad = None
    if first:
        layer.module.zero_grad(set_to_none=True)
    y = layer.run(x)
    y.backward(grad)
    return y.detach()


def compare(case: Case, layers: dict[str, Layer], tokens: int) -> tuple[float, float]:
    """The largest difference of an element of an output or gradient of ours and any other's, and the largest relative error."""
    x, grad = inputs(case, tokens)
    made = {}
    for name, layer in layers.items():
        y = step(layer, x, grad)
        made[name] = {key: value.clone() for key, value in {"y": y, "x": x.grad, **layer.gradients()}.items()}
    mine, absolute, relative = made.pop("ours"), [], []
    for theirs in made.values():
        if theirs.keys() != mine.keys():
            raise SystemExit(f"error: gradients of other parameters: {theirs.keys() ^ mine.keys()}")
        absolute += [(mine[key] - theirs[key]).abs().max() for key in theirs]
        relative.append(relative_errors([mine[key] for key in theirs], list(theirs.values())).max())
    return torch.stack(absolute).max().item(), torch.stack(relative).max().item()  # NaN where any is


def products(case: Case, rows: int, multiply: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], None]:
    """The products of a step, and nothing else, of experts with as many rows each. `multiply`: x and w to x w^T."""
    x, inner = torch.randn(rows, case.hidden), torch.randn(rows, case.inner)
    weights = [torch.randn(case.inner, case.hidden) for _ in range(case.experts)]

    def run() -> None:
        for w in weights:
            for _ in range(2):  # gate and up, down with its sides changed
                multiply(x, w)
                multiply(inner, w.T)
            multiply(inner, w.T)
            multiply(x, w)
            for _ in range(0 if case.lora else 3):
                multiply(inner.T, x.T)

    return run


def measure_memory(name: str, provider: str, args: argparse.Namespace) -> tuple[int, int]:
    """Peak resident bytes of one provider, in a fresh process: gradients of weights being there, and not."""
    command = [sys.executable, "-m", "bench.moe", f"--only={name}", f"--child={provider}", f"--tokens={args.tokens}"]
    # what is freed goes back to the system at once, and is no memory that a later step finds already there
    environ = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command + ["--tiny"] * args.tiny, stdout=subprocess.PIPE, text=True, env=environ, check=True)
    there, made = done.stdout.splitlines()[-1].split()
    return int(there), int(made)


def run_child(case: Case, provider: str, tokens: int) -> None:
    """The fresh process: libraries are warm, with few tokens, before its memory counts."""
    layer = build(case, provider)
    step(layer, *inputs(case, 64 * case.experts))
    x, grad = inputs(case, tokens)
    peaks = []
    for first in (False, True):
        x.grad = None
        if first:
            layer.module.zero_grad(set_to_none=True)
        gc.collect()
        peaks.append(peak_resident_bytes(lambda first=first: step(layer, x, grad, first)))
    print(*peaks)


def measure(name: str, case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """A case's row."""
    providers = [*case.others, "ours"]
    memory = {provider: measure_memory(name, provider, args) for provider in providers}
    layers = {provider: build(case, provider) for provider in providers}
    absolute, relative = compare(case, layers, args.tokens)
    if not relative <= ALLOWED:
        raise SystemExit(f"error: {name}: results differ by {relative:.1e} relative; nothing was timed")
    # each repetition has other tokens, the same for all, so that experts have other numbers of rows, as in training
    given = [inputs(case, args.tokens, seed) for seed in range(args.repetitions + 1)]
    turns = {provider: iter(given) for provider in providers}
    runs = {provider: lambda p=provider: step(layers[p], *next(turns[p])) for provider in providers}
    share = args.tokens * case.top_k / case.experts
    rows = dict.fromkeys(providers, math.ceil(share)) | ({"deepspeed": math.ceil(1.5 * share)} if "deepspeed" in providers else {})
    alone = {p: products(case, rows[p], product if p == "ours" else lambda x, w: x @ w.T) for p in providers}
    seconds = cpu_seconds(runs | {f"{p}, products": run for p, run in alone.items()}, args.repetitions)
    of_products = {p: seconds.pop(f"{p}, products") for p in providers}
    for p in providers:
        there, made = (value >> 20 for value in memory[p])
        figures = f"{seconds[p]:7.3f} s CPU, products {of_products[p]:7.3f} s  {there:6d} MB, with gradients {made:6d} MB"
        print(f"{name:12} {p:12} {figures}", file=sys.stderr)
    fastest, leanest = min(seconds[other] for other in case.others), [min(memory[o][i] for o in case.others) for i in (0, 1)]
    return {
        "case": f"{name} S={args.tokens} H={case.hidden} F={case.inner} float32",
        "speedup": round(fastest / seconds["ours"], 2),
        "speedup_bound": round(fastest / of_products["ours"], 2),
        "memory_ratio": round(memory["ours"][0] / max(1, leanest[0]), 2),
        "first_memory_ratio": round(memory["ours"][1] / max(1, leanest[1]), 2),
        "max_abs_error": float(f"{absolute:.1e}"),
        "max_relative_error": float(f"{relative:.1e}"),
        "cpu_seconds": {provider: round(value, 4) for provider, value in seconds.items()},
        "products_seconds": {provider: round(value, 4) for provider, value in of_products.items()},
        "rss_mb": {provider: [value >> 20 for value in both] for provider, both in memory.items()},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="CPU time and memory of a mixture of experts against others' layers.")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--tiny", action="store_true", help="narrow layers, to try the bench itself")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not sys.platform.startswith("linux"):
        print("error: only Linux can say how much memory one step takes (/proc/self/clear_refs)", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    cases = {name: case._replace(**TINY) if args.tiny else case for name, case in CASES.items()}
    if args.child:
        run_child(cases[args.only], args.child, args.tokens)
        return 0
    chosen = {name: case for name, case in cases.items() if args.only in name}
    version = importlib.util.find_spec("deepspeed") and importlib.metadata.version("deepspeed")
    if not version:
        print("DeepSpeed is not installed (pip install -e '.[scale]'): its cases are left out", file=sys.stderr)
        chosen = {name: case for name, case in chosen.items() if "deepspeed" not in case.others}
    if not chosen:
        print(f"error: no case is left of {', '.join(CASES)}", file=sys.stderr)
        return 2
    rows = [measure(name, case, args) for name, case in chosen.items()]
    worst = {"speedup": min(row["speedup"] for row in rows)}
    worst |= {key: max(row[key] for row in rows) for key in ("memory_ratio", "max_abs_error", "max_relative_error")}
    print(json.dumps({**worst, "cases": rows, "deepspeed": version, **environment(torch.device("cpu"))}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
