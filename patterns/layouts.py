"""Scale layouts: what is done to the scales after they are computed.

A layout is recognised by what it does, not by how it is written: the views, permutations and paddings in front of a copy are
carried out on the numbers of the scales, or on the parts of their indices if the number of rows is not known, and the result is compared
with where each layout keeps them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from fusion_pass.inductor import real_tensors
from fusion_pass.specs import ScaleLayout

from .placed_scales import Numbers, Parts
from .values import aten, dtype, readers, same_shape, same_size, shape, sizes

_PERMUTES = (aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default)
_RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
_ALIASES = (aten.alias.default, aten.detach.default)
# Larger numberings would cost more than a match is worth; such scales keep their copies.
_MOST_SCALES = 1 << 24

Uses = list[tuple[fx.Node, fx.Node]]


def stored_copies(uses: Uses, rows: tuple[Any, ...], groups: int) -> tuple[ScaleLayout, tuple[fx.Node, ...]]:
    """The copies of the scales in another layout, if those are all that is read of them; else ROW and none.

    ``uses`` are the (presentation, user) pairs of the scales outside their quantizer. ``rows`` are the leading sizes of
    the matrices of scales.
    """
    copies = column_copies(uses, rows, groups)
    if copies:
        return ScaleLayout.COLUMN, copies
    with real_tensors():
        return _by_numbers(uses, rows, groups)


def _by_numbers(uses: Uses, rows: tuple[Any, ...], groups: int) -> tuple[ScaleLayout, tuple[fx.Node, ...]]:
    if len(rows) != 1 and not all(same_size(size, 1) for size in rows[:-1]):
        return ScaleLayout.ROW, ()
    stored: list[fx.Node] = []
    found: set[ScaleLayout] = set()
    for presentation, user in uses:
        copy = _stored_copy(presentation, user, rows[-1], groups)
        if copy is None:
            return ScaleLayout.ROW, ()
        stored.append(copy[0])
        found.add(copy[1])
    return (found.pop(), tuple(stored)) if len(found) == 1 else (ScaleLayout.ROW, ())


def column_copies(uses: Uses, rows: tuple[Any, ...], groups: int) -> tuple[fx.Node, ...]:
    """The contiguous copies of ``scale.transpose(-1, -2)``, for any number of rows, symbolic ones too."""
    copies: list[fx.Node] = []
    for presentation, user in uses:
        if not swaps_last_two(user) or not same_shape(shape(presentation), (*rows, groups)):
            return ()
        found = readers(user)
        if not found or not all(map(_is_contiguous_copy, found)):
            return ()
        copies += found
    return tuple(copies)


def _stored_copy(presentation: fx.Node, user: fx.Node, rows: Any, groups: int) -> tuple[fx.Node, ScaleLayout] | None:
    """The copy that user leads to in whose storage the scales have a layout; None if none has, before anything else is done.

    It may be the copy of a copy: torchao's to_blocked moves the tiles first, and then the rows in them. What is padded is a copy, too: of
    four groups it has packed words already, and their transposes are no others.
    """
    held = _placed(presentation, rows, groups)
    node = user
    while held is not None:
        copied = _is_contiguous_copy(node)
        held = held if copied else _moved(node, held)
        if held is not None and (copied or node.target is aten.constant_pad_nd.default):
            packed = dtype(node) is torch.int32 or (not copied and dtype(node) is torch.uint8)
            layout = held.layout(rows, groups, packed)
            if layout is not None:
                return node, layout
        users = readers(node)
        if len(users) != 1:
            return None
        node = users[0]
    return None


def _placed(presentation: fx.Node, rows: Any, groups: int) -> Numbers | Parts | None:
    """The scales as they are presented."""
    if isinstance(rows, torch.SymInt):
        return Parts.of(sizes(presentation), rows, groups)
    numbers = shape(presentation)
    if not all(isinstance(s, int) for s in (*numbers, rows)) or math.prod(numbers) > _MOST_SCALES:
        return None
    return Numbers.of(numbers)


def _moved(node: fx.Node, held: Numbers | Parts) -> Numbers | Parts | None:
    """Where node puts what is held, or None if it does something else."""
    # Guards of a graph that was traced with one tile of rows say that there is one: parts are of any number of them.
    result: tuple[Any, ...] = () if dtype(node) is None else (sizes if isinstance(held, Parts) else shape)(node)
    if node.target in _ALIASES:
        return held
    if node.target in _RESHAPES:
        return held.reshaped(result)
    if node.target in _PERMUTES:
        order = _order(node, len(result))
        return None if order is None else held.permuted(order)
    if node.target is aten.constant_pad_nd.default:
        value = node.args[2] if len(node.args) > 2 else 0
        before: Any = node.args[1][::2]  # type: ignore[index]
        return held.padded(result) if value == 0 and all(isinstance(p, int) and p == 0 for p in before) else None
    if node.target is aten.view.dtype and (dtype(node.args[0]), dtype(node)) == (torch.uint8, torch.int32):  # type: ignore[arg-type]
        return held.reshaped(result, width=4)
    return None


def _order(node: fx.Node, rank: int) -> list[int] | None:
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        return [d % rank for d in dims]
    order = list(range(rank))
    first, second = rank - 2, rank - 1
    if node.target is aten.transpose.int:
        first, second = (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
    order[first], order[second] = order[second], order[first]
    return order


def swaps_last_two(node: fx.Node) -> bool:
    """Whether node is the transpose of matrices."""
    if node.target not in _PERMUTES:
        return False
    rank = len(shape(node))
    return rank >= 2 and _order(node, rank) == [*range(rank - 2), rank - 1, rank - 2]


def _is_contiguous_copy(node: fx.Node) -> bool:
    memory_format = node.kwargs.get("memory_format")
    return node.target is aten.clone.default and memory_format in (torch.contiguous_format,)
