"""Estimate from shapes alone what a graph's operations move, and how many kernels they are.

The model is eager execution: every operation that is no view is one kernel, reads each of its tensors whole and writes its results
whole. Inductor fuses some of them, so what the pass saves over Inductor is less; the ratio of two graphs is still telling.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

_FREE = {operator.getitem, torch.ops.aten.reshape.default, torch.ops.aten._unsafe_view.default}


@dataclass(frozen=True)
class Traffic:
    """Bytes read and written, and kernels launched."""

    bytes: int = 0
    kernels: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.bytes + other.bytes, self.kernels + other.kernels)


def of_graph(graph: fx.Graph) -> dict[str, Traffic]:
    """The traffic of each operation, by the name of its node; a symbolic size counts as its hint."""
    return {node.name: of_node(node) for node in graph.nodes if node.op == "call_function"}


def of_node(node: fx.Node) -> Traffic:
    if not _is_kernel(node):
        return Traffic()
    values = [n.meta.get("val") for n in node.all_input_nodes] + [node.meta.get("val")]
    return Traffic(sum(map(_bytes, pytree.tree_leaves(values))), 1)


def _is_kernel(node: fx.Node) -> bool:
    makes_tensors = any(isinstance(v, torch.Tensor) for v in pytree.tree_leaves(node.meta.get("val")))
    return makes_tensors and node.target not in _FREE and not getattr(node.target, "is_view", False)


def _bytes(value: Any) -> int:
    if not isinstance(value, torch.Tensor):
        return 0
    # Expanded dimensions are read from the cache.
    sizes = [_hint(s) for s, stride in zip(value.shape, value.stride(), strict=True) if _hint(stride) != 0]
    count = 1
    for size in sizes:
        count *= size
    return count * value.element_size()


def _hint(size: Any) -> int:
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return 1 if hint is None else int(hint)
