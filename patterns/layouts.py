"""Scale layouts: what is done to the scales after they are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .values import aten, same_size, shape

_PERMUTES = (aten.permute.default, aten.transpose.int, aten.t.default, aten.mT.default)


def column_copies(uses: list[tuple[fx.Node, fx.Node]], groups: int) -> tuple[fx.Node, ...]:
    """The contiguous copies of ``scale.transpose(-1, -2)``, if those are all that is read of the scales; else none.

    ``uses`` are the (presentation, user) pairs of the scales outside their quantizer; a presentation is (…, R, groups).
    """
    copies: list[fx.Node] = []
    for presentation, user in uses:
        if not _swaps_last_two(user) or not same_size(shape(presentation)[-1], groups):
            return ()
        if not user.users or not all(_is_contiguous_copy(copy) for copy in user.users):
            return ()
        copies += user.users
    return tuple(copies)


def _swaps_last_two(node: fx.Node) -> bool:
    if node.target not in _PERMUTES:
        return False
    rank = len(shape(node))
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        return rank >= 2 and [d % rank for d in dims] == [*range(rank - 2), rank - 1, rank - 2]
    if node.target is aten.transpose.int:
        return {int(d) % rank for d in node.args[1:3]} == {rank - 1, rank - 2}  # type: ignore[arg-type]
    return rank == 2


def _is_contiguous_copy(node: fx.Node) -> bool:
    memory_format = node.kwargs.get("memory_format")
    return node.target is aten.clone.default and memory_format in (torch.contiguous_format,)
