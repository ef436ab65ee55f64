"""The cast-transpose: both directions of one read against the quantization of x and of its transpose, layouts included."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from fusion_pass.kernels import cast_transpose
from fusion_pass.kernels.cast_transpose import launch, packs, plain
from fusion_pass.kernels.cheaper_scales import cheaper, quantizes_fp4_pairs, with_cheaper_scales
from fusion_pass.kernels.launch import launch as fused_quant
from fusion_pass.kernels.reference import reference

from fusion_pass import layouts, ops
from fusion_pass.cast_transpose import BlockScales, CastTransposeSpec, Placement
from fusion_pass.mx_specs import Multiplier, ScaleMode, mx_quantizer, nvfp4_quantizer
from fusion_pass.specs import E2M1, FusedSpec, NoPrologue, Quantizer, Sign, SpecError, Ties
from fusion_pass.terms import Term
from fusion_pass.testing import compare

FP4 = torch.float4_e2m1fn_x2
TE = mx_quantizer(FP4, ScaleMode.EVEN, e2m1=E2M1(Ties.AWAY, Sign.NEGATIVE, 0), zero_byte=127, infinity_byte=254)
QUANTIZERS = {
    "te": TE,
    "mxfp4": mx_quantizer(FP4),
    "mxfp4, NaN 4": mx_quantizer(FP4, e2m1=E2M1(nan_code=4)),
    "mxfp4, ties to zero": mx_quantizer(FP4, e2m1=E2M1(Ties.TOWARD_ZERO)),
    "mxfp4 divided": mx_quantizer(FP4, ScaleMode.FLOOR, multiplier=Multiplier.DIVISION),
    "mxfp4 divided, NaN 4": mx_quantizer(FP4, ScaleMode.FLOOR, multiplier=Multiplier.DIVISION, e2m1=E2M1(nan_code=4)),
    "mxfp8": mx_quantizer(),
    "mxfp8 floor": mx_quantizer(mode=ScaleMode.FLOOR),
    "e5m2": mx_quantizer(torch.float8_e5m2),
    "nvfp4": nvfp4_quantizer(divides=True),
    "f32 scales": Quantizer.dynamic(group=128, amax_floor=1e-10),
}
BY_PAIRS_OF_BF16 = [name for name, quantizer in QUANTIZERS.items() if quantizer.group == 32]
NOT_OF_F16 = {"te", "mxfp4, ties to zero", "mxfp4 divided", "mxfp4 divided, NaN 4"}


def values(*shape, dtype=torch.bfloat16):
    """Magnitudes of several binades, a row and a column of zeros, and a block of special values."""
    x = torch.randn(shape) * torch.logspace(-3, 3, shape[-1])
    x[..., 0, :], x[..., 1] = 0, 0
    x[..., -1, -4:] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    return x.to(dtype)


def check(spec, x):
    result = compare(launch(spec, x), plain(spec, x))
    assert result.equal, f"{spec}: {result}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", QUANTIZERS)
def test_both_directions(name, dtype, device):
    quantizer = QUANTIZERS[name]
    unit = max(quantizer.group, 32)
    for shape in [(unit, unit), (unit * 3, unit * 5), (2, unit, unit * 2)]:
        check(CastTransposeSpec(quantizer), values(*shape, dtype=dtype).to(device))


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("scales", BlockScales)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("te", torch.bfloat16), ("mxfp8", torch.bfloat16), ("mxfp8", torch.float16), ("mxfp4", torch.float16)],
)
def test_placements(name, dtype, scales, shuffled, device):
    """Not square, so that the directions cannot be exchanged; not a multiple of the tile or of the padding."""
    spec = CastTransposeSpec(QUANTIZERS[name], Placement(scales, shuffled), Placement(scales, shuffled))
    check(spec, values(64, 320, dtype=dtype).to(device))


@pytest.mark.parametrize("columns", [32, 64])
@pytest.mark.parametrize("warps", [1, 2, 4])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("te", torch.bfloat16), ("mxfp8", torch.float16), ("mxfp4", torch.bfloat16), ("mxfp4", torch.float16)],
)
def test_tiles_of_pairs(name, dtype, warps, columns, device, monkeypatch):
    """Of which rows and columns fill all, some or a part of one."""
    monkeypatch.setattr(cast_transpose, "packed_tile", lambda *_: (warps, columns))
    shuffled = Placement(BlockScales.SHUFFLED, shuffled=True)
    for shape, placement in [((32, 32), Placement()), ((96, 160), Placement()), ((192, 128), shuffled)]:
        check(CastTransposeSpec(QUANTIZERS[name], placement, placement), values(*shape, dtype=dtype).to(device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", BY_PAIRS_OF_BF16)
def test_every_value_of_16_bits(name, dtype, device):
    """Each in a block of its neighbours, which has a like amax, and in one with values of all exponents."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    check(CastTransposeSpec(QUANTIZERS[name]), bits.view(2048, 32))
    check(CastTransposeSpec(QUANTIZERS[name]), bits.view(64, 1024))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in BY_PAIRS_OF_BF16 if QUANTIZERS[name].e2m1 is not None])
def test_every_value_of_16_bits_by_rows(name, dtype, device):
    """In the interpreter, which takes long for many programs, 16 rows of them."""
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).to(device)
    spec = FusedSpec(NoPrologue(), QUANTIZERS[name])
    for x in (bits.view(2048, 32), bits.view(64, 1024)):
        if device == "cpu":
            step = len(x) // 16
            x = x[random.randrange(step) :: step]
        result = compare(fused_quant(spec, x), reference(spec, x))
        assert result.equal, f"{spec}: {result}"


@pytest.mark.parametrize("name", QUANTIZERS)
def test_what_pairs_are_for(name):
    def takes(dtype):
        return packs(CastTransposeSpec(cheaper(QUANTIZERS[name], dtype)), dtype)

    assert takes(torch.bfloat16) == (name in BY_PAIRS_OF_BF16)
    assert takes(torch.float16) == (name in BY_PAIRS_OF_BF16 and name not in NOT_OF_F16)
    if QUANTIZERS[name].e2m1 is not None:
        for dtype in (torch.bfloat16, torch.float16):
            spec = with_cheaper_scales(FusedSpec(NoPrologue(), QUANTIZERS[name]), dtype)
            assert quantizes_fp4_pairs(spec, dtype) == takes(dtype)


@pytest.mark.parametrize("nan_code", [4, 7])
@pytest.mark.parametrize("power", [-16, -2, 0, 1])
def test_every_factor_of_f16(power, nan_code, device):
    """Each value alone among zeros, and beside others; 2^power of the factors takes them where f16 has them not."""
    quantizer = replace(mx_quantizer(FP4, e2m1=E2M1(nan_code=nan_code)), clamp=None)
    quantizer = replace(quantizer, factor=shifted(quantizer.scale.args[0], power))
    spec = CastTransposeSpec(quantizer)
    assert packs(CastTransposeSpec(cheaper(quantizer, torch.float16)), torch.float16) == (power in (-16, 0))
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    # In Triton's interpreter, the least and the greatest: infinity and NaN among them.
    some = bits if device == "cuda" else torch.cat([bits[:32], bits[31732:31764], bits[-32:]])
    alone = torch.zeros(len(some), 32, dtype=torch.float16)
    alone[:, 5] = some.view(torch.float16)
    beside = alone.clone()
    beside[:, ::2] = torch.tensor([65504.0, -65504.0, 2.0**-24, -(2.0**-24)]).repeat(4).half()
    for x in (alone, beside):
        check(spec, x.to(device))


def shifted(byte, power):
    """2^(127 + power - byte), NaN for byte 255."""
    bits = Term("shl", (Term("sub", (254 + power, byte)), 23))
    within = Term("max", (Term("min", (bits, 0x7F000000)), 0x00400000))
    return Term("from_bits", (Term("where", (Term("eq", (byte, 255)), 0x7FC00000, within)),))


def test_one_direction_alone(device):
    x = values(64, 96).to(device)
    for wanted in itertools.product([Placement(), None], [Placement(BlockScales.SHUFFLED), None]):
        if any(wanted):
            check(CastTransposeSpec(TE, *wanted), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_input_dtypes_and_strided_rows(dtype, device):
    both = values(64, 256, dtype=dtype).to(device)
    check(CastTransposeSpec(TE), both[:, :128])


def test_transformer_engine_layouts(device):
    """The columnwise scales of rows that are no multiple of 256 keep their padding: trimming a shuffled matrix loses scales."""
    x = values(96, 160).to(device)
    placement = Placement(BlockScales.SHUFFLED, shuffled=False)
    result = ops.cast_transpose(x, TE, rowwise=placement, columnwise=placement)
    assert result.rowwise.shape == (96, 80)
    assert result.columnwise.shape == (160, 48)
    assert result.rowwise_scale.shape == (256, 8)
    assert result.columnwise_scale.shape == (256, 8)
    linear = ops.cast_transpose(x, TE)
    assert torch.equal(layouts.unpack_mx_shuffled(result.columnwise_scale, 160, 3), linear.columnwise_scale)
    assert torch.equal(layouts.unpack_mx_shuffled(result.rowwise_scale, 96, 5), linear.rowwise_scale)


def test_the_transpose_of_the_transpose(device):
    x = values(64, 128).to(device)
    there, back = ops.cast_transpose(x, TE), ops.cast_transpose(x.t(), TE)
    assert torch.equal(there.rowwise, back.columnwise)
    assert torch.equal(there.columnwise_scale, back.rowwise_scale)


def test_no_rows(device):
    result = ops.cast_transpose(torch.empty(0, 64, device=device), TE)
    assert result.rowwise.shape == (0, 32)
    assert result.columnwise.shape == (64, 0)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: ops.cast_transpose(x[:33], TE), "M, of x"),
        (lambda x: ops.cast_transpose(x[:, :40], TE), "N, of x"),
        (lambda x: ops.cast_transpose(x[0], TE), "x has shape"),
        (lambda x: ops.cast_transpose(x.int(), TE), "x is torch.int32"),
        (lambda x: ops.cast_transpose(x[:, :32], TE, rowwise=Placement(shuffled=True)), "rowwise data are"),
        (lambda x: ops.cast_transpose(x, TE, rowwise=None, columnwise=None), "rowwise and columnwise are None"),
        (lambda x: ops.cast_transpose(x, Quantizer.dynamic()), "group of quantizer is None"),
        (lambda x: ops.cast_transpose(x, mx_quantizer(block=96)), "group of quantizer is 96"),
        (
            lambda x: ops.cast_transpose(x, QUANTIZERS["f32 scales"], rowwise=Placement(BlockScales.PADDED)),
            "scales of rowwise are padded",
        ),
    ],
)
def test_bad_input_is_named(call, named, device):
    with pytest.raises((ValueError, SpecError), match=named):
        call(torch.randn(64, 128, device=device))


def test_the_op_passes_opcheck(device):
    x = values(64, 128).to(device).nan_to_num()
    spec = CastTransposeSpec(TE, Placement(BlockScales.SHUFFLED), Placement(BlockScales.BLOCKED, shuffled=True))
    torch.library.opcheck(torch.ops.fusion_pass.cast_transpose, (x, *spec.arguments()))
