"""A traced part's float32 products on a CPU with AVX-512, where torch would call MKL, whose code there is for makers it knows.

Linear layers of many rows and convolutions become oneDNN's, with an exact GELU that follows taken in: it needs no pass of its own.
A single row's product becomes a sum, which Inductor joins with what stands before and after it. Weights stay as they are.
"""

from typing import Any

import torch
from torch import SymInt, Tensor
from torch.export import ExportedProgram
from torch.fx import Graph, Node

from kernels.moe_cpu import has_onednn

aten: Any = torch.ops.aten
onednn: Any = torch.ops.mkldnn
LEAST = 1 << 24  # multiplications of a product: with fewer, MKL's calls cost less than it loses
SOME_ROWS = 64  # stand for a number of rows that is not known
LONGEST_SUM = 4096  # Inductor adds longer rows up in pieces, at half the speed


def use_onednn(program: ExportedProgram) -> None:
    """Replace them in the part's graph."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        make = {aten.linear.default: _linear, aten.conv2d.default: _convolution}.get(node.target)
        if make is None or not has_onednn(_value(node).dtype):
            continue
        user = next(iter(node.users))
        gelu = len(node.users) == 1 and user.target is aten.gelu.default and not user.kwargs
        last = user if gelu else node
        after: Any = ("gelu" if gelu else "none", [], "none" if gelu else "")
        with graph.inserting_before(last):
            made = make(graph, node, after)
        if made is not None:
            made.meta = dict(last.meta)
            last.replace_all_uses_with(made)
            program.graph_signature.replace_all_uses(last.name, made.name)
            for old in (user, node) if gelu else (node,):
                graph.erase_node(old)
    program.graph_module.recompile()


def _linear(graph: Graph, node: Node, after: tuple[Any, ...]) -> Node | None:
    given: list[Any] = [*node.args, None]
    x, w, b = given[:3]
    *sizes, width = _value(x).shape
    if sizes == [1] * len(sizes) and width <= LONGEST_SUM and after[0] == "none":
        products = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.unsqueeze.default, (x, -2)), w))
        y = graph.call_function(aten.sum.dim_IntList, (products, [-1]))
        return y if b is None else graph.call_function(aten.add.Tensor, (y, b))
    rows = SOME_ROWS if any(isinstance(size, SymInt) for size in sizes) else torch.Size(sizes).numel()
    if rows * _value(w).numel() < LEAST:
        return None
    return graph.call_function(onednn._linear_pointwise.default, (x, w, b, *after))


def _convolution(graph: Graph, node: Node, after: tuple[Any, ...]) -> Node | None:
    defaults: list[Any] = [None, [1, 1], [0, 0], [1, 1], 1]  # what torch.export leaves out at the end
    given: list[Any] = list(node.args)
    x, w, b, stride, padding, dilation, groups = given + defaults[len(given) - 2 :]
    shape, strides = list(_value(x).shape), list(_value(x).stride())
    if any(isinstance(size, SymInt) for size in shape) or not _value(node).is_contiguous(memory_format=torch.channels_last):
        return None
    if _is_view(x):
        # Inductor gives a view's only image a stride of 0, and oneDNN then takes it for one whose channels come first.
        base = x.args[0]
        if x.target is not aten.permute.default or _is_view(base) or not _value(base).is_contiguous():
            return None
        x = graph.call_function(aten.as_strided.default, (base, shape, strides))
    return graph.call_function(onednn._convolution_pointwise.default, (x, w, b, padding, stride, dilation, groups, *after))


def _value(node: Node) -> Tensor:
    return node.meta["val"]


def _is_view(node: Node) -> bool:
    target: Any = node.target
    return node.op == "call_function" and any(one.alias_info for one in target._schema.returns)
