"""The one oracle: what a spec means, in plain PyTorch operations.

Computed eagerly on the device of the code it stands for, it gives that code's bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from fusion_pass.specs import (
    FusedSpec,
    GatedActivation,
    Mean,
    Quantizer,
    QuotientRule,
    RMSNorm,
    Root,
    Rounding,
    ScaleLayout,
    ScaleRule,
    Weight,
)


def reference(
    spec: FusedSpec, x: torch.Tensor, other: torch.Tensor | None, weight: torch.Tensor | None
) -> list[torch.Tensor]:
    """Shapes, dtypes and order of the results as :func:`fusion_pass.kernels.launch.launch` returns them."""
    value, total = x.float(), None
    if isinstance(spec.prologue, RMSNorm):
        value, total = _rms_norm(spec.prologue, value, other, weight)
    elif isinstance(spec.prologue, GatedActivation):
        assert other is not None
        activated = _round(F.silu(value), spec.prologue.activated)
        value = _round(activated * other.float(), spec.prologue.product)
    codes, scale = _quantize(spec.quantizer, value)
    if spec.layout is ScaleLayout.COLUMN:
        scale = scale.transpose(-1, -2).contiguous()
    outputs = [codes, scale]
    if spec.sum_output is not None:
        assert total is not None
        outputs.append(total.to(spec.sum_output).contiguous())
    if spec.value_output is not None:
        outputs.append(value.to(spec.value_output).contiguous())
    # An op may not return its own input, which .to() and .contiguous() do where nothing changes.
    return [o.clone() if o is x or o is other else o for o in outputs]


def _round(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).float()


def _rms_norm(
    norm: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    total = None
    if residual is not None:
        assert norm.residual_sum is not None
        total = x + residual.float()
        x = _round(total, norm.residual_sum)
    if norm.mean is (Mean.DIVIDE if x.device.type == "cpu" else Mean.RECIPROCAL):
        mean = x.square().mean(-1, keepdim=True)
    else:
        squares = x.square().sum(-1, keepdim=True)
        count = torch.full_like(squares, x.shape[-1])
        mean = squares / count if norm.mean is Mean.DIVIDE else squares * count.reciprocal()
    normalized = _round(_over_root(norm.root, x, mean + norm.eps), norm.normalized)
    if weight is not None:
        factor = weight.float() + 1 if norm.weight is Weight.ONE_PLUS else weight.float()
        normalized = normalized * factor
    return _round(normalized, norm.product), total


def _over_root(root: Root, x: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    if root is Root.RSQRT:
        return x * variance.rsqrt()
    if root is Root.RECIPROCAL_SQRT:
        return x * variance.sqrt().reciprocal()
    return x / variance.sqrt()


def _quantize(quantizer: Quantizer, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    grouped = value.unflatten(-1, (-1, quantizer.group or value.shape[-1]))  # type: ignore[no-untyped-call]
    amax = grouped.abs().amax(-1, keepdim=True) if value.numel() else grouped[..., :1]
    if quantizer.amax_floor is not None:
        amax = amax.clamp(min=quantizer.amax_floor)
    divisor = torch.full_like(amax, quantizer.divisor)
    scale = amax / divisor if quantizer.scale_rule is ScaleRule.DIVIDE else amax * divisor.reciprocal()
    scale = _round(scale, quantizer.scale_dtype)
    if quantizer.power_of_two:
        scale = scale.log2().ceil().exp2()
    if quantizer.scale_floor is not None:
        scale = scale.clamp(min=quantizer.scale_floor)
    quotient = grouped / scale if quantizer.quotient_rule is QuotientRule.DIVIDE else grouped * scale.reciprocal()
    if quantizer.rounding is Rounding.NEAREST_EVEN:
        quotient = quotient.round()
    if quantizer.clamp is not None:
        low = -quantizer.clamp if quantizer.clamp_low is None else quantizer.clamp_low
        quotient = quotient.clamp(low, quantizer.clamp)
    return quotient.to(quantizer.code).reshape(value.shape).contiguous(), scale.squeeze(-1).contiguous()
