"""The kernel for few long rows: several programs to a row, each of which reads all of it and quantizes a part."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import amax, cast, named, whole_amax
from .fused_quant import adds_residual, norm_factor, store_padding, store_quantized, summed, value_of
from .tiles import inside_row, load_at, vector_of


@triton.jit
def fused_quant_split_kernel(
    x_ptr,
    other_ptr,
    weight_ptr,
    given_ptr,
    code_ptr,
    scale_ptr,
    sum_ptr,
    value_ptr,
    M,
    scale_rows,
    x_stride,
    other_stride,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    INLINE_MEAN: tl.constexpr,
    OWN_SCALES: tl.constexpr,
    WARPS: tl.constexpr,
    ESTIMATES: tl.constexpr,
    PEAK: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PROGRAM: tl.constexpr,
    CODES: tl.constexpr,
    LAYOUT: tl.constexpr,
    ONE_MATRIX: tl.constexpr,
    PAD_TILE: tl.constexpr,
    PAD_ROWS: tl.constexpr,
    PAD_GROUPS: tl.constexpr,
):
    """One program: a part of a row, GROUPS groups x LANES >= GROUP values, of which PARTS cover the row.

    It finds by itself what depends on the whole row: a norm's factor and, with PEAK ``row``, the amax. Where a row in one
    program leaves most processors idle, that costs less time than quantizing the row takes one of them.

    Arguments are those of :func:`fused_quant_kernel`; where one scale is for more than a group, GROUP is the length of a part.
    WARPS is the number of warps where :func:`in_warps` knows how to find a row's values in them; else None.
    """
    if PAD_ROWS is not None:  # noqa: SIM102  # Triton decides the one while it compiles.
        if (tl.program_id(0) >= M) | (tl.program_id(1) * GROUPS >= N // GROUP):
            store_padding(scale_ptr, M, N // GROUP, LAYOUT, 1, GROUPS, PAD_TILE, PAD_ROWS, PAD_GROUPS)
            return
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * (N if x_stride is None else x_stride)
    if other_ptr is not None:
        other_ptr += row * (N if other_stride is None else other_stride)
    lanes = tl.arange(0, LANES)[None, None, :]
    groups = (tl.program_id(1) * GROUPS + tl.arange(0, GROUPS))[None, :, None]
    columns = groups * GROUP + lanes
    mask = inside_row(columns, lanes, N, GROUP, GROUPS)
    # All is asked for before the row is added up: loads do not move before the barriers of a sum.
    given = None
    if given_ptr is not None:
        given = tl.load(given_ptr).to(tl.float32)
    x = load_at(x_ptr, columns, mask)
    other = load_at(other_ptr, columns, mask)
    weight = load_at(weight_ptr, columns, mask)

    row_columns = tl.arange(0, GROUPS * PARTS)[None, :, None] * GROUP + lanes
    inside = inside_row(row_columns, lanes, N, GROUP, GROUPS * PARTS)
    row_x = load_at(x_ptr, row_columns, inside)
    row_other = load_at(other_ptr if PEAK == "row" or adds_residual(PROLOGUE, other_ptr) else None, row_columns, inside)
    row_weight = load_at(weight_ptr if PEAK == "row" else None, row_columns, inside)
    OF: tl.constexpr = row_x.dtype if ESTIMATES else tl.float32
    VECTOR: tl.constexpr = vector_of(x_ptr)
    whole = summed(row_x, row_other, None, None, None, PROLOGUE)
    factor = None
    if named(PROLOGUE, "kind") == "norm":
        factor = norm_factor(whole, M, N, GROUP, WARPS, VECTOR, None, INLINE_MEAN, PROLOGUE)
    peak = None
    if PEAK == "row":
        peak = amax(whole_amax(value_of(whole, factor, row_weight, row_other, OF, PROLOGUE), WARPS, VECTOR), 1)

    at = row * N + columns
    value = value_of(summed(x, other, sum_ptr, at, mask, PROLOGUE), factor, weight, other, OF, PROLOGUE)
    if value_ptr is not None:
        tl.store(value_ptr + at, cast(value, value_ptr.dtype.element_ty), mask)
    store_quantized(
        value,
        peak,
        given,
        None,
        code_ptr,
        scale_ptr,
        row + tl.zeros([1, 1, 1], tl.int64),
        groups,
        lanes,
        mask,
        M,
        scale_rows,
        N,
        GROUP,
        None,
        vector_of(sum_ptr, value_ptr),
        None,
        PEAK,
        PROGRAM,
        CODES,
        LAYOUT,
        ONE_MATRIX,
        PAD_ROWS,
        PAD_GROUPS,
        OWN_SCALES,
    )
