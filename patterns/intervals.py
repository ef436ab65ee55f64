"""What a pointwise function of one float32 gives on whole intervals of its argument: interval arithmetic on graph nodes.

Code that forms codes from bits is written in too many ways to list. That two such functions agree on all 2^32 arguments is
proved here instead: an interval on which every operation is monotone, or decided, needs only its ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fusion_pass.inductor import stored_tensor

from .values import FLOATS, Values, aten, cast_dtype, dtype, tensor

_WIDTHS = {torch.int32: 32, torch.uint8: 8, torch.int64: 64, torch.int16: 16, torch.int8: 8, torch.bool: 1}
_INT_MIN = -(2**31)


@dataclass
class Range:
    """Per interval of the argument, between what a node's values lie.

    Attributes:
        low, high: float32 for floats, int64 for integers and booleans.
        exact: where low is the value itself, and high too; of floats also its sign of zero, or NaN.
        nan: where the value may be NaN, exact or not.
    """

    low: torch.Tensor
    high: torch.Tensor
    exact: torch.Tensor
    nan: torch.Tensor


class Unproved(Exception):  # noqa: N818
    """An operation that intervals are not known of."""


def leaf(first: torch.Tensor, last: torch.Tensor) -> Range:
    """The floats whose bits are from first to last, int64 from 0 to 2^32 - 1 and of one sign."""
    low, high = (bits.where(bits < 2**31, bits - 2**32).to(torch.int32).view(torch.float32) for bits in (first, last))
    negative = first >= 2**31
    low, high = torch.where(negative, high, low), torch.where(negative, low, high)
    return Range(low, high, first == last, low.isnan() | high.isnan())


class Evaluator:
    """Evaluates the nodes between an argument and a result; raises :class:`Unproved` at others.

    To be used where tensors are real ones, not a compilation's fakes.
    """

    def __init__(self, argument: fx.Node, values: Values) -> None:
        self.argument = argument
        self.values = values
        self.known: dict[fx.Node, Range] = {}

    def evaluate(self, result: fx.Node, over: Range) -> Range:
        self.known = {self.values.core(self.argument): over}
        return self._range(result)

    def _range(self, operand: Any) -> Range:
        count = next(iter(self.known.values())).low.numel()
        if not isinstance(operand, fx.Node):
            return _constant(torch.tensor(operand), count)
        core = self.values.core(operand)
        if core not in self.known:
            fixed = concrete(core)
            if fixed is not None and fixed.numel() == 1:
                self.known[core] = _constant(fixed.reshape(()), count)
            else:
                self.known[core] = self._operation(core)
        return self.known[core]

    def _operation(self, node: fx.Node) -> Range:
        rule = (_ON_BOOLEANS if dtype(node) is torch.bool else _RULES).get(node.target) or _RULES.get(node.target)
        if rule is not None:
            if node.kwargs:
                raise Unproved(f"{node.target} with {node.kwargs}")
            result = rule(*(self._range(a) for a in node.args))
        elif node.target is aten.view.dtype:
            result = _reinterpreted(self._range(node.args[0]), dtype(node.args[0]), dtype(node))  # type: ignore[arg-type]
        elif cast_dtype(node) is not None:
            result = _cast(self._range(node.args[0]), dtype(node.args[0]), dtype(node))  # type: ignore[arg-type]
        elif node.target is aten.bucketize.Tensor:
            result = self._bucketized(node)
        elif node.target is aten.index.Tensor:
            result = self._looked_up(node)
        else:
            raise Unproved(f"{node.target}")
        return _fitted(result, dtype(node))

    def _bucketized(self, node: fx.Node) -> Range:
        edges = concrete(node.args[1])
        if edges is None or edges.dim() != 1:
            raise Unproved("bucketize of other edges than constants")
        right = bool(node.kwargs.get("right", False))
        given = self._range(node.args[0])
        low, high = (torch.bucketize(v, edges.to(v.dtype), right=right) for v in (given.low, given.high))
        return Range(low, high, given.exact, torch.zeros_like(given.nan))

    def _looked_up(self, node: fx.Node) -> Range:
        table = concrete(node.args[0])
        indices: Any = node.args[1]
        if table is None or table.dim() != 1 or len(indices) != 1 or table.is_floating_point():
            raise Unproved("a table that is no constant")
        index, table = self._range(indices[0]), table.to(torch.int64)
        at = index.low.clamp(0, table.numel() - 1)
        inside = index.exact & (at == index.low)
        low, high = table.amin().expand_as(at), table.amax().expand_as(at)
        return Range(torch.where(inside, table[at], low), torch.where(inside, table[at], high), inside, index.nan)


def concrete(node: Any) -> torch.Tensor | None:
    """The tensor that a node made of constants alone holds."""
    if not isinstance(node, fx.Node) or tensor(node) is None:
        return None
    if node.op == "get_attr":
        return stored_tensor(node)
    if node.target is aten.full.default:
        return torch.full((), node.args[1], dtype=dtype(node))  # type: ignore[arg-type]
    if node.target is aten.scalar_tensor.default:
        return torch.tensor(node.args[0], dtype=dtype(node))
    if node.target in (aten.lift_fresh_copy.default, aten.alias.default, aten.detach.default, aten.clone.default):
        return concrete(node.args[0])
    if node.target is aten.view.dtype or cast_dtype(node) is not None:
        source = concrete(node.args[0])
        if source is None:
            return None
        return source.view(dtype(node)) if node.target is aten.view.dtype else source.to(dtype(node))  # type: ignore[arg-type]
    return None


def _constant(value: torch.Tensor, count: int) -> Range:
    value = value.to(torch.float32 if value.is_floating_point() else torch.int64).expand(count)
    return Range(value, value, torch.ones(count, dtype=torch.bool), value.isnan())


def _fitted(result: Range, kind: torch.dtype | None) -> Range:
    """The result in the dtype of its node: rounded, or modulo its integers."""
    if kind in FLOATS:
        low, high = (v.to(kind).float() for v in (result.low, result.high))
        nan = result.nan | low.isnan() | high.isnan()
        anything = nan & ~result.exact
        low = torch.where(anything, -torch.inf, low).contiguous()
        high = torch.where(anything, torch.inf, high).contiguous()
        settled = ~nan & (low.view(torch.int32) == high.view(torch.int32))
        return Range(low, high, result.exact | settled, nan)
    width = _WIDTHS.get(kind)  # type: ignore[arg-type]
    if width is None:
        raise Unproved(f"values of {kind}")
    if width in (1, 64):
        return replace(result, exact=result.exact | (result.low == result.high))
    least = 0 if kind is torch.uint8 else -(2 ** (width - 1))
    turns = (result.low - least) >> width
    whole = turns == (result.high - least) >> width
    low = torch.where(whole, result.low - (turns << width), least)
    high = torch.where(whole, result.high - (turns << width), least + 2**width - 1)
    return Range(low, high, (result.exact & whole) | (low == high), torch.zeros_like(result.nan))


def _each(function: Callable[..., torch.Tensor], *given: Range) -> Range:
    """A function that grows with each of its arguments."""
    low, high = function(*(g.low for g in given)), function(*(g.high for g in given))
    nan = _any(*(g.nan for g in given))
    return Range(low, high, _all(*(g.exact for g in given)), nan)


def _all(*flags: torch.Tensor) -> torch.Tensor:
    return torch.stack(flags).all(0)


def _any(*flags: torch.Tensor) -> torch.Tensor:
    return torch.stack(flags).any(0)


def _negated(a: Range) -> Range:
    return Range(-a.high, -a.low, a.exact, a.nan)


def _difference(a: Range, b: Range) -> Range:
    return Range(a.low - b.high, a.high - b.low, a.exact & b.exact, a.nan | b.nan)


def _magnitude(a: Range) -> Range:
    low, high = a.low.abs(), a.high.abs()
    across = (a.low < 0) & (a.high > 0)
    least = torch.where(across, torch.zeros_like(low), torch.minimum(low, high))
    return Range(torch.where(a.exact, low, least), torch.where(a.exact, low, torch.maximum(low, high)), a.exact, a.nan)


def _product(a: Range, b: Range) -> Range:
    if not bool(b.exact.all()):
        a, b = b, a
    if not bool(b.exact.all()) or bool((b.low < 0).any()):
        raise Unproved("a product with no positive constant")
    return _each(torch.mul, a, b)


def _bounded(a: Range, low: Range | None = None, high: Range | None = None) -> Range:
    if low is not None:
        a = _each(_unless_nan(torch.maximum), a, low)
    return a if high is None else _each(_unless_nan(torch.minimum), a, high)


def _unless_nan(extreme: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The maximum or the minimum of two tensors, but a NaN of the first with its bits: so clamp and CUDA's maximum."""
    return lambda a, b: torch.where(a.isnan(), a, extreme(a, b))


def _masked(a: Range, b: Range) -> Range:
    if not _is_one_number(b):
        a, b = b, a
    low, high = torch.full_like(a.low, _INT_MIN), torch.full_like(a.low, 2**31 - 1)
    if _is_one_number(b):
        low, high = _within_mask(a, int(b.low[0]), low, high)
    exact, value = a.exact & b.exact, a.low & b.low
    low, high = torch.where(exact, value, low), torch.where(exact, value, high)
    return Range(low, high, exact | (low == high), a.nan | b.nan)


def _is_one_number(a: Range) -> bool:
    """Whether it is the same on all intervals; exact on each it may be without that, as a sign is."""
    return bool(a.exact.all()) and bool((a.low == a.low[0]).all())


def _within_mask(a: Range, mask: int, least: torch.Tensor, most: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bounds of a & mask; ``least`` and ``most`` where nothing is known."""
    none = torch.zeros_like(a.low)
    if mask in (_INT_MIN, 2**31):
        return torch.where(a.low < 0, least, none), torch.where(a.high < 0, least, none)
    if mask < 0:
        return least, most
    if mask & (mask + 1):
        return none, torch.full_like(none, mask)
    kept = mask.bit_length()
    same = (a.low >> kept) == (a.high >> kept)
    return torch.where(same, a.low & mask, 0), torch.where(same, a.high & mask, mask)


def _united(a: Range, b: Range) -> Range:
    exact = a.exact & b.exact
    # The bits of both, at most as many as their sum has.
    usual = (a.low >= 0) & (b.low >= 0)
    low = torch.where(usual, torch.maximum(a.low, b.low), _INT_MIN)
    high = torch.where(usual, a.high + b.high, 2**31 - 1)
    value = a.low | b.low
    return Range(torch.where(exact, value, low), torch.where(exact, value, high), exact, a.nan | b.nan)


def _exclusive(a: Range, b: Range) -> Range:
    if not bool(b.exact.all()):
        a, b = b, a
    flips = b.low == _INT_MIN
    one_sign = (a.low < 0) == (a.high < 0)
    moved = b.exact & ((b.low == 0) | (flips & one_sign) | a.exact)
    low = torch.where(moved, a.low ^ b.low, _INT_MIN)
    high = torch.where(moved, a.high ^ b.low, 2**31 - 1)
    return Range(low, high, a.exact & b.exact, a.nan | b.nan)


def _right(a: Range, b: Range) -> Range:
    if not bool(b.exact.all()):
        raise Unproved("a shift by no constant")
    return _each(torch.bitwise_right_shift, a, b)


def _left(a: Range, b: Range) -> Range:
    if not bool(b.exact.all()) or bool((b.low > 31).any()):
        raise Unproved("a shift by no constant")
    return _each(torch.bitwise_left_shift, a, b)


def _truth(certain: torch.Tensor, possible: torch.Tensor) -> Range:
    low, high = certain.to(torch.int64), possible.to(torch.int64)
    return Range(low, high, low == high, torch.zeros_like(certain))


def _compared(operation: Callable[..., torch.Tensor], *, rising: bool) -> Callable[[Range, Range], Range]:
    """a < b and the like, which hold most easily at one end of each; ``rising``: at the great end of a."""

    def rule(a: Range, b: Range) -> Range:
        easy = operation(a.high, b.low) if rising else operation(a.low, b.high)
        hard = operation(a.low, b.high) if rising else operation(a.high, b.low)
        value, exact, nan = operation(a.low, b.low), a.exact & b.exact, a.nan | b.nan
        return _truth(torch.where(exact, value, hard & ~nan), torch.where(exact, value, easy | nan))

    return rule


def _equal(a: Range, b: Range) -> Range:
    exact, apart = a.exact & b.exact, (a.high < b.low) | (b.high < a.low)
    value = a.low == b.low
    return _truth(torch.where(exact, value, False), torch.where(exact, value, ~apart | a.nan | b.nan))


def _not(a: Range) -> Range:
    return _truth(a.high == 0, a.low == 0)


def _unequal(a: Range, b: Range) -> Range:
    return _not(_equal(a, b))


def _is_nan(a: Range) -> Range:
    return _truth(torch.where(a.exact, a.low.isnan(), False), torch.where(a.exact, a.low.isnan(), a.nan))


def _sign_bit(a: Range) -> Range:
    low, high = a.low.signbit(), a.high.signbit()
    return _truth(low & high & ~(a.nan & ~a.exact), low | high | (a.nan & ~a.exact))


def _selected(mask: Range, a: Range, b: Range) -> Range:
    yes, no = mask.low != 0, mask.high == 0
    if a.low.dtype != b.low.dtype:
        raise Unproved("a choice between floats and integers")
    low = torch.where(yes, a.low, torch.where(no, b.low, torch.minimum(a.low, b.low)))
    high = torch.where(yes, a.high, torch.where(no, b.high, torch.maximum(a.high, b.high)))
    exact = torch.where(yes, a.exact, torch.where(no, b.exact, False))
    return Range(low, high, exact, torch.where(yes, a.nan, torch.where(no, b.nan, a.nan | b.nan)))


def _cast(a: Range, source: torch.dtype | None, target: torch.dtype | None) -> Range:
    if target in FLOATS:
        return Range(a.low.float(), a.high.float(), a.exact, a.nan)
    if source not in FLOATS:
        if target is torch.bool:
            return _not(_equal(a, _constant(torch.tensor(0), a.low.numel())))
        return a
    # Of floats that an int32 does not hold, and of NaN, the result is not defined.
    if bool(a.nan.any()) or bool((a.low.abs() >= 2**31).any()) or bool((a.high.abs() >= 2**31).any()):
        raise Unproved("a cast of floats beyond the integers")
    return Range(a.low.to(torch.int64), a.high.to(torch.int64), a.exact, torch.zeros_like(a.nan))


def _reinterpreted(a: Range, source: torch.dtype | None, target: torch.dtype | None) -> Range:
    if (source, target) == (torch.float32, torch.int32):
        low, high = (v.contiguous().view(torch.int32).to(torch.int64) for v in (a.low, a.high))
        one_sign = (low < 0) == (high < 0)
        known = a.exact | (one_sign & ~a.nan)
        first, last = torch.minimum(low, high), torch.maximum(low, high)
        none = torch.zeros_like(a.nan)
        return Range(torch.where(known, first, _INT_MIN), torch.where(known, last, 2**31 - 1), a.exact, none)
    if (source, target) == (torch.int32, torch.float32):
        low, high = (v.to(torch.int32).view(torch.float32) for v in (a.low, a.high))
        one_sign = (a.low < 0) == (a.high < 0)
        known = a.exact | (one_sign & ~low.isnan() & ~high.isnan())
        first, last = torch.where(a.low < 0, high, low), torch.where(a.low < 0, low, high)
        infinite = torch.full_like(low, float("inf"))
        nan = torch.where(a.exact, low.isnan(), ~known)
        return Range(torch.where(known, first, -infinite), torch.where(known, last, infinite), a.exact, nan)
    raise Unproved(f"bits of {source} as {target}")


def _both(a: Range, b: Range) -> Range:
    return _truth((a.low != 0) & (b.low != 0), (a.high != 0) & (b.high != 0))


def _either(a: Range, b: Range) -> Range:
    return _truth((a.low != 0) | (b.low != 0), (a.high != 0) | (b.high != 0))


_ON_BOOLEANS: dict[Any, Callable[..., Range]] = {
    aten.bitwise_and.Tensor: _both,
    aten.bitwise_or.Tensor: _either,
    aten.bitwise_not.default: _not,
}
_RULES: dict[Any, Callable[..., Range]] = {
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), lambda a, b: _each(torch.add, a, b)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _difference),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _product),
    aten.neg.default: _negated,
    aten.abs.default: _magnitude,
    aten.round.default: lambda a: _each(torch.round, a),
    aten.floor.default: lambda a: _each(torch.floor, a),
    aten.ceil.default: lambda a: _each(torch.ceil, a),
    **dict.fromkeys((aten.clamp_min.default, aten.clamp_min.Tensor, aten.maximum.default), _bounded),
    **dict.fromkeys(
        (aten.clamp_max.default, aten.clamp_max.Tensor, aten.minimum.default), lambda a, b: _bounded(a, high=b)
    ),
    aten.clamp.default: _bounded,
    **dict.fromkeys((aten.bitwise_and.Tensor, aten.bitwise_and.Scalar), _masked),
    **dict.fromkeys((aten.bitwise_or.Tensor, aten.bitwise_or.Scalar), _united),
    **dict.fromkeys((aten.bitwise_xor.Tensor, aten.bitwise_xor.Scalar), _exclusive),
    **dict.fromkeys((aten.__rshift__.Scalar, aten.bitwise_right_shift.Tensor_Scalar), _right),
    **dict.fromkeys((aten.__lshift__.Scalar, aten.bitwise_left_shift.Tensor_Scalar), _left),
    **dict.fromkeys((aten.lt.Tensor, aten.lt.Scalar), _compared(torch.lt, rising=False)),
    **dict.fromkeys((aten.le.Tensor, aten.le.Scalar), _compared(torch.le, rising=False)),
    **dict.fromkeys((aten.gt.Tensor, aten.gt.Scalar), _compared(torch.gt, rising=True)),
    **dict.fromkeys((aten.ge.Tensor, aten.ge.Scalar), _compared(torch.ge, rising=True)),
    **dict.fromkeys((aten.eq.Tensor, aten.eq.Scalar), _equal),
    **dict.fromkeys((aten.ne.Tensor, aten.ne.Scalar), _unequal),
    aten.logical_and.default: _both,
    aten.logical_or.default: _either,
    aten.logical_not.default: _not,
    aten.isnan.default: _is_nan,
    aten.signbit.default: _sign_bit,
    aten.where.self: _selected,
}
