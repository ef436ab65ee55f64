"""The pass finds in each preset's PyTorch code the preset's own spec."""

import pytest
import torch

import fusion_pass
from fusion_pass import presets
from fusion_pass.backends import collecting
from fusion_pass.presets import ScaleFormat
from fusion_pass.specs import ScaleLayout
from fusion_pass.testing import compare

import spellings
from spellings import positives_presets as spelled

BF16 = torch.bfloat16
EXPECTED = {
    "aiter_flatten": presets.aiter_flatten_spec(),
    "aiter_flatten_transposed_heads": presets.aiter_flatten_spec(),
    "aiter_flatten_strided": presets.aiter_flatten_spec(transpose_scale=True),
    "aiter_flatten_viewed": presets.aiter_flatten_spec(transpose_scale=True),
    "aiter_rms": presets.aiter_rms_norm_spec(1e-6),
    "aiter_add_rms": presets.aiter_rms_norm_spec(1e-6, transpose_scale=True, residual=BF16, unquantized=BF16),
    "sglang_rms": presets.sglang_rms_norm_spec(1e-6),
    "sglang_add_rms": presets.sglang_rms_norm_spec(1e-6, residual=BF16),
    "sglang_add_rms_group": presets.sglang_rms_norm_spec(1e-6, 64, shuffle_scale=True, residual=BF16),
    "rtp_contiguous": presets.rtp_silu_mul_spec(),
    "rtp_packed": presets.rtp_silu_mul_spec(scale_format=ScaleFormat.UE8M0_WORDS, layout=ScaleLayout.PACKED),
    "rtp_masked": presets.rtp_silu_mul_spec(scale_format=ScaleFormat.UE8M0, layout=ScaleLayout.COLUMN),
    "torchao_rowwise": presets.torchao_rowwise_spec(),
    "torchao_rowwise_power_of_two": presets.torchao_rowwise_spec(round_scales_to_power_of_2=True),
}
SPELLINGS = {s.name: s for s in spellings.catalogue()[0] if s.fn.__module__ == spelled.__name__}


def test_every_spelling_of_a_preset_is_checked():
    assert SPELLINGS.keys() == EXPECTED.keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_the_spec_is_the_preset_s(name, device):
    report = fusion_pass.Report()
    spelling = SPELLINGS[name]
    torch.compile(spelling.fn, backend=collecting(report), dynamic=False)(*spelling.inputs(device))
    assert [site.spec for site in report.fused] == [EXPECTED[name]]
    assert report.missed == []


@pytest.mark.parametrize("name", EXPECTED)
def test_the_spec_is_the_same_on_a_gpu(name):
    """A tensor of the device divides there as well; what is written with Python numbers would be multiplied."""
    spelling = SPELLINGS[name]
    report = fusion_pass.explain(spelling.fn, *spelling.inputs("cpu"), device="cuda")
    assert [site.spec for site in report.fused] == [EXPECTED[name]]


@pytest.mark.parametrize("name", ["aiter_flatten_strided", "aiter_flatten_viewed"])
def test_heads_of_any_number_of_tokens(name, device):
    spelling = SPELLINGS[name]
    report = fusion_pass.Report()
    compiled = torch.compile(spelling.fn, backend=collecting(report), fullgraph=True)
    for tokens in (6, 11):
        x = torch.randn(tokens, 4, 256, device=device).to(BF16)
        torch._dynamo.mark_dynamic(x, 0)
        assert compare(compiled(x), spelling.fn(x)).equal
    assert [site.spec for site in report.fused] == [EXPECTED[name]]
