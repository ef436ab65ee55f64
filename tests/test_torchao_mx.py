"""torchao's own MX casts, compiled as they are: every scale of every mode, byte for byte."""

import random

import pytest
import torch

from fusion_pass.backends import collecting
from fusion_pass.eager import eager_cast_saturates
from fusion_pass.sites import Report
from fusion_pass.testing import compare

mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
config = pytest.importorskip("torchao.prototype.mx_formats.config")


def blocks_of_every_amax(device):
    """Blocks of 32 values, one for each positive bfloat16, infinity and NaN, which is the block's amax."""
    # All on a GPU, every 31st in Triton's interpreter, from a different one each time.
    amaxes = torch.arange(1, 32768, dtype=torch.int16, device=device).view(torch.bfloat16)[:32736]
    if device == "cpu":
        amaxes = amaxes.view(-1, 31)[:, random.randrange(31)]
    shares = torch.randn(amaxes.numel(), 32, device=device).clamp(-1, 1)
    blocks = (amaxes.float().unsqueeze(-1) * shares).to(torch.bfloat16)
    blocks[:, 5] = amaxes
    blocks[::3, 5] *= -1
    return blocks.reshape(-1, 4 * 32)


@pytest.mark.parametrize("mode", list(config.ScaleCalculationMode), ids=lambda mode: mode.name)
def test_mxfp8_casts_fuse(mode, device):
    def cast(x):
        scales, codes = mx_tensor.to_mx(x, torch.float8_e4m3fn, 32, mode)
        return codes, scales.view(torch.uint8)

    x = blocks_of_every_amax(device)
    report = Report()
    actual = torch.compile(cast, backend=collecting(report), dynamic=False)(x)
    # What is compiled has no clamp but with RCEIL: where eager's cast does not saturate it says something else than eager code.
    fuses = mode.name == "RCEIL" or eager_cast_saturates(torch.float8_e4m3fn)
    assert [site.name for site in report.fused] == ["quant_mxfp8"] * fuses
    if not fuses:
        return
    result = compare(actual, cast(x))
    assert result.equal, result


@pytest.mark.parametrize("mode", list(config.ScaleCalculationMode), ids=lambda mode: mode.name)
def test_mxfp4_casts_fuse(mode, device):
    def cast(x):
        scales, codes = mx_tensor.to_mx(x, torch.float4_e2m1fn_x2, 32, mode)
        return codes, scales.view(torch.uint8)

    x = blocks_of_every_amax(device)
    # On a CPU the code of NaN depends on its sign and payload.
    check(cast, "quant_mxfp4", x[~x.isnan().any(-1)])


nvfp4_tensor = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")


@pytest.mark.parametrize("global_scale", [False, True])
def test_nvfp4_casts_fuse(global_scale, device):
    def cast(x, scale):
        scales, codes = nvfp4_tensor.nvfp4_quantize(x, 16, scale if global_scale else None)
        return codes, scales

    x = (torch.randn(64, 128) * torch.logspace(-6, 6, 64)[:, None]).to(torch.bfloat16).to(device)
    check(cast, "quant_nvfp4", x, torch.tensor(0.37, device=device))


def check(cast, name, *tensors):
    report = Report()
    actual = torch.compile(cast, backend=collecting(report), dynamic=False)(*tensors)
    assert [site.name for site in report.fused] == [name], report
    result = compare(actual, cast(*tensors))
    assert result.equal, result
