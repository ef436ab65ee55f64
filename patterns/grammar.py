"""Combinators in which rules are written: a rule is a pattern of operations that reads as the formula it matches.

A pattern takes a node (or a scalar argument), the match so far and the search, and yields every extended match. Patterns
backtrack, look through views and exact casts, and report the deepest operation at which a search stopped. Inductor's own
PatternExpr does neither: it commits to the first alternative and says only that a match failed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import fx

from fusion_pass.inductor import real_tensors, stored_number

from .values import FLOATS, Values, aten, cast_dtype, dtype, same_shape, same_size, shape, tensor

ADD = (aten.add.Tensor, aten.add.Scalar)
SUB = (aten.sub.Tensor, aten.sub.Scalar)
MUL = (aten.mul.Tensor, aten.mul.Scalar)
DIV = (aten.div.Tensor, aten.div.Scalar)
POW = (aten.pow.Tensor_Scalar,)
ABS = (aten.abs.default,)
SQRT = (aten.sqrt.default,)
RECIPROCAL = (aten.reciprocal.default,)
# Where a scalar tensor of 32 bits may meet one of 16.
_NARROWING = frozenset({*ADD, *SUB, *MUL, *DIV, aten.where.self})


@dataclass(frozen=True)
class Match:
    """What a pattern has bound so far, and the operations it consumed, outermost first."""

    captures: Mapping[str, Any] = field(default_factory=dict)
    nodes: tuple[fx.Node, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.captures[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.captures.get(name, default)

    def bind(self, name: str, value: Any) -> Match | None:
        """This match with name bound to value; None if name is bound to another value."""
        if name in self.captures:
            return self if _equal(self.captures[name], value) else None
        return Match({**self.captures, name: value}, self.nodes)

    def consume(self, node: fx.Node) -> Match:
        return Match(self.captures, (*self.nodes, node))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt):
        return same_size(a, b)
    return bool(a == b)


@dataclass(frozen=True)
class Failure:
    """Where a search stopped: the node, what was there and what the rule wanted."""

    node: fx.Node
    seen: str
    expected: str
    depth: int


class Search:
    """One attempt to match a rule: the graph's values, and the deepest failure met."""

    def __init__(self, values: Values) -> None:
        self.values = values
        self.failure: Failure | None = None

    def fail(self, node: Any, match: Match, expected: str, seen: str | None = None) -> None:
        if not isinstance(node, fx.Node):
            return
        depth = len(match.nodes)
        if self.failure is None or depth > self.failure.depth:
            self.failure = Failure(node, seen or describe(node), expected, depth)


Pattern = Callable[[Any, Match, Search], Iterator[Match]]


def describe(node: fx.Node) -> str:
    """One node as a reader of the graph would write it: ``aten.div.Tensor -> f32[8, 1]``."""
    name = str(node.target) if node.op == "call_function" else f"{node.op} {node.name}"
    value = tensor(node)
    if value is None:
        return name
    kind = str(value.dtype).removeprefix("torch.")
    return f"{name} -> {kind}[{', '.join(map(str, value.shape))}]"


def value(name: str) -> Pattern:
    """Any float tensor; binds its core as ``name``, or demands the value that is already bound."""

    def pattern(node: Any, match: Match, search: Search) -> Iterator[Match]:
        if dtype(node) not in FLOATS:
            search.fail(node, match, f"a float tensor for {name}")
            return
        core = search.values.core(node)
        bound = match.bind(name, core)
        if bound is None:
            search.fail(node, match, f"the same {name} as {match[name].name}, here {core.name}")
            return
        # How the value was first used: the operand that has the rows the rule speaks of.
        yield bound if f"{name}_used" in bound.captures else bound.bind(f"{name}_used", node) or bound

    return pattern


_FOLDED = frozenset(
    {
        *ADD,
        *SUB,
        *MUL,
        *DIV,
        aten.neg.default,
        aten.round.default,
        aten.clamp_min.default,
        aten.clamp_min.Tensor,
        aten.clamp_max.default,
        aten.clamp_max.Tensor,
    }
)


def constant(argument: Any, values: Values) -> float | None:
    """The number an argument is: a Python scalar, or a tensor filled with one; what is made of numbers is folded.

    None for -0.0: whatever compares numbers takes it for 0.0.
    """
    if isinstance(argument, (int, float)) and not isinstance(argument, bool):
        return _told_apart(float(argument))
    if not isinstance(argument, fx.Node) or tensor(argument) is None:
        return None
    node = values.core(argument)
    if node not in values.numbers:
        # Remembered, as the operands of a residual stream lead to the start of the graph.
        values.numbers[node] = _number(node, values)
    number = values.numbers[node]
    return None if number is None else _told_apart(round_to(number, dtype(argument)))


def _told_apart(number: float) -> float | None:
    return None if number == 0 and math.copysign(1, number) < 0 else number


def _number(node: fx.Node, values: Values) -> float | None:
    number: Any = None
    if node.op == "get_attr":
        number = stored_number(node)
    elif node.target in (aten.full.default, aten.scalar_tensor.default, aten.full_like.default):
        number = node.args[0] if node.target is aten.scalar_tensor.default else node.args[1]
    elif node.target in _FOLDED or cast_dtype(node) is not None:
        operands = [constant(a, values) for a in (node.args if node.target in _FOLDED else node.args[:1])]
        if None not in operands:
            number = _folded(node, operands) if node.target in _FOLDED else operands[0]
            # Zero is all that is known to survive a cast to codes.
            number = number if number == 0 or dtype(node) in (*FLOATS, torch.float64) else None
    if isinstance(number, bool) or not isinstance(number, (int, float)) or dtype(node) is torch.bool:
        return None
    return round_to(float(number), dtype(node))


def _folded(node: fx.Node, operands: list[Any]) -> float | None:
    """What eager code computes of numbers, by the operation itself; None where devices compute it differently."""
    value_of = tensor(node)
    if value_of is None or node.kwargs.get("alpha", 1) != 1:
        return None
    on_cpu = value_of.device.type == "cpu"
    if not on_cpu and node.target in DIV and not isinstance(node.args[1], fx.Node):
        # Eager CUDA code multiplies by the reciprocal of a Python scalar.
        return None
    with real_tensors():
        given = [
            torch.full((), number, dtype=dtype(argument), device="cpu") if isinstance(argument, fx.Node) else argument
            for number, argument in zip(operands, node.args, strict=True)
        ]
        return float(node.target(*given, **node.kwargs))  # type: ignore[operator]


def round_to(number: float, kind: torch.dtype | None) -> float:
    """The number that a tensor of that dtype has where it is filled with ``number``."""
    if kind is None or kind is torch.float64:
        return number
    with real_tensors():
        return float(torch.full((), number, dtype=kind, device="cpu"))


def number(name: str) -> Pattern:
    """A Python scalar, or a tensor filled with one; binds its value."""

    def pattern(argument: Any, match: Match, search: Search) -> Iterator[Match]:
        found = constant(argument, search.values)
        if found is None:
            search.fail(argument, match, f"a constant for {name}")
            return
        bound = match.bind(name, found)
        if bound is not None:
            yield bound

    return pattern


def quiet(inner: Pattern) -> Pattern:
    """inner, an option of which nobody need hear that it was not taken."""
    return lambda node, match, search: inner(node, match, Search(search.values))


def equal(wanted: float) -> Pattern:
    """The given number."""

    def pattern(argument: Any, match: Match, search: Search) -> Iterator[Match]:
        if constant(argument, search.values) == wanted:
            yield match
        else:
            search.fail(argument, match, f"the number {wanted:g}")

    return pattern


def either(*patterns: Pattern) -> Pattern:
    """Any of the patterns, in order of preference."""

    def pattern(node: Any, match: Match, search: Search) -> Iterator[Match]:
        for alternative in patterns:
            yield from alternative(node, match, search)

    return pattern


def tagged(name: str, tag: Any, inner: Pattern) -> Pattern:
    """inner, recording under ``name`` which spelling it was."""

    def pattern(node: Any, match: Match, search: Search) -> Iterator[Match]:
        bound = match.bind(name, tag)
        if bound is not None:
            yield from inner(node, bound, search)

    return pattern


def made_by(operation: Any, inner: Pattern) -> Pattern:
    """inner, if its outermost operation came out of the decomposition of ``operation``."""

    def pattern(node: Any, match: Match, search: Search) -> Iterator[Match]:
        peeled = search.values.unrounded(node) if isinstance(node, fx.Node) else None
        # Copies of a graph copy this operation, too.
        if peeled is not None and str(peeled[0].meta.get("original_aten")) == str(operation):
            yield from inner(node, match, search)

    return pattern


Shapes = Callable[[tuple[Any, ...], tuple[Any, ...]], bool]


def elementwise(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """Operands of one shape."""
    return same_shape(a, b)


def per_row(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """The second operand has one value for each row of the first."""
    return len(a) == len(b) and same_shape(a[:-1], b[:-1]) and same_size(b[-1], 1)


def one_per_group(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """The second operand has one value for each row of the first, one for all, or one that was expanded to its shape."""
    return per_row(a, b) or all(same_size(size, 1) for size in b) or same_shape(a, b)


def per_column(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    """The second operand is one row for all rows of the first."""
    return len(b) >= 1 and same_size(a[-1], b[-1]) and all(same_size(s, 1) for s in b[:-1])


def op(
    targets: tuple[Any, ...],
    *operands: Pattern,
    rounding: str | None = None,
    exact: bool = False,
    commutative: bool = False,
    reduction: bool = False,
    shapes: Shapes | None = None,
    narrowing: bool = False,
) -> Pattern:
    """One of the operations, on the operands.

    Its result must be unrounded float32, unless ``rounding`` names the capture that takes the dtype it is rounded to, or
    ``exact`` says that it cannot round (max, abs, clamp by a bound of the same dtype). ``narrowing`` says that the operands'
    patterns see to operands that eager code rounds to the result's dtype.
    """
    expected = "/".join(dict.fromkeys(str(t).split(".")[1] for t in targets))
    orders = ((0, 1), (1, 0)) if commutative else (tuple(range(len(operands))),)

    def pattern(node: Any, match: Match, search: Search) -> Iterator[Match]:
        found = _operation(node, match, search)
        if found is None:
            return
        core, match = found
        wide = None if narrowing else next(filter(partial(narrows, core), range(len(operands))), None)
        if wide is not None:
            wanted = f"operands of {expected} in {_result_dtype(core)}"
            search.fail(core, match, wanted, f"operand {wide} is a scalar of more bits")
            return
        for order in orders:
            arguments = [core.args[i] for i in order]
            if shapes is not None and not _fit(shapes, core, arguments):
                search.fail(core, match, f"operands of {expected} that are {shapes.__name__.replace('_', ' ')}")
                continue
            yield from _operands(operands, arguments, match, search)

    def _operation(node: Any, match: Match, search: Search) -> tuple[fx.Node, Match] | None:
        if not isinstance(node, fx.Node):
            return None
        if exact:
            core, rounded = search.values.core(node), torch.float32
        else:
            peeled = search.values.unrounded(node)
            if peeled is None:
                search.fail(node, match, f"{expected} rounded once", "a value rounded to two dtypes")
                return None
            core, rounded = peeled
        if core.op != "call_function" or core.target not in targets or not _takes(core, len(operands), reduction):
            search.fail(core, match, expected)
            return None
        if _result_dtype(core) not in FLOATS or core.kwargs.get("alpha", 1) != 1:
            search.fail(core, match, f"{expected} in float32, bfloat16 or float16")
            return None
        match = match.consume(core)
        if rounding is not None:
            bound = match.bind(rounding, rounded)
            if bound is None:
                search.fail(core, match, f"rounding to {match[rounding]}", f"rounding to {rounded}")
                return None
            return core, bound
        if rounded is not torch.float32:
            search.fail(core, match, f"{expected} not rounded", f"{expected} rounded to {rounded}")
            return None
        return core, match

    return pattern


def narrows(core: fx.Node, index: int) -> bool:
    """Whether eager code rounds an operand to the 16 bits of the operation's result: a tensor without dims in 32 bits.

    ATen's kernels convert their operands to the common dtype, of which such a tensor has no say, but read a scalar that is on
    the CPU as it is: CUDA's either operand (``opmath_symmetric_gpu_kernel_with_scalars``), but a quotient's the second alone, as the CPU's
    (``binary_kernel_reduced_floating_vec_opmath_support``).
    """
    operand, result = tensor(core.args[index]) if index < len(core.args) else None, tensor(core)
    if operand is None or result is None or result.dtype not in (torch.bfloat16, torch.float16):
        return False
    if core.target not in _NARROWING or operand.dtype not in (torch.float32, torch.float64):
        return False
    if core.target is aten.where.self:
        return True
    if result.device.type == "cpu":
        return index == 0
    return operand.device.type != "cpu" or (index == 0 and core.target in DIV)


def _takes(core: fx.Node, operands: int, reduction: bool) -> bool:
    """Whether the operands are all the operation takes, so that no bound or flag goes unread."""
    if reduction:
        return len(core.args) >= operands
    return len(core.args) == operands and not set(core.kwargs) - {"alpha"}


def _result_dtype(core: fx.Node) -> torch.dtype | None:
    result = core.meta.get("val")
    result = result[0] if isinstance(result, (tuple, list)) else result
    return result.dtype if isinstance(result, torch.Tensor) else None


def _fit(shapes: Shapes, core: fx.Node, arguments: list[Any]) -> bool:
    first, second = arguments
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)):
        return False
    if tensor(first) is None or tensor(second) is None:
        return False
    return same_shape(shape(first), shape(core)) and shapes(shape(first), shape(second))


def _operands(patterns: tuple[Pattern, ...], arguments: list[Any], match: Match, search: Search) -> Iterator[Match]:
    if not patterns:
        yield match
        return
    for found in patterns[0](arguments[0], match, search):
        yield from _operands(patterns[1:], arguments[1:], found, search)


def reduce_rows(targets: tuple[Any, ...], operand: Pattern, *, size: str, exact: bool = False) -> Pattern:
    """A reduction of the last dim alone; binds how many values it reduces as ``size``."""
    reduction = op(targets, operand, exact=exact, reduction=True)

    def pattern(node: Any, match: Match, search: Search) -> Iterator[Match]:
        core = search.values.core(node) if isinstance(node, fx.Node) else node
        if isinstance(core, fx.Node) and core.target in targets:
            source = core.args[0]
            if tensor(source) is None or not _reduces_last(core, shape(source)):  # type: ignore[arg-type]
                search.fail(core, match.consume(core), "a reduction over the last dim alone")
                return
            bound = match.bind(size, shape(source)[-1])  # type: ignore[arg-type]
            if bound is None:
                search.fail(core, match.consume(core), f"rows of {match[size]} values")
                return
            match = bound
        yield from reduction(node, match, search)

    return pattern


def reduce_all(targets: tuple[Any, ...], operand: Pattern, *, size: str) -> Pattern:
    """A reduction of every dim to one value; binds ``size`` as None."""
    reduction = op(targets, operand, exact=True, reduction=True)

    def pattern(node: Any, match: Match, search: Search) -> Iterator[Match]:
        core = search.values.core(node) if isinstance(node, fx.Node) else node
        if not isinstance(core, fx.Node) or core.target not in targets or tensor(core) is None:
            return
        if not all(same_size(length, 1) for length in shape(core)):
            return
        bound = match.bind(size, None)
        if bound is not None:
            yield from reduction(node, bound, search)

    return pattern


def _reduces_last(core: fx.Node, sizes: tuple[Any, ...]) -> bool:
    dims = core.args[1] if len(core.args) > 1 else core.kwargs.get("dim")
    if isinstance(dims, int):
        dims = [dims]
    if not sizes or not isinstance(dims, (list, tuple)):
        return False
    reduced = {d % len(sizes) for d in dims if isinstance(d, int)}
    last = len(sizes) - 1
    # Dims of one value may be reduced as well.
    return last in reduced and all(same_size(sizes[d], 1) for d in reduced - {last})


def getitem(index: int, inner: Pattern) -> Pattern:
    """Output ``index`` of an operation with several."""

    def pattern(node: Any, match: Match, search: Search) -> Iterator[Match]:
        core = search.values.core(node) if isinstance(node, fx.Node) else None
        if core is not None and core.target is operator.getitem and core.args[1] == index:
            yield from inner(core.args[0], match.consume(core), search)

    return pattern


def inverse(inner: Pattern) -> Pattern:
    """1 / inner, which eager computes as a reciprocal and, from a Python 1.0, multiplies by one."""
    return either(
        op(RECIPROCAL, inner), op(DIV, equal(1), inner), op(MUL, op(RECIPROCAL, inner), equal(1), commutative=True)
    )
