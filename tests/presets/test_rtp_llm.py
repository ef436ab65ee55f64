"""rtp-llm's silu-and-mul kernels of [up | gate]: against their arithmetic in plain PyTorch, scales where TMA reads them."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from fusion_pass import layouts
from fusion_pass.presets import (
    ScaleFormat,
    rtp_silu_mul_spec,
    silu_and_mul_contiguous_fp8_post_quant,
    silu_and_mul_masked_fp8_post_quant,
)
from fusion_pass.specs import ScaleLayout
from fusion_pass.testing import compare

import awkward

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
TOKENS = [0, 1, 4, 5, 13]


def expected_quant(x, group=128, power_of_two=False):
    """Codes (T, H) and logical scales (T, G): everything in float32, the quotient divided."""
    half = x.shape[-1] // 2
    y = x[..., :half].float() * F.silu(x[..., half:].float())
    blocks = y.reshape(*y.shape[:-1], half // group, group)
    amax = blocks.abs().amax(-1)
    amax = torch.where(amax < 1e-10, 1e-10, amax)
    scale = amax / awkward.filled(448.0, amax)
    if power_of_two:
        mantissa, exponent = torch.frexp(scale)
        power = torch.ldexp(torch.ones_like(scale.double()), torch.where(mantissa == 0.5, exponent - 1, exponent))
        scale = torch.where(scale.isfinite(), power.float(), scale)
    codes = (blocks / scale.unsqueeze(-1)).clamp(-448.0, 448.0)
    return codes.to(torch.float8_e4m3fn).reshape(y.shape), scale


def projection(*shape, device, dtype=BF16):
    return (torch.randn(shape, device=device) * 3).to(dtype)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("scale_format", [ScaleFormat.FLOAT, ScaleFormat.UE8M0], ids=str)
def test_float_scales(tokens, scale_format, device):
    x = projection(tokens, 2 * 384, device=device)
    codes, scale = silu_and_mul_contiguous_fp8_post_quant(x, scale_format=scale_format)
    assert codes.is_contiguous()
    assert compare((codes, scale), expected_quant(x, power_of_two=scale_format is ScaleFormat.UE8M0)).equal
    aligned = -(-tokens // 4) * 4
    if tokens:
        assert scale.stride() == (1, aligned)
        # Three columns of aligned rows, zeros beyond the tokens.
        stored = awkward.storage(scale).view(3, aligned)
        assert compare(stored[:, :tokens].t(), scale).equal
        assert not stored[:, tokens:].any()
        assert compare(layouts.unpack_tma_aligned(scale), scale.contiguous()).equal


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("half", [384, 640])
def test_packed_words(tokens, half, device):
    x = projection(tokens, 2 * half, device=device)
    codes, words = silu_and_mul_contiguous_fp8_post_quant(x, scale_format=ScaleFormat.UE8M0_WORDS)
    expected, scale = expected_quant(x, power_of_two=True)
    groups, aligned = half // 128, -(-tokens // 4) * 4
    assert compare(codes, expected).equal
    assert words.dtype is torch.int32
    assert words.shape == (tokens, -(-groups // 4))
    if tokens:
        assert words.stride() == (1, aligned)
        exponent = torch.log2(scale).to(torch.int32) + 127
        stored = awkward.storage(words).view(torch.uint8).view(-1, aligned, 4).transpose(0, 1).reshape(aligned, -1)
        assert torch.equal(stored[:tokens, :groups].int(), exponent)
        assert not stored[tokens:].any() and not stored[:, groups:].any()
        assert compare(layouts.unpack_ue8m0_words(words, groups), scale).equal


@pytest.mark.parametrize("tokens", [0, 1, 4, 7])
@pytest.mark.parametrize("scale_format", [ScaleFormat.FLOAT, ScaleFormat.UE8M0], ids=str)
def test_masked_batch(tokens, scale_format, device):
    x = projection(3, tokens, 2 * 256, device=device)
    codes, scale = silu_and_mul_masked_fp8_post_quant(x, scale_format=scale_format)
    assert codes.is_contiguous()
    assert compare((codes, scale), expected_quant(x, power_of_two=scale_format is ScaleFormat.UE8M0)).equal
    assert scale.shape == (3, tokens, 2)
    if tokens:
        assert tokens == 1 or scale.stride() == (tokens * 2, 1, tokens)
        e, t, j = torch.meshgrid(torch.arange(3), torch.arange(tokens), torch.arange(2), indexing="ij")
        at = (e * tokens * 2 + j * tokens + t).to(device)
        assert compare(awkward.storage(scale)[at], scale).equal
        assert compare(layouts.unpack_masked_batch(scale), scale.contiguous()).equal


def test_the_first_half_is_up(device):
    up, gate = torch.full((1, 128), 3.0, device=device), torch.full((1, 128), -20.0, device=device)
    _, scale = silu_and_mul_contiguous_fp8_post_quant(torch.cat([up, gate], 1))
    peak = (3.0 * F.silu(gate)).abs().amax(-1, keepdim=True)
    assert torch.equal(scale, peak / awkward.filled(448.0, peak))


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("scale_format", ScaleFormat, ids=str)
@pytest.mark.parametrize("group", [32, 96])
def test_awkward_values(dtype, scale_format, group, device):
    x = torch.cat([awkward.rows(192, device, dtype), awkward.rows(192, device, dtype)], 1)
    # A NaN meets an infinity, a zero an ordinary value.
    x[:, 192:] = x[:, 192:].roll(1, 0)
    actual = silu_and_mul_contiguous_fp8_post_quant(x, group, scale_format)
    expected, scale = expected_quant(x, group, power_of_two=scale_format is not ScaleFormat.FLOAT)
    assert compare(actual.codes, expected).equal
    if scale_format is not ScaleFormat.UE8M0_WORDS:
        assert compare(actual.scale, scale).equal
        return
    # A byte knows no infinity.
    scale[scale == float("inf")] = float("nan")
    assert compare(layouts.unpack_ue8m0_words(actual.scale, 192 // group), scale).equal


def test_a_group_of_zeros_has_the_exponent_of_the_floor(device):
    x = torch.zeros(1, 1024, device=device, dtype=BF16)
    codes, words = silu_and_mul_contiguous_fp8_post_quant(x, scale_format=ScaleFormat.UE8M0_WORDS)
    assert not codes.float().any()
    assert words.item() == 85 * 0x01010101


def test_halves_of_a_strided_projection(device):
    wide = projection(5, 1024, device=device)
    x = wide[:, 256:768]
    assert compare(tuple(silu_and_mul_contiguous_fp8_post_quant(x)), expected_quant(x)).equal


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (
            lambda x: silu_and_mul_contiguous_fp8_post_quant(x[:, :400]),
            r"shape of x is \(4, 400\); allowed: rows of 2H",
        ),
        (lambda x: silu_and_mul_contiguous_fp8_post_quant(x, 0), r"shape of x is \(4, 512\).* group length 0"),
        (
            lambda x: silu_and_mul_contiguous_fp8_post_quant(x[None]),
            r"shape of x is \(1, 4, 512\); allowed: 2 dimensions \(T, 2H\)",
        ),
        (
            lambda x: silu_and_mul_masked_fp8_post_quant(x),
            r"shape of x is \(4, 512\); allowed: 3 dimensions \(E, T, 2H\)",
        ),
        (lambda x: silu_and_mul_contiguous_fp8_post_quant(x.int()), r"x is torch.int32; allowed"),
        (
            lambda x: silu_and_mul_masked_fp8_post_quant(x[None], scale_format=ScaleFormat.UE8M0_WORDS),
            r"layout is column; allowed: packed for words",
        ),
        (lambda x: rtp_silu_mul_spec(layout=ScaleLayout.PACKED), r"layout is packed; allowed: packed for words"),
    ],
)
def test_bad_input_is_named(call, named, device):
    with pytest.raises(ValueError, match=named):
        call(torch.randn(4, 512, device=device))
