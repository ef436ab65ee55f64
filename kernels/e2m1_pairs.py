"""FP4 codes of 16-bit values that stay in pairs until then; their factors are powers of two.

A pair is an int32: two neighbouring values, the first in the low half; F16 says that they are f16, not bf16. For which quantizers
the codes are right, :func:`fusion_pass.kernels.cheaper_scales.fp4_of_pairs` says.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import INTERPRETED, e2m1_code, high, low, named, times

# Triton's interpreter runs no PTX: there the same by Triton's own operations. Docstrings are with the PTX.
if INTERPRETED:

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

        The values have no more bits than a bf16. In f16 times 2^-14, the values below 1 are subnormal as in E2M1, so that rounding is
        an addition to the bits; a NaN that min keeps becomes 0 there.
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
def e2m1_word(first, second, factor, F16: tl.constexpr, CODES: tl.constexpr):
    """The codes of four neighbouring values, two pairs, as an int16."""
    # Codes at bits 0, 16, 8 and 24; by 12 further down, the second and fourth are at 4 and 12.
    spread = e2m1_four(first, second, factor, factor, F16, CODES)
    return (spread + (spread >> 12)).to(tl.int16)
