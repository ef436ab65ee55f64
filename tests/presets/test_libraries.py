"""Functions of installed libraries, unmodified: the pass finds the spec of what they compute, and the bytes are theirs."""

import dataclasses

import pytest
import torch

import fusion_pass
from fusion_pass import presets
from fusion_pass.backends import collecting
from fusion_pass.specs import FusedSpec, NoPrologue, Quantizer, ScaleRule
from fusion_pass.testing import compare

import awkward

BF16, F32 = torch.bfloat16, torch.float32
E4M3 = torch.float8_e4m3fn


def fused(function, *inputs):
    """What the compiled function returns, and the specs in it."""
    report = fusion_pass.Report()
    result = torch.compile(function, backend=collecting(report), dynamic=False)(*inputs)
    return result, [site.spec for site in report.fused]


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("power_of_two", [False, True], ids=["exact", "power of two"])
def test_torchao_rowwise(dtype, power_of_two, device):
    float8 = pytest.importorskip("torchao.float8.float8_utils")
    axis = pytest.importorskip("torchao.float8.config").ScalingGranularity.AXISWISE

    def rowwise(x):
        scale = float8.tensor_to_scale(
            x, E4M3, scaling_granularity=axis, axiswise_dim=-1, round_scales_to_power_of_2=power_of_two
        )
        return float8.to_fp8_saturated(x.to(F32) * scale, E4M3), scale

    spec = presets.torchao_rowwise_spec(round_scales_to_power_of_2=power_of_two)
    for x in (awkward.rows(640, device, dtype), torch.randn(37, 1000, device=device).to(dtype)):
        actual, found = fused(rowwise, x)
        assert found == [spec]
        assert compare(actual, rowwise(x)).equal
        assert compare(tuple(presets.fp8_rowwise_2d_scale_and_cast(x, power_of_two)), rowwise(x)).equal


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_compressed_tensors_fp8_dynamic(dtype, device):
    """Scales in the dtype of x, one where they would be zero made its epsilon; quotients in that dtype as well."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    arguments = quantization.preset_name_to_scheme("FP8_DYNAMIC", ["Linear"]).input_activations

    def per_token(x):
        scale, zero_point = helpers.compute_dynamic_scales_and_zp(x, arguments, torch.nn.Identity())
        return forward.quantize(x, scale, zero_point, arguments, dtype=E4M3), scale.float()

    quantizer = dataclasses.replace(
        Quantizer.dynamic(scale_rule=ScaleRule.DIVIDE, scale_dtype=dtype, zero_scale=torch.finfo(dtype).eps),
        quotient=dtype,
        adds_zero=True,
    )
    for x in (awkward.rows(640, device, dtype), torch.randn(37, 1000, device=device).to(dtype)):
        x = x.unsqueeze(0)
        expected = per_token(x)
        actual, found = fused(per_token, x)
        assert found == [FusedSpec(NoPrologue(), quantizer)]
        assert compare(actual, expected).equal
        direct = torch.ops.fusion_pass.quant(x, None, FusedSpec(NoPrologue(), quantizer).encode())
        assert compare(tuple(direct), expected).equal
