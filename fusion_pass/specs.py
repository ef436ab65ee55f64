"""What one fused kernel computes, as data: the only thing patterns and kernels share.

A spec is prologue x quantizer x scale layout. Every choice that changes a bit of the result is a field: the constants,
where values are rounded, which of two divisions is meant. Patterns fill specs in, kernels obey them, neither knows the other.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .terms import AMAX, GIVEN, Term, kind, parse

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float8_e4m3fn: "e4m3fn",
    torch.float8_e4m3fnuz: "e4m3fnuz",
    torch.float8_e5m2: "e5m2",
    torch.float4_e2m1fn_x2: "e2m1",
    torch.int8: "int8",
    torch.uint8: "uint8",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

ROUNDING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAST_DTYPES = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.int8)
CODE_DTYPES = (*CAST_DTYPES, torch.float4_e2m1fn_x2)
SCALE_DTYPES = (torch.float32, torch.uint8, torch.float8_e4m3fn)


class Weight(enum.Enum):
    """How a norm's weight enters the product."""

    NONE = "none"
    PLAIN = "plain"
    ONE_PLUS = "one_plus"  # 1 + weight, as Gemma has it


class Mean(enum.Enum):
    """How the mean of squares comes from their sum.

    ``mean()`` divides by N on a CPU; on CUDA it multiplies by float(rows) / float(elements). ``sum() / N`` multiplies by
    f32(1/N) there.
    """

    DIVIDE = "divide"
    RECIPROCAL = "reciprocal"
    SCALAR = "scalar"


class Root(enum.Enum):
    """How x is divided by the root mean square: x * rsqrt(v), x * (1 / sqrt(v)) or x / sqrt(v)."""

    RSQRT = "rsqrt"
    RECIPROCAL_SQRT = "reciprocal_sqrt"
    DIVIDE_SQRT = "divide_sqrt"


class Activation(enum.Enum):
    """The function of the gate: as one fused kernel of eager code computes it, or as a product with a sigmoid."""

    SILU = "silu"
    SIGMOID_PRODUCT = "sigmoid_product"  # gate * sigmoid(alpha * gate)
    SIGMOID = "sigmoid"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"


class ScaleRule(enum.Enum):
    """How the stored scale comes from amax: a dequantization scale, or for the multipliers what values are multiplied by.

    A Python scalar divisor is a true division in eager CPU code and a multiplication by the f32 reciprocal in eager CUDA code.
    """

    DIVIDE = "divide"  # amax / divisor
    RECIPROCAL = "reciprocal"  # amax * f32(1 / divisor)
    MULTIPLIER = "multiplier"  # divisor / amax, by reciprocal and product as eager code divides a scalar by a tensor
    INVERSE_MULTIPLIER = "inverse_multiplier"  # 1 / multiplier


class QuotientRule(enum.Enum):
    """How a value is brought to the range of the codes.

    Correctly rounded x / scale, x times the rounded 1 / scale, or x times the multiplier divisor / amax.
    """

    DIVIDE = "divide"
    RECIPROCAL = "reciprocal"
    MULTIPLIER = "multiplier"


class PowerOfTwo(enum.Enum):
    """How scales become powers of two: up by exp2(ceil(log2(s))), up by the bits of s, or down by exp2(floor(log2(s)))."""

    NO = "no"
    CEIL = "ceil"
    CEIL_BITS = "ceil_bits"
    FLOOR = "floor"


class Granularity(enum.Enum):
    """What shares one scale: a row, ``group`` values of it, or the whole tensor."""

    ROW = "row"
    GROUP = "group"
    TENSOR = "tensor"


class Rounding(enum.Enum):
    """How a value becomes a code: as the cast rounds it, or to the nearest integer first, halves to even or from zero."""

    CAST = "cast"
    NEAREST_EVEN = "nearest_even"
    HALF_AWAY = "half_away"


class Ties(enum.Enum):
    """How a value midway between two FP4 values is rounded: to the even code, away from zero or toward it."""

    EVEN = "even"
    AWAY = "away"
    TOWARD_ZERO = "toward_zero"


class Sign(enum.Enum):
    """When an FP4 code has its sign bit."""

    KEPT = "kept"  # as the value has, -0 included
    NEGATIVE = "negative"  # if the value is below zero, also where it rounds to zero
    NONZERO = "nonzero"  # if the value is below zero and the code is not


@dataclass(frozen=True)
class E2M1:
    """How values become FP4 codes: the next of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; beyond 6 that is 6.

    Attributes:
        ties: how midpoints are rounded.
        sign: when a code has its sign bit.
        nan_code: the code of NaN, of whichever sign: E2M1 has none.
    """

    ties: Ties = Ties.EVEN
    sign: Sign = Sign.KEPT
    nan_code: int = 7

    def __post_init__(self) -> None:
        _require(0 <= self.nan_code <= 15, "nan_code", self.nan_code, "0 to 15")


class ScaleLayout(enum.Enum):
    """Where the scale of row m, group g lies; :mod:`fusion_pass.addresses` has the formulas.

    All but ROW are presented as they are stored, a contiguous tensor per matrix, padding included: zeros.
    """

    ROW = "row"  # (M, G)
    COLUMN = "column"  # (G, M): scale.transpose(-1, -2).contiguous()
    TMA = "tma"  # (G, M rounded up to 4), for TMA descriptors: DeepGEMM
    PACKED = "packed"  # E8M0 bytes, four groups to a little-endian word: words (G / 4, M rounded up to 4): DeepGEMM
    BLOCKED = "blocked"  # tiles of 128 x 4: torch._scaled_mm, cuBLAS
    SHUFFLED = "shuffled"  # tiles of 32 x 8: aiter's MX scales


class SpecError(ValueError):
    """A spec's field has a value that no kernel can honour."""


def _require(condition: bool, name: str, value: object, allowed: str) -> None:
    if not condition:
        raise SpecError(f"{name} is {value!r}; allowed: {allowed}")


def _require_rounding(name: str, dtype: torch.dtype) -> None:
    _require(dtype in ROUNDING_DTYPES, name, dtype, "float32 (not rounded), bfloat16 or float16")


@dataclass(frozen=True)
class NoPrologue:
    """The input is quantized as it is."""


@dataclass(frozen=True)
class RMSNorm:
    """y = x * rsqrt(mean(x^2) + eps) * weight, statistics in f32.

    Attributes:
        eps: added to the mean of squares.
        weight: whether and how the weight enters.
        mean: how the mean comes from the sum.
        normalized: dtype to which x * rstd is rounded before the weight (float32: not rounded).
        product: dtype to which the product with the weight is rounded (float32: not rounded).
        residual_sum: None without a residual; else the dtype to which x + residual is rounded before the norm reads it
            (float32: the norm reads the unrounded sum).
        root: how x is divided by the root mean square.
        root_rounding: dtype to which the root or its inverse is rounded (float32: not rounded).
        gate: None, or the function of a gate with which the product is multiplied in f32; there is no residual then.
        gated: dtype to which that is rounded (float32: not rounded).
        shifted: dtype to which 1 + weight is rounded (float32: not rounded).
    """

    eps: float
    weight: Weight = Weight.PLAIN
    mean: Mean = Mean.RECIPROCAL
    normalized: torch.dtype = torch.float32
    product: torch.dtype = torch.float32
    residual_sum: torch.dtype | None = None
    root: Root = Root.RSQRT
    root_rounding: torch.dtype = torch.float32
    gate: Activation | None = None
    gated: torch.dtype = torch.float32
    shifted: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        _require(math.isfinite(self.eps), "eps", self.eps, "a finite number")
        _require_rounding("root_rounding", self.root_rounding)
        _require_rounding("gated", self.gated)
        _require_rounding("shifted", self.shifted)
        shiftable = self.shifted is torch.float32 or self.weight is Weight.ONE_PLUS
        _require(shiftable, "shifted", self.shifted, "float32, but for 1 + weight")
        _require(self.gate in (None, Activation.SILU, Activation.SIGMOID), "gate", self.gate, "None, silu or sigmoid")
        _require(self.gate is None or self.residual_sum is None, "gate", self.gate, "None with a residual")
        _require_rounding("normalized", self.normalized)
        _require_rounding("product", self.product)
        if self.residual_sum is not None:
            _require_rounding("residual_sum", self.residual_sum)

    @property
    def rounded(self) -> torch.dtype:
        """The dtype to which values are rounded last (float32: not rounded)."""
        return self.product if self.gate is None else self.gated


@dataclass(frozen=True)
class GatedActivation:
    """y = activation(min(gate, limit)) * (clamp(up, -limit, limit) + offset), each function in f32.

    Attributes:
        activation: the function of the gate.
        activated: dtype to which activation(gate) is rounded before the product (float32: not rounded).
        product: dtype to which the product is rounded (float32: not rounded).
        inner: dtype to which alpha * gate, the sigmoid and up + offset are rounded (float32: not rounded).
        alpha: the factor in ``SIGMOID_PRODUCT``.
        limit: bound of the gate from above and of up from both sides, or None.
        offset: what is added to up.
        gated: whether there is an up; without one y is the activation, rounded to ``product``.
    """

    activation: Activation = Activation.SILU
    activated: torch.dtype = torch.float32
    product: torch.dtype = torch.float32
    inner: torch.dtype = torch.float32
    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0
    gated: bool = True

    def __post_init__(self) -> None:
        for name in ("activated", "product", "inner"):
            _require_rounding(name, getattr(self, name))
        _require(self.limit is None or self.limit > 0, "limit", self.limit, "None or a positive number")
        _require(math.isfinite(self.offset), "offset", self.offset, "a finite number")
        scaled = self.activation is Activation.SIGMOID_PRODUCT
        _require(self.alpha == 1 or scaled, "alpha", self.alpha, "1, but for sigmoid_product")

    def keeps(self, dtype: torch.dtype) -> bool:
        """Whether a bounded gate of a dtype still has values of it."""
        return self.limit is None or torch.tensor(self.limit, dtype=dtype).item() == self.limit


Prologue = NoPrologue | RMSNorm | GatedActivation


@dataclass(frozen=True)
class Quantizer:
    """Quantization with one factor per row, per group of consecutive values or per tensor.

    code = cast(clamp(round(value / factor))), or the product with factor.

    Attributes:
        code: the dtype of the codes: fp8, int8, or float4_e2m1fn_x2, which is stored as bytes, the even element in the low
            nibble.
        factor: what values are divided by or multiplied with: a term of amax, of the given scale, or of both.
        divides: whether values are divided by ``factor``, correctly rounded, or multiplied with it.
        scale: the scale that is returned, a term as well, or None for none.
        scale_dtype: dtype in which it is returned: float32, uint8 for E8M0 bytes, or float8_e4m3fn.
        granularity: what shares one scale.
        group: values per scale along the row with ``Granularity.GROUP``, else None.
        quotient: dtype to which the quotient is rounded (float32: not rounded).
        clamp: upper bound of the values before the cast, or None for no bounds.
        clamp_low: lower bound, or None for -clamp.
        rounding: how values are rounded to codes.
        adds_zero: whether 0 is added after that, which makes a zero of every -0.
        e2m1: how FP4 codes are formed; None for other codes.
    """

    code: torch.dtype
    factor: Term
    divides: bool
    scale: Term | None
    scale_dtype: torch.dtype = torch.float32
    granularity: Granularity = Granularity.ROW
    group: int | None = None
    quotient: torch.dtype = torch.float32
    clamp: float | None = 448.0
    clamp_low: float | None = None
    rounding: Rounding = Rounding.CAST
    adds_zero: bool = False
    e2m1: E2M1 | None = None

    def __post_init__(self) -> None:
        _require(self.code in CODE_DTYPES, "code", self.code, ", ".join(map(str, CODE_DTYPES)))
        grouped = self.granularity is Granularity.GROUP
        _require(
            (self.group is not None and self.group > 0) if grouped else self.group is None,
            "group",
            self.group,
            "a positive number of values per group, None for rows and tensors",
        )
        _require_rounding("quotient", self.quotient)
        _require(self.clamp is None or self.clamp > 0, "clamp", self.clamp, "None or a positive number")
        _require(self.code is not torch.int8 or self.clamp is not None, "clamp", None, "a number for int8 codes")
        low, high = self.least, self.clamp
        whole = self.code is not torch.int8 or (low is not None and high is not None and -128 <= low <= high <= 127)
        _require(whole, "clamp", f"from {low} to {high}", "bounds within -128 and 127 for int8 codes")
        _require(kind(self.factor) == "f32", "factor", str(self.factor), "a float32 term")
        is_fp4 = self.code is torch.float4_e2m1fn_x2
        _require((self.e2m1 is not None) is is_fp4, "e2m1", self.e2m1, "an E2M1 for FP4 codes, else None")
        _require(
            not is_fp4 or (grouped and self.group is not None and self.group % 2 == 0),
            "group",
            self.group,
            "an even number for FP4 codes",
        )
        _require(self.scale_dtype in SCALE_DTYPES, "scale_dtype", self.scale_dtype, ", ".join(map(str, SCALE_DTYPES)))
        wanted = "i32" if self.scale_dtype is torch.uint8 else "f32"
        _require(self.scale is None or kind(self.scale) == wanted, "scale", str(self.scale), f"None or a {wanted} term")

    @property
    def codes_per_byte(self) -> int:
        return 1 if self.e2m1 is None else 2

    @property
    def stored(self) -> torch.dtype:
        """The dtype in which ops return the codes."""
        return self.code if self.e2m1 is None else torch.uint8

    @property
    def least(self) -> float | None:
        """The lower bound of the values before the cast, or None for no bounds."""
        return -self.clamp if self.clamp_low is None and self.clamp is not None else self.clamp_low

    @property
    def needs_amax(self) -> bool:
        """Whether any term reads the amax; a calibrated scale needs none."""
        terms = [t for t in (self.factor, self.scale) if t is not None]
        return any("amax" in t.leaves() for t in terms)

    @property
    def needs_given(self) -> bool:
        """Whether any term reads a calibrated scalar."""
        terms = [t for t in (self.factor, self.scale) if t is not None]
        return any("given" in t.leaves() for t in terms)

    @classmethod
    def dynamic(
        cls,
        code: torch.dtype = torch.float8_e4m3fn,
        divisor: float = 448.0,
        group: int | None = None,
        *,
        per_tensor: bool = False,
        amax_floor: float | None = None,
        amax_ceiling: float | None = None,
        zero_scale: float | None = None,
        scale_floor: float | None = None,
        scale_rule: ScaleRule = ScaleRule.RECIPROCAL,
        scale_dtype: torch.dtype = torch.float32,
        quotient_rule: QuotientRule = QuotientRule.DIVIDE,
        power_of_two: PowerOfTwo = PowerOfTwo.NO,
        clamp: float | None = 448.0,
        clamp_low: float | None = None,
        rounding: Rounding = Rounding.CAST,
    ) -> Quantizer:
        """The quantizers that public systems use, by the choices in which they differ.

        Args:
            code: the dtype of the codes.
            divisor: what amax is divided by to give the scale, usually the largest code.
            group: values per scale along the row, or None for one scale per row.
            per_tensor: one scale for the whole tensor.
            amax_floor, amax_ceiling: bounds of amax, or None.
            zero_scale: what a scale of zero is replaced by, or None.
            scale_floor: lower bound of the scale, after it became a power of two; or None.
            scale_rule: how the scale comes from amax.
            scale_dtype: dtype to which the scale is rounded; it is returned as float32.
            quotient_rule: how values are divided by the scale.
            power_of_two: whether and how scales become powers of two, as UE8M0 consumers need.
            clamp, clamp_low, rounding: as the fields.

        Raises:
            SpecError: a value is not allowed; the message names it.
        """
        _require(divisor > 0 and math.isfinite(divisor), "divisor", divisor, "a positive finite number")
        for name, bound in {
            "amax_floor": amax_floor,
            "amax_ceiling": amax_ceiling,
            "zero_scale": zero_scale,
            "scale_floor": scale_floor,
        }.items():
            _require(bound is None or bound > 0, name, bound, "None or a positive number")
        _require_rounding("scale_dtype", scale_dtype)
        multiplies = quotient_rule is QuotientRule.MULTIPLIER
        by_multiplier = scale_rule in (ScaleRule.MULTIPLIER, ScaleRule.INVERSE_MULTIPLIER)
        _require(
            not by_multiplier or multiplies, "quotient_rule", quotient_rule.value, "multiplier, as scale_rule is one"
        )
        peak = AMAX
        if amax_floor is not None:
            peak = Term("max", (peak, amax_floor))
        if amax_ceiling is not None:
            peak = Term("min", (peak, amax_ceiling))
        if by_multiplier or multiplies:
            multiplier = Term("mul", (Term("reciprocal", (peak,)), divisor))
        if by_multiplier:
            scale = multiplier
        elif scale_rule is ScaleRule.DIVIDE:
            scale = Term("div", (peak, divisor))
        else:
            scale = Term("mul", (peak, reciprocal_of(divisor)))
        if scale_dtype is not torch.float32:
            scale = Term(DTYPE_NAMES[scale_dtype], (scale,))
        if zero_scale is not None:
            scale = Term("where", (Term("eq", (scale, 0.0)), zero_scale, scale))
        scale = _power_of_two(scale, power_of_two)
        if scale_floor is not None:
            scale = Term("max", (scale, scale_floor))
        if by_multiplier:
            factor, scale = scale, Term("reciprocal", (scale,)) if scale_rule is ScaleRule.INVERSE_MULTIPLIER else scale
        elif multiplies:
            factor = multiplier
        else:
            factor = scale if quotient_rule is QuotientRule.DIVIDE else Term("reciprocal", (scale,))
        return cls(
            code=code,
            factor=factor,
            divides=quotient_rule is QuotientRule.DIVIDE,
            scale=scale,
            granularity=Granularity.TENSOR if per_tensor else Granularity.ROW if group is None else Granularity.GROUP,
            group=group,
            clamp=clamp,
            clamp_low=clamp_low,
            rounding=rounding,
        )

    @classmethod
    def static(
        cls,
        code: torch.dtype = torch.float8_e4m3fn,
        *,
        quotient_rule: QuotientRule = QuotientRule.RECIPROCAL,
        clamp: float | None = 448.0,
        clamp_low: float | None = None,
        rounding: Rounding = Rounding.CAST,
    ) -> Quantizer:
        """Quantization by one calibrated scale, which the op reads from a tensor of one value.

        Args:
            quotient_rule: how values are divided by the scale, or multiplied if it is a multiplier.
            code, clamp, clamp_low, rounding: as the fields.
        """
        return cls(
            code=code,
            factor=Term("reciprocal", (GIVEN,)) if quotient_rule is QuotientRule.RECIPROCAL else GIVEN,
            divides=quotient_rule is QuotientRule.DIVIDE,
            scale=None,
            granularity=Granularity.TENSOR,
            clamp=clamp,
            clamp_low=clamp_low,
            rounding=rounding,
        )


@cache
def reciprocal_of(divisor: float) -> float:
    """f32(1 / f32(divisor)), by which eager CUDA code multiplies where Python divides by a number."""
    return torch.tensor(divisor, dtype=torch.float32, device="cpu").reciprocal().item()


def _power_of_two(scale: Term, rule: PowerOfTwo) -> Term:
    if rule is PowerOfTwo.CEIL_BITS:
        # The biased exponent, one more if any bit of the mantissa is set.
        bits = Term("bits", (scale,))
        fraction = Term("i32", (Term("ne", (Term("bit_and", (bits, 0x7FFFFF)), 0)),))
        exponent = Term("add", (Term("bit_and", (Term("shr", (bits, 23)), 0xFF)), fraction))
        return Term("from_bits", (Term("shl", (exponent, 23)),))
    if rule is PowerOfTwo.NO:
        return scale
    whole = "ceil" if rule is PowerOfTwo.CEIL else "floor"
    return Term("exp2", (Term(whole, (Term("log2", (scale,)),)),))


@dataclass(frozen=True)
class FusedSpec:
    """One fused kernel: a prologue, a quantizer, the layout of its scales, and the optional further outputs.

    Attributes:
        prologue: what is computed before the quantizer.
        quantizer: how the prologue's value is quantized.
        layout: where the scales lie.
        sum_output: dtype in which a norm's x + residual is also returned (rounded from the f32 sum), or None.
        value_output: dtype in which the prologue's value is also returned, or None.
    """

    prologue: Prologue
    quantizer: Quantizer
    layout: ScaleLayout = ScaleLayout.ROW
    sum_output: torch.dtype | None = None
    value_output: torch.dtype | None = None

    def __post_init__(self) -> None:
        has_residual = isinstance(self.prologue, RMSNorm) and self.prologue.residual_sum is not None
        _require(self.sum_output is None or has_residual, "sum_output", self.sum_output, "None without a residual")
        _require(
            self.value_output is None or not isinstance(self.prologue, NoPrologue),
            "value_output",
            self.value_output,
            "None without a prologue",
        )
        for name in ("sum_output", "value_output"):
            dtype = getattr(self, name)
            _require(dtype is None or dtype in ROUNDING_DTYPES, name, dtype, "None, float32, bfloat16 or float16")
        single_column = self.layout is not ScaleLayout.ROW and self.quantizer.group is None
        _require(not single_column, "layout", self.layout.value, "row for per-token scales, which are a single column")
        unpackable = self.layout is ScaleLayout.PACKED and self.quantizer.scale_dtype is not torch.uint8
        _require(not unpackable, "layout", self.layout.value, "packed for E8M0 bytes alone")

    def encode(self) -> str:
        """The spec as text that :func:`decode` reads back; an op in a graph carries its spec this way."""
        return _encoded(self)


@cache
def _encoded(spec: FusedSpec) -> str:
    return _encode(spec)


_CLASSES: dict[str, Any] = {
    cls.__name__: cls for cls in (NoPrologue, RMSNorm, GatedActivation, E2M1, Quantizer, FusedSpec)
}
_SPECS = tuple(_CLASSES.values())
_TERM_FIELDS = ("factor", "scale")
_ENUM_FIELDS: dict[str, type[enum.Enum]] = {
    "weight": Weight,
    "mean": Mean,
    "activation": Activation,
    "gate": Activation,
    "granularity": Granularity,
    "root": Root,
    "rounding": Rounding,
    "ties": Ties,
    "sign": Sign,
    "layout": ScaleLayout,
}


def _encode(value: Any) -> str:
    if isinstance(value, Term):
        return repr(str(value))
    if isinstance(value, _SPECS):  # dataclasses.is_dataclass cannot be compiled by torch 2.11
        fields = ", ".join(f"{f.name}={_encode(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"{type(value).__name__}({fields})"
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES[value]
    if isinstance(value, enum.Enum):
        return str(value.value)
    return repr(value)


@cache
def decode(text: str) -> FusedSpec:
    """The spec that :meth:`FusedSpec.encode` wrote.

    Raises:
        SpecError: ``text`` is not an encoded spec, or a field has a value that no kernel can honour.
    """
    try:
        spec = _decode(ast.parse(text, mode="eval").body, field="")
    except SpecError:
        raise
    except (SyntaxError, KeyError, TypeError, AttributeError, ValueError) as error:
        raise SpecError(f"spec is {text!r}; allowed: the text of FusedSpec.encode() ({error})") from None
    _require(isinstance(spec, FusedSpec), "spec", text, "the text of FusedSpec.encode()")
    assert isinstance(spec, FusedSpec)
    return spec


def _decode(node: ast.expr, field: str) -> Any:
    if isinstance(node, ast.Call):
        if not isinstance(node.func, ast.Name):
            raise SpecError(f"spec calls {ast.unparse(node.func)}; allowed: the classes of specs")
        return _CLASSES[node.func.id](**{str(k.arg): _decode(k.value, str(k.arg)) for k in node.keywords})
    if isinstance(node, ast.Name):
        return _ENUM_FIELDS[field](node.id) if field in _ENUM_FIELDS else _DTYPES[node.id]
    value = ast.literal_eval(node)
    return parse(value) if field in _TERM_FIELDS and value is not None else value
