"""Every kernel against the reference, and the reference against eager code: codes and scales bit for bit."""

import dataclasses
import functools
import itertools
import math

import pytest
import torch
import triton
import triton.language as tl
from fusion_pass.kernels import arithmetic, launch_table
from fusion_pass.kernels import launch as launching
from fusion_pass.kernels.launch import configure, launch, rows_of
from fusion_pass.kernels.reference import reference

from fusion_pass import ops
from fusion_pass.mx_specs import mx_quantizer
from fusion_pass.specs import (
    Activation,
    FusedSpec,
    GatedActivation,
    Mean,
    NoPrologue,
    PowerOfTwo,
    Quantizer,
    QuotientRule,
    RMSNorm,
    Root,
    Rounding,
    ScaleLayout,
    ScaleRule,
    Weight,
)
from fusion_pass.terms import parse
from fusion_pass.testing import compare

import spelled

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
SHAPES = [(1, 256), (7, 640), (2, 5, 384)]


def native(device):
    """The scale rule and mean of eager code on the device."""
    return (ScaleRule.DIVIDE, Mean.DIVIDE) if device == "cpu" else (ScaleRule.RECIPROCAL, Mean.RECIPROCAL)


def prologues(device, dtype):
    mean = native(device)[1]
    return {
        "none": NoPrologue(),
        "norm": RMSNorm(1e-6, mean=mean, normalized=dtype, product=dtype),
        "weightless": RMSNorm(1e-5, weight=Weight.NONE, mean=mean, product=dtype),
        "unrounded norm": RMSNorm(1e-6, mean=mean),
        "add norm": RMSNorm(1e-6, mean=mean, normalized=dtype, product=dtype, residual_sum=dtype),
        "add norm, sum unrounded": RMSNorm(1e-6, mean=mean, product=dtype, residual_sum=F32),
        "one plus weight": RMSNorm(1e-6, weight=Weight.ONE_PLUS, mean=mean, product=dtype),
        "one plus weight, rounded": RMSNorm(
            1e-6, Weight.ONE_PLUS, mean, normalized=dtype, product=dtype, shifted=dtype
        ),
        "one plus weight, both rounded late": RMSNorm(1e-6, Weight.ONE_PLUS, mean, product=dtype, shifted=dtype),
        "1 / sqrt": RMSNorm(1e-6, mean=mean, product=dtype, root=Root.RECIPROCAL_SQRT),
        "rounded root": RMSNorm(1e-6, mean=mean, product=dtype, root_rounding=dtype),
        "gated": RMSNorm(1e-6, mean=mean, normalized=dtype, product=dtype, gate=Activation.SILU, gated=dtype),
        "x / sqrt": RMSNorm(1e-6, mean=Mean.SCALAR, normalized=dtype, product=dtype, root=Root.DIVIDE_SQRT),
        "silu": GatedActivation(activated=dtype, product=dtype),
        "unrounded silu": GatedActivation(),
        "silu by sigmoid": GatedActivation(Activation.SIGMOID_PRODUCT, dtype, dtype, inner=dtype),
        "gelu alone": GatedActivation(Activation.GELU_TANH, product=dtype, gated=False),
        "sigmoid": GatedActivation(Activation.SIGMOID, dtype, dtype),
        "gelu": GatedActivation(Activation.GELU, dtype, dtype),
        "gelu tanh": GatedActivation(Activation.GELU_TANH, dtype, dtype),
        "clamped swiglu": GatedActivation(
            Activation.SIGMOID_PRODUCT, dtype, dtype, inner=dtype, alpha=1.702, limit=7.0, offset=1.0
        ),
    }


def check(spec, shape, dtype, device):
    exact = isinstance(spec.prologue, RMSNorm)
    make = (lambda: spelled.exact_rows(*shape, device=device, dtype=dtype)) if exact else None
    x, other = (make() if make else torch.randn(shape, device=device).to(dtype) for _ in range(2))
    weight = torch.randn(shape[-1], device=device).to(dtype)
    if isinstance(spec.prologue, GatedActivation) and not spec.prologue.gated:
        other = None
    if isinstance(spec.prologue, NoPrologue) or (
        exact and spec.prologue.residual_sum is None and spec.prologue.gate is None
    ):
        other = None
    if not exact or spec.prologue.weight is Weight.NONE:
        weight = None
    given = torch.tensor([1.25], device=device) if spec.quantizer.needs_given else None
    result = compare(launch(spec, x, other, weight, given), reference(spec, x, other, weight, given))
    assert result.equal, f"{spec}: {result}"


@pytest.mark.parametrize("prologue", prologues("cpu", BF16))
@pytest.mark.parametrize("group", [None, 32, 128])
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_kernels_equal_the_reference(prologue, group, dtype, device):
    quantizer = Quantizer.dynamic(group=group, amax_floor=1e-10, scale_rule=native(device)[0])
    layouts = [ScaleLayout.ROW] if group is None else [ScaleLayout.ROW, ScaleLayout.COLUMN]
    for layout, shape in itertools.product(layouts, SHAPES):
        check(FusedSpec(prologues(device, dtype)[prologue], quantizer, layout), shape, dtype, device)


@pytest.mark.parametrize(
    "quantizer",
    [
        Quantizer.dynamic(group=128, scale_rule=ScaleRule.DIVIDE),
        Quantizer.dynamic(group=128, scale_rule=ScaleRule.RECIPROCAL),
        Quantizer.dynamic(group=64, quotient_rule=QuotientRule.RECIPROCAL),
        Quantizer.dynamic(group=96, amax_floor=1e-4),
        Quantizer.dynamic(scale_floor=1 / (448 * 512)),
        Quantizer.dynamic(scale_dtype=BF16),
        Quantizer.dynamic(code=torch.float8_e5m2, divisor=57344.0, clamp=57344.0, group=32),
        Quantizer.dynamic(divisor=100.0, clamp=37.5),
        Quantizer.dynamic(group=128, amax_floor=1e-10, power_of_two=PowerOfTwo.CEIL),
        Quantizer.dynamic(
            amax_floor=1e-10, power_of_two=PowerOfTwo.CEIL, scale_floor=1e-6, quotient_rule=QuotientRule.RECIPROCAL
        ),
        Quantizer.dynamic(code=torch.int8, divisor=127.0, clamp=127.0, amax_floor=1e-10),
        Quantizer.dynamic(
            code=torch.int8, divisor=127.0, clamp=127.0, group=32, rounding=Rounding.NEAREST_EVEN, amax_floor=1e-5
        ),
        Quantizer.dynamic(
            code=torch.int8,
            divisor=127.5,
            scale_dtype=BF16,
            scale_floor=2.0**-23,
            quotient_rule=QuotientRule.RECIPROCAL,
            rounding=Rounding.NEAREST_EVEN,
            clamp=127.0,
            clamp_low=-128.0,
        ),
        Quantizer.dynamic(divisor=2000.0, clamp=None, group=64),
        Quantizer.dynamic(torch.float8_e4m3fnuz, 240.0, 64, clamp=240.0),
        Quantizer.dynamic(torch.float8_e4m3fnuz, 224.0, clamp=224.0, amax_floor=1e-10),
        Quantizer.dynamic(torch.float8_e4m3fnuz, 300.0, clamp=None),
        Quantizer.dynamic(group=64, amax_floor=1e-4, amax_ceiling=1.5, scale_rule=ScaleRule.DIVIDE),
        Quantizer.dynamic(group=64, amax_floor=1e-4, power_of_two=PowerOfTwo.CEIL_BITS),
        Quantizer.dynamic(zero_scale=1.0, scale_dtype=BF16),
        Quantizer.dynamic(amax_floor=1e-12, scale_rule=ScaleRule.MULTIPLIER, quotient_rule=QuotientRule.MULTIPLIER),
        Quantizer.dynamic(
            amax_floor=1e-12,
            scale_rule=ScaleRule.INVERSE_MULTIPLIER,
            quotient_rule=QuotientRule.MULTIPLIER,
            power_of_two=PowerOfTwo.FLOOR,
        ),
        Quantizer.dynamic(torch.int8, 127.0, clamp=127.0, quotient_rule=QuotientRule.MULTIPLIER),
        Quantizer.dynamic(amax_floor=1e-10, per_tensor=True),
        Quantizer.dynamic(scale_floor=1e-5, per_tensor=True, quotient_rule=QuotientRule.RECIPROCAL),
        Quantizer.static(),
        dataclasses.replace(Quantizer.dynamic(group=64), adds_zero=True, quotient=BF16),
        Quantizer.static(quotient_rule=QuotientRule.DIVIDE),
        Quantizer.static(torch.int8, clamp=127.0, rounding=Rounding.NEAREST_EVEN),
        # torchao's float64 detour, and a bound that is a tensor.
        dataclasses.replace(
            Quantizer.dynamic(quotient_rule=QuotientRule.RECIPROCAL),
            factor=parse("f32((reciprocal(max(f64(amax), 1e-12)) * 448.0))"),
            scale=parse("reciprocal(f32((reciprocal(max(f64(amax), 1e-12)) * 448.0)))"),
        ),
        dataclasses.replace(Quantizer.dynamic(), factor=parse("(min(amax, given) / 448.0)"), scale=None),
        # The exponent as a byte, as MX formats store it.
        dataclasses.replace(
            Quantizer.dynamic(group=32),
            factor=parse("from_bits(shl(max((bit_and(shr(bits(amax), 23), 255) - 8), 1), 23))"),
            scale=parse("u8(max((bit_and(shr(bits(amax), 23), 255) - 8), 1))"),
            scale_dtype=torch.uint8,
        ),
        Quantizer.dynamic(divisor=2000.0, clamp=1000.0),
        Quantizer.dynamic(code=torch.float8_e5m2, divisor=200000.0, clamp=None),
    ],
)
def test_quantizer_fields(quantizer, device):
    check(FusedSpec(NoPrologue(), quantizer), (5, 384), BF16, device)
    check(FusedSpec(GatedActivation(activated=BF16, product=BF16), quantizer), (5, 384), BF16, device)
    norm = RMSNorm(1e-6, mean=native(device)[1], normalized=BF16, product=BF16)
    check(FusedSpec(norm, quantizer, value_output=BF16), (2, 3, 384), BF16, device)


BYTES = dataclasses.replace(
    Quantizer.dynamic(group=32, amax_floor=1e-10, power_of_two=PowerOfTwo.CEIL_BITS),
    scale=parse("u8(shr(bits((max(amax, 1e-10) / 448.0)), 23))"),
    scale_dtype=torch.uint8,
)


@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize("shape", [(1, 32), (5, 160), (7, 96), (3, 13, 288), (2, 129, 64)], ids=str)
@pytest.mark.parametrize("quantizer", [Quantizer.dynamic(group=32, amax_floor=1e-10), BYTES], ids=["f32", "bytes"])
def test_layouts(layout, shape, quantizer, device):
    if layout is ScaleLayout.PACKED and quantizer is not BYTES:
        return
    check(FusedSpec(NoPrologue(), quantizer, layout), shape, BF16, device)


@pytest.mark.parametrize(
    ("quantizer", "layout"),
    [
        *((Quantizer.dynamic(group=128), layout) for layout in ScaleLayout if layout is not ScaleLayout.PACKED),
        (Quantizer.dynamic(group=48), ScaleLayout.ROW),
        (BYTES, ScaleLayout.ROW),
        (BYTES, ScaleLayout.BLOCKED),
        (dataclasses.replace(BYTES, group=128), ScaleLayout.PACKED),
        (Quantizer.static(), ScaleLayout.ROW),
    ],
    ids=lambda given: given.value if isinstance(given, ScaleLayout) else str(given.group),
)
@pytest.mark.parametrize("prologue", ["none", "silu"])
def test_tiles_of_many_rows(prologue, quantizer, layout, monkeypatch, device):
    """Of a row, of a part of one and of rows that leave lanes idle, in the configurations for thousands of them."""
    monkeypatch.setattr(launch_table, "_amount", lambda *_: launch_table.Amount.MANY)
    spec = FusedSpec(prologues(device, BF16)[prologue], quantizer, layout)
    shapes = [(2, 3072), (1, 10560)] if quantizer.group == 48 else [(3, 4096), (2, 3072), (2, 7168), (1, 14336)]
    configs = [configure(spec, row) for _, row in shapes]
    largest = 8192 if prologue == "none" else 1024 if layout is ScaleLayout.PACKED else 4096
    assert max(config.groups * config.lanes for config in configs) == largest
    for shape in shapes:
        check(spec, shape, BF16, device)


@pytest.mark.parametrize(
    "amount", [launch_table.Amount.UNKNOWN, launch_table.Amount.MANY], ids=lambda amount: amount.value
)
@pytest.mark.parametrize("prologue", ["norm", "one plus weight", "add norm"])
@pytest.mark.parametrize(
    "quantizer",
    [Quantizer.dynamic(amax_floor=1e-10), Quantizer.dynamic(group=128), BYTES, mx_quantizer(torch.float4_e2m1fn_x2)],
    ids=["token", "group", "bytes", "fp4"],
)
def test_norms_of_many_rows(quantizer, prologue, amount, monkeypatch, device):
    """Of each length that the table tells apart, in the configurations for hundreds or thousands of rows."""
    monkeypatch.setattr(launch_table, "_amount", lambda *_: amount)
    monkeypatch.setattr(launch_table, "_parts", lambda *_: 1)
    spec = FusedSpec(prologues(device, BF16)[prologue], quantizer)
    for row in (1536, 2048, 2944, 3584, 4096, 5120, 7168, 8192, 14336, 16384):
        check(spec, (2, row), BF16, device)


def replace_fields(monkeypatch, **fields):
    """Launch in the configurations of the table, but for these fields."""
    chosen = launching.configure
    monkeypatch.setattr(launching, "configure", lambda *a, **k: dataclasses.replace(chosen(*a, **k), **fields))


@pytest.mark.parametrize(
    ("quantizer", "layout"),
    [
        (quantizer, layout)
        for quantizer in (Quantizer.dynamic(group=16), BYTES, mx_quantizer(torch.float4_e2m1fn_x2))
        for layout in ScaleLayout
        if layout is not ScaleLayout.PACKED or quantizer.scale_dtype is torch.uint8
    ],
)
def test_scales_stored_from_their_groups(quantizer, layout, monkeypatch, device):
    """Of one group and of several, of rows that leave lanes idle or share a program, and of parts of rows."""
    replace_fields(monkeypatch, own_scales=True)
    for prologue, shape in itertools.product(["none", "norm", "silu"], [(1, 32), (2, 4096), (2, 35, 96), (130, 160)]):
        check(FusedSpec(prologues(device, BF16)[prologue], quantizer, layout), shape, BF16, device)


@pytest.mark.parametrize("prologue", ["add norm", "add norm, sum unrounded", "norm", "silu"])
def test_further_outputs(prologue, device):
    spec = FusedSpec(
        prologues(device, BF16)[prologue],
        Quantizer.dynamic(group=128),
        ScaleLayout.COLUMN,
        sum_output=BF16 if "add" in prologue else None,
        value_output=BF16,
    )
    check(spec, (3, 4, 256), BF16, device)


SPECIAL = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-38, -1e-40, 3e38, 448.0, 1e-45]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("floor", [None, 1e-10])
@pytest.mark.parametrize("group", [None, 32])
def test_special_values(dtype, floor, group, device):
    x = torch.randn(len(SPECIAL) + 2, 256, device=device)
    for row, value in enumerate(SPECIAL):
        x[row, row::16] = value
    x[-1] = 0
    x[-2] = -0.0
    x = x.to(dtype)
    for quotient in (QuotientRule.DIVIDE, QuotientRule.RECIPROCAL):
        quantizer = Quantizer.dynamic(
            group=group, amax_floor=floor, quotient_rule=quotient, scale_rule=native(device)[0]
        )
        spec = FusedSpec(NoPrologue(), quantizer)
        result = compare(launch(spec, x, None, None), reference(spec, x, None, None))
        assert result.equal, f"{spec}: {result}"


@pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2], ids=str)
def test_an_unclamped_cast_overflows_as_eager_code_does(code, device):
    """Scale 1, so that the values are the quotients: every rounding boundary near the largest code, and far beyond it."""
    largest = {torch.float8_e4m3fn: 464.0, torch.float8_e4m3fnuz: 248.0, torch.float8_e5m2: 61440.0}[code]
    near = torch.tensor(largest, device=device).view(torch.int32) + torch.arange(-60, 60, device=device)
    x = torch.zeros(2, 128, device=device)
    x[0, :120], x[1, :120] = near.to(torch.int32).view(F32), -near.to(torch.int32).view(F32)
    x[:, -1] = 2.0**20
    quantizer = Quantizer.dynamic(code=code, divisor=2.0**20, clamp=None)
    result = launch(FusedSpec(NoPrologue(), quantizer), x, None, None)
    assert compare(result, [x.to(code), torch.ones(2, 1, device=device)]).equal


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
@pytest.mark.parametrize(("low", "high"), [(-127.0, 127.0), (-128.0, 127.0), (-7.0, 8.0), (-7.5, 7.5), (0.0, 127.0)])
def test_int8_codes_next_to_every_tie_and_of_no_number(low, high, device):
    """A scale of 1, so that the values are the quotients."""
    ties = torch.arange(-131, 131, 0.5, device=device)
    near = [ties, torch.nextafter(ties, ties + 1), torch.nextafter(ties, ties - 1), -ties * 2.0**30, ties * 2.0**-30]
    odd = torch.tensor([float("nan"), -float("nan"), float("inf"), -float("inf")], device=device)
    x = torch.cat([*near, odd, torch.zeros(-(5 * len(ties) + 4) % 128, device=device)]).reshape(-1, 128)
    quantizer = Quantizer.static(torch.int8, clamp=high, clamp_low=low, rounding=Rounding.NEAREST_EVEN)
    spec, one = FusedSpec(NoPrologue(), quantizer), torch.ones(1, device=device)
    wanted = x.round().clamp(low, high).to(torch.int8)
    assert compare(launch(spec, x, given=one), [wanted]).equal
    assert compare(reference(spec, x, given=one), [wanted]).equal


@pytest.mark.parametrize("eps", [0.0, 1e-40])
def test_norms_of_subnormal_means(eps, device):
    """x² is a subnormal or the least normal number, and its sum over few values exact."""
    x = torch.zeros(6, 256, device=device)
    x[torch.arange(6), torch.arange(6) * 31] = 2.0 ** torch.arange(-70, -58, 2, device=device)
    spec = FusedSpec(RMSNorm(eps, weight=Weight.NONE, mean=native(device)[1]), Quantizer.dynamic(), value_output=F32)
    result = compare(launch(spec, x, None, None), reference(spec, x, None, None))
    assert result.equal, result


def test_the_corrected_quotient_is_the_correctly_rounded_one(device):
    """Random bit patterns of values and scales, every exponent: the codes' inputs, not only their roundings, must agree."""
    bits = torch.randint(-(2**31), 2**31 - 1, (512, 1024), device=device, dtype=torch.int64).to(torch.int32)
    x = bits.view(F32)
    x = torch.where(x.isfinite(), x, 1.0)
    spec = FusedSpec(NoPrologue(), Quantizer.dynamic(group=32, scale_rule=native(device)[0]))
    assert compare(launch(spec, x, None, None), reference(spec, x, None, None)).equal


@triton.jit
def reciprocals(s_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    s = tl.load(s_ptr + at)
    tl.store(out_ptr + at, arithmetic.reciprocal(s, s))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="approximate instructions are the GPU's")
def test_every_reciprocal_is_correctly_rounded():
    mantissas = torch.arange(1 << 23, device="cuda", dtype=torch.int32)
    for exponent in range(-80, 126):
        s = (mantissas | (exponent + 127) << 23).view(F32)
        found = torch.empty_like(s)
        reciprocals[(s.numel() // 1024,)](s, found, 1024)
        assert torch.equal(found, s.reciprocal()), exponent


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "alone"])
@pytest.mark.filterwarnings("ignore:invalid value")  # infinite gates times zero
@pytest.mark.parametrize("activation", Activation, ids=lambda activation: activation.value)
def test_an_activation_of_every_16_bit_value(activation, gated, dtype, device):
    every = torch.arange(65536, device=device).to(torch.int32).to(torch.uint16).view(dtype)
    gate = every.reshape(512, 128)
    prologue = GatedActivation(activation, activated=dtype, product=dtype, inner=dtype, gated=gated)
    spec = FusedSpec(prologue, Quantizer.dynamic(group=32), value_output=dtype)
    up = torch.ones_like(gate) if gated else None
    result = compare(launch(spec, gate, up, None), reference(spec, gate, up, None))
    assert result.equal, result


@triton.jit
def activations(x_ptr, out_ptr, NAME: tl.constexpr, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = tl.load(x_ptr + at)
    if NAME == "silu":
        y = arithmetic.silu(x, None)
    elif NAME == "sigmoid":
        y = arithmetic.sigmoid(x, None)
    elif NAME == "gelu":
        y = arithmetic.gelu(x, None)
    else:
        y = arithmetic.gelu_tanh(x, None)
    tl.store(out_ptr + at, y)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="quotients and functions are the GPU's")
@pytest.mark.parametrize("name", ["silu", "sigmoid", "gelu", "gelu_tanh"])
def test_an_activation_of_every_f32_value(name):
    gelu = torch.nn.functional.gelu
    tanh = functools.partial(gelu, approximate="tanh")
    eager = {"silu": torch.nn.functional.silu, "sigmoid": torch.sigmoid, "gelu": gelu, "gelu_tanh": tanh}
    low = torch.arange(1 << 26, device="cuda", dtype=torch.int32)
    for high in range(64):
        x = (low | high - 32 << 26).view(F32)
        found, wanted = torch.empty_like(x), eager[name](x)
        activations[(x.numel() // 1024,)](x, found, name, 1024)
        wrong = (found.view(torch.int32) != wanted.view(torch.int32)) & ~(found.isnan() & wanted.isnan())
        assert not wrong.any(), (name, int(wrong.sum()), x[wrong][:5], found[wrong][:5], wanted[wrong][:5])


def test_a_bound_that_is_no_value_of_the_gate(device):
    gate = torch.full((2, 128), 8.0, dtype=BF16, device=device)
    prologue = GatedActivation(activated=BF16, product=BF16, limit=0.7 + 2**-12, gated=False)
    spec = FusedSpec(prologue, Quantizer.dynamic(group=32), value_output=BF16)
    assert compare(launch(spec, gate), reference(spec, gate)).equal


def test_reference_is_eager_code(device):
    x, r = (spelled.exact_rows(3, 4, 256, device=device) for _ in range(2))
    w = torch.randn(256, device=device).to(BF16)
    rule, mean = native(device)
    norm = RMSNorm(1e-6, mean=mean, normalized=BF16, product=BF16, residual_sum=BF16)
    group = Quantizer.dynamic(group=128, amax_floor=1e-10, scale_rule=rule)
    spec = FusedSpec(norm, group, ScaleLayout.COLUMN, sum_output=BF16)
    expected = [*spelled.column(*spelled.per_group(spelled.rms_norm(x + r, w))), x + r]
    assert compare(reference(spec, x, r, w), expected).equal
    spec = FusedSpec(
        GatedActivation(activated=BF16, product=BF16), Quantizer.dynamic(amax_floor=1e-10, scale_rule=rule)
    )
    assert compare(reference(spec, x, r, None), list(spelled.per_token(spelled.silu_mul(x, r)))).equal


def test_random_norms_stay_in_budget(device):
    """The order of the sum of squares may differ: at most 0.1 % of the codes, by one code, and a scale by one ulp of bf16."""
    x, w = torch.randn(64, 1024, device=device).to(BF16), torch.randn(1024, device=device).to(BF16)
    rule, mean = native(device)
    spec = FusedSpec(RMSNorm(1e-6, mean=mean, normalized=BF16, product=BF16), Quantizer.dynamic(scale_rule=rule))
    (codes, scale), (wanted, wanted_scale) = launch(spec, x, None, w), reference(spec, x, None, w)
    different = compare(codes, wanted)
    assert different.different <= 1e-3 * different.elements, different
    assert ((scale.view(torch.int32) - wanted_scale.view(torch.int32)).abs() <= 2**16).all()


def test_strided_halves_are_not_copied(device):
    both = torch.randn(6, 512, device=device).to(BF16)
    gate, up = both.chunk(2, -1)
    expected = ops.silu_mul_quant_fp8(gate.contiguous(), up.contiguous(), group=64)
    assert compare(tuple(ops.silu_mul_quant_fp8(gate, up, group=64)), tuple(expected)).equal
    transposed = torch.randn(256, 6, device=device).to(BF16).t()
    assert compare(tuple(ops.quant_fp8(transposed)), tuple(ops.quant_fp8(transposed.contiguous()))).equal


@pytest.mark.parametrize(
    ("view", "copied"),
    [
        (lambda x: x.unsqueeze(0).transpose(0, 1), False),  # counts as contiguous, though dim 1 has a stride of its own
        (lambda x: x.unflatten(0, (4, 6))[:, -1:], False),
        (lambda x: x.unflatten(0, (1, 24))[:, :, :64], False),
        (lambda x: x.as_strided((1, 24, 128), (7, 128, 1)), False),
        (lambda x: x[0].expand(5, -1), False),
        (lambda x: x[0], False),
        (lambda x: x.unflatten(0, (4, 6))[:, :4], True),
        (lambda x: x.unflatten(0, (4, 6)).transpose(0, 1), True),
        (lambda x: x[:, ::2], True),
    ],
)
def test_rows_are_read_where_they_lie(view, copied, device):
    x = view(torch.randn(24, 128, device=device))
    spec = FusedSpec(NoPrologue(), Quantizer.dynamic(group=32))
    assert (rows_of(x)[0] is not x) is copied
    assert compare(
        launch(spec, x, None, None), reference(spec, x.clone(memory_format=torch.contiguous_format), None, None)
    ).equal


def test_no_rows(device):
    codes, scale = ops.quant_fp8(torch.empty(0, 256, device=device, dtype=BF16), group=128)
    assert codes.shape == (0, 256)
    assert scale.shape == (0, 2)


@pytest.mark.parametrize("prologue", [NoPrologue(), RMSNorm(1e-6, weight=Weight.NONE)])
def test_no_rows_by_a_scale_of_the_whole_tensor(prologue, device):
    """A calibrated scale is no matter; an amax of nothing is zero."""
    op = ops.OPS[type(prologue)]
    x, given = torch.empty(0, 256, device=device), torch.tensor([0.1], device=device)
    operands = (x,) if isinstance(prologue, NoPrologue) else (x, None, None)
    (codes,) = op(*operands, given, FusedSpec(prologue, Quantizer.static()).encode())
    assert (codes.shape, codes.dtype) == ((0, 256), torch.float8_e4m3fn)
    codes, scale = op(*operands, None, FusedSpec(prologue, Quantizer.dynamic(per_tensor=True)).encode())
    assert codes.shape == (0, 256)
    assert scale.tolist() == [0.0]


def test_a_launch_is_chosen_once():
    spec = FusedSpec(RMSNorm(1e-6), Quantizer.dynamic())
    assert configure(spec, 4096) is configure(spec, 4096)
    assert configure(spec, 4096, 3) is configure(spec, 4096, 5)
    assert configure(spec, 5120).groups * configure(spec, 5120).lanes >= 5120


@pytest.mark.parametrize("quantizer", [Quantizer.dynamic(), Quantizer.dynamic(group=128), Quantizer.dynamic(group=32)])
@pytest.mark.parametrize("prologue", [RMSNorm(1e-6), RMSNorm(1e-6, residual_sum=BF16), NoPrologue(), GatedActivation()])
def test_parts_cover_rows(prologue, quantizer):
    """Whatever the table says: no part without groups, all of them together a row, and no more of it than registers hold."""
    for row, rows in itertools.product([256, 1024, 2048, 2944, 4096, 7168, 16384, 65536], [1, 8, 16, 32, 64, 100]):
        config = configure(FusedSpec(prologue, quantizer), row, rows)
        if config.parts > 1:
            assert config.parts * config.groups * config.lanes == triton.next_power_of_2(row)
            assert config.parts * config.groups * config.lanes <= 64 * 32 * config.warps
            assert config.parts * rows <= 2 * 132


SHARED = {
    "token": Quantizer.dynamic(amax_floor=1e-10),
    "int8": Quantizer.dynamic(
        code=torch.int8, divisor=127.0, clamp=127.0, amax_floor=1e-10, rounding=Rounding.NEAREST_EVEN
    ),
    "group": Quantizer.dynamic(group=64, amax_floor=1e-10),
    "static": Quantizer.static(),
}


@pytest.mark.parametrize("quantizer", SHARED)
@pytest.mark.parametrize("prologue", prologues("cpu", BF16))
def test_rows_that_programs_share(prologue, quantizer, device):
    """Rows that fill their parts, that leave one part with less and others with nothing, and of more than one matrix."""
    spec = FusedSpec(prologues(device, BF16)[prologue], SHARED[quantizer])
    whole = isinstance(spec.prologue, RMSNorm) or quantizer in ("token", "int8")
    for shape, dtype in (((2, 4096), BF16), ((1, 3, 4160), F16), ((1, 5184), F32)):
        assert (configure(spec, shape[-1], math.prod(shape[:-1])).parts > 1) == whole
        if whole:
            check(spec, shape, dtype, device)


@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize("quantizer", [SHARED["group"], BYTES], ids=["f32", "bytes"])
def test_outputs_of_rows_that_programs_share(layout, quantizer, device):
    if layout is ScaleLayout.PACKED and quantizer is not BYTES:
        return
    prologue = prologues(device, BF16)["add norm"]
    for shape in ((3, 2048), (2, 5, 2112)):
        check(FusedSpec(prologue, quantizer, layout, sum_output=BF16, value_output=BF16), shape, BF16, device)


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_values_that_wait_in_16_bits(dtype, monkeypatch, device):
    """Also of rows that share a program, and where the weight is in float32."""
    replace_fields(monkeypatch, narrow=True, late_weight=False)
    for prologue, shape in itertools.product(["norm", "add norm", "one plus weight"], [(1, 4096), (3, 384), (13, 208)]):
        for quantizer in (Quantizer.dynamic(amax_floor=1e-10), Quantizer.dynamic(group=16, amax_floor=1e-10)):
            check(FusedSpec(prologues(device, BF16)[prologue], quantizer), shape, dtype, device)


@pytest.mark.parametrize("row", [384, 2112, 4096])
def test_weights_read_first_and_means_without_calls(row, monkeypatch, device):
    """Also of rows that programs share, in two launches, and where there is no weight or mean of ATen's."""
    replace_fields(monkeypatch, first_weight=True, inline_mean=True, late_weight=False)
    quantizers = [Quantizer.dynamic(per_tensor=True), Quantizer.dynamic(group=32), SHARED["token"], SHARED["static"]]
    for prologue, quantizer in itertools.product(["norm", "weightless", "add norm", "x / sqrt"], quantizers):
        for rows in (1, 3, 67):
            check(FusedSpec(prologues(device, BF16)[prologue], quantizer), (rows, row), BF16, device)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: ops.quant_fp8(x, group=100), "group length 100"),
        (lambda x: ops.quant_fp8(x.to(torch.int8)), "x is torch.int8"),
        (lambda x: ops.rms_norm_quant_fp8(x, x[0, :5], 1e-6), "weight has shape"),
        (lambda x: ops.silu_mul_quant_fp8(x, x[:1]), "up has shape"),
        (lambda x: ops.quant_fp8(x[0], group=64, column_scales=True), "x has shape"),
    ],
)
def test_bad_input_is_named(call, named, device):
    with pytest.raises(ValueError, match=named):
        call(torch.randn(4, 256, device=device))


@pytest.mark.parametrize(
    ("op", "prologue", "others", "named"),
    [
        ("rms_norm_quant", RMSNorm(1e-6, residual_sum=BF16), ["weight"], "residual is None"),
        ("rms_norm_quant", RMSNorm(1e-6), ["x", "weight"], "residual is a tensor"),
        ("rms_norm_quant", RMSNorm(1e-6), [], "weight is None"),
        ("rms_norm_quant", RMSNorm(1e-6, weight=Weight.NONE), ["weight"], "weight is a tensor"),
        ("rms_norm_quant", GatedActivation(), [], "spec has prologue GatedActivation"),
        ("quant", RMSNorm(1e-6), [], "spec has prologue RMSNorm"),
    ],
)
def test_operands_are_those_of_the_spec(op, prologue, others, named, device):
    x = torch.randn(4, 256, device=device)
    text = FusedSpec(prologue, Quantizer.dynamic()).encode()
    norm = [x if "x" in others else None, x[0] if "weight" in others else None]
    with pytest.raises(ValueError, match=named):
        getattr(torch.ops.fusion_pass, op)(x, *(norm if op == "rms_norm_quant" else []), None, text)
