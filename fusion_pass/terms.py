"""Terms: what is computed of one amax, or of a calibrated scale, as expressions.

Public code writes the few operations between amax and the scale in countless ways: floors before or after the division,
upper bounds, guards for zero, powers of two by logarithm or by bits, a detour through float64. A spec carries these
operations as they were written, so that kernels repeat them bit for bit and nothing has a place to be dropped.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

INFINITY = math.inf


class TermError(ValueError):
    """A term's operation or operand is none that a kernel can honour."""


@dataclass(frozen=True)
class Term:
    """One operation on terms and numbers, one value per scale.

    Floats are float32 except between ``f64`` and ``f32``; ``bf16``, ``f16`` and ``e4m3fn`` round a value that stays float32. Integers are int32.

    Attributes:
        op: ``amax``, ``given`` (a calibrated scalar the op reads), or a key of :data:`OPERATIONS`.
        args: its operands.
    """

    op: str
    args: tuple[Operand, ...] = ()

    def __post_init__(self) -> None:
        if self.op in LEAVES:
            wanted = 0
        elif self.op in OPERATIONS:
            wanted = OPERATIONS[self.op].arity
        else:
            raise TermError(f"op is {self.op!r}; allowed: {', '.join((*LEAVES, *OPERATIONS))}")
        if len(self.args) != wanted:
            raise TermError(f"args of {self.op} are {self.args!r}; allowed: {wanted} operands")

    def __str__(self) -> str:
        operands = [str(a) if isinstance(a, Term) else repr(a) for a in self.args]
        if self.op in _INFIX:
            return f"({operands[0]} {_INFIX[self.op]} {operands[1]})"
        return f"{self.op}({', '.join(operands)})" if operands else self.op

    def leaves(self) -> frozenset[str]:
        """Which of ``amax`` and ``given`` the term reads."""
        if self.op in LEAVES:
            return frozenset({self.op})
        return frozenset().union(*(a.leaves() for a in self.args if isinstance(a, Term)))


Operand: TypeAlias = "Term | float | int"

Bounds: TypeAlias = tuple[float, float]


@dataclass(frozen=True)
class Operation:
    """What is known of one operation: its operands, the type of its result, and the bounds of that from its operands'.

    Bounds disregard NaN, and are those of exact arithmetic widened by a few roundings where that matters.
    """

    arity: int
    kind: str
    bounds: Callable[..., Bounds]


def _unknown(*_: Bounds) -> Bounds:
    return -INFINITY, INFINITY


def _monotone(function: Callable[[float], float]) -> Callable[[Bounds], Bounds]:
    return lambda a: (function(a[0]), function(a[1]))


def _product(a: Bounds, b: Bounds) -> Bounds:
    corners = [0.0 if 0.0 in (x, y) else x * y for x in a for y in b]
    return min(corners), max(corners)


def _reciprocal(a: Bounds) -> Bounds:
    if a[0] < 0:
        return _unknown()
    return (0.0 if a[1] == INFINITY else 1 / a[1] if a[1] else INFINITY), (1 / a[0] if a[0] else INFINITY)


def _exp2(x: float) -> float:
    return INFINITY if x > 1000 else 0.0 if x < -1000 else 2.0**x


def _log2(x: float) -> float:
    return -INFINITY if x <= 0 else INFINITY if x == INFINITY else math.log2(x)


def _whole(function: Callable[[float], int]) -> Callable[[float], float]:
    return lambda x: x if math.isinf(x) else float(function(x))


def _magnitude(a: Bounds) -> Bounds:
    least = 0.0 if a[0] <= 0 <= a[1] else min(abs(a[0]), abs(a[1]))
    return least, max(abs(a[0]), abs(a[1]))


def _rounded(least: float, most: float) -> Callable[[Bounds], Bounds]:
    """Rounding to a dtype whose magnitudes are from ``least`` to ``most``, to 8 bits or more."""

    def result(a: Bounds) -> Bounds:
        low = 0.0 if abs(a[0]) < least else a[0] - abs(a[0]) * 2.0**-8
        high = a[1] + abs(a[1]) * 2.0**-8
        return (-INFINITY if low < -most else low), (INFINITY if high > most else high)

    return result


def _e4m3fn(a: Bounds) -> Bounds:
    """Rounding to e4m3fn, which saturates: half a unit of its 4 bits, or of its subnormals."""
    low, high = (max(-448.0, min(448.0, x)) for x in a)
    low -= max(abs(low) * 2.0**-4, 2.0**-10)
    return (0.0 if a[0] >= 0 else low) if low <= 0 else low, min(448.0, high + max(abs(high) * 2.0**-4, 2.0**-10))


def _truth(*_: Bounds) -> Bounds:
    return 0.0, 1.0


def _same(a: Bounds) -> Bounds:
    return a


_UNARY: dict[str, tuple[str, Callable[..., Bounds]]] = {
    "neg": ("same", lambda a: (-a[1], -a[0])),
    "abs": ("same", _magnitude),
    "reciprocal": ("same", _reciprocal),
    "log2": ("same", _monotone(_log2)),
    "exp2": ("same", _monotone(_exp2)),
    "pow2": ("same", _monotone(_exp2)),  # pow(2.0, x), another function of the math library
    "ceil": ("same", _monotone(_whole(math.ceil))),
    "floor": ("same", _monotone(_whole(math.floor))),
    "round": ("same", _monotone(_whole(round))),
    "bf16": ("f32", _rounded(2.0**-133, 3.3e38)),
    "f16": ("f32", _rounded(2.0**-24, 65000.0)),
    "e4m3fn": ("f32", _e4m3fn),
    "f32": ("f32", _rounded(2.0**-149, 3.3e38)),
    "f64": ("f64", _same),
    "i32": ("i32", _same),
    "u8": ("i32", lambda a: a if a[0] >= 0 and a[1] <= 255 else (0.0, 255.0)),
    "bits": ("i32", _unknown),
    "from_bits": ("f32", _unknown),
    "isnan": ("bool", _truth),
    "isinf": ("bool", _truth),
    "negate": ("bool", _truth),
}
_BINARY: dict[str, tuple[str, Callable[..., Bounds]]] = {
    "max": ("same", lambda a, b: (max(a[0], b[0]), max(a[1], b[1]))),
    "min": ("same", lambda a, b: (min(a[0], b[0]), min(a[1], b[1]))),
    "add": ("same", lambda a, b: _unknown() if INFINITY in map(abs, (*a, *b)) else (a[0] + b[0], a[1] + b[1])),
    "sub": ("same", lambda a, b: _unknown() if INFINITY in map(abs, (*a, *b)) else (a[0] - b[1], a[1] - b[0])),
    "mul": ("same", _product),
    "div": ("same", lambda a, b: _product(a, _reciprocal(b)) if b[0] >= 0 else _unknown()),
    "bit_and": ("i32", lambda a, b: (0.0, b[1]) if b[0] >= 0 else _unknown()),
    "bit_or": ("i32", _unknown),
    "shl": ("i32", _unknown),
    "shr": ("i32", _unknown),
    **dict.fromkeys(("eq", "ne", "lt", "le", "gt", "ge"), ("bool", _truth)),
}
OPERATIONS: dict[str, Operation] = {
    **{name: Operation(1, kind, bounds) for name, (kind, bounds) in _UNARY.items()},
    **{name: Operation(2, kind, bounds) for name, (kind, bounds) in _BINARY.items()},
    "where": Operation(3, "same", lambda _, a, b: (min(a[0], b[0]), max(a[1], b[1]))),
}
LEAVES = ("amax", "given")
_INFIX = {"mul": "*", "div": "/", "add": "+", "sub": "-"}
_OPERATORS: dict[type[ast.operator], str] = {ast.Mult: "mul", ast.Div: "div", ast.Add: "add", ast.Sub: "sub"}

AMAX = Term("amax")
GIVEN = Term("given")


@cache
def kind(operand: Operand) -> str:
    """The type of an operand's values: ``f32``, ``f64``, ``i32``, ``bool``, or ``number`` for a number."""
    if not isinstance(operand, Term):
        return "number"
    if operand.op in LEAVES:
        return "f32"
    result = OPERATIONS[operand.op].kind
    if result != "same":
        return result
    kinds = [kind(a) for a in operand.args[-2:]] if operand.op == "where" else [kind(a) for a in operand.args]
    return next((k for k in kinds if k != "number"), "f32")


@cache
def bounds(operand: Operand, largest_amax: float = INFINITY) -> Bounds:
    """Between what an operand's values lie if amax is at most ``largest_amax``, NaN aside."""
    if not isinstance(operand, Term):
        return float(operand), float(operand)
    if operand.op in LEAVES:
        return (0.0, largest_amax) if operand.op == "amax" else _unknown()
    return OPERATIONS[operand.op].bounds(*(bounds(a, largest_amax) for a in operand.args))


@cache
def is_power_of_two(operand: Operand) -> bool:
    """Whether every finite value of an operand other than zero is a power of two, by how it is made."""
    if not isinstance(operand, Term):
        return operand > 0 and math.frexp(operand)[0] == 0.5
    if operand.op in ("exp2", "pow2"):
        exponent = operand.args[0]
        return isinstance(exponent, Term) and _is_whole(exponent)
    if operand.op == "from_bits":
        return _are_bits_of_power_of_two(operand.args[0])
    if operand.op in ("max", "min"):
        return all(map(is_power_of_two, operand.args))
    if operand.op == "where":
        return all(map(is_power_of_two, operand.args[1:]))
    return operand.op in ("reciprocal", "f32", "bf16", "abs") and is_power_of_two(operand.args[0])


def _are_bits_of_power_of_two(operand: Operand) -> bool:
    """As :func:`is_power_of_two`, of the float32 that has an operand's bits."""
    if not isinstance(operand, Term):
        bits = int(operand)
        exponent, mantissa = bits >> 23, bits & 0x7FFFFF
        return exponent == 255 or (mantissa.bit_count() <= 1 if exponent == 0 else mantissa == 0)
    if operand.op == "shl":
        return operand.args[1] == 23
    if operand.op in ("max", "min"):
        return all(map(_are_bits_of_power_of_two, operand.args))
    return operand.op == "where" and all(map(_are_bits_of_power_of_two, operand.args[1:]))


def _is_whole(term: Operand) -> bool:
    if not isinstance(term, Term):
        return float(term).is_integer()
    if term.op in ("add", "sub", "max", "min"):
        return all(map(_is_whole, term.args))
    if term.op == "f32":
        return kind(term.args[0]) == "i32" or _is_whole(term.args[0])
    return term.op in ("ceil", "floor", "round", "i32", "u8")


def largest_quotient(term: Operand, divides: bool) -> float:
    """What |x| divided by a term, or multiplied with it, is at most in exact arithmetic; infinite if that is not known.

    Floors of amax and guards for zero only make it less.
    """
    if not isinstance(term, Term):
        return INFINITY
    if term.op == "where":
        return max(_largest_of_branch(term, 1, divides), _largest_of_branch(term, 2, divides))
    if term.op in ("f32", "f64"):
        return largest_quotient(term.args[0], divides)
    if term.op in ("bf16", "f16"):
        return largest_quotient(term.args[0], divides) * (1 + 2.0**-8)
    if term.op == ("max" if divides else "min"):
        return largest_quotient(term.args[0], divides)
    if term.op == "reciprocal":
        return largest_quotient(term.args[0], not divides)
    if term.op in ("mul", "div") and isinstance(term.args[0], Term) and not isinstance(term.args[1], Term):
        number = float(term.args[1])
        if number <= 0:
            return INFINITY
        # x / (t * number) and x * (t / number) are less by the number, the others more.
        return largest_quotient(term.args[0], divides) * (1 / number if (term.op == "mul") == divides else number)
    if term.op == "div" and not divides and not isinstance(term.args[0], Term):
        return largest_quotient(term.args[1], True) * abs(float(term.args[0]))
    rounded = rounded_power(term, "ceil" if divides else "floor")
    if rounded is not None:
        return largest_quotient(rounded, divides)
    return 1.0 if term.op == "amax" and divides else INFINITY


def _largest_of_branch(where: Term, branch: int, divides: bool) -> float:
    """As :func:`largest_quotient`, where the condition of ``where`` selects that branch."""
    condition, value = where.args[0], where.args[branch]
    if isinstance(value, Term):
        return largest_quotient(value, divides)
    largest = _largest_value(condition, branch == 1)
    if largest == 0:
        return 0.0
    return largest * (1 / value if divides else value) if value > 0 else INFINITY


# Which comparisons of a term with a number say that the term is at most the number, when they hold or when they do not.
_AT_MOST = {"lt": True, "le": True, "eq": True, "gt": False, "ge": False, "ne": False}


def _largest_value(condition: Operand, holds: bool) -> float:
    """What |x| is at most where a condition holds, or does not; infinite if that is not known.

    Rows of which an amax or scale is NaN or infinite have values without a defined code anyway.
    """
    if not isinstance(condition, Term):
        return INFINITY
    if condition.op == "negate":
        return _largest_value(condition.args[0], not holds)
    if condition.op in ("isnan", "isinf"):
        return 0.0 if holds else INFINITY
    if _AT_MOST.get(condition.op) is not holds or isinstance(condition.args[1], Term):
        return INFINITY
    quotient = largest_quotient(condition.args[0], divides=True)
    return INFINITY if quotient == INFINITY else quotient * max(0.0, float(condition.args[1]))


def _keeps_exponents(term: Term) -> bool:
    """Whether a bound from above leaves every finite float's biased exponent as it is."""
    return term.op == "min" and not isinstance(term.args[1], Term) and term.args[1] >= 254


def rounded_power(term: Term, direction: str) -> Operand | None:
    """What term rounds to a power of two in the given direction, by logarithm or, upwards, by bits."""
    inner = term.args[0] if term.args else None
    if term.op in ("exp2", "pow2") and isinstance(inner, Term) and inner.op == direction:
        logarithm = inner.args[0]
        argument = logarithm.args[0] if isinstance(logarithm, Term) and logarithm.op == "log2" else None
        return argument.args[0] if isinstance(argument, Term) and argument.op == "abs" else argument
    if term.op != "from_bits" or direction != "ceil" or not isinstance(inner, Term) or inner.op != "shl":
        return None
    exponent = inner.args[0]
    while isinstance(exponent, Term) and (exponent.op == "max" or _keeps_exponents(exponent)):
        exponent = exponent.args[0]
    if not isinstance(exponent, Term) or exponent.op != "add":
        return None
    # The biased exponent of t, and one more if any bit of its mantissa is set.
    biased, more = exponent.args
    bits = _at(biased, "bit_and", "shr", "bits")
    fraction = _at(more, "i32", "ne", "bit_and", "bits") or _at(more, "i32", "gt", "bit_and", "bits")
    return bits if bits is not None and bits == fraction else None


def _at(operand: Operand, *path: str) -> Operand | None:
    """What lies under operations nested as first operands."""
    for op in path:
        if not isinstance(operand, Term) or operand.op != op:
            return None
        operand = operand.args[0]
    if isinstance(operand, Term) and operand.op == "abs":
        operand = operand.args[0]
    return operand


@cache
def parse(text: str) -> Term:
    """The term that ``str`` wrote.

    Raises:
        TermError: the text is not one.
    """
    try:
        result = _parse(ast.parse(text, mode="eval").body)
    except (SyntaxError, KeyError, AttributeError, ValueError) as error:
        raise TermError(f"term is {text!r}; allowed: operations on amax or given ({error})") from None
    if not isinstance(result, Term):
        raise TermError(f"term is {text!r}; allowed: operations on amax or given")
    return result


def _parse(node: Any) -> Operand:
    if isinstance(node, ast.BinOp):
        return Term(_OPERATORS[type(node.op)], (_parse(node.left), _parse(node.right)))
    if isinstance(node, ast.Call):
        return Term(node.func.id, tuple(map(_parse, node.args)))  # type: ignore[attr-defined]
    if isinstance(node, ast.Name):
        return float(node.id) if node.id in ("inf", "nan") else Term(node.id)
    number = ast.literal_eval(node)
    if not isinstance(number, (int, float)):
        raise TermError(f"operand is {number!r}; allowed: a number")
    return number
