"""Tiny models of many architectures, quantized by torchao, compiled unmodified: every eligible cast is served, bit for bit."""

import contextlib
import functools
import unittest.mock

import pytest
import torch

from fusion_pass.backends import collecting
from fusion_pass.sites import Report
from fusion_pass.testing import compare

pytest.importorskip("transformers")
quant_api = pytest.importorskip("torchao.quantization.quant_api")
architectures = pytest.importorskip("architectures")

QUANTIZATIONS = {
    "fp8 per row": lambda: quant_api.Float8DynamicActivationFloat8WeightConfig(granularity=quant_api.PerRow()),
    "fp8 per tensor": lambda: quant_api.Float8DynamicActivationFloat8WeightConfig(granularity=quant_api.PerTensor()),
    "int8 dynamic": lambda: quant_api.Int8DynamicActivationInt8WeightConfig(),
}
# torchao takes a per-tensor weight of 128 x 128 for one that is scaled by such blocks.
SIZES = {"fp8 per tensor": {"hidden_size": 256, "intermediate_size": 512}}
# How many distinct fused ops serve how many casts in two layers, and how many of them have a norm or an activation.
EXPECTED = {
    "Llama": (8, 14, 6),
    "Mistral": (8, 14, 6),
    "Qwen2": (8, 14, 6),
    "Qwen3": (8, 14, 6),
    "Qwen3Moe": (4, 8, 2),
    "Gemma": (8, 14, 6),
    "Gemma2": (8, 14, 6),
    "Gemma3Text": (8, 14, 6),
    "Glm4": (8, 12, 6),
    "Glm4Moe": (8, 14, 6),
    "Phi3": (8, 8, 6),
    "DeepseekV3": (12, 16, 10),
    "Olmo2": (8, 14, 2),
    "GptOss": (4, 8, 2),
    "Granite": (8, 14, 6),
    "SmolLM3": (8, 14, 6),
    "Cohere": (6, 14, 4),
    "Starcoder2": (8, 12, 2),
}


@functools.cache
def multiplies_rows(device):
    """Whether torch has an fp8 product with a scale per row there; on CPUs it is newer than on GPUs."""
    codes, scale = torch.ones(16, 16, device=device).to(torch.float8_e4m3fn), torch.ones(16, 1, device=device)
    try:
        torch._scaled_mm(codes, codes.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


def asks_whether(settings):
    """Whether Dynamo traces ``if settings``, which it does not before torch 2.13 where a class answers for names that it lacks."""
    asked = torch.compile(lambda x: x + 1 if settings else x, backend="eager", fullgraph=True)
    try:
        asked(torch.ones(1))
    except torch._dynamo.exc.Unsupported:
        return False
    return True


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", EXPECTED)
def test_every_eligible_cast_is_served(name, quantization, device):
    if quantization == "fp8 per row" and not multiplies_rows(device):
        pytest.skip("this torch multiplies no rows of fp8 on this device")
    model = architectures.build(name, **SIZES.get(quantization, {})).to(device)
    with (
        unittest.mock.patch.object(quant_api, "_check_hardware_support"),
        unittest.mock.patch.object(quant_api, "is_sm_at_least_89", lambda: True),
    ):
        quant_api.quantize_(model, QUANTIZATIONS[quantization]())
    report = compiled(model, device)
    served = sum(site.shared_by for site in report.fused)
    with_prologue = [site for site in report.fused if not site.name.startswith("quant")]
    assert (len(report.fused), served, len(with_prologue)) == EXPECTED[name], report
    assert served == report.eligible


def compiled(model, device):
    """What the pass found in the model, whose compiled output must equal eager's."""
    ids = torch.randint(1, 100, (1, 16), device=device)

    def forward(ids):
        return model(ids, use_cache=False).last_hidden_state

    report = Report()
    fused = torch.compile(forward, backend=collecting(report))(ids)
    assert compare(fused, forward(ids)).equal
    return report


@pytest.mark.parametrize("name", ["Llama", "Gemma", "Phi3", "DeepseekV3"])
def test_compressed_tensors_fp8_dynamic(name, device, monkeypatch):
    """Its scales are computed in bf16 from the extremes of a row, guarded against zero, and a zero point is added."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    # It patches each weight with itself, by a context manager at which Dynamo breaks the graph.
    monkeypatch.setattr(quantization.lifecycle.forward, "patch_attr", lambda *_: contextlib.nullcontext())
    model = architectures.build(name)
    scheme = quantization.preset_name_to_scheme("FP8_DYNAMIC", ["Linear"])
    if not asks_whether(scheme.input_activations):
        pytest.skip("Dynamo of this torch breaks the graph before each quantization")
    quantization.apply_quantization_config(model, quantization.QuantizationConfig(config_groups={"all": scheme}))
    for module in model.modules():
        if hasattr(module, "quantization_status"):
            module.quantization_status = quantization.QuantizationStatus.COMPRESSED
    report = compiled(model.to(device), device)
    served = sum(site.shared_by for site in report.fused)
    with_prologue = [site for site in report.fused if not site.name.startswith("quant")]
    assert (len(report.fused), served, len(with_prologue)) == EXPECTED[name], report
    assert served == report.eligible
