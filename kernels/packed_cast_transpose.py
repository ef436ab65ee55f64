"""The cast-transpose of 16-bit values whose factors are powers of two: they stay in pairs until they are codes.

A program is four warps, each with 32 rows of 64 columns. Triton gives a thread 8 neighbouring columns and every 16th row of the
tile, so rows are numbered such that these are neighbours, too: amaxes in both directions then take two exchanges between threads,
four codes of a column make a word, and only words of codes pass through shared memory on their way to the transpose.

A pair is an int32: two neighbouring values of a row, the first in the low half; F16 says that they are f16, not bf16. Which specs this
kernel computes, :func:`fusion_pass.kernels.cast_transpose.packs` says.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import INTERPRETED, cast, e2m1_code, high, low, named, times
from .fused_quant import load
from .placement import block_scale_address, code_address
from .scale_program import evaluate

# What a launch must know. The device functions are written for these shapes, and have them as numbers.
TILE_ROWS = 128
TILE_COLUMNS = 64
WARPS = 4
BLOCK = 32


# Triton's interpreter runs no PTX: there the same by Triton's own operations, magnitudes as integers, infinity below NaN. Docstrings
# are with the PTX.
if INTERPRETED:

    @triton.jit
    def paired(x):
        """A tile of 16-bit values as int32, neighbours along the last axis in pairs."""
        first, second = tl.split(tl.reshape(x.to(tl.uint16, bitcast=True), (x.shape[0], x.shape[1] // 2, 2)))
        return (first.to(tl.int32) | (second.to(tl.int32) << 16)).to(tl.int32)

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

    @triton.jit
    def e2m1_four(a, b, first, second, F16: tl.constexpr, CODES: tl.constexpr):
        TIES: tl.constexpr = named(CODES, "ties")
        SIGN: tl.constexpr = named(CODES, "sign")
        NAN_CODE: tl.constexpr = named(CODES, "nan_code")
        lows = e2m1_code(low(a, F16) * first, TIES, SIGN, NAN_CODE)
        lows |= e2m1_code(low(b, F16) * first, TIES, SIGN, NAN_CODE) << 8
        highs = e2m1_code(high(a, F16) * second, TIES, SIGN, NAN_CODE)
        highs |= e2m1_code(high(b, F16) * second, TIES, SIGN, NAN_CODE) << 8
        return lows | (highs << 16)

else:

    @triton.jit
    def paired(x):
        """A tile of 16-bit values as int32, neighbours along the last axis in pairs."""
        first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        return tl.inline_asm_elementwise(
            "mov.b32 $0, {$1, $2};", "=r,h,h", [first, second], tl.int32, is_pure=True, pack=1
        )

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
    def e2m1_four(a, b, first, second, F16: tl.constexpr, CODES: tl.constexpr):
        """The E2M1 codes of two pairs times two powers of two, as bytes: of the first of ``a``, of ``b``, then of their second."""
        TIES: tl.constexpr = named(CODES, "ties")
        SIGN: tl.constexpr = named(CODES, "sign")
        NAN_CODE: tl.constexpr = named(CODES, "nan_code")
        if TIES == "even":
            tl.static_assert(SIGN == "kept")
            codes = e2m1_to_even(a, b, first, second, F16, NAN_CODE)
        else:
            # More bits than a bf16 has would be rounded among the subnormal values.
            tl.static_assert(not F16)
            # Of a sum contracted with its product, a zero would be -0.
            codes = e2m1_by_subnormals(times(low(a, F16), first), times(high(a, F16), second), TIES, SIGN, NAN_CODE)
            codes += (
                e2m1_by_subnormals(times(low(b, F16), first), times(high(b, F16), second), TIES, SIGN, NAN_CODE) * 256
            )
        return codes

    @triton.jit
    def joined(first, second, F16: tl.constexpr):
        """Two f32 tiles as pairs of bf16, or of f16, in which they are at most its largest; NaN stays NaN."""
        KIND: tl.constexpr = "satfinite.f16x2" if F16 else "bf16x2"
        return tl.inline_asm_elementwise(
            "cvt.rn." + KIND + ".f32 $0, $2, $1;", "=r,f,f", [first, second], tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def e2m1_to_even(a, b, first, second, F16: tl.constexpr, NAN_CODE: tl.constexpr):
        """As :func:`e2m1_four`, halves to even, signs kept; NaN has none.

        A code is the integer next to the least of 2v, v + 2 and v / 2 + 4, at most 7: the three lines meet where the step
        between E2M1 values doubles. An fma rounds once, halves to even, and where the last bit of its result is worth one, the
        low bits are the code: in bf16 from 128 on, which is added; in f16 below 2^-14, with all times 2^-24. There v is 2^-10 of
        what it was, so that f16 has every factor, see :func:`fusion_pass.kernels.cheaper_scales.pairs_have_factors`.
        """
        tl.static_assert(NAN_CODE == 7 or NAN_CODE == 4)
        if F16:
            first *= 2.0**-10
            second *= 2.0**-10
        return tl.inline_asm_elementwise(
            to_even(F16, NAN_CODE), "=r,r,r,r", [a, b, joined(first, second, F16)], tl.int32, is_pure=True, pack=1
        )

    @triton.constexpr_function
    def to_even(f16, nan_code):
        """The PTX of :func:`e2m1_to_even`.

        Of bf16, NaN has its code and no sign by what each product is. Of f16, zero times infinity is no product of theirs: there NaN
        has its code by the factor, which is NaN for the whole block, and signs are the values' own.
        """
        if f16:
            kind, slopes, least, most = "f16x2", ["0800", "0400", "0200"], ["0000", "0002", "0004"], "0007"
        else:
            kind, slopes, least, most = "bf16x2", ["4000", "3f80", "3f00"], ["4300", "4302", "4304"], "4307"
        ptx = "{ .reg .b32 a0, a1, a2, b0, b1, b2, v, w, m, n, z, k, l, most, signs;"
        ptx += f"mov.b32 most, 0x{most * 2};"
        if f16:
            lost = 0 if nan_code == 7 else 0x00030003
            ptx += f"mov.b32 z, 0; mov.b32 k, {lost}; fma.rn.{kind} n, $3, z, z; lop3.b32 most, n, k, most, 0x2a;"
        for name, pair, value in [("a", "$1", "v"), ("b", "$2", "w")]:
            if f16:
                ptx += f"abs.{kind} m, {pair}; fma.rn.{kind} m, m, $3, z;"
            else:
                ptx += f"mov.b32 k, 0x80008000; fma.rn.{kind} {value}, {pair}, $3, k; abs.{kind} m, {value};"
            for i in range(3):
                ptx += f"mov.b32 k, 0x{slopes[i] * 2}; mov.b32 l, 0x{least[i] * 2}; fma.rn.{kind} {name}{i}, m, k, l;"
            if nan_code == 4 and not f16:
                # The third line is at least 4, which a maximum gives in place of NaN.
                ptx += f"max.{kind} {name}2, {name}2, l;"
            ptx += f"min.{kind} {name}2, {name}2, most;"
            ptx += f"min.{kind} {name}0, {name}0, {name}1; min.{kind} {name}0, {name}0, {name}2;"
        if f16:
            ptx += "not.b32 n, n; and.b32 signs, n, 0x08080808;"
            ptx += "mad.lo.u32 a0, b0, 256, a0; prmt.b32 m, $1, $2, 0xfbd9; lop3.b32 $0, m, signs, a0, 0xea; }"
        else:
            ptx += "prmt.b32 a0, a0, b0, 0x6240; prmt.b32 m, v, w, 0xfbd9; lop3.b32 $0, m, 0x08080808, a0, 0xea; }"
        return ptx

    @triton.jit
    def e2m1_by_subnormals(a, b, TIES: tl.constexpr, SIGN: tl.constexpr, NAN_CODE: tl.constexpr):
        """The codes next to pairs of f32, each in the low bits of its half; halves go away from zero or towards it.

        The values have no more bits than a bf16. In f16 times 2^-14, the values below 1 are subnormal as in E2M1, so that rounding is an addition to the bits; a NaN that min
        keeps becomes 0 there.
        """
        HALF: tl.constexpr = 0x01000100 if TIES == "away" else 0x00FF00FF
        tl.static_assert(NAN_CODE == 7 or NAN_CODE == 0)
        MINIMUM: tl.constexpr = "min.f16x2" if NAN_CODE == 7 else "min.NaN.f16x2"
        if SIGN == "negative":
            # A zero product keeps no sign.
            a += 0.0
            b += 0.0
        value = joined(a, b, True)
        bits = tl.inline_asm_elementwise(
            """
            {
                .reg .b32 m, k;
                and.b32 m, $1, 0x7fff7fff;
                mov.b32 k, 0x04000400;
                mul.rn.f16x2 m, m, k;
                mov.b32 k, 0x0e000e00;
            """
            + MINIMUM
            + """ $0, m, k;
            }
            """,
            "=r,r",
            [value],
            tl.int32,
            is_pure=True,
            pack=1,
        )
        return (((bits + HALF) >> 9) & 0x00070007) | ((value >> 12) & 0x00080008)


@triton.jit
def tile_row(index):
    """The row of the tile that has an index: of each warp's rows, every thread's 8 are neighbours."""
    return 32 * (index // 4 % 4) + 8 * (index % 4) + index // 16


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
    F16: tl.constexpr,
    CODES: tl.constexpr,
):
    """Quantize a (128, 32) tile of pairs, 64 columns of x, in blocks of 32 columns."""
    # Each thread's 8 columns first, two of its rows in a pair; then the four threads of a block of 32 columns.
    octets = largest(tl.reshape(magnitudes, (128, 8, 4)), 2, F16)
    upper, lower = tl.split(tl.permute(tl.reshape(octets, (2, 64, 8)), (1, 2, 0)))
    peaks = largest(tl.reshape(larger_halves(upper, lower, F16), (64, 2, 4)), 2, F16)
    peak = tl.reshape(tl.permute(tl.join(low(peaks, F16), high(peaks, F16)), (2, 0, 1)), (128, 2))
    factor, scale = evaluate(peak, tl.full(peak.shape, 0.0, tl.float32), PROGRAM)
    rows = tile_row(tl.arange(0, 128))[:, None]
    groups = first_column // 32 + tl.arange(0, 2)[None, :]
    present = first_row + rows < M
    at = block_scale_address(first_row + rows, groups, M, N // 32, LAYOUT)
    inside = None if FULL else present & (groups < N // 32)
    tl.store(scale_ptr + at, cast(scale, scale_ptr.dtype.element_ty), inside)
    first, second = tl.split(tl.reshape(pairs, (128, 2, 8, 2)))
    f = factor[:, :, None]
    # Two pairs make 4 bytes, or of FP4 codes 2. A tile's first address is that of the matrix plus those of the tile.
    quads = tl.arange(0, 16)[None, :]
    # Told so, Triton finds no more than the two units of a thread to be neighbours: else they would change threads.
    quads = quads // 2 * 2 + quads % 2
    inside = None if FULL else present & (first_column + 4 * quads < N)
    UNIT: tl.constexpr = 4 if named(CODES, "ties") is None else 2
    if named(CODES, "ties") is None:
        code = fp8_pair(low(first, F16) * f, high(first, F16) * f, code_ptr.dtype.element_ty) | (
            fp8_pair(low(second, F16) * f, high(second, F16) * f, code_ptr.dtype.element_ty) << 16
        )
        corner = code_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    else:
        # Codes at bits 0, 16, 8 and 24; by 12 further down, the second and fourth are at 4 and 12.
        spread = e2m1_four(first, second, f, f, F16, CODES)
        code = (spread + (spread >> 12)).to(tl.int16)
        corner = code_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
    corner += code_address(first_row, first_column // 4, N // 4, SHUFFLED, UNIT)
    tl.store(corner + code_address(rows, quads, N // 4, SHUFFLED, UNIT), tl.reshape(code, (128, 16)), inside)


@triton.jit
def four_rows(pairs):
    """A (128, 32) tile as the pairs of four neighbouring rows, each (block, thread, pair, half of the thread's rows).

    Undoes :func:`tile_row`: the tile's index is 16 times the row of a thread's 8, plus 4 times the block, plus the thread.
    """
    by_row = tl.permute(tl.reshape(pairs, (8, 4, 4, 32)), (1, 2, 3, 0))
    even, odd = tl.split(tl.reshape(by_row, (4, 4, 32, 2, 2, 2)))
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
    F16: tl.constexpr,
    CODES: tl.constexpr,
):
    """Quantize a (128, 32) tile of pairs, 64 columns of x, in blocks of 32 rows; codes are written as the transpose's."""
    peaks = largest(largest(tl.reshape(magnitudes, (8, 4, 4, 32)), 0, F16), 1, F16)
    peak = tl.join(low(peaks, F16), high(peaks, F16))
    factor, scale = evaluate(peak, tl.full(peak.shape, 0.0, tl.float32), PROGRAM)
    blocks = first_row // 32 + tl.arange(0, 4)[:, None, None]
    columns = first_column + 2 * tl.arange(0, 32)[None, :, None] + tl.arange(0, 2)[None, None, :]
    at = block_scale_address(columns, blocks, N, M // 32, LAYOUT)
    inside = None if FULL else (columns < N) & (blocks < M // 32)
    tl.store(scale_ptr + at, cast(scale, scale_ptr.dtype.element_ty), inside)
    f, g = tl.split(factor)
    f = f[:, None, :, None]
    g = g[:, None, :, None]
    a, b, c, d = four_rows(pairs)
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
    code = tl.reshape(tl.permute(tl.join(even, odd), (2, 4, 0, 1, 3)), (64, 32))
    column = first_column + tl.arange(0, 64)[:, None]
    quads = first_row // 4 + tl.arange(0, 32)[None, :]
    inside = None if FULL else (column < N) & (4 * quads < M)
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
):
    """One program: a 128 x 64 tile of bf16 or f16 x (M, N), both multiples of 32. FULL promises that tiles cover it exactly.

    The grid has strips of tiles, all columns of a strip after another: rows within a strip, columns, strips.
    """
    first_row = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 128
    first_column = tl.program_id(1).to(tl.int64) * 64
    rows = tile_row(tl.arange(0, 128))[:, None]
    columns = tl.arange(0, 64)[None, :]
    inside = None if FULL else (first_row + rows < M) & (first_column + columns < N)
    corner = x_ptr + (first_row * x_stride + first_column)
    pairs = paired(load(corner + (rows.to(tl.int64) * x_stride + columns), inside))
    magnitudes = without_signs(pairs, x_ptr.dtype.element_ty == tl.float16)
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
        x_ptr.dtype.element_ty == tl.float16,
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
        x_ptr.dtype.element_ty == tl.float16,
        CODES,
    )
