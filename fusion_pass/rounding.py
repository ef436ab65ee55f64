"""Keep the graph's rounding points until the pass has read them.

Before torch 2.13, Inductor's joint-graph passes drop the middle of f32 -> bf16 -> f32: the rounding
that eager code performs. There the guard hides such casts from those passes, and the post-grad pass shows them again.
"""

from __future__ import annotations

import torch
from torch import fx

from .patterns.values import aten, dtype, prims

# Dtypes of casts that the joint-graph passes drop, whatever they cast from.
_DROPPED = (torch.float16, torch.bfloat16, torch.float32)


def hide(graph: fx.Graph) -> None:
    """Spell every rounding cast that is widened again as ``aten._to_copy``, which no Inductor rule removes."""
    for node in graph.nodes:
        if _rounds(node) and any(_widens(user, node) for user in node.users):
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


def _rounds(node: fx.Node) -> bool:
    """Whether node is a cast that may not hold all that it casts."""
    target = dtype(node)
    if not _is_cast(node) or target not in _DROPPED or not isinstance(node.args[0], fx.Node):
        return False
    source = dtype(node.args[0])
    return source is not None and not (source.is_floating_point and source.itemsize < target.itemsize)


def _widens(node: fx.Node, cast: fx.Node) -> bool:
    narrow, wide = dtype(cast), dtype(node)
    return _is_cast(node) and narrow is not None and wide is not None and wide.itemsize > narrow.itemsize


def _is_cast(node: fx.Node) -> bool:
    return node.target is prims.convert_element_type.default
