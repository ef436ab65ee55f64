"""Dynamic fp8 quantizers, from the cast to fp8 up to the tensor they quantize.

code = cast(clamp(x / scale)), scale = f(amax(|x|)), with one scale per row (per token) or per group of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusion_pass.specs import CODE_DTYPES, Quantizer, QuotientRule, Rounding, ScaleRule, SpecError

from .grammar import (
    ABS,
    ADD,
    DIV,
    MUL,
    Match,
    Pattern,
    Search,
    either,
    equal,
    getitem,
    inverse,
    named,
    number,
    op,
    per_row,
    reduce_rows,
    round_to,
    tagged,
    value,
)
from .values import FLOATS, VIEWS, aten, cast_dtype, dtype

_MAXIMUM = (aten.maximum.default, aten.clamp_min.Tensor)
_MINIMUM = (aten.minimum.default, aten.clamp_max.Tensor)


def _bounded(targets: tuple[Any, ...], tensor_targets: tuple[Any, ...], inner: Pattern, name: str) -> Pattern:
    """inner bounded by a constant, which a low-precision operation rounds to its own dtype first."""
    raw = f"{name}_written"
    bounded = either(op(targets, inner, number(raw), exact=True), op(tensor_targets, inner, number(raw), exact=True))

    def pattern(node: Any, match: Match, search: Search) -> Iterator[Match]:
        core: Any = search.values.core(node) if isinstance(node, fx.Node) else node
        kind = dtype(core)
        if search.values.is_rounding(core):
            # A bf16 clamp is decomposed to a f32 one that is rounded again: only its bound can round.
            if search.values.unrounded_dtype(core.args[0].args[0]) != kind:
                return
            node, match = core.args[0], match.consume(core)
        for found in bounded(node, match, search):
            bound = found.bind(name, round_to(found[raw], kind))
            if bound is not None:
                yield bound

    return pattern


def zero() -> Pattern:
    """A tensor filled with zeros, of any dtype."""

    def pattern(node: Any, match: Match, search: Search) -> Iterator[Match]:
        while isinstance(node, fx.Node) and (cast_dtype(node) or search.values.is_transparent(node)):
            node = node.args[0]
        if isinstance(node, fx.Node) and node.target is aten.full.default and node.args[1] == 0:
            yield match

    return pattern


def at_least(inner: Pattern, name: str) -> Pattern:
    return _bounded((aten.clamp_min.default, aten.clamp.default), _MAXIMUM, inner, name)


def at_most(inner: Pattern, name: str) -> Pattern:
    return _bounded((aten.clamp_max.default,), _MINIMUM, inner, name)


_x = value("x")
_magnitude = op(ABS, _x, exact=True)
_greatest = reduce_rows((aten.amax.default,), _x, size="group", exact=True)
_least = reduce_rows((aten.amin.default,), _x, size="group", exact=True)
_amax = either(
    reduce_rows((aten.amax.default,), _magnitude, size="group", exact=True),
    getitem(0, reduce_rows((aten.max.dim,), _magnitude, size="group", exact=True)),
    # torchao's symmetric ranges: the greater of -min(x, 0) and max(x, 0).
    op(
        _MAXIMUM,
        op((aten.neg.default,), op(_MINIMUM, _least, equal(0), exact=True, commutative=True), exact=True),
        op(_MAXIMUM, _greatest, equal(0), exact=True, commutative=True),
        exact=True,
        commutative=True,
    ),
)
_floored_amax = either(at_least(_amax, "amax_floor"), _amax)
_quotient_of_amax = op(DIV, _floored_amax, number("divisor"), rounding="scale_dtype")
_log2 = either(op((aten.log2.default,), _quotient_of_amax), op((aten.log2.default,), op(ABS, _quotient_of_amax)))
_unfloored_scale = either(
    tagged("power_of_two", True, op((aten.exp2.default,), op((aten.ceil.default,), _log2))),
    tagged("power_of_two", False, _quotient_of_amax),
)
_scale = named("scale", either(at_least(_unfloored_scale, "scale_floor"), _unfloored_scale))
_inverse_scale = inverse(_scale)
_quotient = either(
    tagged("quotient_rule", QuotientRule.DIVIDE, op(DIV, _x, _scale, shapes=per_row)),
    tagged("quotient_rule", QuotientRule.RECIPROCAL, op(MUL, _x, _inverse_scale, commutative=True, shapes=per_row)),
)
_rounded = either(
    tagged("rounding", Rounding.NEAREST_EVEN, op((aten.round.default,), _quotient)),
    tagged("rounding", Rounding.CAST, _quotient),
)
# Symmetric int8 quantization may still add its zero point.
_level = either(_rounded, op(ADD, _rounded, zero(), commutative=True))
_saturated = either(
    at_most(at_least(_level, "low"), "high"),
    at_least(at_most(_level, "high"), "low"),
    op((aten.clamp.default,), _level, number("low"), number("high"), exact=True),
    _rounded,
)


@dataclass(frozen=True)
class QuantizerSite:
    """A recognised quantizer: the spec, the tensor it quantizes, and the nodes that hold its codes and scales.

    ``spec.group`` is the length of the reduced dim; whether that is a whole row depends on the tensor's producer.
    """

    spec: Quantizer
    x: fx.Node
    x_used: fx.Node
    codes: fx.Node
    scale: fx.Node
    group: int
    nodes: tuple[fx.Node, ...]


def quantizing_cast(node: fx.Node) -> bool:
    """Whether node casts computed floats to codes; masks and zero points are no codes."""
    if node.op != "call_function" or cast_dtype(node) not in CODE_DTYPES:
        return False
    source: Any = node.args[0]
    if dtype(source) not in FLOATS:
        return False
    while source.target in VIEWS:
        source = source.args[0]
    return source.target is not aten.full.default


def recognise_quantizer(codes: fx.Node, search: Search, device_type: str) -> QuantizerSite | None:
    """The dynamic quantizer that ends in the cast ``codes``, or None with the reason in ``search.failure``."""
    for match in _saturated(codes.args[0], Match(nodes=(codes,)), search):
        site = _describe(codes, match, search, device_type)
        if site is not None:
            return site
    return None


def _describe(codes: fx.Node, match: Match, search: Search, device_type: str) -> QuantizerSite | None:
    if not _saturates(codes, match):
        low, high = match.get("low"), match.get("high")
        seen = "no clamp" if high is None else f"a clamp to [{low:g}, {high:g}]"
        search.fail(codes, match, f"a clamp to what {cast_dtype(codes)} holds", seen)
        return None
    group = match["group"]
    if not isinstance(group, int):
        search.fail(codes, match, "groups of a static length", f"groups of {group} values")
        return None
    try:
        spec = _spec(codes, match, group, device_type)
    except SpecError as error:
        search.fail(codes, match, "constants that a kernel honours", str(error))
        return None
    return QuantizerSite(spec, match["x"], match["x_used"], codes, match["scale"], group, match.nodes)


def _spec(codes: fx.Node, match: Match, group: int, device_type: str) -> Quantizer:
    return Quantizer(
        code=cast_dtype(codes),  # type: ignore[arg-type]
        divisor=match["divisor"],
        group=group,
        amax_floor=match.get("amax_floor"),
        scale_floor=match.get("scale_floor"),
        # A scalar divisor is a division on CPU and a multiplication by its f32 reciprocal on CUDA; a tensor always divides.
        scale_rule=ScaleRule.DIVIDE if device_type == "cpu" or match["divisor_is_tensor"] else ScaleRule.RECIPROCAL,
        scale_dtype=match["scale_dtype"],
        quotient_rule=match["quotient_rule"],
        clamp=match.get("high"),
        clamp_low=None if "low" not in match.captures or match["low"] == -match["high"] else match["low"],
        rounding=match["rounding"],
        power_of_two=match["power_of_two"],
    )


def _saturates(codes: fx.Node, match: Match) -> bool:
    """Whether every value fits the codes: by its clamp, or because amax over the divisor is the scale.

    Without a clamp, |x| / scale exceeds the divisor by roundings alone if a floor keeps the scale normal, and a divisor
    up to the largest fp8 code is then rounded to that code at most.
    """
    code: Any = cast_dtype(codes)
    low, high = match.get("low"), match.get("high")
    if high is None:
        floored = (match.get("amax_floor") or 0.0) / match["divisor"] >= 2.0**-100
        return bool(code is not torch.int8 and floored and match["divisor"] <= torch.finfo(code).max)
    if code is torch.int8:
        return bool(-128 <= low < 0 < high <= 127)
    return bool(low == -high)
