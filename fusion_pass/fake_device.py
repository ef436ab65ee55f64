"""Pretend that a graph runs on a device this machine may not have.

PyTorch's bindings select a tensor's device before they dispatch, so tracing with fake CUDA tensors fails at the first
slice or copy on a build without CUDA. A graph traced on fake CPU tensors and then relabelled is the same graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from . import inductor


def without_data(value: Any) -> Any:
    """In a fake mode, a twin of a tensor with its shape, strides, dtype, device and subclass; other values as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    if inductor.is_traceable_wrapper_subclass(value):
        names, context = value.__tensor_flatten__()
        inner = {name: without_data(getattr(value, name)) for name in names}
        twin = type(value).__tensor_unflatten__(inner, context, value.shape, value.stride())
    else:
        twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return torch.nn.Parameter(twin, value.requires_grad) if isinstance(value, torch.nn.Parameter) else twin


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """gm with a graph of its own, its nodes' metadata included."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.output(graph.graph_copy(gm.graph, mapping))
    for source, node in mapping.items():
        node.meta = dict(source.meta)
    return fx.GraphModule(gm, graph)


def relabelled(gm: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A copy of gm whose values and constructors are on ``device``; it can be analysed and lowered, not run."""
    copy = copy_module(gm)
    with inductor.fake_mode_of(gm.graph):
        for node in copy.graph.nodes:
            node.meta["val"] = pytree.tree_map(lambda value: _on(value, device), node.meta.get("val"))
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": device}
    return copy


def _on(value: Any, device: torch.device) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
