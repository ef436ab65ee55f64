"""MX and NVFP4 blocks: kernels against the reference, the reference against exact arithmetic and torchao, byte for byte."""

import dataclasses
import itertools
import random

import pytest
import torch
from fusion_pass.kernels import launch as launching
from fusion_pass.kernels.launch import launch
from fusion_pass.kernels.reference import reference

from fusion_pass.e2m1 import e2m1_codes
from fusion_pass.mx_specs import GlobalScale, Multiplier, ScaleMode, mx_quantizer, nvfp4_quantizer
from fusion_pass.specs import (
    E2M1,
    FusedSpec,
    GatedActivation,
    NoPrologue,
    RMSNorm,
    ScaleLayout,
    Sign,
    SpecError,
    Ties,
    Weight,
    decode,
)
from fusion_pass.testing import compare

import spelled

FP4, E4M3, E5M2 = torch.float4_e2m1fn_x2, torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {FP4: 6.0, E4M3: 448.0, E5M2: 57344.0}
CODES = pytest.mark.parametrize("code", [FP4, E4M3, E5M2], ids=["e2m1", "e4m3fn", "e5m2"])
MODES = pytest.mark.parametrize("mode", list(ScaleMode), ids=lambda mode: mode.value)
INF, NAN = float("inf"), float("nan")
# TransformerEngine pull request 422.
TE = mx_quantizer(FP4, ScaleMode.EVEN, e2m1=E2M1(Ties.AWAY, Sign.NEGATIVE, 0), zero_byte=127, infinity_byte=254)


def every_amax(device):
    """Every positive bfloat16: 32639 finite values, infinity and NaN; and zero. In the interpreter every 64th of them."""
    amax = torch.cat([torch.arange(1, 0x7F80), torch.tensor([0, 0x7F80, 0x7FC0])]).to(torch.int16).view(torch.bfloat16)
    return (amax if device != "cpu" else amax[random.randrange(64) :: 64]).to(device)


def blocks(amax, block=32):
    """A block for each amax, which its fifth value has; four to a row."""
    shares = torch.randn(amax.numel(), block, device=amax.device).clamp(-1, 1)
    x = torch.where(amax.isfinite(), amax, 1.0).float().unsqueeze(-1) * shares
    x[:, 5] = amax.float() * torch.where(torch.arange(amax.numel(), device=amax.device) % 3 == 0, -1, 1)
    # NaN has the sign that hardware gives it.
    x[:, 5] = torch.where(amax.isnan(), NAN, x[:, 5])
    whole = -(-x.shape[0] // 4) * 4
    return torch.nn.functional.pad(x, (0, 0, 0, whole - x.shape[0])).reshape(-1, 4 * block).to(torch.bfloat16)


def check(spec, x, other=None, weight=None, given=None):
    result = compare(launch(spec, x, other, weight, given), reference(spec, x, other, weight, given))
    assert result.equal, f"{spec}: {result}"


@CODES
@MODES
def test_every_amax_of_every_mode(code, mode, device):
    x = blocks(every_amax(device))
    for multiplier in Multiplier if device != "cpu" else [random.choice(list(Multiplier))]:
        check(FusedSpec(NoPrologue(), mx_quantizer(code, mode, multiplier=multiplier)), x)


@CODES
@MODES
def test_bytes_are_those_of_exact_arithmetic(code, mode):
    """The definition of each mode, in float64, where an exponent is exact."""
    amax = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    x = amax.repeat_interleave(32).reshape(-1, 32)
    byte = reference(FusedSpec(NoPrologue(), mx_quantizer(code, mode)), x)[1].flatten().int()
    exact, p = amax.double(), {FP4: 2, E4M3: 8, E5M2: 15}[code]
    # A subnormal has the exponent field of 2^-127.
    exponent = torch.frexp(exact)[1].clamp(min=-126) - 1
    if mode is ScaleMode.RCEIL:
        fraction, above = torch.frexp((amax.float() / torch.full((), LARGEST[code])).double())
        expected = above - (fraction == 0.5).int()
    else:
        steps = 2.0 ** {FP4: 1, E4M3: 3, E5M2: 2}[code]
        whole = torch.pow(2.0, exponent.double())
        if mode is ScaleMode.CEIL:
            # ... whose mantissa field is then not zero: the next power of two.
            exponent += ((exact != whole) & (exact > 2.0**-127)).int() | (exact < 2.0**-127).int()
        elif mode is ScaleMode.EVEN:
            carries = torch.where(
                exact < 2.0**-126, exact + 2.0**-127 / steps >= 2.0**-126, exact / whole + 0.5 / steps >= 2
            )
            exponent += carries.int()
        expected = exponent - p
    assert torch.equal(byte, (expected + 127).clamp(min=0))


@pytest.mark.parametrize("ties", Ties)
@pytest.mark.parametrize("sign", Sign)
def test_every_fp4_code_and_midpoint(ties, sign, device):
    """All codes and midpoints with their neighbours, both signs; a block scale of 1 leaves them as they are."""
    points = torch.tensor([0.0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 2.0**-140, 2.0**-126])
    near = (points.view(torch.int32)[:, None] + torch.arange(-2, 3, dtype=torch.int32)).clamp(min=0).view(torch.float32)
    values = torch.cat([near.flatten(), -near.flatten()]).clamp(-6, 6)
    x = torch.nn.functional.pad(values, (0, 256 - values.numel())).reshape(-1, 16)
    x = torch.cat([x, torch.full((16, 1), 6.0), torch.zeros(16, 15)], 1).to(device)
    check(FusedSpec(NoPrologue(), mx_quantizer(FP4, e2m1=E2M1(ties, sign, 5))), x)


@pytest.mark.parametrize("low", [None, -6.0, -2.0, 0.0])
def test_bounds_of_fp4_values(low, device):
    """Codes saturate at 6 by themselves, and at no other bound."""
    quantizer = dataclasses.replace(mx_quantizer(FP4), clamp=6.0, clamp_low=low)
    check(FusedSpec(NoPrologue(), quantizer), torch.randn(4, 64, device=device).to(torch.bfloat16))


def test_the_table_of_fp4_ties():
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    table = {
        Ties.EVEN: [0, 2, 2, 4, 4, 6, 6],
        Ties.AWAY: [1, 2, 3, 4, 5, 6, 7],
        Ties.TOWARD_ZERO: [0, 1, 2, 3, 4, 5, 6],
    }
    for ties, wanted in table.items():
        assert e2m1_codes(E2M1(ties), midpoints).tolist() == wanted
        assert e2m1_codes(E2M1(ties), -midpoints).tolist() == [code + 8 for code in wanted]
        assert e2m1_codes(E2M1(ties, Sign.NONZERO), -midpoints)[0] == (0 if ties is not Ties.AWAY else 9)
    zeros = torch.tensor([0.0, -0.0, -1e-3, NAN])
    assert e2m1_codes(E2M1(sign=Sign.KEPT, nan_code=3), zeros).tolist() == [0, 8, 8, 3]
    assert e2m1_codes(E2M1(sign=Sign.NEGATIVE, nan_code=3), zeros).tolist() == [0, 0, 8, 3]
    assert e2m1_codes(E2M1(sign=Sign.NONZERO, nan_code=3), zeros).tolist() == [0, 0, 0, 3]


def test_transformer_engine_blocks():
    """Worked by hand: zeros; a tie; an amax that the even mode rounds up."""
    x = torch.zeros(3, 32)
    x[1, :3] = torch.tensor([4.0, 0.25, -0.25])
    x[2, 0] = 7.0
    data, byte = reference(FusedSpec(NoPrologue(), TE), x)
    assert byte.flatten().tolist() == [127, 127, 128]
    assert data[0].eq(0).all()
    assert data[1, :2].tolist() == [6 | 1 << 4, 9]
    # 7 / 2 is a tie, away from zero 4.
    assert data[2, 0] == 6


@MODES
@pytest.mark.parametrize("code", [FP4, E4M3], ids=["e2m1", "e4m3fn"])
def test_torchao_agrees_byte_for_byte(code, mode):
    module = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    amax = torch.arange(0, 0x7F80, dtype=torch.int16).view(torch.bfloat16)
    # The last blocks' reciprocal scale is not representable in torchao 0.18, which divides.
    x = blocks(amax)
    scale, data = module.to_mx(x, code, 32, module.ScaleCalculationMode[mode.name])
    # RCEIL multiplies by a reciprocal, which is flushed for byte 0; the other modes divide.
    quantizer = mx_quantizer(code, mode, multiplier=Multiplier.DIVISION)
    ours, byte = reference(FusedSpec(NoPrologue(), quantizer), x)
    assert torch.equal(byte, scale.view(torch.uint8))
    per_block = byte.numel()
    same = ours.view(torch.uint8).reshape(per_block, -1) == data.view(torch.uint8).reshape(per_block, -1)
    comparable = byte.flatten() > 0 if mode is ScaleMode.RCEIL else byte.flatten() >= 0
    assert same[comparable].all()


@pytest.mark.parametrize("global_scale", GlobalScale)
@pytest.mark.parametrize("divides", [False, True])
def test_nvfp4(global_scale, divides, device):
    x = torch.cat([torch.randn(64, 64), torch.randn(8, 64) * 1e-3, torch.randn(8, 64) * 1e4, torch.zeros(1, 64)]).to(
        device
    )
    x[3, 2], x[4, 20], x[5, :16] = NAN, -INF, -0.0
    given = None if global_scale is GlobalScale.NONE else torch.tensor([0.37], device=device)
    for layout in (ScaleLayout.ROW, ScaleLayout.BLOCKED):
        check(FusedSpec(NoPrologue(), nvfp4_quantizer(global_scale, divides=divides), layout), x, given=given)


def test_nvfp4_by_a_quantization_scale():
    """vLLM's arithmetic, written out: a block's scale may be zero, and so are its values then."""
    x = torch.randn(16, 64) * torch.logspace(-8, 0, 16)[:, None]
    scale = torch.tensor(448.0 * 6.0) / x.abs().amax()
    blocks = x.unflatten(-1, (-1, 16))
    amax = blocks.abs().amax(-1, keepdim=True)
    stored = (scale * (amax * (torch.ones(()) / 6))).clamp(max=448.0).to(torch.float8_e4m3fn)
    factor = torch.where(stored.float() == 0, 0.0, (stored.float() * scale.reciprocal()).reciprocal())
    code = e2m1_codes(E2M1(), blocks * factor).flatten(-2)
    quantizer = nvfp4_quantizer(GlobalScale.QUANTIZATION)
    data, block_scale = reference(FusedSpec(NoPrologue(), quantizer), x, given=scale.reshape(1))
    assert torch.equal(block_scale.view(torch.uint8), stored.squeeze(-1).view(torch.uint8))
    assert (block_scale.float() == 0).any()
    assert torch.equal(data, code[:, ::2] | code[:, 1::2] << 4)


@pytest.mark.parametrize("global_scale", [False, True])
def test_torchao_nvfp4_agrees_byte_for_byte(global_scale):
    module = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = (torch.randn(64, 128) * torch.logspace(-6, 6, 64)[:, None]).to(torch.bfloat16)
    given = module.per_tensor_amax_to_scale(x.abs().amax()) if global_scale else None
    direction = GlobalScale.DEQUANTIZATION if global_scale else GlobalScale.NONE
    scale, data = module.nvfp4_quantize(x, 16, given)
    ours, block = reference(FusedSpec(NoPrologue(), nvfp4_quantizer(direction, divides=True)), x, given=given)
    assert torch.equal(block.view(torch.uint8), scale.reshape(block.shape).view(torch.uint8))
    assert torch.equal(ours, data.view(torch.uint8).reshape(ours.shape))


@pytest.mark.parametrize(
    "quantizer", [mx_quantizer(FP4), TE, mx_quantizer(E4M3), nvfp4_quantizer()], ids=["fp4", "te", "fp8", "nvfp4"]
)
@pytest.mark.parametrize("layout", [ScaleLayout.ROW, ScaleLayout.COLUMN, ScaleLayout.BLOCKED, ScaleLayout.SHUFFLED])
def test_prologues_and_layouts(quantizer, layout, device):
    norm = RMSNorm(1e-6, weight=Weight.NONE, residual_sum=torch.bfloat16, product=torch.bfloat16)
    # The longest are rows that programs share.
    for shape in [(1, 64), (2, 37, 416), (3, 2080)]:
        x, other = (spelled.exact_rows(*shape, device=device) for _ in range(2))
        check(FusedSpec(NoPrologue(), quantizer, layout), x)
        check(FusedSpec(norm, quantizer, layout, sum_output=torch.bfloat16), x, other)
        check(FusedSpec(GatedActivation(product=torch.bfloat16), quantizer, layout), x, other)


@pytest.mark.parametrize("quantizer", [mx_quantizer(FP4), mx_quantizer(FP4, block=16), TE], ids=["mx", "16", "te"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_threads_that_read_segments(quantizer, dtype, monkeypatch, device):
    """Of rows that fill their tiles and rows that do not, with a scale for a thread's values and for those of two."""
    chosen, reads_segments, seen, fields = launching.configure, launching._reads_segments, [], {}

    def configured(*arguments):
        config = chosen(*arguments)
        warps = max(1, config.groups * config.lanes // 1024)
        return dataclasses.replace(config, rows=1, warps=warps, **fields)

    monkeypatch.setattr(launching, "configure", configured)
    monkeypatch.setattr(launching, "_reads_segments", lambda *a: seen.append(reads_segments(*a)) or seen[-1])
    for shape, late, narrow in [((3, 1024), True, False), ((2, 1536), False, True), ((5, 864), False, False)]:
        fields.update(late_weight=late, narrow=narrow)
        x, other = (spelled.exact_rows(*shape, device=device, dtype=dtype) for _ in range(2))
        weight = torch.randn(shape[-1], device=device).to(dtype)
        check(FusedSpec(NoPrologue(), quantizer, ScaleLayout.BLOCKED), x)
        check(FusedSpec(GatedActivation(product=dtype), quantizer), x, other)
        check(FusedSpec(RMSNorm(1e-6, normalized=dtype, product=dtype), quantizer), x, weight=weight)
        add = RMSNorm(1e-6, weight=Weight.ONE_PLUS, residual_sum=dtype, product=dtype)
        check(FusedSpec(add, quantizer), x, other, weight)
    assert seen and set(seen) == {dtype is torch.bfloat16 or quantizer is not TE}
    seen.clear()
    check(FusedSpec(add, quantizer, sum_output=dtype), x, other, weight)
    assert seen and not any(seen), "a sum is stored in other vectors than a segment's"


def test_specs_travel_as_text():
    for quantizer, mode in itertools.product([TE, nvfp4_quantizer(), mx_quantizer(FP4)], ScaleLayout):
        if mode is not ScaleLayout.PACKED:
            spec = FusedSpec(NoPrologue(), quantizer, mode)
            assert decode(spec.encode()) == spec


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: mx_quantizer(torch.int8), "code is torch.int8"),
        (lambda: mx_quantizer(FP4, block=31), "group is 31"),
        (lambda: mx_quantizer(FP4, zero_byte=256), "zero_byte is 256"),
        (lambda: mx_quantizer(E4M3, e2m1=E2M1()), "e2m1 is"),
        (lambda: E2M1(nan_code=16), "nan_code is 16"),
    ],
)
def test_bad_choices_are_named(make, named):
    with pytest.raises(SpecError, match=named):
        make()
