"""DeepSpeed's ZeRO-3: the repeated layers of the language model are divided among the processes, all else stays whole on each.

What is whole may be used as each process's rows want it: a vision tower whose features are kept, a mask decoder where there is a
mask, the head's weight in a kernel. The divided layers run in every pass of every process, so their collective calls meet. They
hold most of the weights, and the optimizer's state of everything that is trained is divided too.

The model is loaded whole. While it trains its divided weights are empty, but for the layer that runs; a checkpoint is written from
weights that are put together for it, and after training each process has all of them again.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

DIVIDED = 3


def is_zero3(trainer: Any) -> bool:
    return trainer.is_deepspeed_enabled and trainer.accelerator.deepspeed_plugin.zero_stage == DIVIDED


def mark_leaves(layers: nn.ModuleList) -> None:
    """A module with weights of its own beside children reads its children's too, as a mixture of experts does: all of them are put
    together at once. Call it before DeepSpeed takes the model."""
    from deepspeed.utils import set_z3_leaf_modules

    def has_own(module: nn.Module) -> bool:
        return next(module.parameters(recurse=False), None) is not None

    kinds = {type(module) for module in layers.modules() if has_own(module) and next(module.children(), None) is not None}
    if kinds:
        set_z3_leaf_modules(layers, list(kinds))


def keep_whole(engine: Any, layers: nn.ModuleList) -> None:
    """All parameters of DeepSpeed's `engine` but those of `layers` stay on each process, and are shared after each step.

    DeepSpeed records which modules run and refuses processes that differ, so that only the layers are left to its hooks.
    """
    offload, divided = engine.optimizer.parameter_offload, {id(parameter) for parameter in layers.parameters()}
    _unhook(offload)
    for layer in layers:
        offload._register_deepspeed_module(layer)
    others = [p for p in engine.module.parameters() if id(p) not in divided and not p.ds_persist]
    for parameter in others:
        parameter.ds_persist = True
    offload.persistent_parameters.extend(others)  # the list that the optimizer has too
    if others:
        others[0].all_gather(others)


def _unhook(offload: Any) -> None:
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        hook.remove()
    offload.forward_hooks.clear()
    offload.backward_hooks.clear()


@contextmanager
def put_together(engine: Any) -> Iterator[None]:
    """Within it each process has all weights. Every process has to take part."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    with GatheredParameters([p for p in engine.module.parameters() if not p.ds_persist]):
        yield


def hold(engine: Any) -> None:
    """Give each process all weights for good, and let none be taken away when a layer has run."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    _unhook(engine.optimizer.parameter_offload)
    GatheredParameters([p for p in engine.module.parameters() if not p.ds_persist]).__enter__()
