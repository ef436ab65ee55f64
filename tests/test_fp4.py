"""FP4 codes as they are written: conversions that are E2M1's, proved over all floats, and look-alikes that are not."""

import pytest
import torch
from fusion_pass.patterns import fp4

from fusion_pass.backends import collecting
from fusion_pass.sites import Report
from fusion_pass.specs import E2M1, Sign, Ties
from fusion_pass.testing import compare

import spelled

MIDPOINTS = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def bucketized(v):
    return torch.bucketize(v.abs(), torch.tensor(MIDPOINTS, device=v.device)) | (v < 0).to(torch.int64) << 3


def bucketized_upwards(v):
    code = torch.bucketize(v.abs(), torch.tensor(MIDPOINTS, device=v.device), right=True)
    return code.to(torch.uint8) | (v.signbit().to(torch.uint8) << 3)


def counted(v):
    """TransformerEngine's ladder of thresholds."""
    code = sum((v.abs() >= m).to(torch.uint8) for m in MIDPOINTS)
    return code | torch.where(v < 0, 8, 0).to(torch.uint8)


def signed_unless_zero(v):
    code = torch.bucketize(v.abs(), torch.tensor(MIDPOINTS, device=v.device), out_int32=True)
    return torch.where((v < 0) & (code != 0), code + 8, code).to(torch.uint8)


def by_bits(v):
    """With one mantissa bit after the exponent's bias is taken off; subnormals by comparison."""
    bits = v.abs().clamp(max=6.0).view(torch.int32)
    normal = ((bits + 0x1FFFFF + ((bits >> 22) & 1)) >> 22) - 252
    small = (v.abs() > 0.25).to(torch.int32) + (v.abs() >= 0.75).to(torch.int32)
    code = torch.where(v.abs() < 1.0, small, normal)
    return (code | ((v.view(torch.int32) >> 28) & 8)).to(torch.uint8)


def bounded_from_above_alone(v):
    return bucketized(torch.clamp(v, None, 6.0))


CONVERSIONS = {
    bucketized: E2M1(Ties.TOWARD_ZERO, Sign.NEGATIVE),
    bucketized_upwards: E2M1(Ties.AWAY, Sign.KEPT),
    counted: E2M1(Ties.AWAY, Sign.NEGATIVE, 0),
    signed_unless_zero: E2M1(Ties.TOWARD_ZERO, Sign.NONZERO),
    by_bits: E2M1(Ties.EVEN, Sign.KEPT),
    bounded_from_above_alone: E2M1(Ties.TOWARD_ZERO, Sign.NEGATIVE),
}


def joined(codes):
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def reshaped(codes):
    pairs = codes.reshape(*codes.shape[:-1], -1, 2)
    return (pairs[..., 0] + pairs[..., 1] * 16).to(torch.uint8)


def mxfp4(convert, pack=joined, divide=True):
    def quantize(x):
        blocks = x.float().unflatten(-1, (-1, 32))
        biased = torch.clamp((blocks.abs().amax(-1, keepdim=True).view(torch.int32) >> 23) - 2, min=1)
        scale = (biased << 23).view(torch.float32)
        scaled = blocks / scale if divide else blocks * scale.reciprocal()
        return pack(convert(scaled.flatten(-2)).to(torch.uint8)), biased.to(torch.uint8).squeeze(-1)

    return quantize


def values(device):
    """Every code and midpoint of a block with scale 1, both signs, and blocks of other magnitudes."""
    points = torch.tensor([*MIDPOINTS, *VALUES, 0.3, 1e-9])
    near = torch.cat([points, -points])
    rows = torch.zeros(4, 96)
    rows[0, :34], rows[0, 40:42], rows[0, 70] = near, torch.tensor([6.0, -6.0]), 5.9
    rows[1:] = torch.randn(3, 96) * torch.tensor([[1e-6], [1.0], [1e6]])
    return rows.to(torch.bfloat16).to(device)


def compiled(fn, *tensors, dynamic=False):
    torch._dynamo.reset()
    report = Report()
    result = torch.compile(fn, backend=collecting(report), dynamic=dynamic)(*tensors)
    return result, report


@pytest.mark.parametrize("pack", [joined, reshaped])
@pytest.mark.parametrize("convert", CONVERSIONS)
def test_conversions_fuse(convert, pack, device):
    fn, x = mxfp4(convert, pack), values(device)
    result, report = compiled(fn, x)
    assert [site.name for site in report.fused] == ["quant_mxfp4"], report
    rule = report.fused[0].quantizer.e2m1
    assert (rule.ties, rule.sign) == (CONVERSIONS[convert].ties, CONVERSIONS[convert].sign)
    assert compare(result, fn(x)).equal


@pytest.mark.parametrize("pack", [joined, reshaped])
def test_rows_of_an_unknown_length(pack, device):
    """Those of a transpose, whose length is that of whole blocks."""

    def fn(x):
        return (*mxfp4(by_bits, pack)(x), *mxfp4(by_bits, pack)(x.t().contiguous()))

    x = values(device).repeat(16, 1)
    torch._dynamo.mark_dynamic(x, 0)
    result, report = compiled(fn, x, dynamic=None)
    assert [site.name for site in report.fused] == ["quant_mxfp4_both_ways"], report
    assert compare(result, fn(x)).equal


def test_a_multiplied_block_after_a_norm(device):
    def fn(x, w):
        return mxfp4(counted, divide=False)(spelled.rms_norm(x, w))

    x, w = spelled.exact_rows(5, 64, device=device), torch.randn(64, device=device).to(torch.bfloat16)
    result, report = compiled(fn, x, w)
    assert [site.name for site in report.fused] == ["rms_norm_mxfp4"]
    assert compare(result, fn(x, w)).equal


def test_rows_of_one_block(device):
    fn, x = mxfp4(bucketized), values(device)[:, :32].contiguous()
    result, report = compiled(fn, x)
    assert [site.name for site in report.fused] == ["quant_mxfp4"], report
    assert compare(result, fn(x)).equal


def a_threshold_off_by_one_ulp(v):
    edges = torch.tensor([0.25, 0.75, 1.25, 1.7500001192092896, 2.5, 3.5, 5.0], device=v.device)
    return torch.bucketize(v.abs(), edges) | (v < 0).to(torch.int64) << 3


def overflowing(v):
    """Values beyond 6 wrap."""
    code = torch.bucketize(v.abs(), torch.tensor([*MIDPOINTS, 7.0], device=v.device))
    return (code & 7) | (v < 0).to(torch.int64) << 3


def another_sign(v):
    return torch.bucketize(v.abs(), torch.tensor(MIDPOINTS, device=v.device)) | (v <= 0).to(torch.int64) << 3


def a_mask_of_the_sign(v):
    """Which drops the sign of values below zero."""
    return bucketized(v) & torch.where(v < 0, 7, 15)


def compared_with_each_other(v):
    """Every value with every other, not with itself."""
    least = v.flatten().unsqueeze(-1) >= v.flatten().unsqueeze(0)
    return bucketized(v).flatten().unsqueeze(0) | (least.to(torch.int64) & 0)


def of_two_tensors(v):
    return torch.bucketize(v.abs(), torch.tensor(MIDPOINTS, device=v.device)) | (v.sin() < 0).to(torch.int64) << 3


def a_wider_code(v):
    return torch.bucketize(v.abs(), torch.tensor(MIDPOINTS, device=v.device)) | (v < 0).to(torch.int64) << 4


def cast_to_integers(v):
    """Scaled once more in between."""
    a = v.abs().clamp(max=6.0)
    steps = torch.round(torch.where(a < 2, a * 2, torch.where(a < 4, a, a * 0.5))).to(torch.int32)
    code = steps + torch.where(a < 2, 0, torch.where(a < 4, 2, 4)).to(torch.int32)
    return code.to(torch.uint8) | (v.signbit().to(torch.uint8) << 3)


@pytest.mark.parametrize(
    ("convert", "reason"),
    [
        (cast_to_integers, "codes of no single tensor of floats"),
        (a_threshold_off_by_one_ulp, "codes that are not those of E2M1"),
        (overflowing, "codes that are not those of E2M1"),
        (another_sign, "codes that are not those of E2M1"),
        (a_mask_of_the_sign, "codes that are not those of E2M1"),
        (compared_with_each_other, "codes of no single tensor of floats"),
        (of_two_tensors, "of which nothing can be proved"),
        (a_wider_code, "codes that are not those of E2M1"),
    ],
)
def test_look_alikes_do_not(convert, reason, device):
    fn, x = mxfp4(convert), values(device)
    result, report = compiled(fn, x)
    assert not report.fused
    assert any(reason in miss.reason for miss in report.missed), report
    assert compare(result, fn(x)).equal


@pytest.mark.parametrize(
    "pack",
    [
        lambda codes: codes[..., 1::2] | (codes[..., ::2] << 4),
        lambda codes: codes[..., ::2] | (codes[..., 1::2] << 3),
        lambda codes: codes[..., :48] | (codes[..., 48:] << 4),
        lambda codes: codes.reshape(-1, 3)[:, ::2] | (codes.reshape(-1, 3)[:, 1::2] << 4),
    ],
    ids=["odd first", "three bits", "halves", "odd rows"],
)
def test_other_packings_do_not(pack, device):
    fn, x = mxfp4(bucketized, pack), values(device)
    result, report = compiled(fn, x)
    assert not report.fused
    assert compare(result, fn(x)).equal


def test_a_conversion_is_proved_once(device, monkeypatch):
    proofs = []
    rule = fp4._rule
    monkeypatch.setattr(fp4, "_proofs", {})
    monkeypatch.setattr(fp4, "_rule", lambda *given: proofs.append(given) or rule(*given))
    quantize = mxfp4(counted)
    _, report = compiled(lambda x: (quantize(x), quantize(x + 1)), values(device))
    assert len(report.fused) == 2
    assert len(proofs) == 1
