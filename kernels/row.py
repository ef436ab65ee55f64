"""Row family: a program holds whole rows in registers, for norms and for per-token scales."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import amax, cast, codes, dequantization_scale, round_to, silu


@triton.jit
def row_kernel(
    x_ptr,
    other_ptr,
    weight_ptr,
    code_ptr,
    scale_ptr,
    sum_ptr,
    value_ptr,
    M,
    scale_rows,
    x_stride,
    other_stride,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    EPS: tl.constexpr,
    DIVIDE_MEAN: tl.constexpr,
    SUM_ROUNDING: tl.constexpr,
    INNER_ROUNDING: tl.constexpr,
    PRODUCT_ROUNDING: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
    SCALE_FLOOR: tl.constexpr,
    DIVISOR: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    SCALE_ROUNDING: tl.constexpr,
    EXACT_QUOTIENT: tl.constexpr,
    CLAMP: tl.constexpr,
    COLUMN_SCALES: tl.constexpr,
):
    """ROWS rows of N values per program: prologue, then one scale per row (GROUP == N) or per GROUP values.

    x (M, N) with row stride ``x_stride``; other is the residual of a norm or the up half of a gated activation; weight (N,);
    code (M, N) contiguous; scale (M, N // GROUP) f32, or with COLUMN_SCALES blocks of (N // GROUP, scale_rows).
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < M) & (columns < N)
    x = cast(tl.load(x_ptr + rows * x_stride + columns, mask, other=0.0), tl.float32)
    out = rows * N + columns

    if NORM:
        if other_ptr is not None:
            x += cast(tl.load(other_ptr + rows * other_stride + columns, mask, other=0.0), tl.float32)
            if sum_ptr is not None:
                tl.store(sum_ptr + out, cast(x, sum_ptr.dtype.element_ty), mask)
            x = round_to(x, SUM_ROUNDING)
        squares = tl.sum(x * x, 1, keep_dims=True)
        if DIVIDE_MEAN:
            mean = tl.math.div_rn(squares, tl.full(squares.shape, N, tl.float32))
        else:
            # ATen's mean on CUDA multiplies by float(outputs) / float(elements).
            count = M.to(tl.int64) * N
            mean = squares * tl.math.div_rn(M.to(tl.float32), count.to(tl.float32))
        x = round_to(x * tl.math.rsqrt(mean + EPS), INNER_ROUNDING)
        if weight_ptr is not None:
            x *= cast(tl.load(weight_ptr + columns, columns < N, other=0.0), tl.float32)
        x = round_to(x, PRODUCT_ROUNDING)
    if GATED:
        up = cast(tl.load(other_ptr + rows * other_stride + columns, mask, other=0.0), tl.float32)
        x = round_to(round_to(silu(x), INNER_ROUNDING) * up, PRODUCT_ROUNDING)
    if value_ptr is not None:
        tl.store(value_ptr + out, cast(x, value_ptr.dtype.element_ty), mask)

    if GROUP == N:
        scale = dequantization_scale(amax(x, 1), AMAX_FLOOR, SCALE_FLOOR, DIVISOR, MULTIPLIER, SCALE_ROUNDING)
        code = codes(x, scale, CLAMP, EXACT_QUOTIENT, code_ptr.dtype.element_ty)
        tl.store(scale_ptr + rows, scale, rows < M)
    else:
        GROUPS: tl.constexpr = BLOCK_N // GROUP
        x = tl.reshape(x, (ROWS, GROUPS, GROUP))
        scale = dequantization_scale(amax(x, 2), AMAX_FLOOR, SCALE_FLOOR, DIVISOR, MULTIPLIER, SCALE_ROUNDING)
        code = tl.reshape(codes(x, scale, CLAMP, EXACT_QUOTIENT, code_ptr.dtype.element_ty), (ROWS, BLOCK_N))
        groups = tl.arange(0, GROUPS)[None, :]
        if COLUMN_SCALES:
            batch = rows // scale_rows
            at = batch * scale_rows * (N // GROUP) + groups * scale_rows + (rows - batch * scale_rows)
        else:
            at = rows * (N // GROUP) + groups
        tl.store(scale_ptr + at, tl.reshape(scale, (ROWS, GROUPS)), (rows < M) & (groups < N // GROUP))
    tl.store(code_ptr + out, code, mask)
