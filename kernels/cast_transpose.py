"""The kernel of a cast-transpose: a tile is read once, and quantized along its rows and along its columns."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from fusion_pass.cast_transpose import BlockScales, CastTransposeSpec, Placement
from fusion_pass.layouts import pack_blocked, pack_mfma_shuffled, pack_mx_shuffled
from fusion_pass.specs import FusedSpec, NoPrologue, Quantizer

from .arithmetic import amax, cast, named, widened
from .cheaper_scales import casts_by_powers_of_two, cheaper, fp4_of_pairs
from .fused_quant import quantized
from .launch import as_codes, overflow, quantizer_constants, rows_of, storable
from .packed_cast_transpose import BLOCK, packed_cast_transpose_kernel
from .placement import block_scale_address, code_address
from .reference import reference
from .tiles import load

# Measured on an H200 among tiles of 32 to 128 by 32 to 128.
_TILE_ROWS = 32
_TILE_COLUMNS = 128
# Rows of tiles that are worked through together, so that what is read and what is written lies side by side either way: of
# 65536 x 2880 values, MXFP8 took 283.6 us in the order of rows, 226.8 to 227.6 by 1 to 8, where bare traffic takes 220.
_STRIP = 8


@triton.jit
def quantize_tile(
    x,
    first_row,
    first_column,
    ROWS,
    COLUMNS,
    code_ptr,
    scale_ptr,
    GROUP: tl.constexpr,
    LAYOUT: tl.constexpr,
    SHUFFLED: tl.constexpr,
    PROGRAM: tl.constexpr,
    CODES: tl.constexpr,
):
    """Quantize blocks of GROUP values along the rows of a f32 tile of a (ROWS, COLUMNS) matrix, at the given corner."""
    R: tl.constexpr = x.shape[0]
    G: tl.constexpr = x.shape[1] // GROUP
    rows = (first_row + tl.arange(0, R))[:, None, None]
    groups = (first_column // GROUP + tl.arange(0, G))[None, :, None]
    blocks = tl.reshape(x, (R, G, GROUP))
    peak = amax(blocks, 2)
    present = (rows < ROWS) & (groups < COLUMNS // GROUP)
    given = tl.full(peak.shape, 0.0, tl.float32)
    code, scale = quantized(blocks, peak, given, present, PROGRAM, CODES, code_ptr.dtype.element_ty)
    if named(CODES, "ties") is None:
        columns = groups * GROUP + tl.arange(0, GROUP)[None, None, :]
        tl.store(code_ptr + code_address(rows, columns, COLUMNS, SHUFFLED), code, present)
    else:
        columns = groups * (GROUP // 2) + tl.arange(0, GROUP // 2)[None, None, :]
        tl.store(code_ptr + code_address(rows, columns, COLUMNS // 2, SHUFFLED), code, present)
    at = block_scale_address(rows, groups, ROWS, COLUMNS // GROUP, LAYOUT)
    tl.store(scale_ptr + at, cast(scale, scale_ptr.dtype.element_ty), present)


@triton.jit
def cast_transpose_kernel(
    x_ptr,
    row_code_ptr,
    row_scale_ptr,
    column_code_ptr,
    column_scale_ptr,
    M,
    x_stride,
    N: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr,
    GROUP: tl.constexpr,
    ROW_LAYOUT: tl.constexpr,
    ROW_SHUFFLED: tl.constexpr,
    COLUMN_LAYOUT: tl.constexpr,
    COLUMN_SHUFFLED: tl.constexpr,
    PROGRAM: tl.constexpr,
    CODES: tl.constexpr,
):
    """One program: a TILE_ROWS x TILE_COLUMNS tile of x (M, N). Pointers of an unwanted direction are None."""
    first_row = tl.program_id(0).to(tl.int64) * TILE_ROWS
    first_column = tl.program_id(1).to(tl.int64) * TILE_COLUMNS
    rows = (first_row + tl.arange(0, TILE_ROWS))[:, None]
    columns = (first_column + tl.arange(0, TILE_COLUMNS))[None, :]
    x = widened(load(x_ptr + rows * x_stride + columns, (rows < M) & (columns < N)))
    if row_code_ptr is not None:
        quantize_tile(
            x,
            first_row,
            first_column,
            M,
            N,
            row_code_ptr,
            row_scale_ptr,
            GROUP,
            ROW_LAYOUT,
            ROW_SHUFFLED,
            PROGRAM,
            CODES,
        )
    if column_code_ptr is not None:
        quantize_tile(
            tl.trans(x),
            first_column,
            first_row,
            N,
            M,
            column_code_ptr,
            column_scale_ptr,
            GROUP,
            COLUMN_LAYOUT,
            COLUMN_SHUFFLED,
            PROGRAM,
            CODES,
        )


def launch(spec: CastTransposeSpec, x: torch.Tensor) -> list[torch.Tensor]:
    """Run the kernel on x (..., N) float32, bfloat16 or float16; data and scales of each wanted direction."""
    return finish(spec, launch_into_buffers(spec, x))


def finish(spec: CastTransposeSpec, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs, of the buffers that the kernel wrote."""
    return [as_codes(spec.quantizer, b) if i % 2 == 0 else b for i, b in enumerate(buffers)]


def launch_into_buffers(
    spec: CastTransposeSpec, x: torch.Tensor, wrap: Callable[[Any], Any] = lambda kernel: kernel
) -> list[torch.Tensor]:
    """As :func:`launch`, returning the buffers the kernel wrote; ``wrap`` is applied to it before the launch."""
    row = x.shape[-1]
    spec = replace(spec, quantizer=cheaper(spec.quantizer, x.dtype))
    x, stride = rows_of(x)
    outputs = [storable(out) if i % 2 == 0 else out for i, out in enumerate(spec.allocate(x))]
    count = x.numel() // row
    directed: dict[str, Any] = dict.fromkeys(("row_code_ptr", "row_scale_ptr", "column_code_ptr", "column_scale_ptr"))
    for (name, _), code, scale in zip(spec.placements(), outputs[::2], outputs[1::2], strict=True):
        direction = name.removesuffix("wise")
        directed |= {f"{direction}_code_ptr": code, f"{direction}_scale_ptr": _bytes(scale)}
    for direction, placement in (("ROW", spec.rowwise), ("COLUMN", spec.columnwise)):
        directed[f"{direction}_LAYOUT"] = None if placement is None else placement.scales.value
        directed[f"{direction}_SHUFFLED"] = placement is not None and placement.shuffled
    assert spec.quantizer.group is not None
    arguments = {
        "x_ptr": x,
        "M": count,
        "x_stride": stride,
        "N": row,
        **directed,
        **quantizer_constants(spec.quantizer),
    }
    if packs(spec, x.dtype):
        warps, columns = packed_tile(spec, x.dtype, count, row)
        tiles = -(-count // (BLOCK * warps))
        strip = math.gcd(tiles, _STRIP) if isinstance(tiles, int) else _STRIP
        grid = (strip, -(-row // columns), -(-tiles // strip))
        full = isinstance(count, int) and count % (BLOCK * warps) == 0
        wrap(packed_cast_transpose_kernel)[grid](**arguments, FULL=full, COLUMNS=columns, WARPS=warps, num_warps=warps)
        return outputs
    tile_rows = max(_TILE_ROWS, spec.quantizer.group)
    wrap(cast_transpose_kernel)[(-(-count // tile_rows), -(-row // _TILE_COLUMNS), 1)](
        **arguments,
        TILE_ROWS=tile_rows,
        TILE_COLUMNS=_TILE_COLUMNS,
        GROUP=spec.quantizer.group,
        # FP4 codes take several times the instructions.
        num_warps=2 if spec.quantizer.e2m1 is None else 4,
    )
    return outputs


def packed_tile(spec: CastTransposeSpec, dtype: torch.dtype, rows: Any, row: int) -> tuple[int, int]:
    """Warps, each of which has 32 rows, and columns of a program's tile: few where a matrix leaves processors idle."""
    if not isinstance(rows, int):
        return 4, 64
    if rows * row <= 1 << 18 and row < 4096:
        # us: MXFP8 of 32 x 1024 2.61 -> 1.81, MXFP4 of 96 x 2048 3.26 -> 2.43, of 128 x 1024 2.87 -> 2.20; 256 x 2048 is up to 9 % slower so.
        return (1 if rows <= 32 else 2), 32
    if rows <= 32 and spec.quantizer.e2m1 is not None and dtype is torch.bfloat16:
        # 4096 columns 2.97 -> 2.44, 16384 4.65 -> 3.91; one warp of 64 2.78 and 4.12: its last load waits for the first.
        return 2, 32
    # 32 x 16384 to MXFP8 4.28 -> 3.06, 64 x 4096 3.81 -> 3.05.
    return (1 if rows <= 32 else 2 if rows <= 64 else 4), 64


def packs(spec: CastTransposeSpec, dtype: torch.dtype) -> bool:
    """Whether the kernel of pairs computes a spec: MX blocks of 16-bit values in both directions, with its codes and no others."""
    quantizer = spec.quantizer
    if spec.rowwise is None or spec.columnwise is None or quantizer.group != BLOCK:
        return False
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    if quantizer.e2m1 is not None:
        return fp4_of_pairs(quantizer, dtype)
    if not casts_by_powers_of_two(quantizer):
        return False
    known = quantizer.code in (torch.float8_e4m3fn, torch.float8_e5m2)
    # Casts saturate, here always.
    return known and overflow(quantizer) is None and quantizer.clamp in (None, torch.finfo(quantizer.code).max)


def _bytes(scale: torch.Tensor) -> torch.Tensor:
    return scale.view(torch.uint8) if scale.dtype is torch.float8_e8m0fnu else scale


def written(arguments: dict[str, Any]) -> list[str]:
    """The arguments of a launch that its kernel writes."""
    return [name for name, value in arguments.items() if name.endswith(("code_ptr", "scale_ptr")) and value is not None]


def plain(spec: CastTransposeSpec, x: torch.Tensor) -> list[torch.Tensor]:
    """The reference: x and its transpose quantized in plain PyTorch, then laid out by :mod:`fusion_pass.layouts`."""
    matrix = x.reshape(-1, x.shape[-1])
    results: list[torch.Tensor] = []
    for name, placement in spec.placements():
        source = matrix if name == "rowwise" else matrix.t()
        data, scale = reference(FusedSpec(NoPrologue(), spec.quantizer), source)
        results += [_shuffled(data) if placement.shuffled else data, _placed(spec.quantizer, placement, scale)]
    return results


def _shuffled(data: torch.Tensor) -> torch.Tensor:
    return pack_mfma_shuffled(data.view(torch.uint8)).view(data.dtype).reshape(data.shape)


def _placed(quantizer: Quantizer, placement: Placement, scale: torch.Tensor) -> torch.Tensor:
    layout = placement.scales
    if layout is BlockScales.LINEAR:
        return scale
    if layout is BlockScales.PADDED:
        rows, blocks = layout.allocated(*scale.shape)
        padded = scale.new_zeros((rows, blocks))
        padded[: scale.shape[0], : scale.shape[1]] = scale
        return padded
    pack = pack_mx_shuffled if layout is BlockScales.SHUFFLED else pack_blocked
    return pack(scale.view(torch.uint8)).view(quantizer.scale_dtype).reshape(layout.allocated(*scale.shape))
