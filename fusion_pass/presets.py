"""The fused quantization kernels of public systems, by name: as a spec, and as a function on tensors.

Each system is one point in the product of specs. A function ``*_spec`` returns it as a :class:`fusion_pass.specs.FusedSpec`;
the function named as the system names its kernel takes the tensors the system takes, and returns what it returns. Hand
written kernels divide where their source divides: a spec says which of two divisions is meant, so the results are the same
bits on every device.

What all have in common: statistics and products are float32, codes are clamped to the largest code, scales multiply codes to
give values back unless said otherwise. NaN in a row or group makes its scale and codes NaN; with an infinity the scale is
infinite, finite values are 0 and the infinity NaN. No rows (M = 0) are allowed, and so are inputs of any strides: rows that
are not contiguous or not evenly spaced are copied first. Every function raises ValueError, naming the argument, its value and
what is allowed, for a shape, dtype or group that it does not take.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

import torch

from .cast_transpose import LINEAR, BlockScales, CastTransposed, CastTransposeSpec, Placement
from .checks import require, require_dims, require_float8
from .mx_specs import ScaleMode, mx_quantizer
from .ops import Quantized, cast_transpose
from .specs import (
    E2M1,
    FusedSpec,
    GatedActivation,
    Mean,
    NoPrologue,
    PowerOfTwo,
    Quantizer,
    QuotientRule,
    RMSNorm,
    ScaleLayout,
    ScaleRule,
    Sign,
    Ties,
    Weight,
)
from .terms import Term, parse

__all__ = [
    "Multiplied",
    "ScaleFormat",
    "add_rmsnorm_quant",
    "aiter_flatten_spec",
    "aiter_rms_norm_spec",
    "fp8_rowwise_2d_scale_and_cast",
    "fused_flatten_fp8_group_quant",
    "fused_rms_fp8_group_quant",
    "rmsnorm_quant",
    "rtp_silu_mul_spec",
    "sglang_rms_norm_spec",
    "silu_and_mul_contiguous_fp8_post_quant",
    "silu_and_mul_masked_fp8_post_quant",
    "te_cast_transpose_mxfp4",
    "te_mxfp4_spec",
    "torchao_rowwise_spec",
]

_AMAX_FLOOR = 1e-10
_SGLANG_GROUPS = (0, 32, 64, 128)


class ScaleFormat(enum.Enum):
    """What rtp-llm's consumers take as scales."""

    FLOAT = "float"  # float32
    UE8M0 = "ue8m0"  # float32 powers of two
    UE8M0_WORDS = "ue8m0_words"  # the exponents of powers of two, four groups to an int32


class Multiplied(NamedTuple):
    """Codes (M, K), and float32 multipliers (M, 1): values times the multiplier are codes."""

    codes: torch.Tensor
    multiplier: torch.Tensor


def _columns_or_rows(columns: bool) -> ScaleLayout:
    return ScaleLayout.COLUMN if columns else ScaleLayout.ROW


def _presented(scale: torch.Tensor, transposed: bool, strided: bool) -> torch.Tensor:
    """Scales as aiter presents them: (M, G), transposed ones (G, M) by strides or with their bytes read as rows."""
    if not transposed:
        return scale
    return scale.t() if strided else scale.view(scale.shape[::-1])


# --- aiter: pull request 3041 and its sister ---------------------------------------------------------------------------


def _aiter_quantizer(group_size: int, dtype: torch.dtype) -> Quantizer:
    bound = torch.finfo(require_float8(dtype)).max
    return Quantizer.dynamic(
        dtype,
        bound,
        group_size,
        amax_floor=_AMAX_FLOOR,
        scale_rule=ScaleRule.DIVIDE,
        quotient_rule=QuotientRule.RECIPROCAL,
        clamp=bound,
    )


def aiter_flatten_spec(
    group_size: int = 128, dtype: torch.dtype = torch.float8_e4m3fn, *, transpose_scale: bool = False
) -> FusedSpec:
    """scale = max(amax, 1e-10) / MAX per group; codes = cast(clamp(x * (1 / scale))), all in float32.

    MAX is the largest number of ``dtype``. ``transpose_scale`` stores the scales (G, M).

    Source: ROCm/aiter pull request 3041, ``fused_flatten_fp8_group_quant``.
    """
    return FusedSpec(NoPrologue(), _aiter_quantizer(group_size, dtype), _columns_or_rows(transpose_scale))


def fused_flatten_fp8_group_quant(
    x: torch.Tensor,
    group_size: int = 128,
    dtype_quant: torch.dtype = torch.float8_e4m3fn,
    transpose_scale: bool = False,
    *,
    is_x_scale_strided: bool = True,
) -> Quantized:
    """Flatten (M, N1, N2) to (M, N1*N2) and quantize groups of it; see :func:`aiter_flatten_spec`.

    Args:
        x: (M, N1, N2) float32, bfloat16 or float16, of any strides.
        group_size: values per scale, a divisor of N2, so that no group crosses a segment.
        dtype_quant: torch.float8_e4m3fn, or torch.float8_e4m3fnuz for gfx942.
        transpose_scale: store the scale of row m, group j at j*M + m, not at m*G + j.
        is_x_scale_strided: present transposed scales with strides (1, M), which are the same values; else as contiguous
            (M, G), which read as such are scrambled. :func:`fusion_pass.layouts.unpack_transposed_view` gives the
            strided view of a contiguous one, without a copy.

    Returns:
        codes (M, N1*N2) contiguous; scale (M, G) float32 with G = N1*N2 / group_size.

    Source: ROCm/aiter pull request 3041, which described the contiguous presentation and merged the strided one.
    """
    require_dims("x", x, "(M, N1, N2)")
    whole = group_size > 0 and x.shape[-1] % group_size == 0
    require(whole, "group_size", group_size, f"a divisor of the segment length {x.shape[-1]} of x {tuple(x.shape)}")
    spec = aiter_flatten_spec(group_size, dtype_quant, transpose_scale=transpose_scale)
    codes, scale = torch.ops.fusion_pass.quant(x.flatten(1), None, spec.encode())
    return Quantized(codes, _presented(scale, transpose_scale, is_x_scale_strided))


def aiter_rms_norm_spec(
    eps: float,
    group_size: int = 128,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    transpose_scale: bool = False,
    residual: torch.dtype | None = None,
    unquantized: torch.dtype | None = None,
) -> FusedSpec:
    """h = x + residual; n = h * rsqrt(sum(h^2) / N + eps) * weight; quantized as :func:`aiter_flatten_spec`.

    Nothing is rounded before the codes are. ``residual`` is None without a residual, else the dtype in which h is returned;
    ``unquantized`` the dtype in which n is returned, or None.

    Source: ROCm/aiter ``fused_rms_fp8_group_quant``.
    """
    norm = RMSNorm(eps, mean=Mean.DIVIDE, residual_sum=None if residual is None else torch.float32)
    return FusedSpec(
        norm,
        _aiter_quantizer(group_size, dtype),
        _columns_or_rows(transpose_scale),
        sum_output=residual,
        value_output=unquantized,
    )


def fused_rms_fp8_group_quant(
    inp1: torch.Tensor,
    inp1_weight: torch.Tensor,
    inp1_epsilon: float,
    inp2: torch.Tensor | None = None,
    inp2_weight: torch.Tensor | None = None,
    inp2_epsilon: float | None = None,
    group_size: int = 128,
    dtype_quant: torch.dtype = torch.float8_e4m3fn,
    res1: torch.Tensor | None = None,
    output_unquantized_inp1: bool = False,
    transpose_scale: bool = False,
    is_x_scale_strided: bool = False,
) -> tuple[Quantized, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Normalize and quantize inp1, optionally with a residual; normalize inp2 alone. See :func:`aiter_rms_norm_spec`.

    The second norm shares no data with the first; here it runs as PyTorch operations of its own.

    Args:
        inp1, res1: (M, N1) float32, bfloat16 or float16; N1 a multiple of ``group_size``.
        inp2: (M, N2), or None; then its weight and epsilon are as well.
        inp1_weight, inp2_weight: (N1,) and (N2,) float.
        output_unquantized_inp1: also return the normed inp1.
        transpose_scale: as for :func:`fused_flatten_fp8_group_quant`.
        is_x_scale_strided: as there, with the other default, as in the source.

    Returns:
        (codes (M, N1), scale (M, N1 / group_size) float32), the normed inp1, the normed inp2, inp1 + res1; the last three
        rounded to the dtype of inp1 or inp2, and None where they are not asked for.

    Source: ROCm/aiter ``fused_rms_fp8_group_quant``.
    """
    require_dims("inp1", inp1, "(M, N1)")
    for name, argument in (("inp2_weight", inp2_weight), ("inp2_epsilon", inp2_epsilon)):
        absent = argument is None
        require(absent is (inp2 is None), name, "None" if absent else "given", "None exactly if inp2 is")
    spec = aiter_rms_norm_spec(
        inp1_epsilon,
        group_size,
        dtype_quant,
        transpose_scale=transpose_scale,
        residual=None if res1 is None else inp1.dtype,
        unquantized=inp1.dtype if output_unquantized_inp1 else None,
    )
    codes, scale, *rest = torch.ops.fusion_pass.rms_norm_quant(inp1, res1, inp1_weight, None, spec.encode())
    # The op returns the sum before the value.
    total = rest[0] if res1 is not None else None
    value = rest[-1] if output_unquantized_inp1 else None
    second = None
    if inp2 is not None and inp2_weight is not None and inp2_epsilon is not None:
        second = _normed(inp2, inp2_weight, inp2_epsilon)
    return Quantized(codes, _presented(scale, transpose_scale, is_x_scale_strided)), value, second, total


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    squares = x.float().square().sum(-1, keepdim=True)
    # Divided by a tensor: eager CUDA code multiplies by the reciprocal of a number.
    mean = squares / torch.full_like(squares, x.shape[-1])
    return (x.float() * torch.rsqrt(mean + eps) * weight.float()).to(x.dtype)


# --- sglang: pull request 21403 ----------------------------------------------------------------------------------------


def sglang_rms_norm_spec(
    eps: float,
    group_size: int = 0,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    shuffle_scale: bool = False,
    gemma_norm: bool = False,
    residual: torch.dtype | None = None,
) -> FusedSpec:
    """The norm of :func:`aiter_rms_norm_spec`; scale = max(amax, 1e-10) * f32(1 / MAX); codes = cast(clamp(n * (1 / scale))).

    1 / scale is correctly rounded, where the source takes an instruction that approximates it. ``group_size`` is 0 for one
    scale per row, or 32, 64 or 128; ``shuffle_scale`` stores the scales of groups (G, M); with ``gemma_norm`` the product
    is with 1 + weight. ``residual`` is None without a residual, else the dtype in which the sum is returned.

    Source: sgl-project/sglang pull request 21403, over aiter's ``add_rmsnorm_quant``.
    """
    require(group_size in _SGLANG_GROUPS, "group_size", group_size, ", ".join(map(str, _SGLANG_GROUPS)))
    bound = torch.finfo(require_float8(dtype)).max
    quantizer = Quantizer.dynamic(
        dtype,
        bound,
        group_size or None,
        amax_floor=_AMAX_FLOOR,
        scale_rule=ScaleRule.RECIPROCAL,
        quotient_rule=QuotientRule.RECIPROCAL,
        clamp=bound,
    )
    norm = RMSNorm(
        eps,
        Weight.ONE_PLUS if gemma_norm else Weight.PLAIN,
        Mean.DIVIDE,
        residual_sum=None if residual is None else torch.float32,
    )
    # A single column lies the same way by rows and by columns.
    return FusedSpec(norm, quantizer, _columns_or_rows(shuffle_scale and group_size > 0), sum_output=residual)


def rmsnorm_quant(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group_size: int = 0,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    shuffle_scale: bool = False,
    gemma_norm: bool = False,
) -> Quantized:
    """Normalize and quantize, per row or per group; see :func:`sglang_rms_norm_spec`.

    Args:
        x: (M, N) float32, bfloat16 or float16.
        weight: (N,) float.
        group_size: 0 for one scale per row; else 32, 64 or 128, a divisor of N.
        shuffle_scale: store the scale of row m, group j at j*M + m; they are presented with strides (1, M).
        gemma_norm: multiply by 1 + weight.

    Returns:
        codes (M, N); scale (M, 1) float32, or (M, N / group_size).

    Source: sgl-project/sglang pull request 21403.
    """
    return _rms_norm_quant(x, None, weight, eps, group_size, dtype, shuffle_scale, gemma_norm)[0]


def add_rmsnorm_quant(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    group_size: int = 0,
    dtype: torch.dtype = torch.float8_e4m3fn,
    *,
    shuffle_scale: bool = False,
    gemma_norm: bool = False,
) -> tuple[Quantized, torch.Tensor]:
    """As :func:`rmsnorm_quant` of x + residual, which the norm reads unrounded.

    Returns:
        (codes, scale), and x + residual rounded to x's dtype, a new tensor.
    """
    quantized, total = _rms_norm_quant(x, residual, weight, eps, group_size, dtype, shuffle_scale, gemma_norm)
    assert total is not None
    return quantized, total


def _rms_norm_quant(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    group_size: int,
    dtype: torch.dtype,
    shuffle_scale: bool,
    gemma_norm: bool,
) -> tuple[Quantized, torch.Tensor | None]:
    require_dims("x", x, "(M, N)")
    spec = sglang_rms_norm_spec(
        eps,
        group_size,
        dtype,
        shuffle_scale=shuffle_scale,
        gemma_norm=gemma_norm,
        residual=None if residual is None else x.dtype,
    )
    codes, scale, *total = torch.ops.fusion_pass.rms_norm_quant(x, residual, weight, None, spec.encode())
    transposed = spec.layout is ScaleLayout.COLUMN
    return Quantized(codes, _presented(scale, transposed, strided=True)), total[0] if total else None


# --- rtp-llm: pull request 816 -----------------------------------------------------------------------------------------


def rtp_silu_mul_spec(
    group_size: int = 128, scale_format: ScaleFormat = ScaleFormat.FLOAT, layout: ScaleLayout = ScaleLayout.TMA
) -> FusedSpec:
    """y = up * silu(gate), unrounded; scale = max(amax, 1e-10) / 448 per group; codes = cast(clamp(y / scale)).

    With a UE8M0 ``scale_format`` the scale is exp2(ceil(log2(scale))) and divides as such.

    Args:
        group_size: values per scale.
        scale_format: words of exponents need ``ScaleLayout.PACKED``, and that needs them.
        layout: where the scales lie.

    Source: alibaba/rtp-llm pull request 816.
    """
    power = PowerOfTwo.NO if scale_format is ScaleFormat.FLOAT else PowerOfTwo.CEIL
    quantizer = Quantizer.dynamic(
        group=group_size, amax_floor=_AMAX_FLOOR, scale_rule=ScaleRule.DIVIDE, power_of_two=power
    )
    if scale_format is ScaleFormat.UE8M0_WORDS:
        assert quantizer.scale is not None
        byte = Term("u8", (Term("shr", (Term("bits", (quantizer.scale,)), 23)),))
        quantizer = dataclasses.replace(quantizer, scale=byte, scale_dtype=torch.uint8)
    require(
        (layout is ScaleLayout.PACKED) is (scale_format is ScaleFormat.UE8M0_WORDS),
        "layout",
        layout.value,
        "packed for words of exponents, and for nothing else",
    )
    return FusedSpec(GatedActivation(), quantizer, layout)


def _up_and_gate(x: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    size = x.shape[-1]
    whole = group_size > 0 and size % (2 * group_size) == 0
    require(whole, "shape of x", tuple(x.shape), f"rows of 2H values, H a multiple of the group length {group_size}")
    return x[..., : size // 2], x[..., size // 2 :]


def silu_and_mul_contiguous_fp8_post_quant(
    x: torch.Tensor, group_size: int = 128, scale_format: ScaleFormat = ScaleFormat.FLOAT
) -> Quantized:
    """Quantize up * silu(gate) of a projection [up | gate], scales for TMA; see :func:`rtp_silu_mul_spec`.

    Args:
        x: (T, 2H) float32, bfloat16 or float16: the first half of a row is up, the second gate. T may be 0.
        group_size: values per scale, a divisor of H.
        scale_format: what scales are returned. Consumers on sm_90 take float32 alone; on sm_100 DeepGEMM takes words, and
            float32 only if they are powers of two.

    Returns:
        codes (T, H) float8_e4m3fn contiguous; scale (T, G) float32 with strides (1, ceil4(T)), or (T, ceil(G/4)) int32 of
        the same strides, group j being byte j%4 of word j//4, counted from the lowest. The rows from T to ceil4(T) and the
        bytes of groups from G on are zero. An infinite scale has the byte of NaN, 255.

    Source: alibaba/rtp-llm pull request 816.
    """
    require_dims("x", x, "(T, 2H)")
    up, gate = _up_and_gate(x, group_size)
    packed = scale_format is ScaleFormat.UE8M0_WORDS
    spec = rtp_silu_mul_spec(group_size, scale_format, ScaleLayout.PACKED if packed else ScaleLayout.TMA)
    codes, scale = torch.ops.fusion_pass.act_mul_quant(gate, up, None, spec.encode())
    if packed:
        scale = scale.view(torch.int32).squeeze(-1)
    return Quantized(codes, scale.t()[: x.shape[0]])


def silu_and_mul_masked_fp8_post_quant(
    x: torch.Tensor, group_size: int = 128, scale_format: ScaleFormat = ScaleFormat.FLOAT
) -> Quantized:
    """As :func:`silu_and_mul_contiguous_fp8_post_quant` for the padded batches of experts, (E, T, 2H).

    There is no mask: all rows are quantized, those beyond an expert's tokens as well, which nothing reads.

    Args:
        x: (E, T, 2H) float32, bfloat16 or float16, [up | gate].
        group_size: values per scale, a divisor of H.
        scale_format: ``ScaleFormat.FLOAT`` or ``ScaleFormat.UE8M0``.

    Returns:
        codes (E, T, H) float8_e4m3fn contiguous; scale (E, T, G) float32 with strides (T*G, 1, T), unpadded.

    Source: rtp-llm's masked sibling of the kernel in pull request 816.
    """
    require_dims("x", x, "(E, T, 2H)")
    up, gate = _up_and_gate(x, group_size)
    spec = rtp_silu_mul_spec(group_size, scale_format, ScaleLayout.COLUMN)
    codes, scale = torch.ops.fusion_pass.act_mul_quant(gate, up, None, spec.encode())
    return Quantized(codes, scale.transpose(1, 2))


# --- torchao: pull request 3973 ----------------------------------------------------------------------------------------

_MULTIPLIER = parse("f32((reciprocal(max(f64(amax), 1e-12)) * 448.0))")


def torchao_rowwise_spec(*, round_scales_to_power_of_2: bool = False) -> FusedSpec:
    """multiplier = f32(448 / max(f64(amax), 1e-12)) per row; codes = cast(clamp(x * multiplier)).

    With ``round_scales_to_power_of_2`` the multiplier is exp2(floor(log2(multiplier))). A row of zeros has the multiplier
    4.48e14, or 2^48; one with an infinity 0.

    Source: pytorch/ao pull request 3973, ``triton_fp8_rowwise_2d_scale_and_cast``; ``tensor_to_scale``.
    """
    multiplier = _MULTIPLIER
    if round_scales_to_power_of_2:
        multiplier = Term("exp2", (Term("floor", (Term("log2", (multiplier,)),)),))
    return FusedSpec(NoPrologue(), Quantizer(torch.float8_e4m3fn, multiplier, divides=False, scale=multiplier))


def fp8_rowwise_2d_scale_and_cast(x: torch.Tensor, round_scales_to_power_of_2: bool = False) -> Multiplied:
    """Quantize rows to e4m3fn by a multiplier each; see :func:`torchao_rowwise_spec`.

    Args:
        x: (M, K) float32, bfloat16 or float16.
        round_scales_to_power_of_2: take the greatest power of two that is not above the multiplier.

    Returns:
        codes (M, K) float8_e4m3fn, multiplier (M, 1) float32: ``torch._scaled_grouped_mm`` takes its reciprocal.

    Source: pytorch/ao pull request 3973.
    """
    require_dims("x", x, "(M, K)")
    spec = torchao_rowwise_spec(round_scales_to_power_of_2=round_scales_to_power_of_2)
    return Multiplied(*torch.ops.fusion_pass.quant(x, None, spec.encode()))


# All-zero blocks have the scale 1; an amax that rounds up to infinity has the greatest scale. E2M1 has no NaN: its code is 0.
_TE_MXFP4 = mx_quantizer(
    torch.float4_e2m1fn_x2,
    ScaleMode.EVEN,
    e2m1=E2M1(Ties.AWAY, Sign.NEGATIVE, 0),
    zero_byte=127,
    infinity_byte=254,
)


def te_mxfp4_spec(rowwise: Placement | None = LINEAR, columnwise: Placement | None = LINEAR) -> CastTransposeSpec:
    """The spec of :func:`te_cast_transpose_mxfp4`."""
    return CastTransposeSpec(_TE_MXFP4, rowwise, columnwise)


def te_cast_transpose_mxfp4(
    x: torch.Tensor,
    *,
    rowwise: bool = True,
    columnwise: bool = True,
    scale_layout: BlockScales = BlockScales.PADDED,
    shuffle_rowwise_data: bool = False,
    shuffle_columnwise_data: bool = False,
) -> CastTransposed:
    """MXFP4 of a matrix and of its transpose, from one read.

    Blocks of 32 values: the scale's exponent is that of amax rounded to one mantissa bit, halves up, minus 2; values at the
    scale are rounded to E2M1, ties away from zero, with the sign of values below zero.

    Args:
        x: (..., N) float32, bfloat16 or float16, whose leading dims count as M rows; M and N multiples of 32.
        rowwise, columnwise: which directions are wanted.
        scale_layout: linear; padded to (ceil256, ceil8) with zeros; or that in the 32x8 shuffle, padded with 127. None is
            ever trimmed: a shuffled matrix without its padding has lost scales.
        shuffle_rowwise_data, shuffle_columnwise_data: whether the data are in the (16, 16) order of
            :func:`fusion_pass.layouts.pack_mfma_shuffled`: multiples of 16 rows and of 64 values.

    Returns:
        rowwise data (M, N // 2) uint8, the even element in the low nibble, and E8M0 bytes of (M, N // 32) blocks;
        columnwise data (N, M // 2) and bytes of (N, M // 32); None for a direction that is not wanted.

    Source: TransformerEngine pull request 422, ``te_cast_transpose_mxfp4_triton``.
    """
    return cast_transpose(
        x,
        _TE_MXFP4,
        rowwise=Placement(scale_layout, shuffle_rowwise_data) if rowwise else None,
        columnwise=Placement(scale_layout, shuffle_columnwise_data) if columnwise else None,
    )
