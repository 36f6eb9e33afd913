"""`--torch_compile` and its two settings, which transformers would apply to the model as a whole."""

from typing import Any

from engine.command.settings import refuse

BACKENDS = ("inductor", "aot_eager", "eager")
MODES = ("default", "max-autotune-no-cudagraphs")


def take_compile_settings(args: Any) -> tuple[str | None, str | None] | None:
    """(backend, mode) of `transformers.TrainingArguments`, which are then without: with them it would allow TF32. None: not asked
    for; either of the two asks for it. InputError, in one line, for what cannot be compiled so."""
    asked = args.torch_compile or args.torch_compile_backend is not None or args.torch_compile_mode is not None
    backend, mode = args.torch_compile_backend or "inductor", args.torch_compile_mode
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    if not asked:
        return None
    graphs = "its CUDA graphs want the same lengths at every step; use max-autotune-no-cudagraphs"
    refuse(
        [
            (backend in BACKENDS, f"--torch_compile_backend {backend}: expected {', '.join(BACKENDS[:-1])} or {BACKENDS[-1]}"),
            (mode not in ("reduce-overhead", "max-autotune"), f"--torch_compile_mode {mode} is not supported: {graphs}"),
            (mode in (None, *MODES), f"--torch_compile_mode {mode}: expected {' or '.join(MODES)}"),
            (mode is None or backend == "inductor", f"--torch_compile_mode is not for --torch_compile_backend {backend}"),
            (not args.use_liger_kernel, "--torch_compile and --use_liger_kernel fuse the same layers: leave one out"),
            (
                backend != "inductor" or not args.use_cpu or _has_compiler(),
                "--torch_compile needs a C++ compiler on a CPU: install g++ or clang++, or leave it out",
            ),
        ]
    )
    return backend, mode


def _has_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, RuntimeError):
        return False
    return True
