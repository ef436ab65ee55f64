"""The fused ops: what the pass inserts, and what can be called directly.

``torch.ops.fusion_pass.quant``, ``.rms_norm_quant`` and ``.act_mul_quant`` take their tensors and an encoded
:class:`fusion_pass.specs.FusedSpec`. The functions below build the spec. On a GPU an op launches the Triton kernel; on a
CPU it runs the plain PyTorch reference, or under TRITON_INTERPRET=1 the kernel in Triton's interpreter.
"""

# mypy: allow-untyped-calls
# torch.library.Library has no annotations.

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .cast_transpose import LINEAR, CastTransposed, CastTransposeSpec, Placement
from .checks import require_float8
from .kernels.arithmetic import INTERPRETED
from .kernels.cast_transpose import launch as launch_cast_transpose
from .kernels.cast_transpose import plain as plain_cast_transpose
from .kernels.launch import allocate, check_row, launch
from .kernels.reference import reference
from .specs import (
    FusedSpec,
    GatedActivation,
    Granularity,
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

_interpreted: ContextVar[bool] = ContextVar("interpreted", default=INTERPRETED)

_library = torch.library.Library("fusion_pass", "DEF")
_library.define("quant(Tensor x, Tensor? given, str spec) -> Tensor[]")
_library.define("rms_norm_quant(Tensor x, Tensor? residual, Tensor? weight, Tensor? given, str spec) -> Tensor[]")
_library.define("act_mul_quant(Tensor gate, Tensor? up, Tensor? given, str spec) -> Tensor[]")
_library.define("cast_transpose(Tensor x, str quantizer, str? rowwise, str? columnwise) -> Tensor[]")


@dataclass(frozen=True)
class _Operands:
    """The tensors of one call; up and residual are ``other``."""

    x: torch.Tensor
    other: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    given: torch.Tensor | None = None


def _check_presence(op: str, spec: FusedSpec, operands: _Operands) -> None:
    """Raise ValueError unless each optional operand is present exactly if the spec says so."""
    prologue = spec.prologue
    if not isinstance(prologue, _PROLOGUES[op]):
        raise ValueError(f"spec has prologue {type(prologue).__name__}; allowed for {op}: {_PROLOGUES[op].__name__}")
    optional = {"given": (operands.given, spec.quantizer.needs_given)}
    if isinstance(prologue, RMSNorm):
        gated = prologue.gate is not None
        optional["gate" if gated else "residual"] = operands.other, gated or prologue.residual_sum is not None
        optional["weight"] = operands.weight, prologue.weight is not Weight.NONE
    if isinstance(prologue, GatedActivation):
        optional["up"] = operands.other, prologue.gated
    for name, (tensor, wanted) in optional.items():
        if wanted is (tensor is None):
            present, allowed = ("None", "a tensor") if tensor is None else ("a tensor", "None")
            raise ValueError(f"{name} is {present}; allowed by the spec: {allowed}")


def _check(op: str, spec: FusedSpec, operands: _Operands) -> None:
    """Raise ValueError, naming the argument, its value and what is allowed, unless the op can run."""
    _check_presence(op, spec, operands)
    x = operands.x
    if x.dim() < 1 or (spec.layout is not ScaleLayout.ROW and x.dim() < 2):
        raise ValueError(
            f"x has shape {tuple(x.shape)}; allowed: (..., N), and (..., M, N) for scales that are not stored by rows"
        )
    check_row(spec, x.shape[-1])
    other = "residual" if isinstance(spec.prologue, RMSNorm) else "up"
    shapes = {"x": x.shape, other: x.shape, "weight": x.shape[-1:], "given": None}
    for (name, shape), tensor in zip(shapes.items(), vars(operands).values(), strict=True):
        if tensor is None:
            continue
        if tensor.dtype not in _FLOATS:
            raise ValueError(f"{name} is {tensor.dtype}; allowed: {', '.join(map(str, _FLOATS))}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}; allowed: the device of x, {x.device}")
        if shape is None and tensor.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; allowed: one value")
        if shape is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; allowed: {tuple(shape)}, as x has {tuple(x.shape)}"
            )


def _run(op: str, text: str, operands: _Operands) -> list[torch.Tensor]:
    spec = decode(text)
    _check(op, spec, operands)
    x = operands.x
    # An empty tensor has no rows to quantize; one that shares a scale still has the scale of an amax of zero.
    if x.numel() == 0 and spec.quantizer.granularity is not Granularity.TENSOR:
        return allocate(spec, x)
    run = reference if x.numel() == 0 or (x.device.type == "cpu" and not _interpreted.get()) else launch
    return run(spec, x, operands.other, operands.weight, operands.given)


@contextlib.contextmanager
def plain_on_cpu() -> Iterator[None]:
    """On a CPU, run the ops as plain PyTorch in the block, also under TRITON_INTERPRET=1: in eager's order of summation."""
    token = _interpreted.set(False)
    try:
        yield
    finally:
        _interpreted.reset(token)


def _fake(op: str, text: str, operands: _Operands) -> list[torch.Tensor]:
    spec = decode(text)
    _check(op, spec, operands)
    return allocate(spec, operands.x)


def _implementations(run: Callable[..., list[torch.Tensor]]) -> dict[str, Callable[..., list[torch.Tensor]]]:
    """``run`` in each op's signature."""
    return {
        "quant": lambda x, given, spec: run("quant", spec, _Operands(x, given=given)),
        "rms_norm_quant": lambda x, residual, weight, given, spec: run(
            "rms_norm_quant", spec, _Operands(x, residual, weight, given)
        ),
        "act_mul_quant": lambda gate, up, given, spec: run("act_mul_quant", spec, _Operands(gate, up, given=given)),
    }


for _name, _implementation in _implementations(_run).items():
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)
for _name, _implementation in _implementations(_fake).items():
    torch.library.register_fake(f"fusion_pass::{_name}", _implementation, lib=_library)


def _cast_transpose(x: torch.Tensor, *arguments: str) -> list[torch.Tensor]:
    spec = CastTransposeSpec.of_arguments(*arguments)
    spec.check(x)
    if x.numel() == 0:
        return spec.allocate(x)
    run = plain_cast_transpose if x.device.type == "cpu" and not _interpreted.get() else launch_cast_transpose
    return run(spec, x)


def _fake_cast_transpose(x: torch.Tensor, *arguments: str) -> list[torch.Tensor]:
    spec = CastTransposeSpec.of_arguments(*arguments)
    spec.check(x)
    return spec.allocate(x)


for _key in ("CPU", "CUDA"):
    _library.impl("cast_transpose", _cast_transpose, _key)
torch.library.register_fake("fusion_pass::cast_transpose", _fake_cast_transpose, lib=_library)

OPS: dict[type[Prologue], torch._ops.OpOverload] = {
    NoPrologue: torch.ops.fusion_pass.quant.default,
    RMSNorm: torch.ops.fusion_pass.rms_norm_quant.default,
    GatedActivation: torch.ops.fusion_pass.act_mul_quant.default,
}


class Quantized(NamedTuple):
    """Codes (..., N), and float32 dequantization scales: (..., 1) per row, (..., N // group), or (..., N // group, M) for column scales."""

    codes: torch.Tensor
    scale: torch.Tensor


class NormQuantized(NamedTuple):
    """As :class:`Quantized`, with x + residual in x's dtype, or None without a residual."""

    codes: torch.Tensor
    scale: torch.Tensor
    residual_sum: torch.Tensor | None


def _quantizer(dtype: torch.dtype, group: int | None, amax_floor: float | None) -> Quantizer:
    bound = torch.finfo(require_float8(dtype)).max
    return Quantizer.dynamic(dtype, bound, group, amax_floor=amax_floor, scale_rule=ScaleRule.DIVIDE, clamp=bound)


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
    return Quantized(*torch.ops.fusion_pass.quant(x, None, spec.encode()))


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
    codes, scale, *total = torch.ops.fusion_pass.rms_norm_quant(x, residual, weight, None, spec.encode())
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
    return Quantized(*torch.ops.fusion_pass.act_mul_quant(gate, up, None, spec.encode()))


def cast_transpose(
    x: torch.Tensor,
    quantizer: Quantizer,
    *,
    rowwise: Placement | None = LINEAR,
    columnwise: Placement | None = LINEAR,
) -> CastTransposed:
    """Quantize x and its transpose in blocks along their rows, reading x once.

    Args:
        x: (..., N) float32, bfloat16 or float16, whose leading dims count as one of M rows; M and N multiples of the block.
        quantizer: blocks of 16 to 128 values with a scale each, as :func:`fusion_pass.mx_specs.mx_quantizer` makes.
        rowwise, columnwise: where each direction's results lie, or None if it is not wanted.

    Returns:
        ``rowwise`` (M, N) codes, for FP4 (M, N // 2) bytes, with (M, N // block) scales as their placement stores them;
        ``columnwise`` (N, M) or (N, M // 2), with (N, M // block) scales.

    Raises:
        ValueError: x or a placement is not allowed; the message names it.
        SpecError: the quantizer has no block scales.

    Source: TransformerEngine pull request 422; torchao's dim-1 MX casts.
    """
    spec = CastTransposeSpec(quantizer, rowwise, columnwise)
    results = iter(torch.ops.fusion_pass.cast_transpose(x, *spec.arguments()))
    present = (rowwise, rowwise, columnwise, columnwise)
    return CastTransposed(*(None if placement is None else next(results) for placement in present))
