"""Keep casts that eager code performs from Inductor's rules until the pass has read them.

- Before torch 2.13, its joint-graph passes drop the middle of f32 -> bf16 -> f32, a rounding.
- A rule for MX scales replaces ``(clamp(ceil(log2(s)), -127, 127) + 127).to(uint8)`` on CUDA by operations on the bits of s, since
  torch 2.13 and before sm_100, which give a subnormal s another byte; and by an instruction on sm_100, which is no term of scales.

The guard hides such casts from those passes, and the post-grad pass shows them again.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from .patterns.values import aten, dtype, prims, tensor

# Dtypes of casts that the joint-graph passes drop, whatever they cast from.
_DROPPED = (torch.float16, torch.bfloat16, torch.float32)
_EXPONENTS = (aten.log2.default, aten.bitwise_right_shift.Tensor_Scalar, aten.__rshift__.Scalar)
_AMAXES = (aten.amax.default, aten.max.dim, aten.max.default)
# Operations between an amax and the byte of its scale.
_LONGEST = 32


def roundings(graph: fx.Graph) -> list[fx.Node]:
    """The casts that round and are widened again."""
    return [node for node in graph.nodes if _rounds(node) and any(_widens(user, node) for user in node.users)]


def exponents(graph: fx.Graph, devices: Collection[str]) -> list[fx.Node]:
    """The casts to bytes of what is computed, on these types of devices, from the exponent of an amax."""
    return [node for node in graph.nodes if _is_byte(node, devices) and _comes_from_exponent_of_amax(node)]


def hide(graph: fx.Graph, casts: Collection[fx.Node]) -> None:
    """Spell casts as ``aten._to_copy``, which no Inductor rule removes or looks for."""
    for node in casts:
        source, target = node.args
        with graph.inserting_before(node):
            hidden = graph.call_function(aten._to_copy.default, (source,), {"dtype": target})
        hidden.meta = dict(node.meta)
        node.replace_all_uses_with(hidden)
        graph.erase_node(node)


def hidden(graph: fx.Graph) -> list[fx.Node]:
    """The casts that :func:`hide` renamed, or that a trace without decompositions has."""
    copies = graph.find_nodes(op="call_function", target=aten._to_copy.default)
    return [node for node in copies if set(node.kwargs) == {"dtype"}]


def show(casts: Collection[fx.Node]) -> None:
    """Spell such casts as Inductor expects them after its decompositions."""
    for node in casts:
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


def _is_byte(node: fx.Node, devices: Collection[str]) -> bool:
    if not _is_cast(node) or dtype(node) is not torch.uint8 or not isinstance(node.args[0], fx.Node):
        return False
    value = tensor(node)
    return value is not None and value.device.type in devices and dtype(node.args[0]) in (torch.float32, torch.int32)


def _comes_from_exponent_of_amax(cast: fx.Node) -> bool:
    """Whether both are among the operations upstream of a cast, none of them beyond an amax."""
    upstream = [cast]
    for node in upstream:
        if node.target not in _AMAXES and len(upstream) < _LONGEST:
            upstream += [source for source in node.all_input_nodes if source not in upstream]
    targets = {node.target for node in upstream}
    return not targets.isdisjoint(_EXPONENTS) and not targets.isdisjoint(_AMAXES)


def _is_cast(node: fx.Node) -> bool:
    return node.target is prims.convert_element_type.default
