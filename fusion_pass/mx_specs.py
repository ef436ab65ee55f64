"""Quantizers of the microscaling formats: blocks of values that share one E8M0 or e4m3fn scale.

An E8M0 scale is a byte b that stands for 2^(b - 127). Everything here is written in terms, integer operations on the bits
of amax, so that no approximate logarithm decides about an exponent.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch

from .specs import E2M1, Granularity, Quantizer, SpecError, reciprocal_of
from .terms import AMAX, GIVEN, Term

# OCP Microscaling Formats 1.0, and NVFP4: values per scale.
MX_BLOCK = 32
NVFP4_BLOCK = 16

INFINITY_BITS = 0x7F800000
_MANTISSA = 0x7FFFFF
_NAN_BYTE = 255


class ScaleMode(enum.Enum):
    """How the byte comes from a block's amax. With 2^p the largest power of two of the element and MAX its largest value:

    FLOOR: the exponent of amax, minus p: the OCP minimum; values beyond MAX saturate.
    RCEIL: the least scale with amax / scale <= MAX.
    CEIL: the exponent of amax rounded up to a power of two, minus p.
    EVEN: the exponent of amax rounded to the element's mantissa bits, halves up, minus p; values beyond MAX saturate.
    """

    FLOOR = "floor"
    RCEIL = "rceil"
    CEIL = "ceil"
    EVEN = "even"


class Multiplier(enum.Enum):
    """What the values of a block are multiplied by: 2^(127 - byte), and at the ends of the bytes

    EXACT: 2^127 for byte 0, NaN for byte 255.
    DIVISION: 2^126 for byte 0 and 0 for byte 255, as a division by the float32 of bits ``byte << 23``, at least 2^-126.
    UNIT: 1 for byte 0, NaN for byte 255.
    """

    EXACT = "exact"
    DIVISION = "division"
    UNIT = "unit"


@dataclass(frozen=True)
class Element:
    """An MX element format.

    Attributes:
        exponent: p, where 2^p is the largest power of two.
        mantissa_bits: explicit bits of the mantissa.
        largest: the largest value, whose float32 mantissa field is ``largest_mantissa``.
    """

    exponent: int
    mantissa_bits: int
    largest: float
    largest_mantissa: int


ELEMENTS = {
    torch.float4_e2m1fn_x2: Element(2, 1, 6.0, 0x400000),
    torch.float8_e4m3fn: Element(8, 3, 448.0, 0x600000),
    torch.float8_e5m2: Element(15, 2, 57344.0, 0x600000),
}


def mx_quantizer(
    code: torch.dtype = torch.float8_e4m3fn,
    mode: ScaleMode = ScaleMode.RCEIL,
    *,
    multiplier: Multiplier = Multiplier.EXACT,
    e2m1: E2M1 | None = None,
    zero_byte: int = 0,
    infinity_byte: int | None = None,
    block: int = MX_BLOCK,
) -> Quantizer:
    """Blocks with one E8M0 scale: data at the scale's multiplier, and the scale's byte. NaN makes the byte 255.

    Args:
        code: torch.float8_e4m3fn, torch.float8_e5m2 or torch.float4_e2m1fn_x2.
        mode: how the byte comes from amax.
        multiplier: what values are multiplied by.
        e2m1: how FP4 codes are formed; None for the default of FP4, and for FP8.
        zero_byte: the byte of a block of zeros.
        infinity_byte: the byte where amax, rounded as ``mode`` says, is infinite; None for the one its exponent gives,
            which under RCEIL is 254.
        block: values per scale.

    Raises:
        SpecError: a value is not allowed; the message names it.

    Source: OCP Microscaling Formats 1.0; torchao ``to_mx``; TransformerEngine pull request 422; aiter.
    """
    if code not in ELEMENTS:
        raise SpecError(f"code is {code}; allowed: {', '.join(map(str, ELEMENTS))}")
    for name, choice in (("zero_byte", zero_byte), ("infinity_byte", infinity_byte)):
        if choice is not None and not 0 <= choice <= _NAN_BYTE:
            raise SpecError(f"{name} is {choice}; allowed: 0 to {_NAN_BYTE}")
    if code is torch.float4_e2m1fn_x2:
        e2m1 = e2m1 or E2M1()
    element = ELEMENTS[code]
    byte = _byte(element, mode, zero_byte, infinity_byte)
    return Quantizer(
        code=code,
        factor=multiplied_by(byte, multiplier),
        divides=False,
        scale=Term("u8", (byte,)),
        scale_dtype=torch.uint8,
        granularity=Granularity.GROUP,
        group=block,
        clamp=element.largest,
        e2m1=e2m1,
    )


def carry_into_exponent(element: Element, mode: ScaleMode) -> int:
    """What is added to the bits of amax, so that a mode's rounding carries into the exponent."""
    return {
        ScaleMode.FLOOR: 0,
        ScaleMode.CEIL: _MANTISSA,
        ScaleMode.EVEN: 1 << (22 - element.mantissa_bits),
        ScaleMode.RCEIL: _MANTISSA - element.largest_mantissa,
    }[mode]


def _byte(element: Element, mode: ScaleMode, zero_byte: int, infinity_byte: int | None) -> Term:
    """The byte, as int32, of a block with the given amax.

    RCEIL is the ceiling of the exponent of amax / MAX, correctly rounded to f32. Where the quotient is normal that is a
    comparison of mantissas: the next f32 above MAX * 2^k has a quotient more than half an ulp above 2^k. Around 2^-127,
    in the subnormals, a quotient is a multiple of 2^-149, and only an amax two ulps above MAX * 2^-127 gives more than that.
    """
    # NaN comes with either sign.
    bits = Term("bit_and", (Term("bits", (AMAX,)), 0x7FFFFFFF))
    carry = carry_into_exponent(element, mode)
    byte = Term("shr", (Term("add", (bits, carry - (element.exponent << 23))), 23))
    if mode is ScaleMode.RCEIL:
        least = (element.exponent << 23) + element.largest_mantissa + 1
        byte = Term("where", (Term("le", (bits, least)), 0, byte))
        infinity_byte = 254 if infinity_byte is None else infinity_byte
    else:
        byte = Term("max", (byte, 0))
    if infinity_byte is not None:
        infinite = INFINITY_BITS if mode is ScaleMode.RCEIL else INFINITY_BITS - carry
        byte = Term("where", (Term("ge", (bits, infinite)), infinity_byte, byte))
    if zero_byte:
        byte = Term("where", (Term("eq", (bits, 0)), zero_byte, byte))
    return Term("where", (Term("gt", (bits, INFINITY_BITS)), _NAN_BYTE, byte))


def multiplied_by(byte: Term, multiplier: Multiplier) -> Term:
    """What the values of a block with a byte are multiplied by."""
    # For byte 254 it is 2^-127, a subnormal.
    bits = Term("max", (Term("shl", (Term("sub", (254, byte)), 23)), 0x00400000))
    if multiplier is Multiplier.DIVISION:
        bits = Term("min", (bits, 253 << 23))
    if multiplier is Multiplier.UNIT:
        bits = Term("where", (Term("eq", (byte, 0)), 0x3F800000, bits))
    of_nan = 0 if multiplier is Multiplier.DIVISION else 0x7FC00000
    return Term("from_bits", (Term("where", (Term("eq", (byte, _NAN_BYTE)), of_nan, bits)),))


class GlobalScale(enum.Enum):
    """The scale of the whole tensor, which the op reads: what block scales are divided by, or its reciprocal.

    NONE: there is none. DEQUANTIZATION: global amax / (448 * 6), as torchao has it. QUANTIZATION: 448 * 6 / global amax, as
    vLLM has it.
    """

    NONE = "none"
    DEQUANTIZATION = "dequantization"
    QUANTIZATION = "quantization"


def nvfp4_quantizer(
    global_scale: GlobalScale = GlobalScale.NONE, *, divides: bool = False, e2m1: E2M1 | None = None
) -> Quantizer:
    """Blocks of 16 FP4 values with one e4m3fn scale.

    The scale is amax / 6, over the global scale if there is one, at most 448. With a quantization scale it may be zero, and
    its block then is; else it is at least 2^-6.

    Args:
        global_scale: the scale of the whole tensor, in which direction.
        divides: whether amax is divided by 6, correctly rounded as on a CPU, or multiplied by f32(1 / 6) as eager code
            does on CUDA.
        e2m1: how FP4 codes are formed; None for the default.

    Source: torchao ``nvfp4_quantize``; vLLM ``scaled_fp4_quant``, whose approximate reciprocals are exact here.
    """
    wanted = Term("div", (AMAX, 6.0)) if divides else Term("mul", (AMAX, reciprocal_of(6.0)))
    if global_scale is GlobalScale.QUANTIZATION:
        scale = Term("e4m3fn", (Term("min", (Term("mul", (GIVEN, wanted)), 448.0)),))
        exact = Term("reciprocal", (Term("mul", (scale, Term("reciprocal", (GIVEN,)))),))
        factor = Term("where", (Term("eq", (scale, 0.0)), 0.0, exact))
    else:
        if global_scale is GlobalScale.DEQUANTIZATION:
            wanted = Term("div", (wanted, GIVEN))
        scale = Term("e4m3fn", (Term("min", (Term("max", (wanted, 2.0**-6)), 448.0)),))
        factor = Term("reciprocal", (scale,))
        if global_scale is GlobalScale.DEQUANTIZATION:
            factor = Term("div", (Term("reciprocal", (GIVEN,)), scale))
    return Quantizer(
        code=torch.float4_e2m1fn_x2,
        factor=factor,
        divides=False,
        scale=scale,
        scale_dtype=torch.float8_e4m3fn,
        granularity=Granularity.GROUP,
        group=NVFP4_BLOCK,
        clamp=6.0,
        e2m1=e2m1 or E2M1(),
    )
