"""Sizes of a graph whose number of rows is not known: what they are for every number of rows, by its remainder.

Padding rows to a multiple and splitting them into tiles is arithmetic with constants. Where these divide a period, a size is a linear
function of how often the rows hold that period, one function for each remainder: equal functions are equal sizes, whatever the rows.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

PERIOD = 512


class Linear(NamedTuple):
    """``slope * q + start`` for ``PERIOD * q + r`` rows, by r."""

    slope: torch.Tensor
    start: torch.Tensor

    def equals(self, other: Linear) -> bool:
        return torch.equal(self.slope, other.slope) and torch.equal(self.start, other.start)

    def is_never_less_than(self, other: Linear) -> bool:
        return bool((self.slope >= other.slope).all() and (self.start >= other.start).all())

    def is_multiple_of(self, divisor: int) -> bool:
        return not (self.slope % divisor).any() and not (self.start % divisor).any()

    def number(self) -> int | None:
        """The size, if the number of rows makes no difference."""
        first = self.start[0]
        return None if self.slope.any() or (self.start != first).any() else int(first)


def of_rows(size: Any, rows: torch.SymInt) -> Linear | None:
    """A size as a function of the number of rows; None if it depends on something else, or otherwise."""
    if isinstance(size, int):
        return _constant(size)
    symbol = rows.node.expr
    if not symbol.is_Symbol:
        return None
    return _linear(size.node.expr, symbol)


def _constant(number: int) -> Linear:
    return Linear(torch.zeros(PERIOD, dtype=torch.int64), torch.full((PERIOD,), number, dtype=torch.int64))


@lru_cache(1024)
def _linear(expression: Any, rows: Any) -> Linear | None:
    if expression == rows:
        return Linear(torch.full((PERIOD,), PERIOD), torch.arange(PERIOD))
    if expression.is_Integer:
        return _constant(int(expression))
    operands = [_linear(argument, rows) for argument in expression.args]
    rule = _RULES.get(type(expression).__name__)
    if rule is None or not operands:
        return None
    result = operands[0]
    for operand in operands[1:]:
        if result is None or operand is None:
            return None
        result = rule(result, operand)
    return result


def _sum(a: Linear, b: Linear) -> Linear:
    return Linear(a.slope + b.slope, a.start + b.start)


def _product(a: Linear, b: Linear) -> Linear | None:
    if a.slope.any() and b.slope.any():
        return None
    return Linear(a.slope * b.start + b.slope * a.start, a.start * b.start)


def _remainder(a: Linear, b: Linear) -> Linear | None:
    divisor = b.number()
    if divisor is None or divisor <= 0 or (a.slope % divisor).any():
        return None
    return Linear(torch.zeros_like(a.slope), a.start % divisor)


def _quotient(a: Linear, b: Linear) -> Linear | None:
    divisor = b.number()
    if divisor is not None:
        if divisor <= 0 or (a.slope % divisor).any():
            return None
        return Linear(a.slope // divisor, a.start // divisor)
    # Of one size by another to which it is in proportion.
    if not b.slope.all() or (a.slope % b.slope).any():
        return None
    ratio = a.slope // b.slope
    return Linear(torch.zeros_like(ratio), ratio) if torch.equal(ratio * b.start, a.start) else None


# By the names of sympy's classes and torch's.
_RULES = {
    "Add": _sum,
    "Mul": _product,
    "Mod": _remainder,
    "PythonMod": _remainder,
    "FloorDiv": _quotient,
    "CleanDiv": _quotient,
}
