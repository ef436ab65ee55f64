"""Dynamic fp8 quantizers, from the cast to fp8 up to the tensor they quantize.

code = cast(clamp(x / scale)), scale = f(amax(|x|)), with one scale per row (per token) or per group of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from fusion_pass.specs import CODE_DTYPES, Quantizer, QuotientRule, ScaleRule

from .grammar import (
    ABS,
    DIV,
    MUL,
    Match,
    Pattern,
    Search,
    either,
    equal,
    getitem,
    named,
    number,
    op,
    per_row,
    reduce_rows,
    round_to,
    tagged,
    value,
)
from .values import aten, cast_dtype, dtype

_MAXIMUM = (aten.maximum.default, aten.clamp_min.Tensor)
_MINIMUM = (aten.minimum.default, aten.clamp_max.Tensor)


def _bounded(targets: tuple[Any, ...], tensor_targets: tuple[Any, ...], inner: Pattern, name: str) -> Pattern:
    """inner bounded by a constant, which a low-precision operation rounds to its own dtype first."""
    raw = f"{name}_written"
    bounded = either(op(targets, inner, number(raw), exact=True), op(tensor_targets, inner, number(raw), exact=True))

    def pattern(node: Any, match: Match, search: Search) -> Iterator[Match]:
        for found in bounded(node, match, search):
            bound = found.bind(name, round_to(found[raw], dtype(search.values.core(node))))
            if bound is not None:
                yield bound

    return pattern


def at_least(inner: Pattern, name: str) -> Pattern:
    return _bounded((aten.clamp_min.default, aten.clamp.default), _MAXIMUM, inner, name)


def at_most(inner: Pattern, name: str) -> Pattern:
    return _bounded((aten.clamp_max.default,), _MINIMUM, inner, name)


_x = value("x")
_magnitude = op(ABS, _x, exact=True)
_amax = either(
    reduce_rows((aten.amax.default,), _magnitude, size="group", exact=True),
    getitem(0, reduce_rows((aten.max.dim,), _magnitude, size="group", exact=True)),
)
_floored_amax = either(at_least(_amax, "amax_floor"), _amax)
_unfloored_scale = op(DIV, _floored_amax, number("divisor"), rounding="scale_dtype")
_scale = named("scale", either(at_least(_unfloored_scale, "scale_floor"), _unfloored_scale))
_inverse_scale = either(
    op((aten.reciprocal.default,), _scale),
    op(DIV, equal(1), _scale),
    op(MUL, op((aten.reciprocal.default,), _scale), equal(1)),
)
_quotient = either(
    tagged("quotient_rule", QuotientRule.DIVIDE, op(DIV, _x, _scale, shapes=per_row)),
    tagged("quotient_rule", QuotientRule.RECIPROCAL, op(MUL, _x, _inverse_scale, commutative=True, shapes=per_row)),
)
_saturated = either(
    at_most(at_least(_quotient, "low"), "high"),
    at_least(at_most(_quotient, "high"), "low"),
    op((aten.clamp.default,), _quotient, number("low"), number("high"), exact=True),
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
    return node.op == "call_function" and cast_dtype(node) in CODE_DTYPES


def recognise_quantizer(codes: fx.Node, search: Search, device_type: str) -> QuantizerSite | None:
    """The dynamic quantizer that ends in the cast ``codes``, or None with the reason in ``search.failure``."""
    for match in _saturated(codes.args[0], Match(nodes=(codes,)), search):
        site = _describe(codes, match, search, device_type)
        if site is not None:
            return site
    return None


def _describe(codes: fx.Node, match: Match, search: Search, device_type: str) -> QuantizerSite | None:
    if match["low"] != -match["high"]:
        search.fail(codes, match, "a symmetric clamp", f"a clamp to [{match['low']:g}, {match['high']:g}]")
        return None
    group = match["group"]
    if not isinstance(group, int):
        search.fail(codes, match, "groups of a static length", f"groups of {group} values")
        return None
    # A scalar divisor is a division on CPU and a multiplication by its f32 reciprocal on CUDA; a tensor is neither.
    true_division = device_type == "cpu" or match["divisor_is_tensor"]
    spec = Quantizer(
        code=cast_dtype(codes),  # type: ignore[arg-type]
        divisor=match["divisor"],
        group=group,
        amax_floor=match.get("amax_floor"),
        scale_floor=match.get("scale_floor"),
        scale_rule=ScaleRule.DIVIDE if true_division else ScaleRule.RECIPROCAL,
        scale_dtype=match["scale_dtype"],
        quotient_rule=match["quotient_rule"],
        clamp=match["high"],
    )
    return QuantizerSite(spec, match["x"], match["x_used"], codes, match["scale"], group, match.nodes)
