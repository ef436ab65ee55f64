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

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float8_e4m3fn: "e4m3fn",
    torch.float8_e5m2: "e5m2",
    torch.int8: "int8",
}
_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}

ROUNDING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CODE_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


class Weight(enum.Enum):
    """How a norm's weight enters the product."""

    NONE = "none"
    PLAIN = "plain"
    ONE_PLUS = "one_plus"  # 1 + weight in float32, as Gemma does


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
    SILU = "silu"


class ScaleRule(enum.Enum):
    """How the dequantization scale comes from amax.

    A Python scalar divisor is a true division in eager CPU code and a multiplication by the f32 reciprocal in eager CUDA code.
    """

    DIVIDE = "divide"
    RECIPROCAL = "reciprocal"


class QuotientRule(enum.Enum):
    """How a value is brought to the range of the codes: the correctly rounded x / s, or x times the rounded 1 / s."""

    DIVIDE = "divide"
    RECIPROCAL = "reciprocal"


class Rounding(enum.Enum):
    """How a value becomes a code: as the cast rounds it, or to the nearest even integer first."""

    CAST = "cast"
    NEAREST_EVEN = "nearest_even"


class ScaleLayout(enum.Enum):
    """Where the scale of row m, group g lies: at m*G + g (ROW), or at g*M + m (COLUMN).

    COLUMN is presented as the eager code presents it: the contiguous (G, M) result of ``scale.transpose(-1, -2).contiguous()``.
    """

    ROW = "row"
    COLUMN = "column"


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
    """

    eps: float
    weight: Weight = Weight.PLAIN
    mean: Mean = Mean.RECIPROCAL
    normalized: torch.dtype = torch.float32
    product: torch.dtype = torch.float32
    residual_sum: torch.dtype | None = None
    root: Root = Root.RSQRT

    def __post_init__(self) -> None:
        _require(math.isfinite(self.eps), "eps", self.eps, "a finite number")
        _require_rounding("normalized", self.normalized)
        _require_rounding("product", self.product)
        if self.residual_sum is not None:
            _require_rounding("residual_sum", self.residual_sum)


@dataclass(frozen=True)
class GatedActivation:
    """y = activation(gate) * up, the activation in f32.

    Attributes:
        activation: the function of the gate.
        activated: dtype to which activation(gate) is rounded before the product (float32: not rounded).
        product: dtype to which the product is rounded (float32: not rounded).
    """

    activation: Activation = Activation.SILU
    activated: torch.dtype = torch.float32
    product: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        _require_rounding("activated", self.activated)
        _require_rounding("product", self.product)


Prologue = NoPrologue | RMSNorm | GatedActivation


@dataclass(frozen=True)
class Quantizer:
    """Dynamic quantization with one dequantization scale per token (group None) or per group of consecutive values.

    scale = max(pow2(max(amax, amax_floor) over divisor), scale_floor); code = cast(clamp(round(value over scale))).

    Attributes:
        code: the fp8 dtype of the codes, or int8.
        divisor: what amax is divided by to give the scale, usually the largest code.
        group: values per scale along the row, or None for one scale per row.
        amax_floor: lower bound of amax, or None.
        scale_floor: lower bound of the scale, or None.
        scale_rule: how the division by ``divisor`` is done.
        scale_dtype: dtype in which the scale is computed and to which it is rounded; it is stored as float32.
        quotient_rule: how values are divided by the scale.
        clamp: upper bound of the values before the cast, or None for no bounds.
        clamp_low: lower bound, or None for -clamp.
        rounding: how values are rounded to codes.
        power_of_two: whether scales are rounded up to powers of two, exp2(ceil(log2(scale))), as UE8M0 consumers need.
    """

    code: torch.dtype = torch.float8_e4m3fn
    divisor: float = 448.0
    group: int | None = None
    amax_floor: float | None = None
    scale_floor: float | None = None
    scale_rule: ScaleRule = ScaleRule.RECIPROCAL
    scale_dtype: torch.dtype = torch.float32
    quotient_rule: QuotientRule = QuotientRule.DIVIDE
    clamp: float | None = 448.0
    clamp_low: float | None = None
    rounding: Rounding = Rounding.CAST
    power_of_two: bool = False

    def __post_init__(self) -> None:
        _require(self.code in CODE_DTYPES, "code", self.code, ", ".join(map(str, CODE_DTYPES)))
        _require(self.divisor > 0 and math.isfinite(self.divisor), "divisor", self.divisor, "a positive finite number")
        _require(self.group is None or self.group > 0, "group", self.group, "None or a positive number of values")
        _require_rounding("scale_dtype", self.scale_dtype)
        for name in ("amax_floor", "scale_floor", "clamp"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "None or a positive number")
        _require(self.code is not torch.int8 or self.clamp is not None, "clamp", None, "a number for int8 codes")


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
        column_per_token = self.layout is ScaleLayout.COLUMN and self.quantizer.group is None
        _require(
            not column_per_token, "layout", self.layout.value, "row for per-token scales, which are a single column"
        )

    def encode(self) -> str:
        """The spec as text that :func:`decode` reads back; an op in a graph carries its spec this way."""
        return _encode(self)


_CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (NoPrologue, RMSNorm, GatedActivation, Quantizer, FusedSpec)}
_ENUM_FIELDS: dict[str, type[enum.Enum]] = {
    "weight": Weight,
    "mean": Mean,
    "activation": Activation,
    "scale_rule": ScaleRule,
    "quotient_rule": QuotientRule,
    "root": Root,
    "rounding": Rounding,
    "layout": ScaleLayout,
}


def _encode(value: Any) -> str:
    if dataclasses.is_dataclass(value):
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
    except (SyntaxError, KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"spec is {text!r}; allowed: the text of FusedSpec.encode() ({error})") from None
    _require(isinstance(spec, FusedSpec), "spec", text, "the text of FusedSpec.encode()")
    assert isinstance(spec, FusedSpec)
    return spec


def _decode(node: ast.expr, field: str) -> Any:
    if isinstance(node, ast.Call):
        assert isinstance(node.func, ast.Name)
        return _CLASSES[node.func.id](**{str(k.arg): _decode(k.value, str(k.arg)) for k in node.keywords})
    if isinstance(node, ast.Name):
        return _ENUM_FIELDS[field](node.id) if field in _ENUM_FIELDS else _DTYPES[node.id]
    return ast.literal_eval(node)
