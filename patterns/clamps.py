"""Clamps: bounds by constants, from one side or both, in whichever order and dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from .grammar import Match, Pattern, Search, either, number, op, round_to
from .values import aten, dtype

MAXIMUM = (aten.maximum.default, aten.clamp_min.Tensor)
MINIMUM = (aten.minimum.default, aten.clamp_max.Tensor)


def at_least(inner: Pattern, name: str) -> Pattern:
    """inner bounded from below by a constant, a Python scalar or a tensor."""
    scalar = op((aten.clamp_min.default, aten.clamp.default), inner, number(name), exact=True)
    return either(scalar, op(MAXIMUM, inner, number(name), exact=True))


def at_most(inner: Pattern, name: str) -> Pattern:
    """inner bounded from above by a constant, a Python scalar or a tensor."""
    scalar = op((aten.clamp_max.default,), inner, number(name), exact=True)
    return either(scalar, op(MINIMUM, inner, number(name), exact=True))


def clamped(inner: Pattern, low: str, high: str) -> Pattern:
    """inner between two constants, in the dtype of inner."""
    level = f"{low}_{high}_level"
    inner = _level_of(inner, level)
    both = op((aten.clamp.default,), inner, number(low), number(high), exact=True)
    return _narrowed(
        either(at_most(at_least(inner, low), high), at_least(at_most(inner, high), low), both), level, low, high
    )


def clamped_above(inner: Pattern, high: str) -> Pattern:
    """inner below a constant, in the dtype of inner."""
    level = f"{high}_level"
    return _narrowed(at_most(_level_of(inner, level), high), level, high)


def _level_of(inner: Pattern, name: str) -> Pattern:
    """inner, binding the dtype it has before it is clamped."""

    def pattern(node: Any, match: Match, search: Search) -> Iterator[Match]:
        bound = match.bind(name, search.values.unrounded_dtype(node))
        if bound is not None:
            yield from inner(node, bound, search)

    return pattern


def _narrowed(inner: Pattern, level: str, *limits: str) -> Pattern:
    """inner, possibly cast to a dtype that holds it exactly: a bf16 clamp is decomposed to a f32 one and a cast."""

    def pattern(node: Any, match: Match, search: Search) -> Iterator[Match]:
        core: Any = search.values.core(node) if isinstance(node, fx.Node) else node
        if not search.values.is_rounding(core):
            yield from inner(node, match, search)
            return
        for found in inner(core.args[0], match.consume(core), search):
            kept = all(round_to(found[name], dtype(core)) == found[name] for name in limits)
            if found[level] == dtype(core) and kept:
                yield found

    return pattern
