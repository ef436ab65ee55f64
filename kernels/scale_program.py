"""Terms on the device: the operations between amax and the scale, one by one, as eager PyTorch computes each.

A term travels to its kernel as text, one part per operation, and is read back while Triton traces the kernel.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl

from fusion_pass.terms import LEAVES, OPERATIONS, Operand, Term, kind

from .arithmetic import (
    cast,
    ceiling,
    exponential2,
    floor,
    integer,
    logarithm2,
    nearest_even,
    power_of_two,
    times,
)


@cache
def program(*terms: Term | None) -> str:
    """The lines ``family operation operands...`` that compute the terms, their common parts once; then ``= results``.

    Operands are line numbers; lines 0 and 1 are amax and the given scalar. Lines end with a semicolon: the code that
    Inductor generates around a kernel does not keep escaped newlines.
    """
    lines = list(LEAVES)
    numbers: dict[str, int] = {leaf: i for i, leaf in enumerate(LEAVES)}

    def number(text: str) -> int:
        if text not in numbers:
            numbers[text] = len(lines)
            lines.append(text)
        return numbers[text]

    def visit(operand: Operand, like: str) -> int:
        if not isinstance(operand, Term):
            if like == "i32":
                return number(f"integer {int(operand)}")
            return number(f"{'double' if like == 'f64' else 'number'} {operand!r}")
        if operand.op in LEAVES:
            return numbers[operand.op]
        likes = next((k for k in map(kind, operand.args) if k not in ("number", "bool")), "f32")
        return number(" ".join([_family(operand.op), operand.op, *(str(visit(a, likes)) for a in operand.args)]))

    results = [visit(t, "f32") if t is not None else 0 for t in terms]
    return ";".join([*lines, " ".join(["=", *map(str, results)])])


def _family(op: str) -> str:
    if op in ("bf16", "f16", "e4m3fn", "f32", "f64", "i32", "u8"):
        return "conversion"
    if op == "where" or OPERATIONS[op].kind == "same":
        return "where" if op == "where" else "arithmetic"
    return "bits"


@triton.constexpr_function
def line_count(text):
    return text.count(";")


@triton.constexpr_function
def word(text, line, index):
    return text.split(";")[line].split()[index]


@triton.constexpr_function
def line_number(text, line, index):
    words = text.split(";")[line].split()
    return int(words[index]) if index < len(words) else 0


@triton.constexpr_function
def literal(text, line):
    number = text.split(";")[line].split()[1]
    return int(number) if text.split(";")[line].startswith("integer") else float(number)


@triton.jit
def quotient(a, b):
    if a.dtype == tl.float64:
        result = a / b
    else:
        result = tl.math.div_rn(a, b)
    return result


@triton.jit
def product(a, b):
    if a.dtype == tl.float32:
        result = times(a, b)
    else:
        result = a * b
    return result


@triton.jit
def arithmetic_step(OP: tl.constexpr, a, b):
    """One operation on floats or integers; max and min keep NaN, as torch.clamp and torch.maximum do."""
    if OP == "max":
        r = tl.where((a < b) | (b != b), b, a)
    elif OP == "min":
        r = tl.where((a > b) | (b != b), b, a)
    elif OP == "mul":
        r = product(a, b)
    elif OP == "div":
        r = quotient(a, b)
    elif OP == "add":
        r = a + b
    elif OP == "sub":
        r = a - b
    elif OP == "reciprocal":
        r = quotient(tl.full(a.shape, 1.0, a.dtype), a)
    elif OP == "neg":
        r = a * -1
    elif OP == "abs":
        r = tl.abs(a)
    elif OP == "log2":
        r = logarithm2(a)
    elif OP == "exp2":
        r = exponential2(a)
    elif OP == "pow2":
        r = power_of_two(a)
    elif OP == "ceil":
        r = ceiling(a)
    elif OP == "floor":
        r = floor(a)
    else:
        tl.static_assert(OP == "round")
        r = nearest_even(a)
    return r


@triton.jit
def bit_step(OP: tl.constexpr, a, b):
    """One operation on bits, or one that tells something."""
    if OP == "bits":
        r = a.to(tl.int32, bitcast=True)
    elif OP == "from_bits":
        r = a.to(tl.float32, bitcast=True)
    elif OP == "bit_and":
        r = a & b
    elif OP == "bit_or":
        r = a | b
    elif OP == "shl":
        r = a << b
    elif OP == "shr":
        r = a >> b
    elif OP == "isnan":
        r = a != a
    elif OP == "isinf":
        r = tl.abs(a) == float("inf")
    elif OP == "negate":
        r = a == 0
    elif OP == "eq":
        r = a == b
    elif OP == "ne":
        r = a != b
    elif OP == "lt":
        r = a < b
    elif OP == "le":
        r = a <= b
    elif OP == "gt":
        r = a > b
    else:
        tl.static_assert(OP == "ge")
        r = a >= b
    return r


@triton.jit
def conversion_step(OP: tl.constexpr, a):
    if OP == "bf16":
        r = cast(cast(a, tl.bfloat16), tl.float32)
    elif OP == "f16":
        r = cast(cast(a, tl.float16), tl.float32)
    elif OP == "e4m3fn":
        # The interpreter's cast is PyTorch's, which has not always saturated.
        r = cast(cast(tl.clamp(a, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL), tl.float8e4nv), tl.float32)
    elif OP == "f32":
        r = a.to(tl.float32)
    elif OP == "f64":
        r = a.to(tl.float64)
    elif OP == "i32":
        r = integer(a)
    else:
        tl.static_assert(OP == "u8")
        # A float of 0 to 255, or NaN, which converts to zero in the low byte.
        r = integer(a) & 0xFF
    return r


@triton.jit
def step(PROGRAM: tl.constexpr, LINE: tl.constexpr, values):
    FAMILY: tl.constexpr = word(PROGRAM, LINE, 0)
    first = values[0]
    if FAMILY == "number":
        r = tl.full(first.shape, literal(PROGRAM, LINE), tl.float32)
    elif FAMILY == "double":
        r = tl.full(first.shape, literal(PROGRAM, LINE), tl.float64)
    elif FAMILY == "integer":
        r = tl.full(first.shape, literal(PROGRAM, LINE), tl.int32)
    else:
        OP: tl.constexpr = word(PROGRAM, LINE, 1)
        a = values[line_number(PROGRAM, LINE, 2)]
        b = values[line_number(PROGRAM, LINE, 3)]
        if FAMILY == "where":
            r = tl.where(a, b, values[line_number(PROGRAM, LINE, 4)])
        elif FAMILY == "arithmetic":
            r = arithmetic_step(OP, a, b)
        elif FAMILY == "conversion":
            r = conversion_step(OP, a)
        else:
            r = bit_step(OP, a, b)
    return r


@triton.jit
def evaluate(peak, given, PROGRAM: tl.constexpr):
    """The two results of PROGRAM on a tile of amaxes and a given scalar of the tile's shape."""
    values = (peak, given)
    for line in tl.static_range(2, line_count(PROGRAM)):
        values = values + (step(PROGRAM, line, values),)  # type: ignore[assignment]  # noqa: RUF005
    END: tl.constexpr = line_count(PROGRAM)
    return values[line_number(PROGRAM, END, 1)], values[line_number(PROGRAM, END, 2)]
