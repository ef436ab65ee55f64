"""The fused ops: what the pass inserts, and what can be called directly.

``torch.ops.fusion_pass.quant``, ``.rms_norm_quant`` and ``.act_mul_quant`` take their tensors and an encoded
:class:`fusion_pass.specs.FusedSpec`. The functions below build the spec. On a GPU an op launches the Triton kernel; on a
CPU it runs the plain PyTorch reference, or under TRITON_INTERPRET=1 the kernel in Triton's interpreter.
"""

# mypy: allow-untyped-calls
# torch.library.Library has no annotations.

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .kernels.arithmetic import INTERPRETED
from .kernels.launch import allocate, check_row, launch
from .kernels.reference import reference
from .specs import (
    FusedSpec,
    GatedActivation,
    Mean,
    NoPrologue,
    Prologue,
    Quantizer,
    RMSNorm,
    ScaleLayout,
    ScaleRule,
    Weight,
    decode,
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)

_PROLOGUES: dict[str, type[Prologue]] = {
    "quant": NoPrologue,
    "rms_norm_quant": RMSNorm,
    "act_mul_quant": GatedActivation,
}

_library = torch.library.Library("fusion_pass", "DEF")
_library.define("quant(Tensor x, str spec) -> Tensor[]")
_library.define("rms_norm_quant(Tensor x, Tensor? residual, Tensor? weight, str spec) -> Tensor[]")
_library.define("act_mul_quant(Tensor gate, Tensor up, str spec) -> Tensor[]")


def _check_operands(
    op: str, spec: FusedSpec, other: torch.Tensor | None, weight: torch.Tensor | None
) -> dict[str, torch.Tensor | None]:
    """The operands beside x by name, each present exactly if the spec says so."""
    prologue = spec.prologue
    if not isinstance(prologue, _PROLOGUES[op]):
        raise ValueError(f"spec has prologue {type(prologue).__name__}; allowed for {op}: {_PROLOGUES[op].__name__}")
    if not isinstance(prologue, RMSNorm):
        return {"up": other}
    wanted = {"residual": prologue.residual_sum is not None, "weight": prologue.weight is not Weight.NONE}
    operands = {"residual": other, "weight": weight}
    for name, tensor in operands.items():
        if wanted[name] is (tensor is None):
            given, allowed = ("None", "a tensor") if tensor is None else ("a tensor", "None")
            raise ValueError(f"{name} is {given}; allowed by the spec: {allowed}")
    return operands


def _check(op: str, spec: FusedSpec, x: torch.Tensor, other: torch.Tensor | None, weight: torch.Tensor | None) -> None:
    """Raise ValueError, naming the argument, its value and what is allowed, unless the op can run."""
    operands = {"x": x, **_check_operands(op, spec, other, weight)}
    if x.dim() < 1 or (spec.layout is ScaleLayout.COLUMN and x.dim() < 2):
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: (..., N), and (..., M, N) for column scales")
    check_row(spec, x.shape[-1])
    for name, tensor in operands.items():
        if tensor is None:
            continue
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} is {tensor.dtype}; allowed: {', '.join(map(str, _FLOATS))}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; allowed: the device of x, {x.device}")
        shape = x.shape[-1:] if name == "weight" else x.shape
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; allowed: {tuple(shape)}, as x has {tuple(x.shape)}"
            )


def _run(
    op: str, text: str, x: torch.Tensor, other: torch.Tensor | None = None, weight: torch.Tensor | None = None
) -> list[torch.Tensor]:
    spec = decode(text)
    _check(op, spec, x, other, weight)
    if x.numel() == 0:
        return allocate(spec, x)
    if x.device.type == "cpu" and not INTERPRETED:
        return reference(spec, x, other, weight)
    return launch(spec, x, other, weight)


def _fake(
    op: str, text: str, x: torch.Tensor, other: torch.Tensor | None = None, weight: torch.Tensor | None = None
) -> list[torch.Tensor]:
    spec = decode(text)
    _check(op, spec, x, other, weight)
    return allocate(spec, x)


def _implementations(run: Callable[..., list[torch.Tensor]]) -> dict[str, Callable[..., list[torch.Tensor]]]:
    """``run`` in each op's signature."""
    return {
        "quant": lambda x, spec: run("quant", spec, x),
        "rms_norm_quant": lambda x, residual, weight, spec: run("rms_norm_quant", spec, x, residual, weight),
        "act_mul_quant": lambda gate, up, spec: run("act_mul_quant", spec, gate, up),
    }


for _name, _implementation in _implementations(_run).items():
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)
for _name, _implementation in _implementations(_fake).items():
    torch.library.register_fake(f"fusion_pass::{_name}", _implementation, lib=_library)

OPS: dict[type[Prologue], torch._ops.OpOverload] = {
    NoPrologue: torch.ops.fusion_pass.quant.default,
    RMSNorm: torch.ops.fusion_pass.rms_norm_quant.default,
    GatedActivation: torch.ops.fusion_pass.act_mul_quant.default,
}


class Quantized(NamedTuple):
    """Codes (..., N), and float32 dequantization scales (..., N // group), or (..., N // group, M) for column scales."""

    codes: torch.Tensor
    scale: torch.Tensor


class NormQuantized(NamedTuple):
    """As :class:`Quantized`, with x + residual in x's dtype, or None without a residual."""

    codes: torch.Tensor
    scale: torch.Tensor
    residual_sum: torch.Tensor | None


def _quantizer(dtype: torch.dtype, group: int | None, amax_floor: float | None) -> Quantizer:
    bound = torch.finfo(dtype).max
    return Quantizer(
        code=dtype, divisor=bound, group=group, amax_floor=amax_floor, scale_rule=ScaleRule.DIVIDE, clamp=bound
    )


def _layout(column_scales: bool) -> ScaleLayout:
    return ScaleLayout.COLUMN if column_scales else ScaleLayout.ROW


def quant_fp8(
    x: torch.Tensor,
    *,
    group: int | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    amax_floor: float | None = 1e-10,
    column_scales: bool = False,
) -> Quantized:
    """scale = max(amax(|x|), amax_floor) / MAX; codes = cast(clamp(x / scale)), all in float32, correctly rounded.

    Args:
        x: (..., N) float32, bfloat16 or float16.
        group: values per scale, a divisor of N; None for one scale per row.
        dtype: torch.float8_e4m3fn or torch.float8_e5m2.
        amax_floor: lower bound of amax, or None: rows of zeros then give NaN codes, as a division in PyTorch does.
        column_scales: return the scales of each (M, N) matrix as ``scale.transpose(-1, -2).contiguous()``.

    Raises:
        ValueError: a tensor's shape, dtype or device, or ``group``, is not allowed; the message names it.

    Source: vLLM ``per_token_group_quant_fp8`` and aiter pull request 3041 for the layout.
    """
    spec = FusedSpec(NoPrologue(), _quantizer(dtype, group, amax_floor), _layout(column_scales))
    return Quantized(*torch.ops.fusion_pass.quant(x, spec.encode()))


def rms_norm_quant_fp8(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    group: int | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    amax_floor: float | None = 1e-10,
    column_scales: bool = False,
) -> NormQuantized:
    """Quantize (x + residual) * rsqrt(mean((x + residual)^2) + eps) * weight as :func:`quant_fp8` does.

    The sum is rounded to x's dtype before the norm reads it, and the normed value to x's dtype before it is quantized.

    Args:
        x, residual: (..., N) float32, bfloat16 or float16, of one shape.
        weight: (N,) float, or None.
        eps: added to the mean of squares.

    Raises:
        ValueError: as :func:`quant_fp8`.

    Source: transformers ``LlamaRMSNorm``; sglang pull request 21403.
    """
    norm = RMSNorm(
        eps=eps,
        weight=Weight.NONE if weight is None else Weight.PLAIN,
        mean=Mean.DIVIDE if x.device.type == "cpu" else Mean.RECIPROCAL,
        product=x.dtype,
        residual_sum=None if residual is None else x.dtype,
    )
    spec = FusedSpec(
        norm,
        _quantizer(dtype, group, amax_floor),
        _layout(column_scales),
        sum_output=None if residual is None else x.dtype,
    )
    codes, scale, *total = torch.ops.fusion_pass.rms_norm_quant(x, residual, weight, spec.encode())
    return NormQuantized(codes, scale, total[0] if total else None)


def silu_mul_quant_fp8(
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    group: int | None = None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    amax_floor: float | None = 1e-10,
    column_scales: bool = False,
) -> Quantized:
    """Quantize silu(gate) * up, activation and product each rounded to gate's dtype, as :func:`quant_fp8` does.

    Args:
        gate, up: (..., N) float32, bfloat16 or float16, of one shape; halves of one projection are not copied.

    Raises:
        ValueError: as :func:`quant_fp8`.

    Source: vLLM ``SiluAndMul``; rtp-llm pull request 816.
    """
    activation = GatedActivation(activated=gate.dtype, product=gate.dtype)
    spec = FusedSpec(activation, _quantizer(dtype, group, amax_floor), _layout(column_scales))
    return Quantized(*torch.ops.fusion_pass.act_mul_quant(gate, up, spec.encode()))
