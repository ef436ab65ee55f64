"""Lower: on a GPU, turn each fused op into the node Inductor has for a user's own Triton kernel.

An op left in the graph costs a Python dispatcher call at run time. As a kernel node, its launch is generated code, its
buffers are planned with all others, and CUDA graphs, the C++ wrapper and ahead-of-time compilation apply.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from . import distances, hidden_casts, inductor
from .cast_transpose import CastTransposeSpec
from .failures import during
from .kernels import cast_transpose
from .kernels.launch import finish, launch_into_buffers, written
from .patterns.values import aten, tensor
from .sites import FusedSite

_KERNEL_DEVICES = ("cuda",)
_ALLOCATIONS = (aten.empty.memory_format, aten.empty_strided.default)


def lower(graph: fx.Graph, sites: Sequence[FusedSite]) -> None:
    """Replace the fused ops of ``sites`` that are on a GPU by the launches of their kernels."""
    # Most sites of a model repeat those of its first layers: trace each distinct launch once.
    traced: dict[Any, fx.GraphModule] = {}
    for site in sites:
        if site.op is None or site.op.graph is not graph or not _on_gpu(site.op):
            continue
        with during("lower", site):
            inputs = _tensor_inputs(site.op)
            key = (site.op.target, site.op.args[len(inputs) :], tuple(_meta(n) for n in inputs))
            if key not in traced:
                traced[key] = _trace(graph, site, inputs)
            _splice(graph, site, inputs, traced[key])


def _on_gpu(op: fx.Node) -> bool:
    return all(value.device.type in _KERNEL_DEVICES for value in map(tensor, op.all_input_nodes) if value is not None)


def _tensor_inputs(op: fx.Node) -> tuple[fx.Node | None, ...]:
    """The op's arguments before its spec; an absent tensor is None."""
    return tuple(op.args[: 1 if _transposes(op) else -1])  # type: ignore[arg-type]


def _transposes(op: fx.Node) -> bool:
    return op.target is torch.ops.fusion_pass.cast_transpose.default


def _meta(node: fx.Node | None) -> Any:
    value = None if node is None else tensor(node)
    if value is None:
        return None
    return (value.dtype, value.device, *map(str, value.shape), "strides", *map(str, value.stride()))


def _trace(graph: fx.Graph, site: FusedSite, inputs: Sequence[fx.Node | None]) -> fx.GraphModule:
    """The launch as a graph of allocations and functional kernel nodes, over the inputs that are present."""
    values = [n.meta["val"] for n in inputs if n is not None]

    assert site.op is not None
    spec, op = site.spec, site.op

    def run(*present: torch.Tensor) -> list[torch.Tensor]:
        if _transposes(op):
            return _cast_transpose(present[0], *op.args[1:])
        remaining = iter(present)
        x, *others, given = [None if n is None else next(remaining) for n in inputs]
        assert x is not None
        other, weight = (*others, None, None)[:2]
        buffers = inductor.functional_launch(
            lambda wrap: launch_into_buffers(spec, x, other, weight, given, wrap), written
        )
        return finish(spec, buffers)

    with inductor.fake_mode_of(graph):
        module = inductor.make_fx(run)(*values)
    module.graph.eliminate_dead_code()
    hidden_casts.show(hidden_casts.hidden(module.graph))
    return module  # type: ignore[no-any-return]


def _cast_transpose(x: torch.Tensor, *arguments: Any) -> list[torch.Tensor]:
    spec = CastTransposeSpec.of_arguments(*arguments)
    buffers = inductor.functional_launch(
        lambda wrap: cast_transpose.launch_into_buffers(spec, x, wrap), cast_transpose.written
    )
    return cast_transpose.finish(spec, buffers)


def _splice(graph: fx.Graph, site: FusedSite, inputs: Sequence[fx.Node | None], module: fx.GraphModule) -> None:
    """Copy the traced graph before the site's op and hand its outputs to those of the op."""
    op = site.op
    assert op is not None
    copies: dict[fx.Node, Any] = {}
    remaining = iter(n for n in inputs if n is not None)
    outputs: Sequence[Any] = ()
    for node in module.graph.nodes:
        if node.op == "placeholder":
            copies[node] = next(remaining)
        elif node.op == "output":
            outputs = [copies[n] for n in node.args[0]]
        else:
            with graph.inserting_before(op):
                copy = graph.node_copy(node, copies.__getitem__)
            copy.meta["stack_trace"] = op.meta.get("stack_trace")
            copies[node] = copy
    distances.note(site, next(copy for copy in copies.values() if copy.target in _ALLOCATIONS))
    for getter in list(op.users):
        getter.replace_all_uses_with(outputs[getter.args[1]])  # type: ignore[index]
        graph.erase_node(getter)
    graph.erase_node(op)
