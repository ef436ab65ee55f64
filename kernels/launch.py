"""From a spec and its tensors to one kernel launch."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from fusion_pass.addresses import allocated, has_padding, multiples, padded
from fusion_pass.dense import empty, row_distance
from fusion_pass.eager import overflow_code
from fusion_pass.specs import (
    DTYPE_NAMES,
    FusedSpec,
    GatedActivation,
    Granularity,
    Quantizer,
    RMSNorm,
    Rounding,
    ScaleLayout,
    Weight,
)
from fusion_pass.terms import bounds

from .arithmetic import INTERPRETED
from .cheaper_scales import LARGEST, int8_needs_no_bounds, quantizes_fp4_pairs, with_cheaper_scales
from .fused_quant import fused_quant_kernel
from .launch_table import LaunchConfig, adds_rows, configure, group_length, whole_rows
from .scale_program import program
from .split_rows import fused_quant_split_kernel

_LONGEST_ROW = 65536
_PAD_SCALES = 1024  # of a program that writes nothing but padding
_SEGMENT = 16  # neighbouring values of a thread


def _in_warps(spec: FusedSpec, row: int, config: LaunchConfig) -> bool:
    """Whether a tile is one row whose values each thread of several warps reads as vectors of 16, or as 2, 4 or 8 in total.

    Of FP4 codes, parts of rows alone: what they add up is not what they quantize.
    """
    one_row = config.rows == 1 and whole_rows(spec) and row % 16 == 0
    groups = config.groups * config.parts
    contiguous = spec.quantizer.group is None or groups == 1 or config.lanes == spec.quantizer.group >= 16
    enough = groups * config.lanes >= 64 * config.warps > 64
    return one_row and contiguous and enough and (spec.quantizer.e2m1 is None or config.parts > 1)


def _reads_segments(spec: FusedSpec, config: LaunchConfig, input_dtype: torch.dtype) -> bool:
    """Whether threads read whole segments: of one row in groups of such, each thread at least one, for FP4 codes of pairs.

    Fewer threads then compute each scale. Segments of 32 are fewer instructions still, but a warp's loads, 64 bytes apart, touch twice the
    lines: slower. FP8 codes have segments of 16 without being told. What is stored in 16 bits, too, would be exchanged between threads, or
    each of its sectors be written by halves: add + RMSNorm of 8192 rows of 2880 45.2 us for 39.4.
    """
    one_row = config.rows == 1 and config.lanes == spec.quantizer.group and config.lanes % _SEGMENT == 0
    enough = config.groups * config.lanes >= 32 * config.warps * _SEGMENT
    stores = spec.value_output is not None or spec.sum_output is not None
    return one_row and enough and not stores and quantizes_fp4_pairs(spec, input_dtype)


def check_row(spec: FusedSpec, row: int) -> None:
    """Raise ValueError if no kernel takes rows of ``row`` values."""
    group = spec.quantizer.group
    if group is not None and row % group:
        raise ValueError(f"x has rows of {row} values; allowed: a multiple of the group length {group}")
    if row < 1 or (whole_rows(spec) and row > _LONGEST_ROW):
        raise ValueError(f"x has rows of {row} values; allowed: 1 to {_LONGEST_ROW}")


def launch(
    spec: FusedSpec,
    x: torch.Tensor,
    other: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Run the fused kernel of ``spec``.

    Args:
        x: (..., N) float32, bfloat16 or float16; leading dims that collapse to one stride are not copied.
        other: as x: the residual or the gate of a norm, or the up half of a gated activation.
        weight: (N,) float.
        given: one float, the calibrated scale that the quantizer's terms read.

    Returns:
        codes (..., N), or for FP4 (..., N // 2); the scale if the spec returns one: (..., N // group), as its layout stores it, or (1,)
        for a whole tensor; then the residual sum and the prologue's value if the spec asks for them. All contiguous.
    """
    return finish(spec, launch_into_buffers(spec, x, other, weight, given))


def launch_into_buffers(
    spec: FusedSpec,
    x: torch.Tensor,
    other: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> list[torch.Tensor]:
    """As :func:`launch`, returning the buffers it allocated; ``wrap`` is applied to a kernel before each launch."""
    spec = with_cheaper_scales(spec, x.dtype)
    x, x_stride = rows_of(x)
    other, other_stride = (None, None) if other is None else rows_of(other)
    config = configure(spec, x.shape[-1], x.numel() // x.shape[-1], x.dtype)
    grid, division = _divided(spec, config, x)
    outputs = _buffers(spec, x, filled=division["PAD_ROWS"] is None)
    named = dict(zip(output_names(spec), outputs, strict=True))
    arguments = {
        "x_ptr": x,
        "other_ptr": other,
        "weight_ptr": weight if weight is None or weight.is_contiguous() else weight.contiguous(),
        "given_ptr": given,
        "code_ptr": named["code"],
        "scale_ptr": named.get("scale"),
        "sum_ptr": named.get("sum"),
        "value_ptr": named.get("value"),
        "x_stride": _unless_known(spec, x_stride, x.shape[-1]),
        "other_stride": _unless_known(spec, other_stride, x.shape[-1]),
        "ESTIMATES": _takes_estimates(spec, x),
        "PEAK": _peak(spec, config),
        **division,
        **constants(spec, x.dtype),
        "num_warps": config.warps,
    }
    if config.parts > 1:
        wrap(fused_quant_split_kernel)[grid](**arguments)
        return outputs
    arguments["amax_ptr"] = None
    if spec.quantizer.granularity is Granularity.TENSOR and spec.quantizer.needs_amax:
        amax = _zeros([1], torch.int32, x.device)
        first = dict.fromkeys(("code_ptr", "scale_ptr", "sum_ptr", "value_ptr"))
        wrap(fused_quant_kernel)[grid](
            **{**arguments, **first, "amax_ptr": amax, "PEAK": "store", "FIRST_WEIGHT": False}
        )
        arguments |= {"amax_ptr": amax, "PEAK": "load"}
    wrap(fused_quant_kernel)[grid](**arguments)
    return outputs


def _divided(spec: FusedSpec, config: LaunchConfig, x: torch.Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How programs divide x: their grid, and what they are told of it."""
    row = x.shape[-1]
    count = x.numel() // row
    # Of a row that programs share, and where a whole tensor shares the scale, what a program takes may as well be a group.
    free = spec.quantizer.group is None and (config.parts > 1 or not whole_rows(spec))
    group = config.lanes if free else group_length(spec, row)
    columns = -(-row // group)
    one_matrix = all(isinstance(size, int) and size == 1 for size in x.shape[:-2])
    pads = one_matrix and _writes_padding(spec, config, count, columns)
    pad_rows, pad_groups = multiples(spec.layout) if pads else (None, None)
    pad_tile = max(config.rows, min(pad_rows or 1, _PAD_SCALES // config.groups)) if pads else None
    if config.parts > 1:
        of_kernel: dict[str, Any] = {"PARTS": config.parts}
    else:
        of_kernel = {
            "ROWS": config.rows,
            "LATE_WEIGHT": config.late_weight,
            "FIRST_WEIGHT": config.first_weight,
            "NARROW": config.narrow,
            "SEGMENT": _SEGMENT if _reads_segments(spec, config, x.dtype) else None,
        }
    # Three dimensions: Inductor's launchers take no fewer.
    return (*_programs(spec, config, count, columns, pad_tile), 1), {
        "M": count,
        "scale_rows": None if spec.layout is ScaleLayout.ROW else x.shape[-2],
        "N": row,
        "GROUP": group,
        "GROUPS": config.groups,
        "LANES": config.lanes,
        **of_kernel,
        "INLINE_MEAN": config.inline_mean,
        "OWN_SCALES": config.own_scales,
        "WARPS": config.warps if _in_warps(spec, row, config) else None,
        "ONE_MATRIX": one_matrix,
        "PAD_TILE": pad_tile,
        "PAD_ROWS": pad_rows,
        "PAD_GROUPS": pad_groups,
    }


def _unless_known(spec: FusedSpec, stride: Any, row: int) -> Any:
    """The distance of rows, or None where a norm of sums, whose kernel is compiled for it, finds them at their length."""
    # us: add + RMSNorm of 8 x 7168 2.41 -> 2.33, of 32 x 2048 1.67 -> 1.56. Where the assembler knows the distance of gates' halves, it waits
    # for one before it asks for the other.
    return None if adds_rows(spec.prologue) and isinstance(stride, int) and stride == row else stride


def _peak(spec: FusedSpec, config: LaunchConfig) -> str:
    """Where a kernel finds the amax: of groups of its tile, or of the row of which it has a part."""
    if not spec.quantizer.needs_amax:
        return "none"
    return "row" if config.parts > 1 and spec.quantizer.group is None else "group"


def _programs(spec: FusedSpec, config: LaunchConfig, rows: Any, columns: int, pad_tile: int | None) -> tuple[Any, int]:
    """How many programs there are by rows and by columns of scales; below the tiles, those of ``pad_tile`` rows of padding."""
    tiles = -(-rows // config.rows)
    if pad_tile is None:
        return tiles, -(-columns // config.groups)
    # Of a symbolic number of rows, as many as there may be.
    of_rows, _ = multiples(spec.layout)
    spare = (
        max(0, padded(spec.layout, rows, columns)[0] - tiles * config.rows) if isinstance(rows, int) else of_rows - 1
    )
    return tiles + -(-spare // pad_tile), -(-padded(spec.layout, 1, columns)[1] // config.groups)


def _takes_estimates(spec: FusedSpec, x: torch.Tensor) -> bool:
    """Whether the activation can be computed from estimates: of 16-bit values, which were all compared on an H200.

    In the interpreter that is PyTorch's own activation of such values.
    """
    if not isinstance(spec.prologue, GatedActivation) or not spec.prologue.keeps(x.dtype):
        return False
    return INTERPRETED or _runs_on_sm_90(x.device)


def _runs_on_sm_90(device: torch.device) -> bool:
    on_gpu = device.type == "cuda" and torch.version.cuda is not None and torch.cuda.is_available()
    return on_gpu and torch.cuda.get_device_capability(device) == (9, 0)


def output_names(spec: FusedSpec) -> list[str]:
    """What the op of ``spec`` returns, in order."""
    optional = {"scale": spec.quantizer.scale, "sum": spec.sum_output, "value": spec.value_output}
    return ["code", *(name for name, wanted in optional.items() if wanted is not None)]


def written(arguments: dict[str, Any]) -> list[str]:
    """The arguments of a launch that its kernel writes."""
    names = ["code_ptr", "scale_ptr", "sum_ptr", "value_ptr"]
    if arguments["PEAK"] == "store":
        names.append("amax_ptr")
    return [name for name in names if arguments[name] is not None]


def _writes_padding(spec: FusedSpec, config: LaunchConfig, rows: Any, columns: int) -> bool:
    """Whether the kernel writes the zeros between the scales of a single matrix, so that nothing must fill them before.

    Programs of whole rows write no other groups than those that a power of two gives them.
    """
    if spec.quantizer.granularity is Granularity.TENSOR or not has_padding(spec.layout, rows, columns):
        return False
    return not whole_rows(spec) or padded(spec.layout, 1, columns)[1] <= config.groups * config.parts


def allocate(spec: FusedSpec, x: torch.Tensor, filled: bool = True) -> list[torch.Tensor]:
    """The outputs of ``spec`` for an input like x, uninitialised but, if wanted, for padding of the scales."""
    quantizer = spec.quantizer
    lead = list(x.shape[:-1])
    codes = [*lead, x.shape[-1] // quantizer.codes_per_byte]
    outputs = [empty(codes, quantizer.stored, x.device)]
    if quantizer.scale is not None:
        groups = x.shape[-1] // (quantizer.group or x.shape[-1])
        scale, with_padding = [*lead, groups], False
        if quantizer.granularity is Granularity.TENSOR:
            scale = [1]
        elif spec.layout is not ScaleLayout.ROW:
            scale = [*lead[:-1], *allocated(spec.layout, lead[-1], groups)]
            with_padding = has_padding(spec.layout, lead[-1], groups)
        if filled and with_padding:
            outputs.append(_zeros(scale, quantizer.scale_dtype, x.device))
        else:
            outputs.append(empty(scale, quantizer.scale_dtype, x.device))
    extras = [dtype for dtype in (spec.sum_output, spec.value_output) if dtype is not None]
    return outputs + [empty(x.shape, dtype, x.device) for dtype in extras]


def _zeros(size: list[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    # Inductor has no lowering of torch.zeros, only a decomposition, which runs before the pass.
    return torch.full(size, 0, dtype=dtype, device=device)


def _buffers(spec: FusedSpec, x: torch.Tensor, filled: bool) -> list[torch.Tensor]:
    """What kernels write: the outputs, but for codes of a dtype that Triton does not know everywhere as bytes."""
    codes, *others = allocate(spec, x, filled)
    return [storable(codes), *others]


def storable(codes: torch.Tensor) -> torch.Tensor:
    """A buffer for codes: of their dtype, or of bytes if not every Triton backend knows it."""
    unknown = codes.dtype is torch.float8_e4m3fnuz
    return empty(codes.shape, torch.uint8, codes.device) if unknown else codes


def finish(spec: FusedSpec, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs, of the buffers that kernels wrote."""
    codes, *others = buffers
    return [as_codes(spec.quantizer, codes), *others]


def as_codes(quantizer: Quantizer, buffer: torch.Tensor) -> torch.Tensor:
    """The codes that a buffer of :func:`storable` holds."""
    return buffer if buffer.dtype is quantizer.stored else buffer.view(quantizer.stored)


def rows_of(x: torch.Tensor) -> tuple[torch.Tensor, int]:
    """x, and the distance of its rows in values; a copy of x if its rows are not evenly spaced or not contiguous.

    Where no copy is needed x itself is returned, not a view: Inductor computes an unrealised input anew for each view.
    """
    distance = row_distance(x)
    return (x.contiguous(), x.shape[-1]) if distance is None else (x, distance)


def _cast_clamps(quantizer: Quantizer) -> bool:
    """Whether the device's cast clamps to the bounds by itself; the interpreter's cast is PyTorch's, which may not."""
    if quantizer.e2m1 is not None:
        low, high = quantizer.least, quantizer.clamp
        return low is not None and high is not None and low <= -6.0 and high >= 6.0
    emulated = quantizer.code in (torch.int8, torch.float8_e4m3fnuz)
    if INTERPRETED or emulated or quantizer.clamp_low is not None:
        return False
    return quantizer.clamp == torch.finfo(quantizer.code).max


def _ordinary(quantizer: Quantizer) -> bool:
    """Whether every finite divisor is from 2^-80 to 2^126, where quotients need no rescaling."""
    least, most = bounds(quantizer.factor, torch.finfo(torch.float32).max)
    return least >= 2.0**-80 and most <= 2.0**126


def overflow(quantizer: Quantizer) -> int | None:
    """The code of a value too large for the dtype, or None where no value is or the cast saturates."""
    if quantizer.code not in LARGEST or (quantizer.clamp is not None and quantizer.clamp <= LARGEST[quantizer.code]):
        return None
    return overflow_code(quantizer.code)


@cache
def constants(spec: FusedSpec, input_dtype: torch.dtype) -> dict[str, Any]:
    """The compile-time arguments that follow from the spec and from what x is of."""
    return {
        "PROLOGUE": json.dumps(_prologue_constants(spec)),
        **quantizer_constants(
            spec.quantizer, int8_needs_no_bounds(spec, input_dtype), quantizes_fp4_pairs(spec, input_dtype)
        ),
        "LAYOUT": spec.layout.value,
    }


def _prologue_constants(spec: FusedSpec) -> dict[str, Any]:
    prologue = spec.prologue
    if isinstance(prologue, RMSNorm):
        return {
            "kind": "norm",
            "eps": prologue.eps,
            "mean": prologue.mean.value,
            "root": prologue.root.value,
            "one_plus": prologue.weight is Weight.ONE_PLUS,
            "weight_rounding": DTYPE_NAMES[prologue.shifted],
            "root_rounding": DTYPE_NAMES[prologue.root_rounding],
            "gate": None if prologue.gate is None else prologue.gate.value,
            "gated_rounding": DTYPE_NAMES[prologue.gated],
            "sum_rounding": DTYPE_NAMES[prologue.residual_sum or torch.float32],
            "inner_rounding": DTYPE_NAMES[prologue.normalized],
            "product_rounding": DTYPE_NAMES[prologue.product],
        }
    if isinstance(prologue, GatedActivation):
        return {
            "kind": "gated",
            "inner_rounding": DTYPE_NAMES[prologue.activated],
            "product_rounding": DTYPE_NAMES[prologue.product],
            "activation": prologue.activation.value,
            "alpha": prologue.alpha,
            "limit": prologue.limit,
            "offset": prologue.offset,
            "sigmoid_rounding": DTYPE_NAMES[prologue.inner],
        }
    return {"kind": "none"}


def _whole(quantizer: Quantizer, unbounded: bool) -> str | None:
    """How quotients become whole numbers, if they do.

    ``int8`` is for the nearest even one within bounds that int8 holds, ``unbounded_int8`` where they are not needed.
    """
    low, high = quantizer.least, quantizer.clamp
    if quantizer.rounding is Rounding.CAST:
        return None
    if unbounded:
        return "unbounded_int8"
    int8 = quantizer.rounding is Rounding.NEAREST_EVEN and quantizer.code is torch.int8
    if int8 and low is not None and high is not None and -128 <= low <= 0 <= high <= 127 and low % 1 == high % 1 == 0:
        return "int8"
    return str(quantizer.rounding.value)


@cache
def quantizer_constants(quantizer: Quantizer, unbounded: bool = False, pairs: bool = False) -> dict[str, Any]:
    """The compile-time arguments that follow from the quantizer.

    Args:
        unbounded: int8 codes need no bounds.
        pairs: FP4 codes, and their amaxes, are formed from pairs.
    """
    codes = {
        "divides": quantizer.divides,
        "ordinary": _ordinary(quantizer),
        "quotient_rounding": DTYPE_NAMES[quantizer.quotient],
        "whole": _whole(quantizer, unbounded),
        "adds_zero": quantizer.adds_zero,
        "clamp": None if _cast_clamps(quantizer) else quantizer.clamp,
        "clamp_low": quantizer.least,
        "largest": LARGEST.get(quantizer.code),
        "overflow": overflow(quantizer),
        "ties": None if quantizer.e2m1 is None else quantizer.e2m1.ties.value,
        "sign": None if quantizer.e2m1 is None else quantizer.e2m1.sign.value,
        "nan_code": None if quantizer.e2m1 is None else quantizer.e2m1.nan_code,
        "pairs": pairs,
    }
    return {"PROGRAM": program(quantizer.factor, quantizer.scale), "CODES": json.dumps(codes)}
