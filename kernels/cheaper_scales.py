"""Scales and codes by fewer instructions, where the outputs are the same for every amax that there can be.

Public code takes logarithms where the bits of a float have its exponent, and guards against what cannot happen. The amax of
bfloat16 or float16 values is one of 32 thousand, so that terms are compared on all of them, and quotients bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import torch

from fusion_pass.inductor import real_tensors
from fusion_pass.mx_specs import ELEMENTS, INFINITY_BITS, Multiplier, ScaleMode, carry_into_exponent, multiplied_by
from fusion_pass.specs import FusedSpec, GatedActivation, Granularity, Quantizer, RMSNorm, Rounding, Sign, Ties
from fusion_pass.terms import AMAX, Operand, Term, bounds, is_power_of_two, rounded_power

from .reference import evaluate

# The largest magnitude that rounds to a finite code: beyond it, eager code's cast overflows or saturates.
LARGEST = {torch.float8_e4m3fn: 464.0, torch.float8_e4m3fnuz: 247.99998474121094, torch.float8_e5m2: 61439.99609375}
# Beyond what a logarithm of at most one ulp of error, or two of them apart, may be off.
_LOGARITHMS_ERROR = 2.0**-21


@cache
def with_cheaper_scales(spec: FusedSpec, input_dtype: torch.dtype) -> FusedSpec:
    """A spec that gives the same outputs for an input of a dtype, its scales by fewer instructions if any are known."""
    return replace(spec, quantizer=cheaper(spec.quantizer, _value_dtype(spec, input_dtype)))


def _value_dtype(spec: FusedSpec, input_dtype: torch.dtype) -> torch.dtype:
    """The dtype to which values are rounded before their amax is taken."""
    prologue = spec.prologue
    if isinstance(prologue, RMSNorm):
        return prologue.rounded
    return prologue.product if isinstance(prologue, GatedActivation) else input_dtype


@cache
def cheaper(quantizer: Quantizer, dtype: torch.dtype) -> Quantizer:
    """The quantizer, for values of a dtype, with the first of the cheaper terms that are worth the same.

    Where no quotient is beyond the largest code, it has a bound there, which the device's cast applies by itself.
    """
    quantizer = _as_product(quantizer)
    if not _of_amaxes_of_16_bits(quantizer, dtype):
        return quantizer
    with real_tensors():
        quantizer = _with_cheaper_terms(quantizer, dtype)
        if _never_overflows(quantizer, dtype):
            quantizer = replace(quantizer, clamp=torch.finfo(quantizer.code).max)
        return quantizer


def _with_cheaper_terms(quantizer: Quantizer, dtype: torch.dtype) -> Quantizer:
    candidates = list(_candidates(quantizer))
    if not candidates:
        return quantizer
    amaxes = _every_amax(dtype)
    # Most are told apart by a few.
    few = amaxes.flip(0)[::61]
    wanted = _whatever_the_error(quantizer, few)
    for candidate in candidates:
        if _is_worth(candidate, few, wanted) and _is_worth(candidate, amaxes, _whatever_the_error(quantizer, amaxes)):
            return candidate
    return quantizer


def _every_amax(dtype: torch.dtype) -> torch.Tensor:
    """In float32, those of values of 16 bits; NaN has many payloads, all alike to terms."""
    amaxes = torch.arange(32768, dtype=torch.int16, device="cpu").view(dtype).float()
    return torch.cat([amaxes[~amaxes.isnan()], torch.tensor([torch.nan], device="cpu")])


def quantizes_fp4_pairs(spec: FusedSpec, input_dtype: torch.dtype) -> bool:
    """Whether FP4 codes of a spec's values, and their amaxes, are formed from pairs."""
    quantizer = spec.quantizer
    # Four codes are stored at once, and amaxes found of eight values first.
    fits = quantizer.group is not None and quantizer.group % 4 == 0 and quantizer.group >= 8
    return fits and fp4_of_pairs(quantizer, _value_dtype(spec, input_dtype))


def int8_needs_no_bounds(spec: FusedSpec, input_dtype: torch.dtype) -> bool:
    """Whether no value exceeds int8 codes where the factor is positive and finite, and all codes are zero where it is not."""
    quantizer, dtype = spec.quantizer, _value_dtype(spec, input_dtype)
    low, high = quantizer.least, quantizer.clamp
    whole = quantizer.code is torch.int8 and quantizer.rounding is Rounding.NEAREST_EVEN
    if not whole or low is None or high is None or not _of_amaxes_of_16_bits(quantizer, dtype):
        return False
    bound = math.floor(min(high, -low, 127))
    with real_tensors():
        amaxes = _every_amax(dtype)
        for factor, *_ in _whatever_the_error(quantizer, amaxes):
            within = amaxes.isfinite() & (_quotients(quantizer, amaxes, factor).round() <= bound)
            vanishing = factor == (torch.inf if quantizer.divides else 0)
            zero = vanishing | factor.isnan() | (amaxes == 0)
            if not torch.where((factor > 0) & factor.isfinite(), within, zero).all():
                return False
    return True


def casts_by_powers_of_two(quantizer: Quantizer) -> bool:
    """Whether codes are casts of products with powers of two: not rounded before, and bounded by magnitude if at all."""
    exact = quantizer.quotient is torch.float32 and not quantizer.divides and is_power_of_two(quantizer.factor)
    return exact and quantizer.rounding is Rounding.CAST and not quantizer.adds_zero and quantizer.clamp_low is None


def fp4_of_pairs(quantizer: Quantizer, dtype: torch.dtype) -> bool:
    """Whether :mod:`fusion_pass.kernels.e2m1_pairs` has the codes of values of a dtype: FP4, by powers of two."""
    e2m1 = quantizer.e2m1
    if e2m1 is None or dtype not in (torch.bfloat16, torch.float16):
        return False
    # Codes saturate at 6 whether or not values are clamped.
    if not casts_by_powers_of_two(quantizer) or (quantizer.clamp is not None and quantizer.clamp < 6.0):
        return False
    if e2m1.ties is not Ties.EVEN:
        return e2m1.sign in (Sign.KEPT, Sign.NEGATIVE) and e2m1.nan_code in (0, 7) and dtype is torch.bfloat16
    return e2m1.sign is Sign.KEPT and e2m1.nan_code in (4, 7) and pairs_have_factors(quantizer, dtype)


@cache
def pairs_have_factors(quantizer: Quantizer, dtype: torch.dtype) -> bool:
    """Whether FP4 codes of values of a dtype may be formed by factors in that dtype, of float16 by 2^-10 of them, at most 65504.

    Of float16, besides, NaN alone must make a factor NaN, and none may be zero: there the whole block has NaN's code.
    """
    if not _of_amaxes_of_16_bits(quantizer, dtype) or quantizer.divides:
        return False
    with real_tensors():
        amaxes = _every_amax(dtype)
        for factor, *_ in _whatever_the_error(quantizer, amaxes):
            if dtype is torch.bfloat16:
                held = (factor.bfloat16() == factor) | factor.isnan()
            else:
                held = torch.where(amaxes.isnan(), factor.isnan(), (factor > 0) & _held_by_float16(factor, amaxes))
            if not held.all():
                return False
    return True


def _held_by_float16(factor: torch.Tensor, amaxes: torch.Tensor) -> torch.Tensor:
    """Which factors give the same codes if they are 2^-10 of what they were, in float16 and at most its largest.

    Float16 has 40 powers of two; amaxes but zero and infinity have up to 41 factors.
    """
    largest = torch.finfo(torch.float16).max
    held = (factor * 2.0**-10).clamp(max=largest).half().float()
    exact = held == factor * 2.0**-10
    # Zeros have the same codes by any finite factor.
    zeros = (amaxes == 0) & factor.isfinite()
    # The product of the least value with 65504 in place of 2^16 has the same code.
    least = (amaxes == 2.0**-24) & (factor == 2.0**26)
    # Where a factor vanishes, all codes of finite values must, as those beside infinity do.
    vanishing = (held == 0) & (amaxes.clamp(max=largest) * factor <= 0.25)
    return exact | zeros | least | vanishing


def _of_amaxes_of_16_bits(quantizer: Quantizer, dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16) and all(term.leaves() == {"amax"} for term in _terms(quantizer))


def _quotients(quantizer: Quantizer, values: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return (values / factor if quantizer.divides else values * factor).to(quantizer.quotient).float()


def _never_overflows(quantizer: Quantizer, dtype: torch.dtype) -> bool:
    """Whether the largest quotient of each amax is NaN or rounds to a code of an fp8 dtype, and so all that are less."""
    cast = quantizer.rounding is Rounding.CAST and quantizer.e2m1 is None and quantizer.code in LARGEST
    if not cast or quantizer.clamp is not None:
        return False
    amaxes = _every_amax(dtype)
    # Beside an infinite or absent amax there are finite values.
    finite = amaxes.clamp(max=torch.finfo(dtype).max).nan_to_num(torch.finfo(dtype).max)
    for factor, *_ in _whatever_the_error(quantizer, amaxes):
        for values in (amaxes, finite, torch.full_like(amaxes, torch.inf).where(amaxes.isnan(), finite)):
            if bool((_quotients(quantizer, values, factor).abs() > LARGEST[quantizer.code]).any()):
                return False
    return True


def _as_product(quantizer: Quantizer) -> Quantizer:
    """With products in place of divisions by powers of two whose reciprocals float32 holds, infinite or NaN."""
    exact = is_power_of_two(quantizer.factor) and bounds(quantizer.factor)[0] >= 2.0**-126
    if not quantizer.divides or not exact:
        return quantizer
    return replace(quantizer, factor=Term("reciprocal", (quantizer.factor,)), divides=False)


def _terms(quantizer: Quantizer) -> list[Term]:
    return [quantizer.factor] if quantizer.scale is None else [quantizer.factor, quantizer.scale]


def _whatever_the_error(quantizer: Quantizer, amaxes: torch.Tensor) -> list[list[torch.Tensor]]:
    """What the terms are worth for these amaxes if logarithms err downwards, and if upwards."""
    return [list(_worth(quantizer, amaxes, nudge)) for nudge in (1 - _LOGARITHMS_ERROR, 1 + _LOGARITHMS_ERROR)]


def _is_worth(candidate: Quantizer, amaxes: torch.Tensor, wanted: list[list[torch.Tensor]]) -> bool:
    """Whether the terms are worth that; values that are all zero have the same codes by any finite factor.

    Where the factor is the scale that is returned, as it is if there is no other, it must be the same for zeros, too.
    """
    zeros = (amaxes == 0) & (candidate.scale is not None and not candidate.divides)
    return all(
        _same(found, other, zeros & (term is not candidate.scale) & found.isfinite() & other.isfinite())
        for term, found, *others in zip(_terms(candidate), _worth(candidate, amaxes), *wanted, strict=True)
        for other in others
    )


def _same(a: torch.Tensor, b: torch.Tensor, but: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and bool(((a == b) | a.isnan() | but).all())


def _worth(quantizer: Quantizer, amaxes: torch.Tensor, nudge: float | None = None) -> Iterator[torch.Tensor]:
    """The values of the terms; with ``nudge``, logarithms but of powers of two are multiplied by it."""
    known: dict[Term, torch.Tensor] = {}
    for term in _terms(quantizer):
        nudged = term if nudge is None else _replaced(term, ("log2",), lambda log: _nudged(log, nudge))
        yield evaluate(nudged, {"amax": amaxes}, known=known).expand(amaxes.shape)


def _nudged(logarithm: Term, nudge: float) -> Term:
    is_power = Term("eq", (Term("exp2", (Term("round", (logarithm,)),)), *logarithm.args))
    return Term("where", (is_power, logarithm, Term("mul", (logarithm, nudge))))


def _replaced(term: Term, ops: tuple[str, ...], by: Callable[[Term], Term]) -> Term:
    """The term with each operation of ``ops`` in it replaced, from the leaves up."""
    arguments: tuple[Operand, ...] = tuple(_replaced(a, ops, by) if isinstance(a, Term) else a for a in term.args)
    same = replace(term, args=arguments)
    return by(same) if term.op in ops else same


def _candidates(quantizer: Quantizer) -> Iterator[Quantizer]:
    is_block = quantizer.granularity is Granularity.GROUP and quantizer.code in ELEMENTS and not quantizer.divides
    if is_block and quantizer.scale is not None and quantizer.scale_dtype is torch.uint8:
        yield from _mx_candidates(quantizer, quantizer.scale)
    terms = (quantizer.factor, quantizer.scale)
    inverted = tuple(term and _replaced(term, ("reciprocal",), _reciprocal_by_bits) for term in terms)
    for changed in dict.fromkeys((inverted, terms)):
        factor, scale = (term and _replaced(term, ("exp2", "pow2"), _power_by_bits) for term in changed)
        if factor is not None and (factor, scale) != terms:
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
    """2^(127 - byte), with the ends of each multiplier; first those of a division where no byte is 254."""
    bits = Term("shl", (Term("sub", (254, byte)), 23))
    yield Term("from_bits", (Term("min", (Term("max", (bits, 0)), 253 << 23)),))
    yield from (multiplied_by(byte, multiplier) for multiplier in (Multiplier.EXACT, Multiplier.UNIT))


def _power_by_bits(power: Term) -> Term:
    """``exp2(ceil(log2(x)))`` as the exponent of x, one more if any bit of the mantissa is set; NaN stays NaN."""
    x = rounded_power(power, "ceil")
    if x is None:
        return power
    carried = Term("add", (Term("bits", (x,)), 0x7FFFFF))
    rounded = Term("from_bits", (Term("bit_and", (carried, 0x7F800000)),))
    return Term("where", (Term("isnan", (x,)), x, rounded))


def _reciprocal_by_bits(reciprocal: Term) -> Term:
    """``1 / x`` of a power of two by its exponent: zero of infinity, and NaN stays NaN; a division has a slow path."""
    x = reciprocal.args[0]
    if not is_power_of_two(x):
        return reciprocal
    # The bits of 2^k are (127 + k) << 23.
    exponent = Term("sub", (254 << 23, Term("bits", (x,))))
    return Term("where", (Term("isnan", (x,)), x, Term("from_bits", (Term("max", (exponent, 0)),))))
