"""The cast-transpose of 16-bit values whose factors are powers of two: they stay in pairs until they are codes.

A program is four warps, each with 32 rows of 64 columns. Triton gives a thread 8 neighbouring columns and every 16th row of the
tile, so rows are numbered such that these are neighbours, too: amaxes in both directions then take two exchanges between threads,
four codes of a column make a word, and only words of codes pass through shared memory on their way to the transpose.

A pair is an int32: two neighbouring values of a row, the first in the low half; F16 says that they are f16, not bf16. Where magnitudes
are compared as integers, their bits are in the order of their values, infinity below NaN. Which specs this kernel computes,
:func:`fusion_pass.kernels.cast_transpose.packs` says.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import INTERPRETED, cast, e2m1_code, high, low, named
from .fused_quant import load
from .placement import block_scale_address, code_address
from .scale_program import evaluate

# What a launch must know. The device functions are written for these shapes, and have them as numbers.
TILE_ROWS = 128
TILE_COLUMNS = 64
WARPS = 4
BLOCK = 32


@triton.jit
def larger_half(magnitudes, F16: tl.constexpr):
    """The greater magnitude of each pair, as an int32 in which these are ordered; see :func:`of_half`."""
    if F16:
        larger = tl.maximum(magnitudes & 0xFFFF, magnitudes >> 16)
    else:
        # Where f32 has the bits of a bf16.
        larger = tl.maximum(magnitudes & -65536, magnitudes << 16)
    return larger


@triton.jit
def of_half(larger, F16: tl.constexpr):
    """What :func:`larger_half` stands for, in float32."""
    if F16:
        value = low(larger, F16)
    else:
        value = larger.to(tl.float32, bitcast=True)
    return value


# Triton's interpreter runs no PTX: there the same by Triton's own operations. Docstrings are with the PTX.
if INTERPRETED:

    @triton.jit
    def paired(x):
        """A tile of 16-bit values as int32, neighbours along the last axis in pairs."""
        first, second = tl.split(tl.reshape(x.to(tl.uint16, bitcast=True), (x.shape[0], x.shape[1] // 2, 2)))
        return (first.to(tl.int32) | (second.to(tl.int32) << 16)).to(tl.int32)

    @triton.jit
    def largest(magnitudes, AXIS: tl.constexpr, F16: tl.constexpr):
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
    def e2m1_pair(pair, first, second, F16: tl.constexpr, CODES: tl.constexpr):
        TIES: tl.constexpr = named(CODES, "ties")
        SIGN: tl.constexpr = named(CODES, "sign")
        NAN_CODE: tl.constexpr = named(CODES, "nan_code")
        low_code = e2m1_code(low(pair, F16) * first, TIES, SIGN, NAN_CODE)
        return low_code | (e2m1_code(high(pair, F16) * second, TIES, SIGN, NAN_CODE) << 16)

else:

    @triton.jit
    def paired(x):
        """A tile of 16-bit values as int32, neighbours along the last axis in pairs."""
        first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
        return tl.inline_asm_elementwise(
            "mov.b32 $0, {$1, $2};", "=r,h,h", [first, second], tl.int32, is_pure=True, pack=1
        )

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
    def e2m1_pair(pair, first, second, F16: tl.constexpr, CODES: tl.constexpr):
        """The E2M1 codes of a pair times two powers of two, each in the low bits of its half, plus :func:`surplus`."""
        TIES: tl.constexpr = named(CODES, "ties")
        SIGN: tl.constexpr = named(CODES, "sign")
        if TIES == "even":
            tl.static_assert(SIGN == "kept")
            code = e2m1_to_even(pair, first, second, F16, named(CODES, "nan_code"))
        else:
            a = low(pair, F16) * first
            b = high(pair, F16) * second
            if SIGN == "negative":
                # A zero product keeps no sign.
                a += 0.0
                b += 0.0
            # More bits than a bf16 has would be rounded among the subnormal values.
            tl.static_assert(not F16)
            code = e2m1_by_subnormals(a, b, TIES, named(CODES, "nan_code"))
        return code

    @triton.constexpr_function
    def to_even(f16, nan_code):
        """The PTX of :func:`e2m1_to_even`."""
        if f16:
            kind, minus_one, half, one, two, four, zero = "f16x2", "bc00", "3800", "3c00", "4000", "4400", "64"
            scaled = "cvt.rn.f16x2.f32 v, $2, $1;"
        else:
            kind, minus_one, half, one, two, four, zero = "bf16x2", "bf80", "3f00", "3f80", "4000", "4080", "43"
            # A product is a sum with -0.
            scaled = "mov.b32 k, 0x80008000; fma.rn.bf16x2 v, $1, $2, k;"
        # The third line is at least 4, which a maximum gives in place of NaN.
        keep = "" if nan_code == 7 else f"max.{kind} c, c, l;"
        return f"""
            {{
                .reg .b32 v, m, a, b, c, s, k, l;
                {scaled}
                abs.{kind} m, v;
                mov.b32 k, 0x{two}{two};
                mov.b32 l, 0x{zero}04{zero}04;
                fma.rn.{kind} a, m, k, l;
                mov.b32 k, 0x{one}{one};
                mov.b32 l, 0x{zero}06{zero}06;
                fma.rn.{kind} b, m, k, l;
                mov.b32 k, 0x{half}{half};
                mov.b32 l, 0x{zero}08{zero}08;
                fma.rn.{kind} c, m, k, l;
                {keep}
                mov.b32 k, 0x{zero}0b{zero}0b;
                min.{kind} a, a, b;
                min.{kind} c, c, k;
                min.{kind} a, a, c;
                lop3.b32 s, v, 0x80008000, 0x{four}{four}, 0xea;
                mov.b32 k, 0x{minus_one}{minus_one};
                fma.rn.{kind} $0, s, k, a;
            }}
        """

    @triton.jit
    def e2m1_to_even(pair, first, second, F16: tl.constexpr, NAN_CODE: tl.constexpr):
        """The codes next to a pair times two powers of two, halves to even, signs kept.

        A code is the integer next to the least of 2v, v + 2 and v / 2 + 4, at most 7: the three lines meet where the step
        between E2M1 values doubles. Sums of 128 or more in bf16, and of 1024 or more in f16, are rounded to an integer, halves
        to even, and an fma rounds once. A factor may be more than f16 holds; products are rounded where they are next to zero.

        The lines are computed with 4 more, and 4 with the sign of v is taken from the least, which leaves 8 of negative ones: by
        the pipe of multiplications, where shifts and masks of the sign would wait for that of integers.
        """
        tl.static_assert(NAN_CODE == 7 or NAN_CODE == 4)
        if F16:
            a = low(pair, F16) * first
            b = high(pair, F16) * second
            code = tl.inline_asm_elementwise(to_even(F16, NAN_CODE), "=r,f,f", [a, b], tl.int32, is_pure=True, pack=1)
        else:
            factors = ((first.to(tl.int32, bitcast=True) >> 16) & 0xFFFF) | (second.to(tl.int32, bitcast=True) & -65536)
            code = tl.inline_asm_elementwise(
                to_even(F16, NAN_CODE), "=r,r,r", [pair, factors], tl.int32, is_pure=True, pack=1
            )
        return code

    @triton.jit
    def e2m1_by_subnormals(a, b, TIES: tl.constexpr, NAN_CODE: tl.constexpr):
        """The codes next to pairs of f32 with no more bits than a bf16, halves away from zero or towards it, signs kept.

        In f16 times 2^-14, the values below 1 are subnormal as in E2M1, so that rounding is an addition to the bits; a NaN that min
        keeps becomes 0 there.
        """
        HALF: tl.constexpr = 0x01000100 if TIES == "away" else 0x00FF00FF
        tl.static_assert(NAN_CODE == 7 or NAN_CODE == 0)
        MINIMUM: tl.constexpr = "min.f16x2" if NAN_CODE == 7 else "min.NaN.f16x2"
        value = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [a, b], tl.int32, is_pure=True, pack=1
        )
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


@triton.constexpr_function
def surplus(ties, f16, factor):
    """What a sum of codes by :func:`e2m1_pair` has in it that is none, where their weights add up to ``factor``; an int32."""
    of_one = 0 if INTERPRETED or ties != "even" else 0x64006400 if f16 else 0x43004300
    return (of_one * factor + 2**31) % 2**32 - 2**31


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
    # Each thread's 8 columns first, then the four threads of a block of 32 columns.
    in_octet = larger_half(largest(tl.reshape(magnitudes, (128, 8, 4)), 2, F16), F16)
    peak = of_half(tl.max(tl.reshape(in_octet, (128, 2, 4)), 2), F16)
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
        spread = e2m1_pair(first, f, f, F16, CODES) + e2m1_pair(second, f, f, F16, CODES) * 256
        spread -= surplus(named(CODES, "ties"), F16, 257)
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
        both = e2m1_pair(a, f, g, F16, CODES) + e2m1_pair(b, f, g, F16, CODES) * 16
        both += e2m1_pair(c, f, g, F16, CODES) * 256 + e2m1_pair(d, f, g, F16, CODES) * 4096
        both -= surplus(named(CODES, "ties"), F16, 4369)
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
    rows = first_row + tile_row(tl.arange(0, 128))[:, None]
    columns = first_column + tl.arange(0, 64)[None, :]
    pairs = paired(load(x_ptr + rows * x_stride + columns, None if FULL else (rows < M) & (columns < N)))
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
