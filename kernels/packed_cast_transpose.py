"""The cast-transpose of bf16 whose factors are powers of two: values stay in pairs, and in the registers they were read into.

A program is one warp. Each of its threads reads 16 rows of 8 neighbouring columns: amaxes of columns need one exchange between
threads, those of 32 values in a row two; a thread's codes of a column are neighbours in the transpose, so nothing is transposed
through shared memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import INTERPRETED, cast, e2m1_code, named
from .fused_quant import load
from .placement import block_scale_address, code_address
from .scale_program import evaluate

# A tile has the rows of one MX block; twice the columns take more registers than leave enough warps to a processor.
TILE_ROWS = 32
TILE_COLUMNS = 64


@triton.jit
def low(pair):
    """The first of each pair of bf16 values, in float32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def high(pair):
    """The second of each pair of bf16 values, in float32."""
    return (pair & -65536).to(tl.float32, bitcast=True)


if INTERPRETED:

    @triton.jit
    def paired(x):
        """A bf16 tile as int32, neighbours along the last axis in pairs."""
        first, second = tl.split(
            tl.reshape(x.to(tl.uint16, bitcast=True), (x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2, 2))
        )
        return (first.to(tl.int32) | (second.to(tl.int32) << 16)).to(tl.int32)

    @triton.jit
    def largest(magnitudes, AXIS: tl.constexpr):
        return tl.max(magnitudes & 0xFFFF, AXIS) | (tl.max(magnitudes >> 16, AXIS) << 16)

    @triton.jit
    def fp8_byte(x, dtype: tl.constexpr):
        most: tl.constexpr = 448.0 if dtype == tl.float8e4nv else 57344.0
        clamped = tl.clamp(x, -most, most, propagate_nan=tl.PropagateNan.ALL)
        return cast(clamped, dtype).to(tl.uint8, bitcast=True).to(tl.int32)

    @triton.jit
    def fp8_pair(first, second, dtype: tl.constexpr):
        return fp8_byte(first, dtype) | (fp8_byte(second, dtype) << 8)

    @triton.jit
    def e2m1_pair(pair, first, second, CODES: tl.constexpr):
        TIES: tl.constexpr = named(CODES, "ties")
        SIGN: tl.constexpr = named(CODES, "sign")
        NAN_CODE: tl.constexpr = named(CODES, "nan_code")
        low_code = e2m1_code(low(pair) * first, TIES, SIGN, NAN_CODE)
        return low_code | (e2m1_code(high(pair) * second, TIES, SIGN, NAN_CODE) << 16)

else:

    @triton.jit
    def paired(x):
        """A bf16 tile as int32, neighbours along the last axis in pairs."""
        first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2], x.shape[3] // 2, 2)))
        return tl.inline_asm_elementwise(
            "mov.b32 $0, {$1, $2};", "=r,h,h", [first, second], tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def greater_pair(a, b):
        return tl.inline_asm_elementwise("max.NaN.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)

    @triton.jit
    def largest(magnitudes, AXIS: tl.constexpr):
        """The maximum along AXIS of both values of each pair; NaN if any is."""
        return tl.reduce(magnitudes, AXIS, greater_pair)

    @triton.jit
    def fp8_pair(first, second, dtype: tl.constexpr):
        """The codes of two f32 tiles, the first in the low byte."""
        if dtype == tl.float8e4nv:
            code = tl.inline_asm_elementwise(
                "{ .reg .b16 c; cvt.rn.satfinite.e4m3x2.f32 c, $2, $1; cvt.u32.u16 $0, c; }",
                "=r,f,f",
                [first, second],
                tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            code = tl.inline_asm_elementwise(
                "{ .reg .b16 c; cvt.rn.satfinite.e5m2x2.f32 c, $2, $1; cvt.u32.u16 $0, c; }",
                "=r,f,f",
                [first, second],
                tl.int32,
                is_pure=True,
                pack=1,
            )
        return code

    @triton.jit
    def e2m1_pair(pair, first, second, CODES: tl.constexpr):
        """The E2M1 codes of a pair of bf16 values times two powers of two, each in the low bits of its half.

        A code is the integer next to the least of 2v, v + 2 and v / 2 + 4, at most 7: the three lines meet where the step
        between E2M1 values doubles. In bf16, a sum of 128 or more is rounded to an integer, halves to even, and an fma rounds
        once. Other ties, and signs that need the product as eager code has it, go by way of f16 times 2^-14: there the values
        below 1 are subnormal as in E2M1, so that rounding is an addition to the bits; a NaN that min keeps becomes 0 there.
        """
        TIES: tl.constexpr = named(CODES, "ties")
        SIGN: tl.constexpr = named(CODES, "sign")
        NAN_CODE: tl.constexpr = named(CODES, "nan_code")
        if TIES == "even":
            tl.static_assert(SIGN == "kept" and NAN_CODE == 7)
            factors = ((first.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | (second.to(tl.int32, bitcast=True) & -65536)
            code = tl.inline_asm_elementwise(
                """
                {
                    .reg .b32 z, v, m, a, b, c, s, k, l;
                    mov.b32 z, 0x80008000;
                    fma.rn.bf16x2 v, $1, $2, z;
                    and.b32 m, v, 0x7fff7fff;
                    mov.b32 k, 0x40004000;
                    mov.b32 l, 0x43004300;
                    fma.rn.bf16x2 a, m, k, l;
                    mov.b32 k, 0x3f803f80;
                    mov.b32 l, 0x43024302;
                    fma.rn.bf16x2 b, m, k, l;
                    mov.b32 k, 0x3f003f00;
                    mov.b32 l, 0x43044304;
                    fma.rn.bf16x2 c, m, k, l;
                    mov.b32 k, 0x43074307;
                    min.bf16x2 a, a, b;
                    min.bf16x2 c, c, k;
                    min.bf16x2 a, a, c;
                    and.b32 a, a, 0x00070007;
                    shr.b32 s, v, 12;
                    and.b32 s, s, 0x00080008;
                    or.b32 $0, a, s;
                }
                """,
                "=r,r,r",
                [pair, factors],
                tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            a = low(pair) * first
            b = high(pair) * second
            if SIGN == "negative":
                # A zero product keeps no sign.
                a += 0.0
                b += 0.0
            HALF: tl.constexpr = 0x01000100 if TIES == "away" else 0x00FF00FF
            value = tl.inline_asm_elementwise(
                "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], tl.int32, is_pure=True, pack=1
            )
            if NAN_CODE == 0:
                bits = tl.inline_asm_elementwise(
                    """
                    {
                        .reg .b32 m, k;
                        and.b32 m, $1, 0x7fff7fff;
                        mov.b32 k, 0x04000400;
                        mul.rn.f16x2 m, m, k;
                        mov.b32 k, 0x0e000e00;
                        min.NaN.f16x2 $0, m, k;
                    }
                    """,
                    "=r,r",
                    [value],
                    tl.int32,
                    is_pure=True,
                    pack=1,
                )
            else:
                tl.static_assert(NAN_CODE == 7)
                bits = tl.inline_asm_elementwise(
                    """
                    {
                        .reg .b32 m, k;
                        and.b32 m, $1, 0x7fff7fff;
                        mov.b32 k, 0x04000400;
                        mul.rn.f16x2 m, m, k;
                        mov.b32 k, 0x0e000e00;
                        min.f16x2 $0, m, k;
                    }
                    """,
                    "=r,r",
                    [value],
                    tl.int32,
                    is_pure=True,
                    pack=1,
                )
            code = (((bits + HALF) >> 9) & 0x00070007) | ((value >> 12) & 0x00080008)
        return code


@triton.jit
def quantize_rows(
    pairs,
    magnitudes,
    first_row,
    first_column,
    M,
    N: tl.constexpr,
    FULL: tl.constexpr,
    code_ptr,
    scale_ptr,
    LAYOUT: tl.constexpr,
    SHUFFLED: tl.constexpr,
    PROGRAM: tl.constexpr,
    CODES: tl.constexpr,
):
    """Quantize a (ROWS, PARTS, OCTETS, 4) tile of pairs, (row, part of the tile, octet of columns, pair), by 32 columns."""
    ROWS: tl.constexpr = pairs.shape[0]
    PARTS: tl.constexpr = pairs.shape[1]
    BLOCKS: tl.constexpr = pairs.shape[2] // 4
    octets = largest(magnitudes, 3)
    in_octet = tl.maximum(octets & -65536, octets << 16)
    peak = tl.max(tl.reshape(in_octet, (ROWS, PARTS, BLOCKS, 4)), 3).to(tl.float32, bitcast=True)
    factor, scale = evaluate(peak, tl.full(peak.shape, 0.0, tl.float32), PROGRAM)
    rows = tl.arange(0, ROWS)[:, None, None] + ROWS * tl.arange(0, PARTS)[None, :, None]
    groups = first_column // 32 + tl.arange(0, BLOCKS)[None, None, :]
    at = block_scale_address(first_row + rows, groups, M, N // 32, LAYOUT)
    tl.store(scale_ptr + at, cast(scale, scale_ptr.dtype.element_ty), None if FULL else groups < N // 32)
    first, second = tl.split(tl.reshape(pairs, (ROWS, PARTS, BLOCKS, 4, 2, 2)))
    f = factor[:, :, :, None, None]
    rows = rows[:, :, :, None, None]
    octet = 4 * tl.arange(0, BLOCKS)[None, None, :, None, None] + tl.arange(0, 4)[None, None, None, :, None]
    quads = 2 * octet + tl.arange(0, 2)[None, None, None, None, :]
    mask = None if FULL else first_column + 4 * quads < N
    # Two pairs make 4 bytes, or of FP4 codes 2. A tile's first address is that of the matrix plus those of the tile.
    if named(CODES, "ties") is None:
        code = fp8_pair(low(first) * f, high(first) * f, code_ptr.dtype.element_ty) | (
            fp8_pair(low(second) * f, high(second) * f, code_ptr.dtype.element_ty) << 16
        )
        corner = code_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        corner += code_address(first_row, first_column // 4, N // 4, SHUFFLED, 4)
        tl.store(corner + code_address(rows, quads, N // 4, SHUFFLED, 4), code, mask)
    else:
        spread = e2m1_pair(first, f, f, CODES) | (e2m1_pair(second, f, f, CODES) << 8)
        code = spread | (spread >> 12)
        corner = code_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
        corner += code_address(first_row, first_column // 4, N // 4, SHUFFLED, 2)
        tl.store(corner + code_address(rows, quads, N // 4, SHUFFLED, 2), code.to(tl.int16), mask)


@triton.jit
def four_rows(pairs):
    """A (ROWS, PARTS, OCTETS, 4) tile as the pairs of four neighbouring rows, each (part, octet, pair, rows // 4)."""
    by_row = tl.permute(pairs, (1, 2, 3, 0))
    by_row = tl.reshape(by_row, (by_row.shape[0], by_row.shape[1], 4, by_row.shape[3] // 4, 2, 2))
    even, odd = tl.split(by_row)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def quantize_columns(
    pairs,
    magnitudes,
    first_row,
    first_column,
    M,
    N: tl.constexpr,
    FULL: tl.constexpr,
    code_ptr,
    scale_ptr,
    LAYOUT: tl.constexpr,
    SHUFFLED: tl.constexpr,
    PROGRAM: tl.constexpr,
    CODES: tl.constexpr,
):
    """Quantize a (ROWS, PARTS, OCTETS, 4) tile of pairs, (row, part of the tile, octet of columns, pair), by its 32 rows."""
    ROWS: tl.constexpr = pairs.shape[0]
    PARTS: tl.constexpr = pairs.shape[1]
    OCTETS: tl.constexpr = pairs.shape[2]
    peaks = largest(largest(magnitudes, 0), 0)
    peak = tl.join(low(peaks), high(peaks))
    factor, scale = evaluate(peak, tl.full(peak.shape, 0.0, tl.float32), PROGRAM)
    columns = first_column + 8 * tl.arange(0, OCTETS)[:, None, None]
    columns += 2 * tl.arange(0, 4)[None, :, None] + tl.arange(0, 2)[None, None, :]
    at = block_scale_address(columns, first_row // 32, N, M // 32, LAYOUT)
    tl.store(scale_ptr + at, cast(scale, scale_ptr.dtype.element_ty), None if FULL else columns < N)
    f, g = tl.split(factor)
    f = f[None, :, :, None]
    g = g[None, :, :, None]
    a, b, c, d = four_rows(pairs)
    if named(CODES, "ties") is None:
        even = fp8_pair(low(a) * f, low(b) * f, code_ptr.dtype.element_ty) | (
            fp8_pair(low(c) * f, low(d) * f, code_ptr.dtype.element_ty) << 16
        )
        odd = fp8_pair(high(a) * g, high(b) * g, code_ptr.dtype.element_ty) | (
            fp8_pair(high(c) * g, high(d) * g, code_ptr.dtype.element_ty) << 16
        )
        UNIT: tl.constexpr = 4
        unit = code_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        both = e2m1_pair(a, f, g, CODES) | (e2m1_pair(b, f, g, CODES) << 4)
        both |= (e2m1_pair(c, f, g, CODES) << 8) | (e2m1_pair(d, f, g, CODES) << 12)
        even, odd = both, both >> 16
        even, odd = even.to(tl.int16), odd.to(tl.int16)
        UNIT: tl.constexpr = 2
        unit = code_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    # (pair, column of the pair, part, octet, rows // 4): threads lie in memory as they lie in the tile.
    code = tl.permute(tl.join(even, odd), (2, 4, 0, 1, 3))
    column = first_column + 8 * tl.arange(0, OCTETS)[None, None, None, :, None]
    column += 2 * tl.arange(0, 4)[:, None, None, None, None] + tl.arange(0, 2)[None, :, None, None, None]
    quads = first_row // 4 + ROWS // 4 * tl.arange(0, PARTS)[None, None, :, None, None]
    quads += tl.arange(0, ROWS // 4)[None, None, None, None, :]
    tl.store(unit + code_address(column, quads, M // 4, SHUFFLED, UNIT), code, None if FULL else column < N)


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
    ROW_LAYOUT: tl.constexpr,
    ROW_SHUFFLED: tl.constexpr,
    COLUMN_LAYOUT: tl.constexpr,
    COLUMN_SHUFFLED: tl.constexpr,
    PROGRAM: tl.constexpr,
    CODES: tl.constexpr,
    OCTETS: tl.constexpr,
):
    """One program: 32 rows and OCTETS, 8 or 16, times 8 columns of bf16 x (M, N), both multiples of 32."""
    first_row = tl.program_id(0).to(tl.int64) * 32
    first_column = tl.program_id(1).to(tl.int64) * (8 * OCTETS)
    rows = tl.arange(0, OCTETS)[:, None, None, None] + OCTETS * tl.arange(0, 32 // OCTETS)[None, :, None, None]
    columns = first_column + 8 * tl.arange(0, OCTETS)[None, None, :, None] + tl.arange(0, 8)[None, None, None, :]
    FULL: tl.constexpr = N % (8 * OCTETS) == 0
    mask = None if FULL else columns < N
    pairs = paired(load(x_ptr + (first_row + rows) * x_stride + columns, mask))
    magnitudes = pairs & 0x7FFF7FFF
    quantize_rows(
        pairs,
        magnitudes,
        first_row,
        first_column,
        M,
        N,
        FULL,
        row_code_ptr,
        row_scale_ptr,
        ROW_LAYOUT,
        ROW_SHUFFLED,
        PROGRAM,
        CODES,
    )
    quantize_columns(
        pairs,
        magnitudes,
        first_row,
        first_column,
        M,
        N,
        FULL,
        column_code_ptr,
        column_scale_ptr,
        COLUMN_LAYOUT,
        COLUMN_SHUFFLED,
        PROGRAM,
        CODES,
    )
