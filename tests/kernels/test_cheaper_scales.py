"""Cheaper terms for scales are worth what those that were written are, for every 16-bit amax."""

from dataclasses import replace

import pytest
import torch
from fusion_pass.kernels.cheaper_scales import (
    _is_worth,
    _whatever_the_error,
    cheaper,
    int8_needs_no_bounds,
    pairs_have_factors,
    quantizes_fp4_pairs,
    with_cheaper_scales,
)
from fusion_pass.kernels.launch import launch
from fusion_pass.kernels.reference import evaluate, reference
from fusion_pass.kernels.scale_program import program

from fusion_pass.mx_specs import Multiplier, ScaleMode, mx_quantizer
from fusion_pass.specs import (
    FusedSpec,
    GatedActivation,
    NoPrologue,
    PowerOfTwo,
    Quantizer,
    QuotientRule,
    RMSNorm,
    Rounding,
)
from fusion_pass.terms import Term, parse
from fusion_pass.testing import compare

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
FP4 = torch.float4_e2m1fn_x2


def rceil(divisor, least=-127, infinite=254):
    """torchao's RCEIL, which takes the logarithm of amax over the largest code."""
    s = f"(amax * {torch.tensor(divisor).reciprocal().item()!r})"
    exponent = f"u8(min(max(ceil(log2({s})), {least}.0), 127.0) + 127.0)"
    byte = f"where(isnan({s}), 255, where(isinf({s}), {infinite}, {exponent}))"
    power = f"exp2(127.0 - f32({byte}))"
    guarded = f"where(eq({byte}, 254), 5.877471754111438e-39, where(eq({byte}, 0), 1.0, {power}))"
    return byte, f"where(eq({byte}, 255), {s}, {guarded})"


def floor(power):
    """torchao's FLOOR, which divides by the scale."""
    byte = (
        f"where(isnan(amax), 255, u8(min(max((bit_and(shr(bits(amax), 23), 255) - 127) - {power}, -127), 128) + 127))"
    )
    return byte, f"max(from_bits(shl({byte}, 23)), 1.1754943508222875e-38)"


def written(code, byte, factor, divides=False):
    return replace(mx_quantizer(code), scale=parse(byte), factor=parse(factor), divides=divides)


RCEIL = written(torch.float8_e4m3fn, *rceil(448.0))
RULES = {
    "rceil of e4m3": RCEIL,
    "rceil of e5m2": written(torch.float8_e5m2, *rceil(57344.0)),
    "rceil of e2m1": written(FP4, *rceil(6.0)),
    "floor of e4m3": written(torch.float8_e4m3fn, *floor(8), divides=True),
    "floor of e2m1": written(FP4, *floor(2), divides=True),
    **{
        f"{mode.value}, {multiplier.value}": mx_quantizer(FP4, mode, multiplier=multiplier)
        for mode in ScaleMode
        for multiplier in Multiplier
        if (mode is ScaleMode.RCEIL) != (multiplier is Multiplier.DIVISION)
    },
    "zero byte": mx_quantizer(zero_byte=127),
}


def every_amax(dtype, device):
    amaxes = torch.arange(32768, dtype=torch.int16, device=device).view(dtype).float()
    return {"amax": torch.cat([amaxes[~amaxes.isnan()], amaxes.new_full((1,), torch.nan)])}


def assert_same(quantizer, other, dtype, device):
    """By the device's own logarithms; the multiplier of zeros may be any finite one."""
    leaves = every_amax(dtype, device)
    multiplier = evaluate(quantizer.factor, leaves)
    multiplier = multiplier.reciprocal() if quantizer.divides and not other.divides else multiplier
    found, zero = evaluate(other.factor, leaves), leaves["amax"] == 0
    assert found[zero].isfinite().all()
    found[zero] = multiplier[zero]
    for wanted, value in ((multiplier, found), (evaluate(quantizer.scale, leaves), evaluate(other.scale, leaves))):
        torch.testing.assert_close(value.float(), wanted.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize("rule", RULES)
def test_rules_of_mx(rule, dtype, device):
    quantizer = RULES[rule]
    found = cheaper(quantizer, dtype)
    assert not found.divides
    assert program(found.factor, found.scale).count(";") < program(quantizer.factor, quantizer.scale).count(";")
    assert "log2" not in program(found.factor, found.scale)
    assert_same(quantizer, found, dtype, device)


@pytest.mark.parametrize(
    "quantizer",
    [
        written(torch.float8_e4m3fn, *rceil(448.0, least=-126)),
        written(torch.float8_e4m3fn, *rceil(447.0)),
        # 255 for infinity, whose multiplier then is not NaN.
        written(torch.float8_e4m3fn, *rceil(448.0, infinite=255)),
    ],
    ids=["least byte", "divisor", "infinity"],
)
def test_other_rules_stay(quantizer):
    found = cheaper(quantizer, BF16)
    assert "log2" in program(found.factor, found.scale)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize("rule", list(QuotientRule)[:2], ids=lambda rule: rule.value)
def test_powers_of_two_without_logarithms(rule, dtype, device):
    quantizer = Quantizer.dynamic(group=128, amax_floor=1e-4, power_of_two=PowerOfTwo.CEIL, quotient_rule=rule)
    found = cheaper(quantizer, dtype)
    assert "log2" not in program(found.factor, found.scale)
    assert "reciprocal" not in program(found.factor, found.scale)
    assert_same(quantizer, found, dtype, device)


def test_reciprocals_that_bits_do_not_have(device):
    """Of 2^127."""
    power = parse("exp2(ceil(log2(max(amax, 1.0))))")
    quantizer = replace(Quantizer.dynamic(group=128), scale=power, factor=Term("reciprocal", (power,)), divides=False)
    found = cheaper(quantizer, BF16)
    assert "log2" not in program(found.factor, found.scale)
    assert "reciprocal" in program(found.factor, found.scale)
    assert_same(quantizer, found, BF16, device)


def test_zeros_have_any_finite_factor():
    """Float16 has no other block with byte 0."""
    found = cheaper(RCEIL, F16)
    assert evaluate(found.factor, {"amax": torch.zeros(1)}) == 2.0**127
    assert evaluate(cheaper(RCEIL, BF16).factor, {"amax": torch.zeros(1)}) == 1.0


HALVED = written(FP4, "u8(2)", "reciprocal(max(amax, 0.5))")


@pytest.mark.parametrize(
    ("quantizer", "candidate", "is_worth"),
    [
        (HALVED, {"factor": "reciprocal(max(amax, 0.25))"}, True),
        (HALVED, {"factor": "reciprocal(max(amax, 2.0))"}, False),
        (HALVED, {"factor": "reciprocal(amax)"}, False),
        (HALVED, {"scale": "u8(where(eq(amax, 0.0), 1, 2))"}, False),
        (replace(HALVED, divides=True), {"factor": "reciprocal(max(amax, 0.25))"}, False),
        (replace(HALVED, scale=None), {"factor": "reciprocal(max(amax, 0.25))"}, False),
    ],
    ids=["finite", "of others", "infinite", "scale", "divides", "returned"],
)
def test_factors_of_zeros(quantizer, candidate, is_worth):
    amaxes = torch.tensor([0.0, 1.0, 4.0])
    found = replace(quantizer, **{name: parse(text) for name, text in candidate.items()})
    assert _is_worth(found, amaxes, _whatever_the_error(quantizer, amaxes)) == is_worth


@pytest.mark.parametrize("multiplier", Multiplier)
@pytest.mark.parametrize("mode", ScaleMode)
def test_factors_of_pairs(mode, multiplier):
    """Of bf16, zero beside NaN, which a division multiplies by, is a factor as others are."""
    quantizer = mx_quantizer(FP4, mode, multiplier=multiplier)
    assert pairs_have_factors(quantizer, BF16)
    assert pairs_have_factors(quantizer, F16) == (multiplier is not Multiplier.DIVISION)


def test_factors_that_bf16_has_not():
    """Less than 2^-133 next to infinity."""
    byte = mx_quantizer(FP4).scale.args[0]
    quantizer = replace(mx_quantizer(FP4), factor=Term("exp2", (Term("sub", (107.0, Term("f32", (byte,)))),)))
    assert not pairs_have_factors(quantizer, BF16)


def test_only_of_16_bit_values():
    # The logarithm of a float32 just above a power of two is whole, where its bits say that it is above.
    assert cheaper(RCEIL, F32) == RCEIL


@pytest.mark.parametrize(
    ("prologue", "dtype", "replaced"),
    [
        (NoPrologue(), BF16, True),
        (NoPrologue(), F32, False),
        (RMSNorm(1e-6, product=BF16), BF16, True),
        (RMSNorm(1e-6, normalized=BF16), BF16, False),
        (GatedActivation(product=BF16), BF16, True),
        (GatedActivation(), BF16, False),
    ],
    ids=str,
)
def test_what_amax_is_taken_of_decides(prologue, dtype, replaced):
    spec = FusedSpec(prologue, RCEIL)
    assert (with_cheaper_scales(spec, dtype) != spec) == replaced


UNBOUNDED = {"clamp": None, "group": 128}


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
@pytest.mark.parametrize(
    "quantizer",
    [
        Quantizer.dynamic(**UNBOUNDED),
        Quantizer.dynamic(**UNBOUNDED, amax_floor=1e-4, power_of_two=PowerOfTwo.CEIL),
        Quantizer.dynamic(torch.float8_e5m2, 57344.0, amax_floor=1e-30, **UNBOUNDED),
    ],
    ids=["e4m3", "power of two", "e5m2"],
)
def test_quotients_that_cannot_overflow_are_bounded(quantizer, dtype, device):
    bounded = cheaper(quantizer, dtype)
    assert bounded.clamp == torch.finfo(quantizer.code).max
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    for x in (bits.view(512, 128), bits.view(128, 512).t().contiguous().view(512, 128)):
        result = compare(
            reference(FusedSpec(NoPrologue(), bounded), x), reference(FusedSpec(NoPrologue(), quantizer), x)
        )
        assert result.equal, result


@pytest.mark.parametrize(
    "quantizer",
    [
        Quantizer.dynamic(divisor=470.0, **UNBOUNDED),
        Quantizer.dynamic(amax_ceiling=100.0, **UNBOUNDED),
        # A rounded scale may be less than amax over the divisor.
        Quantizer.dynamic(scale_dtype=BF16, divisor=463.0, **UNBOUNDED),
        Quantizer.dynamic(power_of_two=PowerOfTwo.FLOOR, **UNBOUNDED),
        # The least amaxes have scales of few bits, or none.
        Quantizer.dynamic(torch.float8_e5m2, 57344.0, **UNBOUNDED),
    ],
    ids=["divisor", "ceiling", "rounded scale", "power of two", "subnormal scale"],
)
def test_quotients_that_may_overflow_are_not(quantizer):
    assert cheaper(quantizer, BF16).clamp is None


def test_quotients_of_32_bits_are_not_bounded():
    assert cheaper(Quantizer.dynamic(**UNBOUNDED), F32).clamp is None


def int8(**choices):
    usual = {"divisor": 127.0, "clamp": 127.0, "amax_floor": 1e-7, "rounding": Rounding.NEAREST_EVEN}
    return Quantizer.dynamic(torch.int8, **{**usual, **choices})


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("rule", "floor"), [(QuotientRule.DIVIDE, None), *((rule, 1e-7) for rule in QuotientRule)])
def test_int8_codes_that_need_no_bounds(rule, floor, dtype, device):
    """Of every value, beside others of its size and of all sizes; beside zeros and numbers that are none, codes are zero."""
    spec = FusedSpec(NoPrologue(), int8(quotient_rule=rule, amax_floor=floor))
    assert int8_needs_no_bounds(spec, dtype)
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    for x in (bits.view(512, 128), bits.view(128, 512).t().contiguous().view(512, 128)):
        result = compare(launch(spec, x), reference(spec, x))
        assert result.equal, result


@pytest.mark.parametrize(
    ("quantizer", "dtype"),
    [
        (int8(divisor=128.0), BF16),
        (int8(clamp=126.0), BF16),
        (int8(clamp_low=0.0), BF16),
        # A bounded scale is finite where the amax is not.
        (int8(amax_ceiling=1e38), BF16),
        # Subnormal amaxes have no finite reciprocal.
        (int8(quotient_rule=QuotientRule.RECIPROCAL, amax_floor=None), BF16),
        (int8(scale_dtype=BF16, divisor=127.5), BF16),
        (int8(rounding=Rounding.CAST), BF16),
        (Quantizer.static(torch.int8, clamp=127.0, rounding=Rounding.NEAREST_EVEN), BF16),
        (int8(), F32),
    ],
    ids=["divisor", "bound", "lower bound", "ceiling", "no floor", "rounded scale", "truncated", "static", "f32"],
)
def test_int8_codes_that_may_need_bounds(quantizer, dtype):
    assert not int8_needs_no_bounds(FusedSpec(NoPrologue(), quantizer), dtype)


@pytest.mark.parametrize(
    ("dtype", "prologue", "taken"),
    [
        (BF16, NoPrologue(), True),
        (F32, NoPrologue(), False),
        (BF16, RMSNorm(1e-6, normalized=BF16, product=BF16), True),
        (BF16, RMSNorm(1e-6, product=F16), True),
        (BF16, RMSNorm(1e-6), False),
        (F16, GatedActivation(product=F16), True),
        (F16, GatedActivation(), False),
    ],
    ids=str,
)
def test_fp4_codes_of_pairs_are_of_values_in_16_bits(dtype, prologue, taken):
    spec = with_cheaper_scales(FusedSpec(prologue, mx_quantizer(FP4)), dtype)
    assert quantizes_fp4_pairs(spec, dtype) == taken


@pytest.mark.parametrize("block", [2, 4, 6, 8, 10, 12, 16, 18, 24, 32])
def test_fp4_blocks_of_any_length(block, device):
    """Codes of pairs are stored by words of four, which not all blocks have."""
    spec = FusedSpec(NoPrologue(), mx_quantizer(FP4, block=block))
    assert quantizes_fp4_pairs(with_cheaper_scales(spec, BF16), BF16) == (block % 4 == 0 and block >= 8)
    x = torch.randn(3, 5 * block, device=device).to(BF16)
    result = compare(launch(spec, x), reference(spec, x))
    assert result.equal, result
