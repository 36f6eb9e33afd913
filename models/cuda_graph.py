"""Work on CUDA captured as a graph: one launch, not many."""

from collections.abc import Callable

import torch
from torch import Tensor

Outputs = tuple[Tensor, ...]
Capture = Callable[[Callable[[], Outputs]], tuple[Callable[[], None], Outputs]]


def capture_on_cuda(run: Callable[[], Outputs]) -> tuple[Callable[[], None], Outputs]:
    """`run` captured: what replays it, and the outputs that a replay writes. It is run once more before, and must bear that.

    Raises RuntimeError, torch's and CUDA's, where it cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # warm on the very buffers: no kernel is compiled or loaded within the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()
    return graph.replay, outputs
