"""The repeated layers of networks in training, compiled once a kind (`--torch_compile`): embedding, merger and head stay outside.

    layer(x, ...)   within `running()`: one program for all layers of a kind, whatever the lengths; outside of it as ever

A region is the layers of one part of a network that are alike: of one class, with parameters of the same shapes. It is compiled
once with gradients and once without, as one graph each, for all lengths. Where only one row is left of several, or a mask is there
that was not, another program is needed: a region gets two of each, MOST_PROGRAMS, and what fits none of them runs as it is written.

Only training steps run compiled. Sampling has shapes of its own, and a module that is not in training is untouched: its keys, its
copies and what is saved of it are those of a network that was never compiled. Hooks, gradient checkpointing and DDP see the layers'
calls from outside.
"""

import time
import types
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from torch.compiler import set_stance
from torch.fx.experimental import _config as shapes

from engine.errors import InputError

MOST_PROGRAMS = 2  # of a region, with gradients and without
NOTES_OUTPUTS = "transformers.utils.output_capturing"
SHORTEST = 2  # tokens of an answer: a length of 1 would be a case of its own


class HasLayers(Protocol):
    """What of a policy, or of a model that draws masks, is compiled."""

    @property
    def repeated_layers(self) -> Mapping[str, Iterable[nn.Module]]:
        """The layers of each of its parts, by the part's name."""


class Region:
    """Layers that one program serves. `compilations`: of it; `seconds`: spent in their forward halves."""

    def __init__(self, part: str, layers: Sequence[nn.Module], **options: Any) -> None:
        self.part, self.layers = part, layers
        self.compilations: dict[bool, int] = {True: 0, False: 0}  # with gradients, and without
        self.eager_calls, self.seconds = 0, 0.0
        forward = type(layers[0]).forward

        def run(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():
                self.eager_calls += 1
            return forward(layer, *args, **kwargs)

        compile: Any = torch.compile  # whose overloads leave isolate_recompiles out
        self.programs: dict[bool, Callable[..., Any]] = {
            gradients: compile(run, fullgraph=True, dynamic=True, isolate_recompiles=True, **options) for gradients in (True, False)
        }

        def call(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
            gradients = torch.is_grad_enabled()
            if args:  # the first layer's states may be a view, which would be a case of its own
                args = (_no_view(args[0]), *args[1:])
            if self.compilations[gradients] == MOST_PROGRAMS:
                with set_stance("eager_on_recompile"):
                    return self.programs[gradients](layer, *args, **kwargs)
            graphs, start = counters["stats"]["unique_graphs"], time.perf_counter()
            with _unobserved(layer):
                result = self.programs[gradients](layer, *args, **kwargs)
            if counters["stats"]["unique_graphs"] != graphs:
                self.compilations[gradients] += 1
                self.seconds += time.perf_counter() - start
            return result

        self.call = call


class CompiledLayers:
    """The layers of `parts`, compiled by `backend` in `mode` where they are first used within `running()`."""

    def __init__(self, parts: Iterable[HasLayers], backend: str = "inductor", mode: str | None = None) -> None:
        self.regions: list[Region] = []
        for part in parts:
            for name, layers in part.repeated_layers.items():
                for alike in _alike(layers):
                    if any(not parameter.is_floating_point() for parameter in alike[0].parameters()):
                        raise InputError("--torch_compile: quantized layers are not supported: leave out --load_in_4bit")
                    self.regions.append(Region(name, alike, backend=backend, mode=mode))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within it the layers run compiled. The backward pass belongs in it: there halves are compiled, and layers run again."""
        # Numbers such as a norm's epsilon stay what they are, a layer is one graph also in DDP, lengths that happen to be equal may
        # differ later, and no view is kept for the backward pass: its strides would be those of the first lengths.
        with (
            dynamo.patch(specialize_float=True, optimize_ddp=False),
            shapes.patch(use_duck_shape=False),  # type: ignore[attr-defined]
            functorch.patch(recompute_views=True),
        ):
            for region in self.regions:
                for layer in region.layers:
                    layer.forward = types.MethodType(region.call, layer)
            try:
                yield
            finally:
                for region in self.regions:
                    for layer in region.layers:
                        del layer.forward

    def metrics(self) -> dict[str, float]:
        """Since the beginning: programs compiled, the most of one region with or without gradients, and calls that none fitted."""
        return {
            "compile/compilations": sum(sum(region.compilations.values()) for region in self.regions),
            "compile/most_of_a_region": max((max(region.compilations.values()) for region in self.regions), default=0),
            "compile/eager_calls": sum(region.eager_calls for region in self.regions),
        }


@contextmanager
def _unobserved(layer: nn.Module) -> Iterator[None]:
    """Without the hooks by which transformers notes what modules in a layer give, attentions say: Dynamo cannot read them. What a
    layer gives is noted outside of it."""
    hooked = [(module, module._forward_hooks) for module in layer.modules() if module is not layer and module._forward_hooks]
    for module, hooks in hooked:
        kept = ((key, hook) for key, hook in hooks.items() if getattr(hook, "__module__", None) != NOTES_OUTPUTS)
        module._forward_hooks = OrderedDict(kept)
    try:
        yield
    finally:
        for module, hooks in hooked:
            module._forward_hooks = hooks


def _no_view(states: Tensor) -> Tensor:
    return states if states._base is None else states.clone()


def _alike(layers: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """The layers by what a program depends on: classes of modules, shapes, types and what is trained."""
    kinds: dict[Any, list[nn.Module]] = {}
    for layer in layers:
        modules = tuple((name, type(module)) for name, module in layer.named_modules())
        weights = tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters())
        kinds.setdefault((modules, weights), []).append(layer)
    return list(kinds.values())
