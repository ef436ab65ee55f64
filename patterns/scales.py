"""Scales: the operations between a row's amax and what its values are divided by, read as a term.

Nothing here knows a quantizer by name. Whatever pointwise operations a graph does on one value per scale are repeated by
the kernel, as long as each is one that it repeats bit for bit.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from fusion_pass.eager import eager_cast_saturates
from fusion_pass.inductor import known
from fusion_pass.specs import reciprocal_of
from fusion_pass.terms import AMAX, GIVEN, Operand, Term, bounds, is_power_of_two, kind

from .clamps import MAXIMUM, MINIMUM
from .grammar import (
    ABS,
    Match,
    Pattern,
    Search,
    constant,
    either,
    equal,
    getitem,
    narrows,
    op,
    reduce_all,
    reduce_rows,
    round_to,
    tagged,
    value,
)
from .values import FLOATS, aten, cast_dtype, dtype, same_shape, shape, tensor

# A term longer than this is no scale; it also bounds the text of a spec.
_LONGEST = 48

_x = value("x")
_magnitude = op(ABS, _x, exact=True)


def _reduced(targets: tuple[Any, ...], operand: Pattern) -> Pattern:
    """The reduction of each row, or of the whole tensor."""
    return either(reduce_rows(targets, operand, size="group", exact=True), reduce_all(targets, operand, size="group"))


def _extreme(reduction: Pattern, bound_targets: tuple[Any, ...], scalar_target: Any) -> Pattern:
    """A row's least or greatest value, possibly bounded by zero."""
    return either(
        reduction,
        op(bound_targets, reduction, equal(0), exact=True, commutative=True),
        op((scalar_target,), reduction, equal(0), exact=True),
    )


_least = _extreme(_reduced((aten.amin.default, aten.min.default), _x), MINIMUM, aten.clamp_max.default)
_greatest = _extreme(_reduced((aten.amax.default, aten.max.default), _x), MAXIMUM, aten.clamp_min.default)
_extremes = either(
    op(MAXIMUM, op(ABS, _least, exact=True), op(ABS, _greatest, exact=True), exact=True, commutative=True),
    # Which zero this gives for a row of zeros is not defined, so the sign of a zero scale must not matter.
    tagged(
        "zero_of_any_sign",
        True,
        op(MAXIMUM, op((aten.neg.default,), _least, exact=True), _greatest, exact=True, commutative=True),
    ),
)
_amax = either(
    _reduced((aten.amax.default, aten.max.default), _magnitude),
    getitem(0, reduce_rows((aten.max.dim,), _magnitude, size="group", exact=True)),
    _extremes,
)

_REDUCTIONS = (aten.amax.default, aten.max.default, aten.max.dim, aten.amin.default, aten.min.default)

# What the result of each operation on float tensors is called in a term.
_FLOAT_OPERATIONS: dict[Any, str] = {
    aten.clamp_min.default: "max",
    aten.clamp_min.Tensor: "max",
    aten.maximum.default: "max",
    aten.clamp_max.default: "min",
    aten.clamp_max.Tensor: "min",
    aten.minimum.default: "min",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
    aten.reciprocal.default: "reciprocal",
    aten.neg.default: "neg",
    aten.abs.default: "abs",
    aten.log2.default: "log2",
    aten.exp2.default: "exp2",
    aten.ceil.default: "ceil",
    aten.floor.default: "floor",
    aten.round.default: "round",
}
_INTEGER_OPERATIONS: dict[Any, str] = {
    **{target: name for target, name in _FLOAT_OPERATIONS.items() if name in ("max", "min", "add", "sub")},
    aten.bitwise_and.Scalar: "bit_and",
    aten.bitwise_and.Tensor: "bit_and",
    aten.bitwise_or.Scalar: "bit_or",
    aten.bitwise_or.Tensor: "bit_or",
    aten.__rshift__.Scalar: "shr",
    aten.bitwise_right_shift.Tensor_Scalar: "shr",
    aten.__lshift__.Scalar: "shl",
    aten.bitwise_left_shift.Tensor_Scalar: "shl",
}
_PREDICATES: dict[Any, str] = {
    aten.isnan.default: "isnan",
    aten.isinf.default: "isinf",
    aten.logical_not.default: "negate",
    **{
        getattr(getattr(aten, name), overload): name
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
        for overload in ("Scalar", "Tensor")
    },
}
# Their results are among their operands', or those with another sign: nothing is rounded.
_EXACT = ("max", "min", "neg", "abs", "ceil", "floor", "round")
_ROUNDINGS = {torch.bfloat16: "bf16", torch.float16: "f16"}


class ScaleReader:
    """Reads one quantizer's factor; afterwards knows the term of every value on the way.

    Attributes:
        match: the quantizer's match, which binds ``x``; grows by what is read.
        terms: the cores that were read, each with its term, amax first.
        given: the one tensor of a single value that the terms read as ``given``, or None.
    """

    def __init__(self, match: Match, search: Search, device_type: str) -> None:
        self.match = match
        self.search = search
        self.device_type = device_type
        self.terms: dict[fx.Node, Term] = {}
        self.given: fx.Node | None = None
        self.steps = 0

    def read(self, node: Any) -> Term | None:
        """The term that node's value is, or None with the reason in the search's failure."""
        if not isinstance(node, fx.Node) or tensor(node) is None:
            return None
        core = self.search.values.core(node)
        if core in self.terms:
            return self.terms[core]
        self.steps += 1
        term = None if self.steps > _LONGEST else self._amax(node) or self._operation(core) or self._given(node, core)
        if term is None:
            reduces = core.target in _REDUCTIONS or core.target is operator.getitem
            expected = f"amax of the same x, {self.match['x'].name}" if reduces else "an operation that kernels repeat"
            self.search.fail(core, self.match, expected)
            return None
        self.terms[core] = term
        return term

    def follow(self, node: fx.Node) -> Term | None:
        """The term of an operation downstream of what was read, if it reads nothing else; leaves no trace otherwise."""
        before = dict(self.terms), self.given, self.match
        self.steps = 0
        term = self._operation(self.search.values.core(node))
        if term is None or self.given is not before[1]:
            self.terms, self.given, self.match = before
            return None
        self.terms[self.search.values.core(node)] = term
        return term

    def _amax(self, node: fx.Node) -> Term | None:
        for found in _amax(node, self.match, Search(self.search.values)):
            self.match = found
            return AMAX
        return None

    def _given(self, node: fx.Node, core: fx.Node) -> Term | None:
        """A single float that comes from elsewhere."""
        value_of = tensor(node)
        assert value_of is not None
        if not known(value_of.numel() == 1) or dtype(node) not in FLOATS or value_of.device.type != self.device_type:
            return None
        if self.given is not None and self.search.values.core(self.given) is not core:
            return None
        self.given = node
        return GIVEN

    def _operation(self, core: fx.Node) -> Term | None:
        if core.op != "call_function":
            return None
        saved = dict(self.terms), self.given, self.match, self.steps
        term = self._conversion(core) or self._selection(core) or self._arithmetic(core)
        if term is None:
            self.terms, self.given, self.match, self.steps = saved
        else:
            self.match = self.match.consume(core)
        return term

    def _operands(self, core: fx.Node, arguments: list[Any]) -> list[Operand] | None:
        """The operands as terms and numbers; None if one is neither or broadcasts."""
        found: list[Operand] = []
        for argument in arguments:
            operand: Operand | None = constant(argument, self.search.values)
            if operand is None:
                operand = self.read(argument)
                if operand is None:
                    return None
                assert isinstance(operand, Term)
                if "amax" in operand.leaves() and not same_shape(shape(argument), shape(core)):
                    return None
            narrowed = isinstance(argument, fx.Node) and narrows(core, core.args.index(argument))
            found.append(_rounded_to(operand, dtype(core)) if narrowed else operand)
        return found if any(isinstance(f, Term) for f in found) else None

    def _conversion(self, core: fx.Node) -> Term | None:
        """Casts that round, to and from integers and float64, and the bits of a float."""
        if core.target is aten.view.dtype:
            return self._reinterpreted(core)
        target = cast_dtype(core)
        if target is None:
            return None
        operands = self._operands(core, [core.args[0]])
        if operands is None:
            return None
        term = operands[0]
        assert isinstance(term, Term)
        if dtype(core.args[0]) is torch.float8_e8m0fnu:  # type: ignore[arg-type]
            term = _power_of(term)
            if target is torch.float32:
                return term
        source = kind(term)
        if target in _ROUNDINGS and source in ("f32", "f64"):
            return Term(_ROUNDINGS[target], (term if source == "f32" else Term("f32", (term,)),))
        if target is torch.float64 and source == "f32":
            return Term("f64", (term,))
        if target is torch.float32 and source in ("f64", "i32"):
            return Term("f32", (term,))
        if target is torch.float8_e4m3fn and source == "f32":
            least, most = bounds(term)
            saturates = (least >= -448 and most <= 448) or eager_cast_saturates(target)
            return Term("e4m3fn", (term,)) if saturates else None
        if target is torch.float32 and dtype(core.args[0]) is torch.float8_e4m3fn:  # type: ignore[arg-type]
            return term
        if target is torch.int32:
            return term if source == "i32" else Term("i32", (term,)) if source == "bool" else None
        if target is torch.bool and source == "i32":
            return Term("ne", (term, 0))
        if target is torch.uint8 and source in ("i32", "f32"):
            low, high = bounds(term)
            # What a cast of other floats gives is undefined.
            return Term("u8", (term,)) if source == "i32" or (low >= 0 and high <= 255) else None
        if target is torch.float8_e8m0fnu and is_power_of_two(term):
            return Term("u8", (Term("shr", (Term("bits", (term,)), 23)),))
        return None

    def _reinterpreted(self, core: fx.Node) -> Term | None:
        operands = self._operands(core, [core.args[0]])
        if operands is None:
            return None
        (term,) = operands
        assert isinstance(term, Term)
        source, target = dtype(core.args[0]), core.args[1]  # type: ignore[arg-type]
        if (source, target) == (torch.float32, torch.int32):
            return Term("bits", (term,))
        if (source, target) == (torch.int32, torch.float32):
            return Term("from_bits", (term,))
        # Both are the byte.
        return term if (source, target) == (torch.float8_e8m0fnu, torch.uint8) else None

    def _selection(self, core: fx.Node) -> Term | None:
        if core.target is aten.where.self:
            mask, then, otherwise = core.args
        elif core.target is aten.index_put.default and len(core.args) == 3:
            indices: Any = core.args[1]
            if len(indices) != 1 or dtype(indices[0]) is not torch.bool:
                return None
            mask, then, otherwise = indices[0], core.args[2], core.args[0]
        else:
            return None
        condition = self.read(mask)
        operands = None if _has_exponents(core) else self._operands(core, [then, otherwise])
        if condition is None or kind(condition) != "bool" or operands is None:
            return None
        if not same_shape(shape(mask), shape(core)):  # type: ignore[arg-type]
            return None
        return Term("where", (condition, *operands))

    def _arithmetic(self, core: fx.Node) -> Term | None:
        result = dtype(core)
        if core.target in _PREDICATES:
            return self._applied(_PREDICATES[core.target], core)
        if result is torch.int32 or result is torch.uint8:
            name = _INTEGER_OPERATIONS.get(core.target)
            term = None if name is None else self._applied(name, core, integers=True)
            return Term("u8", (term,)) if term is not None and result is torch.uint8 else term
        if result not in (*FLOATS, torch.float64) or core.kwargs.get("alpha", 1) != 1:
            return None
        if core.target is aten.pow.Scalar:
            return self._power_of_two(core)
        if core.target is aten.pow.Tensor_Scalar:
            # ATen computes pow(x, -1) as a reciprocal.
            term = self._applied("reciprocal", core, core.args[:1]) if core.args[1] == -1 else None
            return Term(_ROUNDINGS[result], (term,)) if term is not None and result in _ROUNDINGS else term
        name = _FLOAT_OPERATIONS.get(core.target)
        if name is None:
            return None
        term = self._quotient(core) if name == "div" else self._applied(name, core)
        rounded = name not in _EXACT and result in _ROUNDINGS
        return Term(_ROUNDINGS[result], (term,)) if term is not None and rounded else term

    def _power_of_two(self, core: fx.Node) -> Term | None:
        """pow(2.0, x) of whole x; of others kernels have no equal."""
        term = self._applied("pow2", core, core.args[1:]) if core.args[0] == 2 and dtype(core) in FLOATS else None
        return term if term is not None and is_power_of_two(term) else None

    def _applied(self, name: str, core: fx.Node, arguments: Any = None, integers: bool = False) -> Term | None:
        operands = self._operands(core, list(core.args if arguments is None else arguments))
        if operands is None:
            return None
        if name in ("max", "min") and dtype(core) in _ROUNDINGS:
            operands = [o if isinstance(o, Term) else round_to(o, dtype(core)) for o in operands]
        if integers:
            # Masks are written unsigned.
            operands = [o if isinstance(o, Term) else (int(o) + 2**31) % 2**32 - 2**31 for o in operands]
        if name == "mul" and 1.0 in operands:
            return next(o for o in operands if isinstance(o, Term))
        promoted = _promoted(operands, core)
        if promoted is None or len({kind(o) for o in promoted} - {"number"}) > 1:
            return None
        return Term(name, tuple(promoted))

    def _quotient(self, core: fx.Node) -> Term | None:
        divisor = constant(core.args[1], self.search.values)
        if divisor is None or self._divides_by_tensor(core):
            return self._applied("div", core)
        # Eager CUDA code multiplies by the reciprocal of a Python scalar.
        inverse = 1 / divisor if dtype(core) is torch.float64 else reciprocal_of(divisor)
        operands = self._operands(core, [core.args[0]])
        promoted = None if operands is None else _promoted(operands, core)
        return None if promoted is None else Term("mul", (promoted[0], inverse))

    def _divides_by_tensor(self, core: fx.Node) -> bool:
        divisor = tensor(core.args[1])
        return self.device_type == "cpu" or (divisor is not None and divisor.device.type == self.device_type)


def _rounded_to(operand: Operand, kind_of: torch.dtype | None) -> Operand:
    """A float32 operand rounded to 16 bits."""
    assert kind_of in _ROUNDINGS
    return Term(_ROUNDINGS[kind_of], (operand,)) if isinstance(operand, Term) else round_to(operand, kind_of)


def _power_of(byte: Term) -> Term:
    """The float32 that an E8M0 byte stands for: 2^-127 is subnormal, 255 is NaN (OCP MX 1.0, 5.4.1)."""
    bits = Term("where", (Term("eq", (byte, 255)), 0x7FC00000, Term("shl", (byte, 23))))
    return Term("from_bits", (Term("where", (Term("eq", (byte, 0)), 0x00400000, bits)),))


def _has_exponents(core: fx.Node) -> bool:
    """Whether an operand is of E8M0, whose terms are its bytes."""
    return any(dtype(node) is torch.float8_e8m0fnu for node in core.all_input_nodes)


def _promoted(operands: list[Operand], core: fx.Node) -> list[Operand] | None:
    """Masks and integers as what torch makes of them before it computes a float32, or integers, of them; E8M0 it computes nothing of."""
    if _has_exponents(core):
        return None
    result = dtype(core)
    kinds = {kind(o) for o in operands}
    if core.target is aten.logical_not.default or not kinds & {"bool", "i32"}:
        return operands
    whole = [Term("i32", (o,)) if kind(o) == "bool" else o for o in operands]
    if result in (torch.int32, torch.uint8):
        return whole
    if result is torch.bool:
        return whole if all(isinstance(o, Term) or float(o).is_integer() for o in whole) else None
    if result is not torch.float32:
        return None
    return [Term("f32", (o,)) if kind(o) == "i32" else o for o in whole]


def factor(reader_of: Callable[[Match, Search], ScaleReader]) -> Pattern:
    """What x is divided by or multiplied with: binds ``reader``, ``factor``, and ``repeats`` where it was expanded."""

    def pattern(node: Any, match: Match, search: Search) -> Iterator[Match]:
        if not isinstance(node, fx.Node) or tensor(node) is None or "x" not in match.captures:
            return
        source, repeats = _unexpanded(node, search)
        reader = reader_of(match if repeats is None else match.consume(search.values.core(node)), search)
        term = reader.read(source)
        if term is None or kind(term) != "f32":
            return
        # What it divides or multiplies was consumed last.
        quotient = match.nodes[-1]
        narrowed = narrows(quotient, quotient.args.index(node))
        divisor = _rounded_to(term, dtype(quotient)) if narrowed else term
        found: Match | None = reader.match
        for name, captured in (("reader", reader), ("factor", divisor), ("repeats", repeats)):
            found = found and found.bind(name, captured)
        if found is not None:
            yield found

    return pattern


def _unexpanded(node: fx.Node, search: Search) -> tuple[fx.Node, Any]:
    """The one value per group that was expanded over the groups, and the groups' length; or node itself and None."""
    core = search.values.core(node)
    if core.target is not aten.expand.default:
        return node, None
    source: Any = core.args[0]
    lead = shape(source)
    if len(lead) == len(shape(core)) and lead and lead[-1] == 1 and same_shape(lead[:-1], shape(core)[:-1]):
        return source, shape(core)[-1]
    return node, None
