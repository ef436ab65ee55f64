"""Keep the graph's rounding points until the pass has read them.

Before torch 2.13, Inductor's joint-graph passes drop the middle of f32 -> bf16 -> f32: the rounding
that eager code performs. The guard hides such casts from those passes, and the post-grad pass shows them again.
"""

from __future__ import annotations

import torch
from torch import fx

from .patterns.values import FLOATS, aten, dtype, prims


def hide(graph: fx.Graph) -> None:
    """Spell every narrowing float cast that is widened again as ``aten._to_copy``, which no Inductor rule removes."""
    for node in graph.nodes:
        if node.target is prims.convert_element_type.default and _narrows(node) and any(map(_widens, node.users)):
            source, target = node.args
            with graph.inserting_before(node):
                hidden = graph.call_function(aten._to_copy.default, (source,), {"dtype": target})
            hidden.meta = dict(node.meta)
            node.replace_all_uses_with(hidden)
            graph.erase_node(node)


def show(graph: fx.Graph) -> None:
    """Spell the casts that :func:`hide` renamed as Inductor expects them after its decompositions."""
    for node in graph.nodes:
        if node.target is aten._to_copy.default and set(node.kwargs) == {"dtype"}:
            node.target = prims.convert_element_type.default
            node.args = (node.args[0], node.kwargs["dtype"])
            node.kwargs = {}


def _narrows(node: fx.Node) -> bool:
    source = node.args[0]
    if not isinstance(source, fx.Node):
        return False
    return dtype(source) is torch.float32 and dtype(node) in FLOATS and dtype(node) is not torch.float32


def _widens(node: fx.Node) -> bool:
    return node.target is prims.convert_element_type.default and dtype(node) is torch.float32
