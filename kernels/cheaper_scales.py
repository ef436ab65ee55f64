"""Scales by fewer instructions: other terms that are worth the same for every amax that there can be.

Public code takes logarithms where the bits of a float have its exponent, and guards against what cannot happen. The amax of
bfloat16 or float16 values is one of 32 thousand, so that terms are compared on all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import torch

from fusion_pass.inductor import real_tensors
from fusion_pass.mx_specs import ELEMENTS, INFINITY_BITS, ScaleMode, carry_into_exponent
from fusion_pass.specs import FusedSpec, GatedActivation, Granularity, Quantizer, RMSNorm
from fusion_pass.terms import AMAX, Operand, Term, bounds, is_power_of_two

from .reference import evaluate

# Beyond what a logarithm of at most one ulp of error, or two of them apart, may be off.
_LOGARITHMS_ERROR = 2.0**-21


def with_cheaper_scales(spec: FusedSpec, input_dtype: torch.dtype) -> FusedSpec:
    """A spec that gives the same outputs for an input of a dtype, its scales by fewer instructions if any are known."""
    return replace(spec, quantizer=cheaper(spec.quantizer, _value_dtype(spec, input_dtype)))


def _value_dtype(spec: FusedSpec, input_dtype: torch.dtype) -> torch.dtype:
    """The dtype to which values are rounded before their amax is taken."""
    prologue = spec.prologue
    if isinstance(prologue, RMSNorm):
        return prologue.product if prologue.gate is None else prologue.gated
    return prologue.product if isinstance(prologue, GatedActivation) else input_dtype


@cache
def cheaper(quantizer: Quantizer, dtype: torch.dtype) -> Quantizer:
    """The quantizer, for values of a dtype, with the first of the cheaper terms that are worth the same."""
    quantizer = _as_product(quantizer)
    if dtype not in (torch.bfloat16, torch.float16) or any(term.leaves() != {"amax"} for term in _terms(quantizer)):
        return quantizer
    with real_tensors():
        amaxes = torch.arange(32768, dtype=torch.int16, device="cpu").view(dtype).float()
        # NaN has many payloads, all alike to terms.
        amaxes = torch.cat([amaxes[~amaxes.isnan()], torch.tensor([torch.nan], device="cpu")])
        for candidate in _candidates(quantizer):
            # Most are told apart by a few.
            if _agree(quantizer, candidate, amaxes.flip(0)[::61]) and _agree(quantizer, candidate, amaxes):
                return replace(quantizer, factor=candidate.factor, scale=candidate.scale)
    return quantizer


def _as_product(quantizer: Quantizer) -> Quantizer:
    """With products in place of divisions by powers of two whose reciprocals float32 holds, infinite or NaN."""
    exact = is_power_of_two(quantizer.factor) and bounds(quantizer.factor)[0] >= 2.0**-126
    if not quantizer.divides or not exact:
        return quantizer
    return replace(quantizer, factor=Term("reciprocal", (quantizer.factor,)), divides=False)


def _terms(quantizer: Quantizer) -> list[Term]:
    return [quantizer.factor] if quantizer.scale is None else [quantizer.factor, quantizer.scale]


def _agree(quantizer: Quantizer, candidate: Quantizer, amaxes: torch.Tensor) -> bool:
    """Whether the terms of both are worth the same for these amaxes, whatever the logarithm's error."""
    found = _worth(candidate, amaxes)
    nudged = (_worth(quantizer, amaxes, 1 - _LOGARITHMS_ERROR), _worth(quantizer, amaxes, 1 + _LOGARITHMS_ERROR))
    return all(_same(value, other) for value, *others in zip(found, *nudged, strict=True) for other in others)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and bool(((a == b) | a.isnan()).all())


def _worth(quantizer: Quantizer, amaxes: torch.Tensor, nudge: float | None = None) -> Iterator[torch.Tensor]:
    """The values of the terms; with ``nudge``, logarithms but of powers of two are multiplied by it."""
    known: dict[Term, torch.Tensor] = {}
    for term in _terms(quantizer):
        nudged = term if nudge is None else _replaced(term, "log2", lambda log: _nudged(log, nudge))
        yield evaluate(nudged, {"amax": amaxes}, known=known).expand(amaxes.shape)


def _nudged(logarithm: Term, nudge: float) -> Term:
    is_power = Term("eq", (Term("exp2", (Term("round", (logarithm,)),)), *logarithm.args))
    return Term("where", (is_power, logarithm, Term("mul", (logarithm, nudge))))


def _replaced(term: Term, op: str, by: Callable[[Term], Term]) -> Term:
    """The term with each operation ``op`` in it replaced, from the leaves up."""
    arguments: tuple[Operand, ...] = tuple(_replaced(a, op, by) if isinstance(a, Term) else a for a in term.args)
    same = replace(term, args=arguments)
    return by(same) if term.op == op else same


def _candidates(quantizer: Quantizer) -> Iterator[Quantizer]:
    is_block = quantizer.granularity is Granularity.GROUP and quantizer.code in ELEMENTS and not quantizer.divides
    if is_block and quantizer.scale is not None and quantizer.scale_dtype is torch.uint8:
        yield from _mx_candidates(quantizer, quantizer.scale)
    factor, scale = (
        term and _replaced(_replaced(term, "exp2", _power_by_bits), "pow2", _power_by_bits)
        for term in (quantizer.factor, quantizer.scale)
    )
    if factor is not None and (factor, scale) != (quantizer.factor, quantizer.scale):
        yield replace(quantizer, factor=factor, scale=scale)


def _mx_candidates(quantizer: Quantizer, scale: Term) -> Iterator[Quantizer]:
    """MX bytes and what they multiply by, in sums and maxima of bits, which the device fuses; amax has no sign."""
    bits = Term("bits", (AMAX,))
    zero_byte = int(evaluate(scale, {"amax": torch.zeros(1, device="cpu")}))
    for mode in ScaleMode:
        element = ELEMENTS[quantizer.code]
        carried = Term("add", (bits, carry_into_exponent(element, mode) - (element.exponent << 23)))
        exponent = Term("shr", (Term("max", (carried, 0)), 23))
        # 254 for infinity, or what its exponent gives; 255 for NaN.
        from_infinity = Term("sub", (Term("min", (bits, INFINITY_BITS + 1)), INFINITY_BITS - 254))
        of_nan = Term("where", (Term("gt", (bits, INFINITY_BITS)), 255, exponent))
        for byte in (Term("max", (exponent, from_infinity)), of_nan):
            byte = Term("where", (Term("eq", (bits, 0)), zero_byte, byte)) if zero_byte else byte
            for factor in _factors(byte):
                yield replace(quantizer, factor=factor, scale=Term("u8", (byte,)))


def _factors(byte: Term) -> Iterator[Term]:
    """2^(127 - byte), with the ends of each :class:`fusion_pass.mx_specs.Multiplier`."""
    bits = Term("sub", (254 << 23, Term("shl", (byte, 23))))
    yield Term("from_bits", (Term("min", (Term("max", (bits, 0)), 253 << 23)),))
    exact = Term("max", (bits, 0x00400000))
    for finite in (exact, Term("where", (Term("eq", (byte, 0)), 127 << 23, exact))):
        yield Term("from_bits", (Term("where", (Term("eq", (byte, 255)), 0x7FC00000, finite)),))


def _power_by_bits(power: Term) -> Term:
    """``exp2(ceil(log2(x)))`` as the exponent of x, one more if any bit of the mantissa is set; NaN stays NaN."""
    ceiling = power.args[0]
    logarithm = ceiling.args[0] if isinstance(ceiling, Term) and ceiling.op == "ceil" else None
    if not isinstance(logarithm, Term) or logarithm.op != "log2":
        return power
    x = logarithm.args[0]
    carried = Term("add", (Term("bits", (x,)), 0x7FFFFF))
    rounded = Term("from_bits", (Term("bit_and", (carried, 0x7F800000)),))
    return Term("where", (Term("isnan", (x,)), x, rounded))
