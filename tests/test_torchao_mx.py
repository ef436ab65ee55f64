"""torchao's own MX casts, compiled as they are: every scale of every mode, byte for byte."""

import random

import pytest
import torch
from fusion_pass.kernels.cast_transpose import packs
from fusion_pass.kernels.cheaper_scales import cheaper

from fusion_pass.backends import collecting
from fusion_pass.cast_transpose import CastTransposeSpec, Placement
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
    # On a CPU the code of NaN depends on its sign and payload, on CUDA each product with NaN has the same bits.
    check(cast, "quant_mxfp4", x if device == "cuda" else x[~x.isnan().any(-1)])


@pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.float4_e2m1fn_x2], ids=["mxfp8", "mxfp4"])
@pytest.mark.parametrize("mode", ["FLOOR", "RCEIL"])
@pytest.mark.parametrize("any_rows", [False, True])
def test_casts_of_a_matrix_and_its_transpose_fuse(any_rows, mode, code, device):
    """By the kernel of pairs, whichever way the factors are spelled."""

    def cast(x):
        scaling = config.ScaleCalculationMode[mode]
        scales, codes = mx_tensor.to_mx(x, code, 32, scaling)
        others, transposed = mx_tensor.to_mx(x.t().contiguous(), code, 32, scaling)
        return codes, scales.view(torch.uint8), transposed, others.view(torch.uint8)

    if mode == "FLOOR" and code is torch.float8_e4m3fn and not eager_cast_saturates(code):
        pytest.skip("eager's cast does not saturate, and what is compiled has no clamp")
    x = blocks_of_every_amax(device)
    x = x if device == "cuda" else x[~x.isnan().any(-1)]
    x = torch.cat([x, x[: -len(x) % 32]])
    if any_rows:
        torch._dynamo.mark_dynamic(x, 0)
    (site,) = check(cast, f"quant_{'mxfp8' if code is torch.float8_e4m3fn else 'mxfp4'}_both_ways", x).fused
    spec = CastTransposeSpec(cheaper(site.spec.quantizer, x.dtype), Placement(), Placement())
    # A CPU gives NaN another code, which no kernel for GPUs needs.
    assert packs(spec, x.dtype) or (device == "cpu" and spec.quantizer.e2m1 is not None)


nvfp4_tensor = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")


@pytest.mark.parametrize("global_scale", [False, True])
def test_nvfp4_casts_fuse(global_scale, device):
    def cast(x, scale):
        scales, codes = nvfp4_tensor.nvfp4_quantize(x, 16, scale if global_scale else None)
        return codes, scales

    x = (torch.randn(64, 128) * torch.logspace(-6, 6, 64)[:, None]).to(torch.bfloat16).to(device)
    check(cast, "quant_nvfp4", x, torch.tensor(0.37, device=device))


def check(cast, name, *tensors):
    torch._dynamo.reset()
    report = Report()
    actual = torch.compile(cast, backend=collecting(report))(*tensors)
    assert [site.name for site in report.fused] == [name], report
    result = compare(actual, cast(*tensors))
    assert result.equal, result
    return report
