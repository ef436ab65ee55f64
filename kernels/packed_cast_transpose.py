"""The cast-transpose of 16-bit values whose factors are powers of two: they stay in pairs until they are codes.

Each warp of a program has 32 rows. Triton gives a thread 8 neighbouring columns and rows of the tile that are as far apart as all warps
reach at once, so rows are numbered such that these are neighbours, too: amaxes in both directions then take two or three exchanges
between threads, four codes of a column make a word, and only words of codes pass through shared memory on their way to the transpose.

A pair is an int32: two neighbouring values of a row, the first in the low half; F16 says that they are f16, not bf16. Which specs this
kernel computes, :func:`fusion_pass.kernels.cast_transpose.packs` says.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import INTERPRETED, cast, high, low, named, pair_of
from .e2m1_pairs import e2m1_four, e2m1_word
from .placement import block_scale_address, code_address
from .scale_program import evaluate
from .tiles import load

BLOCK = 32


# Triton's interpreter runs no PTX: there the same by Triton's own operations, magnitudes as integers, infinity below NaN. Docstrings
# are with the PTX.
if INTERPRETED:

    @triton.jit
    def without_signs(pairs, F16: tl.constexpr):
        return pairs & 0x7FFF7FFF

    @triton.jit
    def largest(magnitudes, AXIS: tl.constexpr, F16: tl.constexpr):
        return tl.max(magnitudes & 0xFFFF, AXIS) | (tl.max(magnitudes >> 16, AXIS) << 16)

    @triton.jit
    def larger_halves(first, second, F16: tl.constexpr):
        first = tl.maximum(first & 0xFFFF, first >> 16)
        return first | (tl.maximum(second & 0xFFFF, second >> 16) << 16)

    @triton.jit
    def fp8_byte(x, dtype: tl.constexpr):
        most: tl.constexpr = 448.0 if dtype == tl.float8e4nv else 57344.0
        clamped = tl.clamp(x, -most, most, propagate_nan=tl.PropagateNan.ALL)
        return cast(clamped, dtype).to(tl.uint8, bitcast=True).to(tl.int32)

    @triton.jit
    def fp8_pair(first, second, dtype: tl.constexpr):
        return fp8_byte(first, dtype) | (fp8_byte(second, dtype) << 8)

else:

    @triton.jit
    def without_signs(pairs, F16: tl.constexpr):
        """The magnitudes of pairs, which of f16 is no instruction of its own."""
        KIND: tl.constexpr = "f16x2" if F16 else "bf16x2"
        return tl.inline_asm_elementwise("abs." + KIND + " $0, $1;", "=r,r", [pairs], tl.int32, is_pure=True, pack=1)

    @triton.jit
    def greater_bf16(a, b):
        """The greater of the first and of the second values of two pairs; NaN if either is."""
        return tl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)

    @triton.jit
    def greater_f16(a, b):
        """As :func:`greater_bf16`."""
        return tl.inline_asm_elementwise("max.NaN.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)

    @triton.jit
    def largest(magnitudes, AXIS: tl.constexpr, F16: tl.constexpr):
        """The maximum along AXIS of both values of each pair; NaN if any is."""
        if F16:
            found = tl.reduce(magnitudes, AXIS, greater_f16)
        else:
            found = tl.reduce(magnitudes, AXIS, greater_bf16)
        return found

    @triton.jit
    def larger_halves(first, second, F16: tl.constexpr):
        """The greater value of each of two pairs, as a pair; NaN if either is."""
        KIND: tl.constexpr = "f16x2" if F16 else "bf16x2"
        return tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; prmt.b32 a, $1, $2, 0x5410; prmt.b32 b, $1, $2, 0x7632; max.NaN."
            + KIND
            + " $0, a, b; }",
            "=r,r,r",
            [first, second],
            tl.int32,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def fp8_pair(first, second, dtype: tl.constexpr):
        """The codes of two f32 tiles, the first in the low byte; PTX takes the one for the high byte first."""
        FORMAT: tl.constexpr = "e4m3x2" if dtype == tl.float8e4nv else "e5m2x2"
        return tl.inline_asm_elementwise(
            "{ .reg .b16 c; cvt.rn.satfinite." + FORMAT + ".f32 c, $2, $1; cvt.u32.u16 $0, c; }",
            "=r,f,f",
            [first, second],
            tl.int32,
            is_pure=True,
            pack=1,
        )


@triton.jit
def paired(x):
    """A tile of 16-bit values as int32, neighbours along the last axis in pairs."""
    first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return pair_of(first, second)


@triton.jit
def block_of(warp, last):
    """The block of rows that a warp has. Past the ``last``, if one is named, warps have that one, too, and write the same: no mask is needed."""
    if last is None:
        block = warp
    else:
        block = tl.minimum(warp, last)
    return block


@triton.jit
def tile_row(index, last, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """The row of the tile that has an index: of each warp's rows, every thread's are neighbours, an eighth as many as columns."""
    OF_THREAD: tl.constexpr = COLUMNS // 8
    THREADS: tl.constexpr = 32 // OF_THREAD
    of_block = OF_THREAD * (index % THREADS) + index // (THREADS * WARPS)
    return 32 * block_of(index // THREADS % WARPS, last) + of_block


@triton.jit
def quantize_rows(
    pairs,
    magnitudes,
    first_row,
    first_column,
    last,
    M,
    N: tl.constexpr,
    code_ptr,
    scale_ptr,
    LAYOUT: tl.constexpr,
    SHUFFLED: tl.constexpr,
    PROGRAM: tl.constexpr,
    F16: tl.constexpr,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Quantize a tile of (32 * WARPS, COLUMNS // 2) pairs in blocks of 32 columns."""
    ROWS: tl.constexpr = 32 * WARPS
    GROUPS: tl.constexpr = COLUMNS // 32
    # Each thread's 8 columns first, two of its rows in a pair; then the four threads of a block of 32 columns.
    octets = largest(tl.reshape(magnitudes, (ROWS, COLUMNS // 8, 4)), 2, F16)
    upper, lower = tl.split(tl.permute(tl.reshape(octets, (2, ROWS // 2, COLUMNS // 8)), (1, 2, 0)))
    peaks = largest(tl.reshape(larger_halves(upper, lower, F16), (ROWS // 2, GROUPS, 4)), 2, F16)
    peak = tl.reshape(tl.permute(tl.join(low(peaks, F16), high(peaks, F16)), (2, 0, 1)), (ROWS, GROUPS))
    factor, scale = evaluate(peak, tl.full(peak.shape, 0.0, tl.float32), PROGRAM)
    rows = tile_row(tl.arange(0, ROWS), last, COLUMNS, WARPS)[:, None]
    groups = first_column // 32 + tl.arange(0, GROUPS)[None, :]
    at = block_scale_address(first_row + rows, groups, M, N // 32, LAYOUT)
    inside = None if N % COLUMNS == 0 else groups < N // 32
    tl.store(scale_ptr + at, cast(scale, scale_ptr.dtype.element_ty), inside)
    first, second = tl.split(tl.reshape(pairs, (ROWS, GROUPS, 8, 2)))
    f = factor[:, :, None]
    # Two pairs make 4 bytes, or of FP4 codes 2. A tile's first address is that of the matrix plus those of the tile.
    quads = tl.arange(0, COLUMNS // 4)[None, :]
    # Told so, Triton finds no more than the two units of a thread to be neighbours: else they would change threads.
    quads = quads // 2 * 2 + quads % 2
    inside = None if N % COLUMNS == 0 else first_column + 4 * quads < N
    UNIT: tl.constexpr = 4 if named(CODES, "ties") is None else 2
    if named(CODES, "ties") is None:
        code = fp8_pair(low(first, F16) * f, high(first, F16) * f, code_ptr.dtype.element_ty) | (
            fp8_pair(low(second, F16) * f, high(second, F16) * f, code_ptr.dtype.element_ty) << 16
        )
        corner = code_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        code = e2m1_word(first, second, f, F16, CODES)
        corner = code_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    corner += code_address(first_row, first_column // 4, N // 4, SHUFFLED, UNIT)
    tl.store(corner + code_address(rows, quads, N // 4, SHUFFLED, UNIT), tl.reshape(code, (ROWS, COLUMNS // 4)), inside)


@triton.jit
def four_rows(pairs, COLUMNS: tl.constexpr, WARPS: tl.constexpr):
    """A tile as the pairs of four neighbouring rows, each (block, thread, pair, four of the thread's rows).

    Undoes :func:`tile_row`: the tile's index counts a thread's rows, then the blocks, then the threads.
    """
    OF_THREAD: tl.constexpr = COLUMNS // 8
    THREADS: tl.constexpr = 32 // OF_THREAD
    by_row = tl.permute(tl.reshape(pairs, (OF_THREAD, WARPS, THREADS, COLUMNS // 2)), (1, 2, 3, 0))
    even, odd = tl.split(tl.reshape(by_row, (WARPS, THREADS, COLUMNS // 2, OF_THREAD // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def quantize_columns(
    pairs,
    magnitudes,
    first_row,
    first_column,
    last,
    M,
    N: tl.constexpr,
    code_ptr,
    scale_ptr,
    LAYOUT: tl.constexpr,
    SHUFFLED: tl.constexpr,
    PROGRAM: tl.constexpr,
    F16: tl.constexpr,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Quantize a tile of (32 * WARPS, COLUMNS // 2) pairs in blocks of 32 rows; codes are written as the transpose's."""
    by_thread = tl.reshape(magnitudes, (COLUMNS // 8, WARPS, 256 // COLUMNS, COLUMNS // 2))
    peaks = largest(largest(by_thread, 0, F16), 1, F16)
    peak = tl.join(low(peaks, F16), high(peaks, F16))
    factor, scale = evaluate(peak, tl.full(peak.shape, 0.0, tl.float32), PROGRAM)
    blocks = first_row // 32 + block_of(tl.arange(0, WARPS), last)[:, None, None]
    columns = first_column + 2 * tl.arange(0, COLUMNS // 2)[None, :, None] + tl.arange(0, 2)[None, None, :]
    at = block_scale_address(columns, blocks, N, M // 32, LAYOUT)
    inside = None if N % COLUMNS == 0 else columns < N
    tl.store(scale_ptr + at, cast(scale, scale_ptr.dtype.element_ty), inside)
    f, g = tl.split(factor)
    f = f[:, None, :, None]
    g = g[:, None, :, None]
    a, b, c, d = four_rows(pairs, COLUMNS, WARPS)
    UNIT: tl.constexpr = 4 if named(CODES, "ties") is None else 2
    if named(CODES, "ties") is None:
        even = fp8_pair(low(a, F16) * f, low(b, F16) * f, code_ptr.dtype.element_ty) | (
            fp8_pair(low(c, F16) * f, low(d, F16) * f, code_ptr.dtype.element_ty) << 16
        )
        odd = fp8_pair(high(a, F16) * g, high(b, F16) * g, code_ptr.dtype.element_ty) | (
            fp8_pair(high(c, F16) * g, high(d, F16) * g, code_ptr.dtype.element_ty) << 16
        )
        corner = code_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        # The low half has four rows' codes of the even columns, the high half those of the odd ones.
        both = e2m1_four(a, c, f, g, F16, CODES) + e2m1_four(b, d, f, g, F16, CODES) * 16
        even, odd = both.to(tl.int16), (both >> 16).to(tl.int16)
        corner = code_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    code = tl.reshape(tl.permute(tl.join(even, odd), (2, 4, 0, 1, 3)), (COLUMNS, 8 * WARPS))
    column = first_column + tl.arange(0, COLUMNS)[:, None]
    quads = tl.arange(0, 8 * WARPS)
    if last is not None:
        quads = tl.max_contiguous(tl.multiple_of(quads % 8 + 8 * block_of(quads // 8, last), 8), 8)
    quads = first_row // 4 + quads[None, :]
    inside = None if N % COLUMNS == 0 else column < N
    tl.store(corner + code_address(column, quads, M // 4, SHUFFLED, UNIT), code, inside)


@triton.jit
def packed_cast_transpose_kernel(
    x_ptr,
    row_code_ptr,
    row_scale_ptr,
    column_code_ptr,
    column_scale_ptr,
    M,
    x_stride,
    N: tl.constexpr,
    FULL: tl.constexpr,
    ROW_LAYOUT: tl.constexpr,
    ROW_SHUFFLED: tl.constexpr,
    COLUMN_LAYOUT: tl.constexpr,
    COLUMN_SHUFFLED: tl.constexpr,
    PROGRAM: tl.constexpr,
    CODES: tl.constexpr,
    COLUMNS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """One program: a tile of 32 * WARPS rows and 32 or 64 COLUMNS of bf16 or f16 x (M, N), both multiples of 32.

    FULL promises that tiles cover the rows exactly.

    The grid has strips of tiles, all columns of a strip after another: rows within a strip, columns, strips.
    """
    first_row = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * (32 * WARPS)
    first_column = tl.program_id(1).to(tl.int64) * COLUMNS
    last = None
    if not FULL:
        if first_row >= M:
            return
        last = (M - first_row).to(tl.int32) // 32 - 1
    rows = tile_row(tl.arange(0, 32 * WARPS), last, COLUMNS, WARPS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    inside = None if N % COLUMNS == 0 else first_column + columns < N
    corner = x_ptr + (first_row * x_stride + first_column)
    pairs = paired(load(corner + (rows.to(tl.int64) * x_stride + columns), inside))
    magnitudes = without_signs(pairs, x_ptr.dtype.element_ty == tl.float16)
    quantize_rows(
        pairs,
        magnitudes,
        first_row,
        first_column,
        last,
        M,
        N,
        row_code_ptr,
        row_scale_ptr,
        ROW_LAYOUT,
        ROW_SHUFFLED,
        PROGRAM,
        x_ptr.dtype.element_ty == tl.float16,
        CODES,
        COLUMNS,
        WARPS,
    )
    quantize_columns(
        pairs,
        magnitudes,
        first_row,
        first_column,
        last,
        M,
        N,
        column_code_ptr,
        column_scale_ptr,
        COLUMN_LAYOUT,
        COLUMN_SHUFFLED,
        PROGRAM,
        x_ptr.dtype.element_ty == tl.float16,
        CODES,
        COLUMNS,
        WARPS,
    )
