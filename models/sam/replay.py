"""A function of tensors on CUDA, captured as a graph for each kind of input that comes twice, and replayed: one launch, not many.

    first call of a kind    eager (it compiles and loads what the function needs)
    second                  captured on buffers of its own, then replayed
    from then on            inputs copied into the buffers, replayed, outputs copied out

A kind is the inputs' names, shapes and types, the flag, and autocast's state. What the function reads beside its inputs is looked
at before a replay: where a weight has moved or was written to, all graphs are dropped. Where a capture fails the reason is logged
once and every call is eager from then on.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.cuda_graph import Capture, Outputs, capture_on_cuda

logger = logging.getLogger(__name__)
KINDS = 8  # that are remembered; the one that was used longest ago goes first


class Graph(NamedTuple):
    """What is copied into before `replay`, and what that writes."""

    buffers: dict[str, Tensor]
    replay: Callable[[], None]
    outputs: Outputs


class Replay:
    """`function(flag, **tensors)` -> tensors; `reads()` lists the tensors beside its inputs that it reads."""

    def __init__(self, function: Callable[..., Outputs], reads: Callable[[], Sequence[Tensor]], capture: Capture = capture_on_cuda):
        self.function, self.reads, self.capture = function, reads, capture
        self.failed = False
        self._graphs: OrderedDict[Hashable, Graph | None] = OrderedDict()  # None: of a kind that came once
        self._read: list[tuple[Tensor, int]] = []  # held, so that nothing else can come to lie where a graph reads

    def __call__(self, flag: bool, **inputs: Tensor) -> Outputs:
        """What the function returns, in tensors that no later call writes to."""
        device = next(iter(inputs.values())).device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kind = (flag, autocast, *((name, x.shape, x.dtype) for name, x in inputs.items()))
        if not self._reads_the_same():
            self._graphs.clear()
        graph = self._graphs.get(kind)
        if graph is None and kind in self._graphs and not self.failed:
            graph = self._captured(flag, inputs)
            self._note_reads()
        if graph is None:
            outputs = self.function(flag, **inputs)
            self._note_reads()  # it may have made some of them
        else:
            for name, buffer in graph.buffers.items():
                buffer.copy_(inputs[name])
            graph.replay()
            outputs = tuple(output.clone() for output in graph.outputs)
        self._graphs[kind] = graph
        self._graphs.move_to_end(kind)
        if len(self._graphs) > KINDS:
            self._graphs.popitem(last=False)
        return outputs

    def _captured(self, flag: bool, inputs: dict[str, Tensor]) -> Graph | None:
        buffers = {name: x.clone(memory_format=torch.contiguous_format) for name, x in inputs.items()}
        try:
            return Graph(buffers, *self.capture(lambda: self.function(flag, **buffers)))
        except RuntimeError as error:  # torch's and CUDA's, no memory included
            logger.warning("no CUDA graph, every call launches its kernels one by one: %s", str(error).partition("\n")[0])
            self.failed = True
            return None

    def _note_reads(self) -> None:
        self._read = [(tensor.detach(), _version(tensor)) for tensor in self.reads()]

    def _reads_the_same(self) -> bool:
        now = self.reads()
        same = (a.data_ptr() == b.data_ptr() and _version(a) == version for a, (b, version) in zip(now, self._read, strict=False))
        return len(now) == len(self._read) and all(same)


def _version(tensor: Tensor) -> int:
    """How often it was written to; torch does not count that of tensors made in inference mode."""
    return 0 if tensor.is_inference() else tensor._version
