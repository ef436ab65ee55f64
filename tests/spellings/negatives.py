"""Look-alikes: what differs from a norm, an activation or a quantizer in one place, and is something else."""

import torch
import torch.nn.functional as F  # noqa: N812

from . import negative
from .inputs import BF16, F16, F32, halves, normed, pair, spread, weightless
from .positives_norms import llama
from .quantizers import E4M3, per_group_32, per_group_128, per_token

MADE_UP = "made up:"
TRANSFORMERS = "huggingface/transformers src/transformers/models"


def _amax(x, dim=-1):
    return x.abs().amax(dim, keepdim=True).float().clamp(min=1e-10)


def _codes(quotient):
    return quotient.clamp(-448.0, 448.0).to(E4M3)


# Quantizers: the clamp and the cast.


@negative(f"{MADE_UP} no clamp, and a divisor that lets values overflow to infinity", inputs=spread())
def overflowing(x):
    scale = _amax(x) / 70000.0
    return (x.float() / scale).to(torch.float8_e5m2), scale


@negative(f"{MADE_UP} an asymmetric clamp", "quant_per_token", inputs=spread())
def asymmetric_clamp(x):
    scale = _amax(x) / 448.0
    return (x.float() / scale).clamp(-448.0, 440.0).to(E4M3), scale


@negative(f"{MADE_UP} one-sided saturation", inputs=spread())
def clamped_above_only(x):
    scale = _amax(x) / 224.0
    return (x.float() / scale).clamp(max=448.0).to(E4M3), scale


@negative(f"{MADE_UP} a clamp of magnitudes: relu in the middle", inputs=spread())
def clamped_at_zero(x):
    scale = _amax(x) / 448.0
    return (x.float() / scale).clamp(0.0, 448.0).to(E4M3), scale


@negative(f"{MADE_UP} int8 without a clamp, by a divisor that needs none", "quant_int8_per_token", inputs=spread())
def int8_wrapping(x):
    scale = _amax(x) / 100.0
    return torch.round(x.float() / scale).to(torch.int8), scale


@negative(f"{MADE_UP} int8 without a clamp, by a divisor that needs none in large rows alone", inputs=spread(F32))
def int8_wrapping_in_small_rows(x):
    amax = x.abs().amax(-1, keepdim=True).clamp(min=1e-3)
    scale = torch.where(amax < 1.0, amax / 500.0, amax / 127.0)
    return torch.round(x / scale).to(torch.int8), scale


@negative(f"{MADE_UP} int8 without a clamp, by a constant for rows that are not as small", inputs=spread(F32))
def int8_wrapping_by_a_constant(x):
    amax = x.abs().amax(-1, keepdim=True)
    scale = torch.where(amax < 1.0, 1e-4, amax / 127.0)
    return torch.round(x / scale).to(torch.int8), scale


@negative(f"{MADE_UP} -0.0 is added, which leaves -0 as it is", inputs=spread(F32))
def minus_zero_added(x):
    scale = _amax(x) / 448.0
    return _codes((x / scale).round() + torch.tensor(-0.0, device=x.device)), scale


@negative(f"{MADE_UP} a guard by -0.0, which kernels read from a tensor", "quant_per_token", inputs=spread(F32))
def guarded_by_minus_zero(x):
    amax = x.abs().amax(-1, keepdim=True)
    multiplier = torch.where(amax < 1.0, -0.0, 448.0 / amax)
    return _codes(x * multiplier), multiplier


@negative(
    "pytorch/ao torchao/quantization/quant_primitives.py asymmetric int8: a zero point from the minimum",
    inputs=spread(F32),
)
def int8_with_zero_point(x):
    low, high = x.amin(-1, keepdim=True).clamp(max=0.0), x.amax(-1, keepdim=True).clamp(min=0.0)
    scale = ((high - low) / 255.0).clamp(min=1e-5)
    zero_point = torch.clamp(-128 - torch.round(low / scale), -128, 127)
    return torch.clamp(torch.round(x / scale) + zero_point, -128, 127).to(torch.int8), scale, zero_point


@negative(f"{MADE_UP} unsigned codes", inputs=spread())
def uint8_codes(x):
    scale = _amax(x) / 127.0
    return (torch.round(x.float() / scale) + 128).clamp(0, 255).to(torch.uint8), scale


@negative(f"{MADE_UP} rounded towards minus infinity", inputs=spread())
def floored(x):
    scale = _amax(x) / 127.0
    return torch.floor(x.float() / scale).clamp(-128, 127).to(torch.int8), scale


@negative(f"{MADE_UP} rounded half away from zero", inputs=spread())
def half_away(x):
    scale = _amax(x) / 127.0
    quotient = x.float() / scale
    rounded = torch.sign(quotient) * torch.floor(quotient.abs() + 0.5)
    return rounded.clamp(-128, 127).to(torch.int8), scale


@negative("NVIDIA/TransformerEngine stochastic rounding: noise before the cast", inputs=spread())
def stochastic(x):
    scale = _amax(x) / 127.0
    noise = torch.linspace(-0.5, 0.5, x.shape[-1], device=x.device)
    return torch.round(x.float() / scale + noise).clamp(-128, 127).to(torch.int8), scale


@negative("pytorch/pytorch aten: a cast of normalized values, no scale", inputs=spread())
def plain_cast(x):
    return x.clamp(-448.0, 448.0).to(E4M3)


@negative(f"{MADE_UP} the quotient is rounded to bfloat16 before the cast", "quant_per_token", inputs=spread())
def quotient_rounded(x):
    scale = _amax(x) / 448.0
    return _codes((x.float() / scale).to(BF16)), scale


@negative(f"{MADE_UP} the quotient is computed in bfloat16", "quant_per_token", inputs=spread())
def quotient_in_bfloat16(x):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return _codes(x / scale), scale


@negative(f"{MADE_UP} cast to e5m2 by way of e4m3's bounds, then to e4m3", "quant_per_token", inputs=spread())
def cast_twice(x):
    scale = _amax(x) / 448.0
    return _codes((x.float() / scale).to(F16).float()), scale


# Quantizers: the scale.


@negative(f"{MADE_UP} the scale has an upper bound", "quant_per_token", inputs=spread())
def scale_bounded_above(x):
    scale = (_amax(x) / 448.0).clamp(max=0.01)
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} amax is bounded above", "quant_per_token", inputs=spread())
def amax_bounded_above(x):
    scale = _amax(x).clamp(max=12.0) / 448.0
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} the scale has a margin", "quant_per_token", inputs=spread())
def scale_with_margin(x):
    scale = _amax(x) / 448.0 + 1e-6
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} tiny scales become one", "quant_per_token", inputs=spread())
def tiny_scales_replaced(x):
    scale = x.abs().amax(-1, keepdim=True).float() / 448.0
    scale = torch.where(scale < 1e-4, 1.0, scale)
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} the stored scale is rounded, the quotient's is not", "quant_per_token", inputs=spread())
def stored_scale_rounded(x):
    codes, scale = per_token(x)
    return codes, scale.to(BF16)


@negative(f"{MADE_UP} the quotient's scale is rounded twice", "quant_per_token", inputs=spread())
def scale_rounded_twice(x):
    scale = (_amax(x) / 448.0).to(F16).to(BF16).float()
    return _codes(x.float() / scale), scale


@negative(
    "pytorch/ao torchao/quantization/quant_primitives.py e8m0 scales: the nearest power of two, not the next",
    "quant_per_token_ue8m0",
    inputs=spread(),
)
def nearest_power_of_two(x):
    scale = torch.exp2(torch.round(torch.log2(_amax(x) / 448.0)))
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} the power of two below", "quant_per_token_ue8m0", inputs=spread())
def power_of_two_below(x):
    scale = torch.exp2(torch.floor(torch.log2(_amax(x) / 448.0)))
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} a power of e", inputs=spread())
def power_of_e(x):
    scale = torch.exp(torch.ceil(torch.log(_amax(x) / 448.0)))
    return _codes(x.float() / scale), scale


@negative(
    "NVIDIA/TransformerEngine delayed scaling: the scale of a former step",
    inputs=lambda d: (*spread()(d), torch.rand(6, 1, device=d)),
)
def former_scale(x, former):
    return _codes(x.float() / former), _amax(x) / 448.0


@negative(
    "NVIDIA/TransformerEngine delayed scaling: the greatest of a history",
    inputs=lambda d: (*spread()(d), torch.rand(6, 1, device=d)),
)
def scale_of_history(x, history):
    scale = torch.maximum(_amax(x), history) / 448.0
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} the scale of another tensor", inputs=spread(tensors=2))
def scale_of_another(x, other):
    scale = _amax(other) / 448.0
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} amax of columns", inputs=spread(shape=(6, 256)))
def amax_of_columns(x):
    scale = _amax(x, dim=0) / 448.0
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} amax of columns of a square", inputs=spread(shape=(64, 64)))
def amax_of_columns_of_a_square(x):
    scale = x.abs().amax(0).float().clamp(min=1e-10).unsqueeze(-1) / 448.0
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} amax of all but the last dim's halves", inputs=spread())
def amax_of_half_a_row(x):
    scale = _amax(x[:, :128]) / 448.0
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} amax of strided groups", inputs=spread())
def amax_of_strided_groups(x):
    grouped = x.view(6, 128, 2).float()
    scale = grouped.abs().amax(1, keepdim=True).clamp(min=1e-10) / 448.0
    return _codes(grouped / scale).view(6, 256), scale


@negative(f"{MADE_UP} amax of several dims", inputs=spread(shape=(2, 3, 256)))
def amax_of_batch(x):
    scale = x.abs().amax((1, 2), keepdim=True).float().clamp(min=1e-10) / 448.0
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} amax without abs", inputs=spread())
def greatest_signed(x):
    scale = x.amax(-1, keepdim=True).float().clamp(min=1e-10) / 448.0
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} amin of magnitudes", inputs=spread())
def least_magnitude(x):
    scale = x.abs().amin(-1, keepdim=True).float().clamp(min=1e-10) / 448.0
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} the mean of magnitudes", inputs=spread())
def mean_magnitude(x):
    scale = x.abs().mean(-1, keepdim=True).float().clamp(min=1e-10) / 448.0
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} the Euclidean norm", inputs=spread(), sums=True)
def euclidean(x):
    scale = x.float().norm(dim=-1, keepdim=True).clamp(min=1e-10) / 448.0
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} a quantile in place of the maximum", inputs=spread())
def quantile(x):
    scale = x.abs().float().sort(dim=-1).values[:, -3:-2].clamp(min=1e-10) / 448.0
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} softmax in place of amax", inputs=spread(F32, shape=(6, 256)), sums=True)
def softmax_scale(x):
    scale = torch.softmax(x, dim=-1).amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return _codes(x / scale), scale


@negative(f"{MADE_UP} logsumexp as a smooth maximum", inputs=spread(F32, shape=(6, 256)), sums=True)
def smooth_maximum(x):
    scale = torch.logsumexp(x.abs(), dim=-1, keepdim=True) / 448.0
    return _codes(x / scale), scale


@negative(f"{MADE_UP} amax of a rounded copy, the quotient of the unrounded value", inputs=spread(F32))
def amax_of_rounded_copy(x):
    scale = _amax(x.to(BF16)) / 448.0
    return _codes(x / scale), scale


@negative(f"{MADE_UP} amax of the unrounded value, the quotient of a rounded copy", inputs=spread(F32))
def quotient_of_rounded_copy(x):
    scale = _amax(x) / 448.0
    return _codes(x.to(BF16).float() / scale), scale


@negative(f"{MADE_UP} the value is multiplied between amax and quotient", inputs=spread(tensors=2))
def mask_between(x, mask):
    scale = _amax(x) / 448.0
    return _codes((x * mask).float() / scale), scale


@negative(f"{MADE_UP} a bias between amax and quotient", inputs=spread())
def bias_between(x):
    scale = _amax(x) / 448.0
    return _codes((x.float() + 1.0) / scale), scale


@negative(f"{MADE_UP} a bias between quotient and clamp", inputs=spread())
def bias_behind_the_quotient(x):
    scale = _amax(x) / 448.0
    return _codes(x.float() / scale + 1.0), scale


@negative(f"{MADE_UP} x is updated in place between amax and quotient", inputs=spread())
def updated_between(x):
    x = x.clone()
    scale = _amax(x) / 448.0
    x.mul_(2.0)
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} a row of x is overwritten between amax and quotient", inputs=spread())
def row_overwritten_between(x):
    scale = _amax(x) / 448.0
    x[0].zero_()
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} rows are permuted between amax and quotient", inputs=spread())
def rows_flipped(x):
    scale = _amax(x.flip(0)) / 448.0
    return _codes(x.float() / scale), scale


@negative(
    f"{MADE_UP} blocked scales whose tiles go down the columns", "quant_per_group_32", inputs=spread(shape=(256, 256))
)
def tiles_by_columns(x):
    codes, scales = per_group_32(x)
    tiles = scales.view(2, 128, 2, 4).permute(2, 0, 1, 3)
    return codes, tiles.reshape(-1, 4, 32, 4).transpose(1, 2).reshape(-1, 32, 16).flatten()


@negative(f"{MADE_UP} scales of transposed heads of one shape", inputs=spread(shape=(4, 4, 64)))
def heads_transposed(x):
    scale = _amax(x.transpose(0, 1)) / 448.0
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} the scale multiplies", "quant_per_token", inputs=spread())
def scale_multiplies(x):
    scale = _amax(x) / 448.0
    return _codes(x.float() * scale), scale


@negative(f"{MADE_UP} the scale is divided by x", inputs=spread())
def quotient_inverted(x):
    scale = _amax(x) / 448.0
    return _codes(scale / x.float()), scale


@negative(f"{MADE_UP} the divisor over amax is taken for the scale", "quant_per_token", inputs=spread())
def scale_inverted(x):
    scale = 448.0 / _amax(x)
    return _codes(x.float() / scale), scale


@negative(f"{MADE_UP} floor division", inputs=spread())
def floor_division(x):
    scale = _amax(x) / 448.0
    return _codes(torch.div(x.float(), scale, rounding_mode="floor")), scale


@negative(f"{MADE_UP} the scale is computed in float64", inputs=spread())
def scale_in_float64(x):
    scale = x.abs().amax(-1, keepdim=True).double().clamp(min=1e-10) / 448.0
    return _codes(x.double() / scale), scale.float()


@negative(f"{MADE_UP} float64 values", inputs=spread(torch.float64))
def float64_values(x):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return _codes(x / scale), scale


@negative(f"{MADE_UP} integer values", inputs=lambda d: (torch.randint(-99, 99, (6, 256), device=d),))
def integer_values(x):
    scale = x.abs().amax(-1, keepdim=True).clamp(min=1) / 448.0
    return _codes(x / scale), scale


@negative(f"{MADE_UP} the quotient is masked after the fact", inputs=spread(tensors=2))
def quotient_masked(x, mask):
    scale = _amax(x) / 448.0
    return _codes(torch.where(mask > 0, x.float() / scale, 0.0)), scale


# Norms: the quantizer alone may fuse.

QUANT = "quant_per_token"


@negative("pytorch/pytorch torch/nn/functional.py layer_norm", QUANT, inputs=normed(F32), then=per_token, sums=True)
def layer_norm(x, weight):
    return F.layer_norm(x, (x.shape[-1],), weight)


@negative(
    f"{TRANSFORMERS}/cohere/modeling_cohere.py CohereLayerNorm: the RMS norm of what is left of the mean",
    "rms_norm_per_token",
    inputs=normed(),
    then=per_token,
    sums=True,
)
def mean_subtracted(x, weight):
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return (weight.float() * h).to(x.dtype)


@negative(
    f"{MADE_UP} the mean is subtracted from the squares' argument alone",
    QUANT,
    inputs=normed(),
    then=per_token,
    sums=True,
)
def centered_variance(x, weight):
    h = x.float()
    variance = (h - h.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True)
    return weight * (h * torch.rsqrt(variance + 1e-5)).to(x.dtype)


@negative(
    "vllm-project/vllm vllm/model_executor/layers/layernorm.py RMSNorm with variance_size_override",
    QUANT,
    inputs=normed(),
    then=per_token,
)
def partial_variance(x, weight):
    h = x.float()
    variance = h[..., :128].pow(2).mean(-1, keepdim=True)
    return weight * (h * torch.rsqrt(variance + 1e-5)).to(x.dtype)


@negative(
    "bzhangGo/rmsnorm rmsnorm_torch.py RMSNorm: eps is added to the root",
    QUANT,
    inputs=normed(F32),
    then=per_token,
    sums=True,
)
def eps_beside_the_root(x, weight):
    root = x.norm(2, dim=-1, keepdim=True) * x.shape[-1] ** (-1.0 / 2)
    return weight * (x / (root + 1e-8))


@negative(f"{MADE_UP} eps is added to the inverse root", QUANT, inputs=normed(), then=per_token)
def eps_behind_rsqrt(x, weight):
    h = x.float()
    return weight * (h * (torch.rsqrt(h.pow(2).mean(-1, keepdim=True)) + 1e-5)).to(x.dtype)


@negative(f"{MADE_UP} eps bounds the mean from below", QUANT, inputs=normed(), then=per_token)
def eps_as_floor(x, weight):
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True).clamp(min=1e-5))).to(x.dtype)


@negative(f"{MADE_UP} a learned eps", QUANT, inputs=lambda d: (*normed()(d), torch.rand(1, device=d)), then=per_token)
def learned_eps(x, weight, eps):
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


@negative(f"{MADE_UP} the sum of squares, not their mean", QUANT, inputs=normed(), then=per_token)
def sum_of_squares(x, weight):
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) + 1e-5)).to(x.dtype)


@negative(f"{MADE_UP} the sum over another count", QUANT, inputs=normed(), then=per_token)
def unbiased_mean(x, weight):
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).sum(-1, keepdim=True) / 255 + 1e-5)).to(x.dtype)


@negative(f"{MADE_UP} the mean of cubes of magnitudes", QUANT, inputs=normed(), then=per_token)
def cubes(x, weight):
    h = x.float()
    return weight * (h * torch.rsqrt(h.abs().pow(3).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


@negative(f"{MADE_UP} the mean of magnitudes", QUANT, inputs=normed(), then=per_token)
def mean_of_magnitudes(x, weight):
    h = x.float()
    return weight * (h / (h.abs().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


@negative(f"{MADE_UP} the root is multiplied", QUANT, inputs=normed(), then=per_token)
def root_multiplied(x, weight):
    h = x.float()
    return weight * (h * torch.sqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


@negative(f"{MADE_UP} no root", QUANT, inputs=normed(), then=per_token)
def no_root(x, weight):
    h = x.float()
    return weight * (h / (h.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


@negative(f"{MADE_UP} the product of two tensors is averaged", QUANT, inputs=normed(tensors=2), then=per_token)
def cross_products(x, other, weight):
    h = x.float()
    mean = (h * other.float()).mean(-1, keepdim=True).abs()
    return weight * (h * torch.rsqrt(mean + 1e-5)).to(x.dtype)


@negative(
    f"{MADE_UP} the statistics of one tensor, the values of another", QUANT, inputs=normed(tensors=2), then=per_token
)
def statistics_of_another(x, other, weight):
    root = torch.rsqrt(other.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * (x.float() * root).to(x.dtype)


@negative(
    f"{MADE_UP} the statistics of the sum, the values without the residual",
    QUANT,
    inputs=normed(tensors=2),
    then=per_token,
)
def residual_in_the_statistics_alone(x, residual, weight):
    root = torch.rsqrt((x + residual).float().pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * (x.float() * root).to(x.dtype)


@negative(
    f"{MADE_UP} the statistics of the unrounded sum, the values of the rounded one",
    QUANT,
    inputs=spread(tensors=2),
    sums=True,
)
def sum_rounded_for_the_values(x, residual):
    h = x.float() + residual.float()
    root = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return per_token((h.to(x.dtype).float() * root).to(x.dtype))


@negative(f"{MADE_UP} squares are rounded to bfloat16", QUANT, inputs=normed(), then=per_token)
def squares_rounded(x, weight):
    root = torch.rsqrt((x * x).float().mean(-1, keepdim=True) + 1e-5)
    return weight * (x.float() * root).to(x.dtype)


@negative(
    "ROCm/aiter op_tests/triton_tests: everything is computed in bfloat16",
    QUANT,
    inputs=normed(),
    then=per_token,
    sums=True,
)
def all_in_bfloat16(x, weight):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))


@negative(f"{MADE_UP} the mean of columns", QUANT, inputs=normed(shape=(256, 256)), then=per_token)
def mean_of_columns(x, weight):
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(0, keepdim=True) + 1e-5)).to(x.dtype)


@negative(f"{MADE_UP} the roots of columns of a square", QUANT, inputs=normed(shape=(64, 64)), then=per_token)
def roots_of_columns(x, weight):
    h = x.float()
    roots = torch.rsqrt(h.pow(2).mean(-1) + 1e-5)
    return weight * (h * roots).to(x.dtype)


@negative(f"{MADE_UP} +1 between norm and quantizer", QUANT, inputs=normed())
def one_added(x, weight):
    return per_token(llama(x, weight) + 1)


@negative("microsoft/LoRA-style bias: the norm has a bias", QUANT, inputs=normed())
def biased(x, weight):
    return per_token(llama(x, weight) + weight)


@negative(f"{MADE_UP} 1 is added to the product, not to the weight", QUANT, inputs=normed())
def one_added_to_the_product(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return per_token((h * weight.float() + 1.0).to(x.dtype))


@negative(f"{MADE_UP} one minus the weight", "rms_norm_per_token", inputs=normed())
def one_minus_weight(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return per_token((h * (1.0 - weight.float())).to(x.dtype))


@negative(f"{MADE_UP} two plus the weight", "rms_norm_per_token", inputs=normed())
def two_plus_weight(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return per_token((h * (2.0 + weight.float())).to(x.dtype))


@negative(
    f"{MADE_UP} a weight for each row",
    QUANT,
    inputs=lambda d: (*weightless(shape=(6, 256))(d), torch.rand(6, 1, device=d).to(BF16)),
)
def weight_of_rows(x, weight):
    return per_token(llama(x, weight))


@negative(f"{MADE_UP} a weight for each value", QUANT, inputs=weightless(tensors=2))
def weight_of_values(x, weight):
    return per_token(llama(x, weight))


@negative(
    f"{MADE_UP} a weight of one value", QUANT, inputs=lambda d: (*weightless()(d), torch.rand(1, device=d).to(BF16))
)
def weight_of_one_value(x, weight):
    return per_token(llama(x, weight))


@negative(
    f"{MADE_UP} a weight for each batch element",
    QUANT,
    inputs=lambda d: (*weightless()(d), torch.rand(2, 1, 256, device=d).to(BF16)),
)
def weight_of_batch(x, weight):
    return per_token(llama(x, weight))


@negative(
    f"{MADE_UP} dropout between norm and quantizer",
    QUANT,
    inputs=lambda d: (*normed()(d), torch.rand(2, 3, 256, device=d) > 0.5),
)
def masked_norm(x, weight, mask):
    return per_token(llama(x, weight) * mask / 0.5)


@negative(f"{MADE_UP} the norm of the columns, quantized by rows", QUANT, inputs=normed(shape=(256, 256)))
def norm_transposed(x, weight):
    return per_token(llama(x, weight).t().contiguous())


@negative(f"{MADE_UP} a part of the norm is quantized", QUANT, inputs=normed(shape=(6, 256)))
def half_of_the_norm(x, weight):
    return per_token(llama(x, weight)[:, :128])


@negative(f"{MADE_UP} amax of the norm before the weight", inputs=normed())
def amax_before_the_weight(x, weight):
    normalized = llama(x, torch.ones_like(weight))
    scale = _amax(normalized) / 448.0
    return _codes((normalized * weight).float() / scale), scale


@negative(f"{MADE_UP} groups span two rows of the norm", "quant_per_token", inputs=normed(shape=(6, 64)))
def groups_across_rows(x, weight):
    return per_group_128(llama(x, weight).view(3, 128))


@negative(
    f"{MADE_UP} broadcast residual",
    "rms_norm_per_token",
    inputs=lambda d: (*normed()(d), *weightless(shape=(1, 1, 256))(d)),
)
def broadcast_residual(x, weight, residual):
    summed = x + residual
    return *per_token(llama(summed, weight)), summed


@negative(f"{MADE_UP} a scaled residual, add with alpha", "rms_norm_per_token", inputs=normed(tensors=2))
def scaled_residual(x, residual, weight):
    summed = torch.add(x, residual, alpha=2)
    return *per_token(llama(summed, weight)), summed


@negative(f"{MADE_UP} a difference, not a sum", "rms_norm_per_token", inputs=normed(tensors=2))
def difference(x, residual, weight):
    summed = x - residual
    return *per_token(llama(summed, weight)), summed


@negative(
    f"{MADE_UP} the residual is updated in place between its reads", "add_rms_norm_per_token", inputs=normed(tensors=2)
)
def residual_updated(x, residual, weight):
    summed = x + residual
    first = per_token(llama(summed, weight))
    summed.mul_(2.0)
    return *first, summed


# Activations: the quantizer alone may fuse.


@negative(f"{MADE_UP} relu gates", QUANT, inputs=pair(), then=per_token)
def relu(gate, up):
    return F.relu(gate) * up


@negative("microsoft/BitNet gpu/model.py FeedForward: a squared relu gates", QUANT, inputs=pair(), then=per_token)
def squared_relu(gate, up):
    return F.relu(gate) ** 2 * up


@negative(
    f"{TRANSFORMERS}/gpt_oss: gate and up are bounded differently",
    "swish_mul_per_token",
    inputs=halves(),
    then=per_token,
)
def bounded_differently(gate_up):
    gate, up = gate_up.chunk(2, -1)
    gate, up = gate.clamp(max=7.0), up.clamp(min=-7.0, max=6.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


@negative(
    f"{TRANSFORMERS}/t5/modeling_t5.py NewGELUActivation: gelu, one operation at a time",
    QUANT,
    inputs=pair(F32),
    then=per_token,
)
def gelu_spelled_out(gate, up):
    inner = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * torch.pow(gate, 3.0))
    return 0.5 * gate * (1.0 + torch.tanh(inner)) * up


@negative(f"{MADE_UP} silu without up", QUANT, inputs=pair(), then=per_token)
def ungated(gate, up):
    return F.silu(gate) + 0 * up


@negative(f"{MADE_UP} the gate's silu of another sign", QUANT, inputs=pair(F32), then=per_token)
def mirrored_silu(gate, up):
    return gate / (1 + torch.exp(gate)) * up


@negative(f"{MADE_UP} 2 + exp", QUANT, inputs=pair(F32), then=per_token)
def other_denominator(gate, up):
    return gate / (2 + torch.exp(-gate)) * up


@negative(f"{MADE_UP} the numerator is another tensor", QUANT, inputs=pair(F32), then=per_token)
def other_numerator(gate, up):
    return up / (1 + torch.exp(-gate)) * up


@negative(
    f"{MADE_UP} a broadcast up",
    QUANT,
    inputs=lambda d: (pair()(d)[0], torch.rand(256, device=d).to(BF16)),
    then=per_token,
)
def broadcast_up(gate, up):
    return F.silu(gate) * up


@negative(f"{MADE_UP} mish", QUANT, inputs=pair(F32), then=per_token, sums=True)
def mish(gate, up):
    return F.mish(gate) * up


@negative(f"{MADE_UP} silu of the product", "silu_per_token", inputs=pair(), then=per_token)
def silu_of_product(gate, up):
    return F.silu(gate * up)


@negative(f"{MADE_UP} zero is added to up, which turns -0 to 0", "silu_mul_per_token", inputs=pair(F32), then=per_token)
def zero_added_to_up(gate, up):
    return F.silu(gate) * (torch.where(up > 0, up, -0.0) + 0.0)


@negative(f"{MADE_UP} a gate in float64", QUANT, inputs=pair(), then=per_token)
def gate_in_float64(gate, up):
    return (F.silu(gate.double()) * up.double()).to(gate.dtype)


@negative(
    f"{MADE_UP} routing weights behind the product",
    QUANT,
    inputs=lambda d: (*pair()(d), torch.rand(6, 1, device=d).to(BF16)),
    then=per_token,
)
def routed(gate, up, routing):
    return F.silu(gate) * up * routing
