"""From a spec and its tensors to one kernel launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from fusion_pass.specs import (
    DTYPE_NAMES,
    FusedSpec,
    GatedActivation,
    Mean,
    Quantizer,
    QuotientRule,
    RMSNorm,
    ScaleLayout,
    ScaleRule,
)

from .fused_quant import fused_quant_kernel

# Values that a program holds; measured on an H200, where 1 x 1024 tiles and one 4096-value row are nearest the floor.
_TILE_VALUES = 1024
_LONGEST_ROW = 65536
# The largest magnitude that rounds to a finite code: beyond it, eager code's cast overflows or saturates.
_LARGEST = {torch.float8_e4m3fn: 464.0, torch.float8_e5m2: 61439.99609375}


@dataclass(frozen=True)
class LaunchConfig:
    """How a row of N values is divided among programs and warps.

    Attributes:
        rows: rows per program.
        groups: groups per program, a power of two.
        lanes: the group length rounded up to a power of two.
        warps: warps per program.
    """

    rows: int
    groups: int
    lanes: int
    warps: int


@cache
def configure(spec: FusedSpec, row: int) -> LaunchConfig:
    """The launch configuration for rows of ``row`` values; it does not depend on how many there are."""
    group = spec.quantizer.group or row
    lanes = triton.next_power_of_2(group)
    if not isinstance(spec.prologue, RMSNorm) and spec.quantizer.group is not None:
        groups = min(max(1, _TILE_VALUES // lanes), triton.next_power_of_2(row // group))
        return LaunchConfig(1, groups, lanes, _warps(groups * lanes))
    groups = triton.next_power_of_2(row // group)
    values = groups * lanes
    residual = isinstance(spec.prologue, RMSNorm) and spec.prologue.residual_sum is not None
    # Short rows leave lanes idle unless several share a program; a residual doubles what a row holds in registers.
    rows = max(1, (2048 if values <= 1024 else 8192 if values == 4096 and not residual else values) // values)
    return LaunchConfig(rows, groups, lanes, _warps(max(values, rows * values // 2)))


def _warps(values: int) -> int:
    for warps, most in ((1, 512), (2, 2048), (4, 8192), (8, 16384)):
        if values <= most:
            return warps
    return 16


def check_row(spec: FusedSpec, row: int) -> None:
    """Raise ValueError if no kernel takes rows of ``row`` values."""
    group = spec.quantizer.group
    if group is not None and row % group:
        raise ValueError(f"x has rows of {row} values; allowed: a multiple of the group length {group}")
    whole_row = group is None or isinstance(spec.prologue, RMSNorm)
    if row < 1 or (whole_row and row > _LONGEST_ROW):
        raise ValueError(f"x has rows of {row} values; allowed: 1 to {_LONGEST_ROW}")


def launch(
    spec: FusedSpec,
    x: torch.Tensor,
    other: torch.Tensor | None,
    weight: torch.Tensor | None,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> list[torch.Tensor]:
    """Run the fused kernel of ``spec``.

    Args:
        x: (..., N) float32, bfloat16 or float16; leading dims that collapse to one stride are not copied.
        other: as x: the residual of a norm, or the up half of a gated activation.
        weight: (N,) float.
        wrap: applied to the kernel before it is launched; lowering records the launch this way.

    Returns:
        codes (..., N), scales float32 (..., N // group) or, in a column layout, (..., N // group, rows); then the
        residual sum and the prologue's value if the spec asks for them. All contiguous.
    """
    row = x.shape[-1]
    rows, others = _rows(x), None if other is None else _rows(other)
    count = rows.shape[0]
    outputs = allocate(spec, x)
    remaining = iter(outputs[2:])
    total = next(remaining) if spec.sum_output is not None else None
    value = next(remaining) if spec.value_output is not None else None
    config = configure(spec, row)
    group = spec.quantizer.group or row
    # Three dimensions: Inductor's launchers take no fewer.
    grid = (-(-count // config.rows), -(-(row // group) // config.groups), 1)
    wrap(fused_quant_kernel)[grid](
        x_ptr=rows,
        other_ptr=rows if others is None else others,
        weight_ptr=rows if weight is None else weight.contiguous(),
        code_ptr=outputs[0],
        scale_ptr=outputs[1],
        sum_ptr=rows if total is None else total,
        value_ptr=rows if value is None else value,
        M=count,
        scale_rows=x.shape[-2] if x.dim() > 1 else 1,
        x_stride=rows.stride(0),
        other_stride=rows.stride(0) if others is None else others.stride(0),
        N=row,
        GROUP=group,
        ROWS=config.rows,
        GROUPS=config.groups,
        LANES=config.lanes,
        HAS_OTHER=other is not None,
        HAS_WEIGHT=weight is not None,
        HAS_SUM=total is not None,
        HAS_VALUE=value is not None,
        **constants(spec),
        num_warps=config.warps,
    )
    return outputs


def allocate(spec: FusedSpec, x: torch.Tensor) -> list[torch.Tensor]:
    """The outputs of ``spec`` for an input like x, uninitialised."""
    groups = x.shape[-1] // (spec.quantizer.group or x.shape[-1])
    lead = list(x.shape[:-1])
    scale = [*lead[:-1], groups, lead[-1]] if spec.layout is ScaleLayout.COLUMN else [*lead, groups]
    outputs = [
        torch.empty(x.shape, dtype=spec.quantizer.code, device=x.device),
        torch.empty(scale, dtype=torch.float32, device=x.device),
    ]
    extras = [dtype for dtype in (spec.sum_output, spec.value_output) if dtype is not None]
    return outputs + [torch.empty(x.shape, dtype=dtype, device=x.device) for dtype in extras]


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x as (M, N) with N contiguous, without a copy where its strides allow."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _overflow(quantizer: Quantizer) -> int | None:
    """The code of a value too large for the dtype, or None where no value is or the cast saturates.

    The e4m3 cast of older torch versions gives NaN and that of newer ones saturates, so the cast itself is asked.
    """
    if quantizer.clamp is not None and quantizer.clamp <= _LARGEST[quantizer.code]:
        return None
    return _OVERFLOWED[quantizer.code]


def _overflowed(code: torch.dtype) -> int | None:
    huge = torch.tensor(1e9, device="cpu").to(code)
    saturates = float(huge.float()) == torch.finfo(code).max
    return None if saturates else int(huge.view(torch.uint8))


# Asked here and not in a launch, which is also traced with fake tensors.
_OVERFLOWED = {code: _overflowed(code) for code in _LARGEST}


@cache
def constants(spec: FusedSpec) -> dict[str, Any]:
    """The compile-time arguments that follow from the spec alone."""
    prologue, quantizer = spec.prologue, spec.quantizer
    arguments: dict[str, Any] = {
        "PROLOGUE": "none",
        "EPS": 0.0,
        "DIVIDE_MEAN": False,
        "SUM_ROUNDING": "f32",
        "INNER_ROUNDING": "f32",
        "PRODUCT_ROUNDING": "f32",
    }
    if isinstance(prologue, RMSNorm):
        arguments |= {
            "PROLOGUE": "norm",
            "EPS": prologue.eps,
            "DIVIDE_MEAN": prologue.mean is Mean.DIVIDE,
            "SUM_ROUNDING": DTYPE_NAMES[prologue.residual_sum or torch.float32],
            "INNER_ROUNDING": DTYPE_NAMES[prologue.normalized],
            "PRODUCT_ROUNDING": DTYPE_NAMES[prologue.product],
        }
    elif isinstance(prologue, GatedActivation):
        arguments |= {
            "PROLOGUE": f"{prologue.activation.value}_mul",
            "INNER_ROUNDING": DTYPE_NAMES[prologue.activated],
            "PRODUCT_ROUNDING": DTYPE_NAMES[prologue.product],
        }
    return arguments | {
        "AMAX_FLOOR": quantizer.amax_floor,
        "SCALE_FLOOR": quantizer.scale_floor,
        "DIVISOR": quantizer.divisor,
        "RECIPROCAL": quantizer.scale_rule is ScaleRule.RECIPROCAL,
        "SCALE_ROUNDING": DTYPE_NAMES[quantizer.scale_dtype],
        "EXACT_QUOTIENT": quantizer.quotient_rule is QuotientRule.DIVIDE,
        "CLAMP": quantizer.clamp,
        "LARGEST": _LARGEST[quantizer.code],
        "OVERFLOW": _overflow(quantizer),
        "COLUMN_SCALES": spec.layout is ScaleLayout.COLUMN,
    }
