"""torchao's rowwise cast: against its arithmetic in float64; test_libraries.py has torchao itself."""

import pytest
import torch

from fusion_pass.presets import fp8_rowwise_2d_scale_and_cast
from fusion_pass.testing import compare

import awkward

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ROUNDED = pytest.mark.parametrize("power_of_two", [False, True], ids=["exact", "power of two"])


def expected_quant(x, power_of_two):
    """The multiplier divided in float64; its power of two taken from its exponent."""
    amax = x.double().abs().amax(-1, keepdim=True)
    amax = torch.where(amax < 1e-12, 1e-12, amax)
    multiplier = (awkward.filled(448.0, amax) / amax).float()
    if power_of_two:
        _, exponent = torch.frexp(multiplier)
        power = torch.ldexp(torch.ones_like(multiplier.double()), exponent - 1)
        multiplier = torch.where((multiplier > 0) & multiplier.isfinite(), power.float(), multiplier)
    return (x.float() * multiplier).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), multiplier


@pytest.mark.parametrize("shape", [(0, 64), (1, 1), (1, 5120), (7, 1000), (131, 257)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@ROUNDED
def test_rowwise(shape, dtype, power_of_two, device):
    x = (torch.randn(shape, device=device) * torch.logspace(-3, 3, shape[1], device=device)).to(dtype)
    codes, multiplier = fp8_rowwise_2d_scale_and_cast(x, power_of_two)
    assert codes.is_contiguous()
    assert multiplier.shape == (shape[0], 1) and multiplier.dtype is F32
    assert compare((codes, multiplier), expected_quant(x, power_of_two)).equal


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@ROUNDED
def test_awkward_values(dtype, power_of_two, device):
    x = awkward.rows(640, device, dtype)
    actual = fp8_rowwise_2d_scale_and_cast(x, power_of_two)
    assert compare(tuple(actual), expected_quant(x, power_of_two)).equal
    assert not actual.codes[-2:].float().any()
    assert actual.multiplier[-1] == (2.0**48 if power_of_two else torch.tensor(4.48e14).item())


def test_every_bfloat16_amax(device):
    amax = torch.arange(0x7F81, device=device).to(torch.int16).view(BF16)
    if device == "cpu":
        amax = amax[torch.arange(0, amax.numel(), 61)]
    x = torch.stack([amax, amax * -0.37], 1)
    for power_of_two in (False, True):
        actual = fp8_rowwise_2d_scale_and_cast(x, power_of_two)
        assert compare(tuple(actual), expected_quant(x, power_of_two)).equal


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: fp8_rowwise_2d_scale_and_cast(x[0]), r"shape of x is \(32,\); allowed: 2 dimensions \(M, K\)"),
        (lambda x: fp8_rowwise_2d_scale_and_cast(x.double()), r"x is torch.float64; allowed"),
        (lambda x: fp8_rowwise_2d_scale_and_cast(x[:, :0]), r"rows of 0 values; allowed: 1 to 65536"),
        (lambda x: fp8_rowwise_2d_scale_and_cast(x[:, :1].expand(4, 65537)), r"rows of 65537 values"),
    ],
)
def test_bad_input_is_named(call, named, device):
    with pytest.raises(ValueError, match=named):
        call(torch.randn(4, 32, device=device))
