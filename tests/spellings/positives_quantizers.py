"""Every way in which public code quantizes a tensor to fp8 or int8, by itself."""

import torch
import torch.nn.functional as F  # noqa: N812

from . import positive
from .inputs import F16, F32, spread, with_scale
from .quantizers import E4M3

E5M2 = torch.float8_e5m2
FNUZ = torch.float8_e4m3fnuz
VLLM_FP8 = "vllm-project/vllm vllm/model_executor/layers/quantization/input_quant_fp8.py QuantFP8"
VLLM_TESTS = "vllm-project/vllm tests/kernels/quant_utils.py"
DEEPGEMM = "deepseek-ai/DeepGEMM deep_gemm/utils/math.py"
SGLANG_FP8 = "sgl-project/sglang python/sglang/test/test_block_fp8.py"
SGLANG_INT8 = "sgl-project/sglang test/srt/quant/test_int8_kernel.py"
TORCHAO = "pytorch/ao torchao/quantization/quant_primitives.py"
FLOAT8 = "pytorch/ao torchao/float8/float8_utils.py"
MX = "pytorch/ao torchao/prototype/mx_formats/mx_tensor.py"
COMPRESSED = "vllm-project/compressed-tensors src/compressed_tensors/quantization/utils/helpers.py"
MIN_SCALE = 1.0 / (448.0 * 512.0)


@positive(f"{VLLM_FP8}.forward_native per token", "quant_per_token", inputs=spread(zero_row=True))
@positive(f"{VLLM_FP8}.forward_native per token", "quant_per_token", inputs=spread(F16))
def vllm_per_token(x):
    greatest, _ = x.abs().max(dim=-1)
    greatest = greatest.unsqueeze(-1).to(torch.float32)
    scale = (greatest / 448.0).clamp(min=MIN_SCALE)
    codes = x.to(torch.float32) * scale.to(torch.float32).reciprocal()
    return codes.clamp(-448.0, 448.0).to(E4M3), scale


@positive(
    f"{VLLM_FP8}.forward_native per token with scale_ub",
    "quant_per_token",
    inputs=with_scale(spread(), 5.0),
)
def vllm_per_token_bounded(x, upper):
    greatest = x.abs().max(dim=-1)[0].unsqueeze(-1).to(torch.float32).clamp(max=upper)
    scale = (greatest / 448.0).clamp(min=MIN_SCALE)
    return (x.to(torch.float32) * scale.reciprocal()).clamp(-448.0, 448.0).to(E4M3), scale


def _vllm_group(x, group, power_of_two=False):
    shape = x.shape
    grouped = x.view(-1, shape[-1] // group, group)
    raw = grouped.abs().max(dim=-1, keepdim=True)[0].float() / 448.0
    if power_of_two:
        raw = torch.exp2(torch.ceil(torch.log2(raw)))
    scales = raw.clamp(min=MIN_SCALE)
    codes = (grouped / scales).clamp(-448.0, 448.0).to(E4M3)
    return codes.view(-1, shape[-1]).view(shape), scales.squeeze(-1).reshape((*shape[:-1], shape[-1] // group))


@positive(f"{VLLM_FP8}._quantize_group_native", "quant_per_group_128", inputs=spread(zero_row=True))
@positive(f"{VLLM_FP8}._quantize_group_native, batched", "quant_per_group_128", inputs=spread(shape=(2, 3, 256)))
def vllm_group_128(x):
    return _vllm_group(x, 128)


@positive(f"{VLLM_FP8}._quantize_group_native of 64", "quant_per_group_64", inputs=spread(F16))
def vllm_group_64(x):
    return _vllm_group(x, 64)


@positive(
    f"{VLLM_FP8}._quantize_group_native with use_ue8m0", "quant_per_group_128_ue8m0", inputs=spread(zero_row=True)
)
def vllm_group_ue8m0(x):
    return _vllm_group(x, 128, power_of_two=True)


@positive(f"{VLLM_FP8}._quantize_group_native of a ragged row", "quant_per_group_128", inputs=spread(shape=(6, 200)))
def vllm_group_padded(x):
    codes, scales = _vllm_group(F.pad(x, (0, 56)), 128)
    return codes[..., :200], scales


@positive(f"{VLLM_FP8}.forward_native static", "quant_static", inputs=with_scale(spread()))
def vllm_static(x, scale):
    return (x.to(torch.float32) * scale.to(torch.float32).reciprocal()).clamp(-448.0, 448.0).to(E4M3)


@positive(f"{VLLM_FP8}.forward_native per tensor", "quant_per_tensor", inputs=spread())
def vllm_per_tensor(x):
    scale = (x.abs().max().unsqueeze(-1).to(torch.float32) / 448.0).clamp(min=MIN_SCALE)
    return (x.to(torch.float32) * scale.reciprocal()).clamp(-448.0, 448.0).to(E4M3), scale


@positive(f"{VLLM_TESTS} ref_dynamic_per_token_quant fp8", "quant_per_token", inputs=spread())
def vllm_reference_per_token(x):
    largest = torch.as_tensor(448.0, dtype=torch.float32, device=x.device)
    least = 1.0 / (largest * 512.0)
    greatest = x.to(torch.float32).abs().amax(dim=-1, keepdim=True)
    scales = (greatest / largest).clamp(min=least)
    return (x.to(torch.float32) / scales).clamp(-448.0, 448.0).to(E4M3), scales


@positive(f"{VLLM_TESTS} ref_dynamic_per_token_quant int8", "quant_int8_per_token", inputs=spread())
def vllm_reference_int8(x):
    greatest = x.to(torch.float32).abs().amax(dim=-1, keepdim=True)
    codes = (x.to(torch.float32) * (127.0 / greatest)).round().clamp(-128, 127)
    return codes.to(torch.int8), greatest / 127.0


def _native_group(x, group, bound, dtype):
    grouped = x.reshape(x.numel() // group, group)
    amax = grouped.abs().max(dim=-1, keepdim=True)[0].clamp(min=1e-10).to(torch.float32)
    scales = amax / bound
    codes = (grouped / scales).clamp(min=-bound, max=bound).to(dtype)
    return codes.reshape(x.shape), scales.reshape((*x.shape[:-1], x.shape[-1] // group))


@positive(f"{SGLANG_FP8} native_per_token_group_quant_fp8", "quant_per_group_128", inputs=spread(zero_row=True))
@positive(f"{VLLM_TESTS} native_per_token_group_quant_fp8", "quant_per_group_128", inputs=spread(F32))
def native_group_fp8(x):
    return _native_group(x, 128, 448.0, E4M3)


@positive(f"{SGLANG_FP8} native_per_token_group_quant_fp8 to e5m2", "quant_per_group_64", inputs=spread())
def native_group_e5m2(x):
    return _native_group(x, 64, 57344.0, E5M2)


@positive(
    f"{SGLANG_FP8} native_per_token_group_quant_fp8 on gfx94x",
    "quant_per_group_128",
    inputs=spread(),
)
def native_group_fnuz(x):
    return _native_group(x, 128, 224.0, FNUZ)


@positive(
    "vllm-project/vllm tests/kernels/quant_utils.py native_per_token_group_quant_int8: the cast truncates",
    "quant_int8_per_group_128",
    inputs=spread(F32),
)
def native_group_int8(x):
    grouped = x.reshape(-1, 128)
    amax = grouped.abs().max(dim=-1, keepdim=True)[0].clamp(min=1e-10).to(torch.float32)
    scales = amax / 127
    codes = (grouped / scales).clamp(min=-128, max=127).to(torch.int8)
    return codes.reshape(x.shape), scales.reshape((*x.shape[:-1], x.shape[-1] // 128))


@positive(f"{SGLANG_INT8} native_per_token_quant_int8", "quant_int8_per_token", inputs=spread())
def sglang_int8_per_token(x):
    x = x.float()
    absmax = x.abs().max(dim=-1).values.clamp_min(1e-10).unsqueeze(-1)
    return x.mul(127 / absmax).round().to(torch.int8), absmax / 127


@positive(
    "sgl-project/sglang python/sglang/srt/layers/quantization/fp8_utils.py input_to_float8",
    "quant_per_tensor",
    inputs=spread(),
)
def sglang_input_to_float8(x):
    least, greatest = x.aminmax()
    amax = torch.maximum(least.abs(), greatest.abs()).float().clamp(min=1e-12)
    scale = 448.0 / amax
    return (x.float() * scale).clamp(min=-448.0, max=448.0).to(E4M3).contiguous(), scale.float().reciprocal()


def _deepgemm(x, group, ceiled=None):
    grouped = x.view(x.shape[0], -1, group)
    scales = grouped.abs().float().amax(dim=2).view(x.shape[0], -1).clamp(1e-4) / 448.0
    if ceiled is not None:
        scales = ceiled(scales)
    return (grouped * (1.0 / scales.unsqueeze(2))).to(E4M3).view(x.shape), scales


@positive(f"{DEEPGEMM} per_token_cast_to_fp8", "quant_per_group_128", inputs=spread(zero_row=True))
def deepgemm(x):
    return _deepgemm(x, 128)


@positive(f"{DEEPGEMM} per_token_cast_to_fp8 with gran_k 32", "quant_per_group_32", inputs=spread())
def deepgemm_32(x):
    return _deepgemm(x, 32)


@positive(
    f"{DEEPGEMM} per_token_cast_to_fp8 into a padded buffer", "quant_per_group_128", inputs=spread(shape=(6, 256))
)
def deepgemm_padded(x):
    padded = torch.empty((6, 256), dtype=x.dtype, device=x.device).fill_(0)
    padded[:, :256] = x
    codes, scales = _deepgemm(padded, 128)
    return codes[:, :256].contiguous(), scales


@positive(f"{DEEPGEMM} ceil_to_ue8m0 by exponent bits", "quant_per_group_128_ue8m0", inputs=spread())
def deepgemm_bits(x):
    def ceiled(scales):
        bits = scales.abs().float().view(torch.int)
        exponent = ((bits >> 23) & 0xFF) + (bits & 0x7FFFFF).bool().int()
        return (exponent.clamp(1, 254) << 23).view(torch.float)

    return _deepgemm(x, 128, ceiled)


@positive(f"{DEEPGEMM} ceil_to_ue8m0 by pow, as before", "quant_per_group_128_ue8m0", inputs=spread())
def deepgemm_pow(x):
    return _deepgemm(x, 128, lambda scales: torch.pow(2.0, torch.ceil(torch.log2(scales.abs()))))


@positive(
    "deepseek-ai/DeepGEMM tests/test_core.py per_token_cast_to_fp8, its first form",
    "quant_per_group_128",
    inputs=spread(),
)
def deepgemm_multiplied(x):
    grouped = x.view(x.shape[0], -1, 128)
    amax = grouped.abs().float().amax(dim=2).view(x.shape[0], -1).clamp(1e-4)
    return (grouped * (448.0 / amax.unsqueeze(2))).to(E4M3).view(x.shape), (amax / 448.0).view(x.shape[0], -1)


@positive(
    "deepseek-ai/DeepSeek-V3 inference/kernel.py act_quant: neither floor nor clamp",
    "quant_per_group_128",
    inputs=spread(),
)
def deepseek(x):
    grouped = x.float().unflatten(-1, (-1, 128))
    scales = grouped.abs().amax(-1) / 448.0
    return (grouped / scales.unsqueeze(-1)).flatten(-2).to(E4M3), scales


def _torchao_multiplier(x, dim, power_of_two=False):
    amax = torch.amax(torch.abs(x), dim=dim, keepdim=True).to(torch.float64)
    scale = (448.0 / torch.clamp(amax, min=1e-12)).to(torch.float32)
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_two else scale


@positive(
    f"{FLOAT8} tensor_to_scale and to_fp8_saturated, rowwise",
    "quant_per_token",
    inputs=spread(zero_row=True),
)
def torchao_rowwise(x):
    scale = _torchao_multiplier(x, -1)
    return (x.to(torch.float32) * scale).clamp(min=-448.0, max=448.0).to(E4M3), scale


@positive(
    f"{FLOAT8} tensor_to_scale with round_scales_to_power_of_2",
    "quant_per_token_ue8m0",
    inputs=spread(),
)
def torchao_rowwise_power_of_two(x):
    scale = _torchao_multiplier(x, -1, power_of_two=True)
    return (x.to(torch.float32) * scale).clamp(min=-448.0, max=448.0).to(E4M3), scale


@positive(
    "pytorch/ao torchao/prototype/blockwise_fp8_training/kernels.py torch_blockwise_scale_act_quant_lhs",
    "quant_per_group_128_column",
    inputs=spread(),
)
def torchao_blockwise(x):
    grouped = x.reshape(-1, 128)
    amax = grouped.abs().max(dim=1, keepdim=True).values.to(torch.float64)
    scale = (448.0 / torch.clamp(amax, min=1e-12, max=float("inf"))).to(torch.float32)
    codes = (grouped * scale).clamp(min=-448.0, max=448.0).to(E4M3).reshape(x.shape)
    scale = scale.reshape(x.shape[0], -1).to(torch.float)
    return codes, 1.0 / scale.transpose(-2, -1).contiguous().transpose(-2, -1)


def _float8(x, amax):
    scale = (amax / 448.0).to(torch.float32)
    return (x.to(torch.float32) / scale).clamp(min=-448.0, max=448.0).to(E4M3), scale


@positive(
    f"{TORCHAO} _choose_scale_float8 per row: the scale is rounded to bfloat16", "quant_per_token", inputs=spread()
)
@positive(f"{TORCHAO} _choose_scale_float8 per row in float16", "quant_per_token", inputs=spread(F16))
@positive(f"{TORCHAO} _choose_scale_float8 per row in float32", "quant_per_token", inputs=spread(F32, zero_row=True))
@positive(f"{TORCHAO} _choose_scale_float8 per row of a batch", "quant_per_token", inputs=spread(shape=(2, 3, 256)))
def torchao_float8(x):
    return _float8(x, x.abs().amax(dim=[-1], keepdim=True))


@positive(f"{TORCHAO} _choose_scale_float8 with hp_value_lb", "quant_per_token", inputs=spread())
def torchao_float8_floored(x):
    return _float8(x, torch.clamp(x.abs().amax(dim=[-1], keepdim=True), min=1e-12))


@positive(
    f"{TORCHAO} _choose_scale_float8 with hp_value_lb and hp_value_ub",
    "quant_per_token",
    inputs=spread(),
)
def torchao_float8_bounded(x):
    return _float8(x, torch.clamp(x.abs().amax(dim=[-1], keepdim=True), min=1e-12, max=1200.0))


@positive(
    f"{TORCHAO} _choose_scale_float8 per group, expanded by repeat_interleave",
    "quant_per_group_128",
    inputs=spread(),
)
def torchao_float8_blocks(x):
    amax = x.view(x.shape[0], -1, 128).abs().amax(dim=[2], keepdim=True)
    scale = (amax / 448.0).reshape(x.shape[0], -1).to(torch.float32)
    quotient = x.to(torch.float32) / scale.repeat_interleave(128, dim=1)
    return quotient.clamp(min=-448.0, max=448.0).to(E4M3), scale


@positive(
    f"{TORCHAO} _choose_qparams_affine, symmetric int8 per token", "quant_int8_per_token", inputs=spread(zero_row=True)
)
@positive(f"{TORCHAO} _choose_qparams_affine, symmetric int8 per token", "quant_int8_per_token", inputs=spread(F32))
def torchao_int8(x):
    lowest = torch.amin(x, dim=[-1], keepdim=False)
    highest = torch.amax(x, dim=[-1], keepdim=False)
    lowest = torch.min(lowest, torch.zeros_like(lowest))
    highest = torch.max(highest, torch.zeros_like(highest))
    scale = torch.clamp(torch.max(-lowest, highest) / (float(127 + 127) / 2), min=1e-5).to(torch.float32)
    inverse = 1.0 / scale.unsqueeze(-1)
    return torch.clamp(torch.round(x * inverse), -127, 127).to(torch.int8), scale


@positive(f"{TORCHAO} _quantize_affine with a zero point of zeros", "quant_int8_per_token", inputs=spread(F32))
def torchao_int8_zero_point(x):
    lowest = torch.min(x.amin(-1), torch.zeros_like(x.amin(-1)))
    highest = torch.max(x.amax(-1), torch.zeros_like(x.amax(-1)))
    scale = torch.clamp(torch.max(-lowest, highest) / 127.5, min=1e-5)
    zero_point = torch.full_like(scale, 0).to(torch.int64)
    level = torch.round(x * (1.0 / scale.unsqueeze(-1))) + zero_point.unsqueeze(-1)
    return torch.clamp(level, -128, 127).to(torch.int8), scale


def _compressed(x, bound, dtype, dims=-1):
    lowest = torch.amin(x, dim=dims, keepdim=True)
    highest = torch.amax(x, dim=dims, keepdim=True)
    lowest = torch.min(lowest, torch.zeros_like(lowest))
    highest = torch.max(highest, torch.zeros_like(highest))
    scales = torch.max(torch.abs(lowest), torch.abs(highest)) / bound
    eps = torch.tensor(torch.finfo(x.dtype).eps, dtype=x.dtype, device=x.device)
    scales = torch.where(scales == 0, eps, scales)
    level = x / scales
    if dtype is torch.int8:
        return torch.round(torch.clamp(level, -128, 127)).to(dtype), scales
    return torch.clamp(level, -448.0, 448.0).to(dtype), scales


@positive(f"{COMPRESSED} calculate_qparams, fp8 per token", "quant_per_token", inputs=spread())
def compressed_fp8(x):
    return _compressed(x, 448.0, E4M3)


@positive(f"{COMPRESSED} calculate_qparams, int8 per token", "quant_int8_per_token", inputs=spread())
def compressed_int8(x):
    return _compressed(x, 127.5, torch.int8)


@positive(
    "microsoft/BitNet gpu/model.py BitLinearKernel.quant_input, in bfloat16",
    "quant_int8_per_token",
    inputs=spread(),
)
@positive(
    "huggingface/transformers src/transformers/integrations/bitnet.py BitLinear.activation_quant",
    "quant_int8_per_token",
    inputs=spread(F16),
)
def bitnet(x):
    scale = 127 / x.abs().max(dim=-1, keepdim=True).values.clamp_(min=1e-5)
    return (x * scale).round().clamp(-128, 127).to(torch.int8), scale


@positive(
    "ROCm/aiter aiter/ops/quant.py pertoken_quant: a zero scale is one",
    "quant_per_token",
    inputs=spread(zero_row=True),
)
def aiter_per_token(x):
    x = x.to(torch.float32)
    amax, _ = torch.max(input=torch.abs(x), dim=-1, keepdim=True)
    scale = amax / 448.0
    scale[scale == 0] = 1
    return (x / scale).to(dtype=E4M3), scale


@positive(
    "NVIDIA/TransformerEngine tests/pytorch/references/blockwise_quantizer_reference.py _quantize_vectorwise_reference",
    "quant_per_group_128",
    inputs=spread(),
)
def transformer_engine(x):
    grouped = x.reshape(x.shape[0], -1, 128)
    amax = torch.abs(grouped).amax(dim=-1).float()
    scale = 448.0 / amax
    scale = torch.where(amax == 0.0, 1.0, scale)
    scale = torch.where(torch.isinf(scale), torch.finfo(torch.float32).max, scale)
    codes = torch.clamp(grouped * scale.unsqueeze(-1), min=-448.0, max=448.0).to(E4M3)
    return codes.reshape(x.shape), torch.reciprocal(scale)


def _mx_exponent(amax):
    return ((amax.view(torch.int32) >> 23) & 0xFF) - 127


@positive(f"{MX} to_mx, e4m3 with the floor rule", "quant_mxfp8", inputs=spread())
def mxfp8_floor(x):
    grouped = x.reshape(x.shape[0], -1, 32).to(torch.float32)
    amax = torch.amax(torch.abs(grouped), -1, keepdim=True)
    biased = (torch.clamp(_mx_exponent(amax) - 8, -127, 128) + 127).to(torch.uint8)
    biased = torch.where(torch.isnan(amax), 255, biased)
    scale = (biased.to(torch.int32) << 23).view(torch.float32).clamp(min=2.0**-126)
    codes = (grouped / scale).clamp(min=-448.0, max=448.0).to(E4M3)
    return codes.reshape(x.shape), biased.squeeze(-1)


@positive(f"{MX} _to_mx_rceil", "quant_mxfp8", inputs=spread())
def mxfp8_rceil(x):
    grouped = x.reshape(x.shape[0], -1, 32).to(torch.float32)
    scale = torch.amax(torch.abs(grouped), -1, keepdim=True) / 448.0
    exponent = (torch.clamp(torch.ceil(torch.log2(scale)), -127, 127) + 127).to(torch.uint8)
    multiplier = torch.where(exponent == 0, 1.0, torch.exp2(127 - exponent.to(torch.float32)))
    codes = torch.clamp(grouped * multiplier, min=-448.0, max=448.0).to(E4M3)
    return codes.reshape(x.shape), exponent.squeeze(-1)


@positive(f"{MX} to_mx, e2m1 with the floor rule", "quant_mxfp4", inputs=spread())
def mxfp4_floor(x):
    grouped = x.reshape(x.shape[0], -1, 32).to(torch.float32)
    biased = torch.clamp(_mx_exponent(torch.amax(torch.abs(grouped), -1, keepdim=True)) - 2, -127, 128) + 127
    scaled = (grouped / (biased << 23).view(torch.float32).clamp(min=2.0**-126)).reshape(x.shape)
    ladder = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0], device=x.device)
    codes = torch.bucketize(scaled.abs(), ladder).to(torch.uint8) | ((scaled < 0).to(torch.uint8) << 3)
    return codes[:, ::2] | (codes[:, 1::2] << 4), biased.to(torch.uint8).squeeze(-1)


GENERIC = "pytorch/pytorch torch/_torch_docs.py:"


@positive(f"{GENERIC} linalg.vector_norm(inf) as amax", "quant_per_token", inputs=spread(F32))
def amax_as_infinity_norm(x):
    scale = torch.linalg.vector_norm(x, ord=float("inf"), dim=-1, keepdim=True).clamp(min=1e-12) / 448.0
    return (x / scale).clamp(-448.0, 448.0).to(E4M3), scale


@positive(f"{GENERIC} aminmax as amax", "quant_per_token", inputs=spread())
def amax_as_aminmax(x):
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    scale = torch.maximum(-low, high).float().clamp(min=1e-12) / 448.0
    return (x.float() / scale).clamp(-448.0, 448.0).to(E4M3), scale


@positive(f"{GENERIC} max of amax and -amin", "quant_per_token", inputs=spread())
def amax_as_extremes(x):
    amax = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True))
    scale = amax.float().clamp(min=1e-12) / 448.0
    return (x.float() / scale).clamp(-448.0, 448.0).to(E4M3), scale


@positive(f"{GENERIC} maximum and minimum as clamp", "quant_per_token", inputs=spread())
def clamp_as_extremes(x):
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448.0
    bound = torch.full((), 448.0, device=x.device)
    return torch.minimum(torch.maximum(x.float() / scale, -bound), bound).to(E4M3), scale


@positive(f"{GENERIC} hardtanh as clamp, bounds from finfo", "quant_per_token", inputs=spread())
def clamp_as_hardtanh(x):
    info = torch.finfo(E4M3)
    scale = x.abs().amax(-1, keepdim=True).float().clip(min=1e-12) / info.max
    return F.hardtanh(x.float() / scale, info.min, info.max).to(E4M3), scale


@positive(
    f"{GENERIC} a product with the reciprocal of the largest code",
    "quant_per_token",
    inputs=spread(),
)
def scale_as_product(x):
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) * (1.0 / 448.0)
    return (x.float() / scale).clamp(-448.0, 448.0).to(E4M3), scale


@positive(f"{GENERIC} a divisor in a tensor, true_divide", "quant_per_token", inputs=spread())
def divisor_in_tensor(x):
    amax = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12)
    scale = torch.true_divide(amax, torch.full_like(amax, 448.0))
    return torch.true_divide(x, scale).clamp(-448.0, 448.0).to(E4M3), scale


@positive(f"{GENERIC} pow(-1) as reciprocal", "quant_per_token", inputs=spread())
def reciprocal_as_power(x):
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448.0
    return (x.float() * scale.pow(-1)).clamp(-448.0, 448.0).to(E4M3), scale


@positive(f"{GENERIC} amax in float32, keepdim by indexing with None", "quant_per_token", inputs=spread(zero_row=True))
def indexed_with_none(x):
    h = x.to(torch.float32)
    scale = torch.amax(h.abs(), dim=1).clamp(1e-12)[:, None] / 448.0
    return torch.clamp(h / scale, -448.0, 448.0).to(E4M3), scale[:, 0]


@positive(f"{GENERIC} the scale expanded over the row", "quant_per_token", inputs=spread())
def expanded_scale(x):
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448.0
    return (x.float() / scale.expand_as(x)).clamp(-448.0, 448.0).to(E4M3), scale


@positive(f"{GENERIC} groups by unflatten, in 4 dims", "quant_per_group_64", inputs=spread(shape=(2, 3, 2, 128)))
def unflattened(x):
    grouped = x.unflatten(-1, (-1, 64)).float()
    scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448.0
    return (grouped / scale).clamp(-448.0, 448.0).to(E4M3).flatten(-2), scale.squeeze(-1)


@positive(f"{GENERIC} groups along the row of a flat batch", "quant_per_group_128", inputs=spread(shape=(2, 3, 256)))
def flattened(x):
    grouped = x.reshape(-1, 128)
    scale = grouped.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 448.0
    return (grouped.float() / scale).clamp(-448.0, 448.0).to(E4M3).view(x.shape), scale.view(2, 3, 2)


@positive(f"{GENERIC} rounding before the int8 cast by round_", "quant_int8_per_token", inputs=spread(F16))
def int8_in_place(x):
    scale = x.float().abs().amax(-1, keepdim=True).clamp_(min=1e-8).div_(127)
    return x.float().div(scale).round_().clamp_(-128, 127).to(torch.int8), scale


@positive(f"{GENERIC} clamping before rounding", "quant_int8_per_token", inputs=spread())
def int8_clamped_first(x):
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
    return (x.float() / scale).clamp(-127, 127).round().to(torch.int8), scale


@positive(
    "made up: a scale that is stored as E8M0 and read again",
    "quant_per_token_ue8m0_bytes",
    inputs=spread(F32, zero_row=True),
)
def e8m0_read_again(x):
    scale = torch.exp2(torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True) / 448.0))).to(torch.float8_e8m0fnu)
    return (x / scale.float()).clamp(-448.0, 448.0).to(E4M3), scale.view(torch.uint8)


@positive(
    "made up: a scalar that eager code rounds to the 16 bits it meets",
    "quant_static",
    inputs=with_scale(spread(), 3.1358),
)
def scalar_first(x, scale):
    return (scale.reshape(()) * x).clamp(-448.0, 448.0).to(E4M3)


@positive("made up: constants computed of tensors", "quant_per_token", inputs=spread(F32))
def constants_of_constants(x):
    scale = x.abs().amax(-1, keepdim=True) / (torch.tensor(448.0, device=x.device) * 0.9)
    return (x / scale).clamp(-448.0, 448.0).to(E4M3), scale


@positive("made up: an integer exponent times a float", "quant_per_token_ue8m0_bytes", inputs=spread(F32))
def exponent_times_float(x):
    exponent = (x.abs().amax(-1, keepdim=True).view(torch.int32) >> 23) & 0xFF
    scale = ((exponent - 8).clamp(min=1) << 23).view(torch.float32)
    return (x / scale).clamp(-448.0, 448.0).to(E4M3), (exponent * 0.5).to(torch.uint8)


@positive("made up: a scale times a mask", "quant_per_token", inputs=spread(F32, zero_row=True))
def scale_times_mask(x):
    amax = x.abs().amax(-1, keepdim=True)
    scale = amax / 448.0 + 0.25 * (amax < 1.0)
    return (x / scale).clamp(-448.0, 448.0).to(E4M3), scale
