"""torch.library.opcheck of every fused op: its schema, its fake tensors, its registrations, and tracing with dynamic shapes."""

import dataclasses

import pytest
import torch

import fusion_pass.ops  # noqa: F401  (registers the ops)
from fusion_pass.specs import (
    Activation,
    FusedSpec,
    GatedActivation,
    NoPrologue,
    Quantizer,
    RMSNorm,
    Rounding,
    ScaleLayout,
    Weight,
)
from fusion_pass.terms import parse

BF16 = torch.bfloat16
ROW = 64
GROUPS = Quantizer.dynamic(group=32)
INT8 = Quantizer.dynamic(torch.int8, 127.0, clamp=127.0, rounding=Rounding.NEAREST_EVEN)
CALIBRATED = dataclasses.replace(Quantizer.dynamic(), factor=parse("(min(amax, given) / 448.0)"), scale=None)

QUANT = {
    "per token": FusedSpec(NoPrologue(), Quantizer.dynamic()),
    "per group, columns": FusedSpec(NoPrologue(), GROUPS, ScaleLayout.COLUMN),
    "per tensor": FusedSpec(NoPrologue(), Quantizer.dynamic(per_tensor=True)),
    "e5m2": FusedSpec(NoPrologue(), Quantizer.dynamic(torch.float8_e5m2, 57344.0, clamp=57344.0)),
    "int8": FusedSpec(NoPrologue(), INT8),
    "calibrated": FusedSpec(NoPrologue(), CALIBRATED),
}
NORM = {
    "weighted": FusedSpec(RMSNorm(1e-6), Quantizer.dynamic()),
    "without weight": FusedSpec(RMSNorm(1e-6, weight=Weight.NONE), GROUPS),
    "added": FusedSpec(RMSNorm(1e-6, residual_sum=BF16), GROUPS, ScaleLayout.TMA, sum_output=BF16),
}
ACTIVATION = {
    "gated": FusedSpec(GatedActivation(activated=BF16, product=BF16), Quantizer.dynamic()),
    "with its value": FusedSpec(GatedActivation(), GROUPS, value_output=torch.float32),
    "alone": FusedSpec(GatedActivation(Activation.SIGMOID, gated=False), Quantizer.dynamic()),
}


def drawn(device, dtype=BF16, shape=(2, 3, ROW)):
    return torch.randn(shape, device=device).to(dtype)


def given(spec, device):
    return torch.full((1,), 1.25, device=device) if spec.quantizer.needs_given else None


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", QUANT)
def test_quant(name, dtype, device):
    spec = QUANT[name]
    torch.library.opcheck(torch.ops.fusion_pass.quant, (drawn(device, dtype), given(spec, device), spec.encode()))


@pytest.mark.parametrize("name", NORM)
def test_rms_norm_quant(name, device):
    spec = NORM[name]
    residual = drawn(device) if spec.prologue.residual_sum is not None else None
    weight = None if spec.prologue.weight is Weight.NONE else drawn(device, shape=(ROW,))
    operands = (drawn(device), residual, weight, None, spec.encode())
    torch.library.opcheck(torch.ops.fusion_pass.rms_norm_quant, operands)


@pytest.mark.parametrize("name", ACTIVATION)
def test_act_mul_quant(name, device):
    """Of the halves of one projection, which are views."""
    spec = ACTIVATION[name]
    gate, up = drawn(device, shape=(3, 2 * ROW)).chunk(2, -1)
    operands = (gate, up if spec.prologue.gated else None, None, spec.encode())
    torch.library.opcheck(torch.ops.fusion_pass.act_mul_quant, operands)
