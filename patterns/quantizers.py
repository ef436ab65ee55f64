"""Quantizers, from the cast to fp8 or int8 up to the tensor they quantize.

code = cast(clamp(round(x / factor))), the factor a term of amax(|x|) per row, group or tensor, or of a calibrated scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusion_pass.eager import eager_cast_saturates
from fusion_pass.specs import CAST_DTYPES, Granularity, Quantizer, Rounding, Sign, SpecError
from fusion_pass.terms import bounds, is_power_of_two, largest_quotient

from .clamps import clamped
from .fp4 import recognise_codes
from .grammar import (
    ADD,
    DIV,
    MUL,
    Match,
    Search,
    constant,
    either,
    equal,
    one_per_group,
    op,
    tagged,
    value,
)
from .scales import ScaleReader, factor
from .values import FLOATS, Values, aten, cast_dtype, dtype, same_size, shape


def _reader(match: Match, search: Search) -> ScaleReader:
    return ScaleReader(match, search, match["device_type"])


_x = value("x")
_factor = factor(_reader)
# Values are divided by the factor in the precision in which they come, or multiplied with it.
_quotient = either(
    tagged("divides", True, op(DIV, _x, _factor, rounding="quotient", shapes=one_per_group, narrowing=True)),
    tagged(
        "divides",
        False,
        op(MUL, _x, _factor, rounding="quotient", commutative=True, shapes=one_per_group, narrowing=True),
    ),
)
_rounded = either(
    tagged("rounding", Rounding.NEAREST_EVEN, op((aten.round.default,), _quotient, exact=True)),
    tagged("rounding", Rounding.CAST, _quotient),
)
# Symmetric quantization may still add its zero point, which changes -0 alone.
_level = either(_rounded, tagged("adds_zero", True, op(ADD, _rounded, equal(0), exact=True, commutative=True)))


_saturated = either(
    clamped(_level, "low", "high"),
    # Between whole bounds it does not matter which comes first.
    tagged(
        "rounding",
        Rounding.NEAREST_EVEN,
        tagged("clamped_first", True, op((aten.round.default,), clamped(_quotient, "low", "high"), exact=True)),
    ),
    _level,
)


@dataclass
class QuantizerSite:
    """A recognised quantizer: the spec, the tensor it quantizes, and the nodes that hold its codes and scales.

    ``spec`` returns no scale yet: that depends on which of the values in ``reader.terms`` the rest of the graph reads.
    ``spec.group`` is the length of the reduced dim; whether that is a whole row depends on the tensor's producer.
    """

    spec: Quantizer
    x: fx.Node
    x_used: fx.Node
    codes: fx.Node
    reader: ScaleReader | None
    nodes: tuple[fx.Node, ...]

    @property
    def given(self) -> fx.Node | None:
        """The calibrated scale that the op reads."""
        return None if self.reader is None else self.reader.given


def casts_to_codes(node: fx.Node) -> bool:
    """Whether node casts floats to a dtype of codes."""
    if node.op != "call_function" or cast_dtype(node) not in CAST_DTYPES:
        return False
    source: Any = node.args[0]
    return dtype(source) in FLOATS


def quantizes(node: fx.Node, values: Values) -> bool:
    """Whether what node casts to codes is computed from a tensor; masks and zero points are no codes."""
    return constant(node.args[0], values) is None


def recognise_quantizer(codes: fx.Node, search: Search, device_type: str) -> QuantizerSite | None:
    """The quantizer that ends in ``codes``, a cast or packed FP4; or None with the reason in ``search.failure``."""
    start = Match({"device_type": device_type}, (codes,))
    if cast_dtype(codes) is None:
        return _packed_quantizer(codes, start, search, device_type)
    for match in _saturated(codes.args[0], start, search):
        site = _describe(codes, match, search)
        if site is not None:
            return site
    return None


def _packed_quantizer(codes: fx.Node, start: Match, search: Search, device_type: str) -> QuantizerSite | None:
    packed = recognise_codes(codes, search.values, device_type)
    if isinstance(packed, str):
        search.fail(codes, start, "FP4 codes", packed)
        return None
    start = Match({"e2m1": packed.rule, "rounding": Rounding.CAST, **start.captures}, packed.nodes)
    for match in _quotient(packed.scaled, start, search):
        site = _describe(codes, match, search)
        if site is not None:
            return site
    return None


def _describe(codes: fx.Node, match: Match, search: Search) -> QuantizerSite | None:
    reader: ScaleReader = match["reader"]
    reader.match = match
    problem = _problem(codes, match)
    if problem is not None:
        search.fail(codes, match, *problem)
        return None
    try:
        spec = _spec(codes, match)
    except SpecError as error:
        search.fail(codes, match, "constants that a kernel honours", str(error))
        return None
    return QuantizerSite(spec, match["x"], match["x_used"], codes, reader, match.nodes)


def _problem(codes: fx.Node, match: Match) -> tuple[str, str] | None:
    """What was expected and what was found where a match cannot be honoured."""
    low, high = match.get("low"), match.get("high")
    rule = match.get("e2m1")
    if rule is not None and rule.sign is Sign.NEGATIVE and match["divides"] and not is_power_of_two(match["factor"]):
        return "a quotient that is no zero", "codes with the sign of quotients below any float"
    if rule is None and not _saturates(codes, match):
        seen = "no clamp" if high is None else f"a clamp to [{low:g}, {high:g}]"
        return f"a clamp to what {cast_dtype(codes)} holds", seen
    if "clamped_first" in match.captures and not (float(low).is_integer() and float(high).is_integer()):
        return "whole bounds where values are rounded afterwards", f"a clamp to [{low:g}, {high:g}]"
    group, repeats = match.get("group"), match["repeats"]
    if group is not None and not isinstance(group, int):
        return "groups of a static length", f"groups of {group} values"
    if repeats is not None and repeats != group:
        return f"scales expanded over their groups of {group}", f"scales expanded over {repeats} values"
    per_row_only = repeats is None and group is not None
    if per_row_only and not same_size(shape(match["x_used"])[-1], group):
        return f"groups of {group} values", f"rows of {shape(match['x_used'])[-1]} values"
    least, most = bounds(match["factor"])
    if "zero_of_any_sign" in match.captures and (least <= 0 if match["divides"] else most == math.inf):
        return "a scale that is never zero, as it comes from extremes of either sign", f"{match['factor']}"
    return None


def _spec(codes: fx.Node, match: Match) -> Quantizer:
    group = match.get("group")
    low, high = match.get("low"), match.get("high")
    code: Any = cast_dtype(codes) or torch.float4_e2m1fn_x2
    if high is None and code is torch.int8:
        high = 127.0
    return Quantizer(
        code=code,
        factor=match["factor"],
        divides=match["divides"],
        scale=None,
        granularity=Granularity.TENSOR if group is None else Granularity.GROUP,
        group=group,
        quotient=match["quotient"],
        clamp=high,
        clamp_low=None if low is None or low == -high else low,
        rounding=match["rounding"],
        adds_zero="adds_zero" in match.captures and code is not torch.int8,
        e2m1=match.get("e2m1"),
    )


def _saturates(codes: fx.Node, match: Match) -> bool:
    """Whether every value fits the codes, or eager code's cast and a compiler's treat those that do not alike.

    Libraries leave the clamp out of what is compiled where compilers' casts saturate and eager's do not: torchao's MX casts.
    """
    code: Any = cast_dtype(codes)
    low, high = match.get("low"), match.get("high")
    if high is not None:
        return bool(low < 0 < high and (code is not torch.int8 or (low >= -128 and high <= 127)))
    if match["quotient"] is not torch.float32:
        return False
    largest = largest_quotient(match["factor"], match["divides"])
    if code is torch.int8:
        return largest <= 127 * (1 + 2.0**-20) and bounds(match["factor"])[0 if match["divides"] else 1] not in (
            0,
            math.inf,
        )
    return eager_cast_saturates(code) or largest <= torch.finfo(code).max * (1 + 2.0**-7)
