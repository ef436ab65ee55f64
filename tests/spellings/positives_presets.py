"""The kernels of fusion_pass.presets as PyTorch code would write them, dividing by tensors where the kernels divide."""

import torch
import torch.nn.functional as F  # noqa: N812

from . import positive
from .inputs import halves, normed, spread
from .quantizers import E4M3


def _by(number, like):
    """A number as a tensor: by a Python number, eager CUDA code does not divide."""
    return torch.full_like(like, number)


def aiter_group(y, group=128):
    blocks = y.float().unflatten(-1, (-1, group))
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    scale = amax / _by(448.0, amax)
    codes = (blocks * (1.0 / scale)).clamp(-448.0, 448.0).to(E4M3)
    return codes.flatten(-2), scale.squeeze(-1)


def _norm(h, weight, eps=1e-6):
    squares = h.square().sum(-1, keepdim=True)
    return h * torch.rsqrt(squares / _by(h.shape[-1], squares) + eps) * weight.float()


AITER = "ROCm/aiter aiter/ops/triton/quant/fused_fp8_quant.py"


@positive(f"{AITER} fused_flatten_fp8_group_quant", "quant_per_group_128", inputs=spread(shape=(6, 4, 256)))
def aiter_flatten(x):
    return aiter_group(x.flatten(1))


@positive(
    f"{AITER} fused_flatten_fp8_group_quant of transposed heads",
    "quant_per_group_128",
    inputs=spread(shape=(4, 6, 256)),
)
def aiter_flatten_transposed_heads(x):
    return aiter_group(x.transpose(0, 1).flatten(1))


@positive(
    f"{AITER} fused_flatten_fp8_group_quant with transpose_scale",
    "quant_per_group_128_column",
    inputs=spread(shape=(6, 4, 256)),
)
def aiter_flatten_strided(x):
    codes, scale = aiter_group(x.flatten(1))
    return codes, scale.t().contiguous().t()


@positive(
    f"{AITER} fused_flatten_fp8_group_quant with transpose_scale, as first proposed",
    "quant_per_group_128_column",
    inputs=spread(shape=(6, 4, 256)),
)
def aiter_flatten_viewed(x):
    codes, scale = aiter_group(x.flatten(1))
    return codes, scale.transpose(0, 1).contiguous().view(*scale.shape)


@positive(f"{AITER} fused_rms_fp8_group_quant", "rms_norm_per_group_128", inputs=normed(shape=(6, 640)))
def aiter_rms(x, weight):
    return aiter_group(_norm(x.float(), weight))


@positive(
    f"{AITER} fused_rms_fp8_group_quant with res1, output_unquantized_inp1 and transpose_scale",
    "add_rms_norm_per_group_128_column",
    inputs=normed(tensors=2, shape=(6, 640)),
)
def aiter_add_rms(x, residual, weight):
    h = x.float() + residual.float()
    n = _norm(h, weight)
    codes, scale = aiter_group(n)
    return codes, scale.transpose(0, 1).contiguous().view(*scale.shape), n.to(x.dtype), h.to(x.dtype)


_INVERSE = torch.tensor(448.0).reciprocal().item()


def _sglang(n, group=None):
    blocks = n.unflatten(-1, (-1, group)) if group else n
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    scale = amax * _INVERSE
    codes = (blocks * scale.reciprocal()).clamp(-448.0, 448.0).to(E4M3)
    return (codes.flatten(-2), scale.squeeze(-1)) if group else (codes, scale)


SGLANG = "sgl-project/sglang python/sglang/srt/layers/layernorm.py"


@positive(f"{SGLANG} rmsnorm_quant", "rms_norm_per_token", inputs=normed(shape=(6, 640)))
def sglang_rms(x, weight):
    return _sglang(_norm(x.float(), weight))


@positive(f"{SGLANG} add_rmsnorm_quant", "add_rms_norm_per_token", inputs=normed(tensors=2, shape=(6, 640)))
def sglang_add_rms(x, residual, weight):
    h = x.float() + residual.float()
    return _sglang(_norm(h, weight)), h.to(x.dtype)


@positive(
    f"{SGLANG} add_rmsnorm_quant with group_size 64 and shuffle_scale",
    "add_rms_norm_per_group_64_column",
    inputs=normed(tensors=2, shape=(6, 640)),
)
def sglang_add_rms_group(x, residual, weight):
    h = x.float() + residual.float()
    codes, scale = _sglang(_norm(h, weight), 64)
    return codes, scale.t().contiguous().t(), h.to(x.dtype)


def _rtp(x, power_of_two=False):
    up, gate = x.float().chunk(2, -1)
    blocks = (up * F.silu(gate)).unflatten(-1, (-1, 128))
    amax = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-10)
    scale = amax / _by(448.0, amax)
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    codes = (blocks / scale).clamp(-448.0, 448.0).to(E4M3)
    return codes.flatten(-2), scale.squeeze(-1)


RTP = "alibaba/rtp-llm pull request 816 silu_and_mul_contiguous_fp8_post_quant"


@positive(RTP, "silu_mul_per_group_128_tma", inputs=halves(shape=(6, 768)))
def rtp_contiguous(x):
    codes, scale = _rtp(x)
    return codes, F.pad(scale, (0, 0, 0, -scale.shape[0] % 4)).t().contiguous().t()[: scale.shape[0]]


@positive(f"{RTP} with packed exponents", "silu_mul_per_group_128_ue8m0_bytes_packed", inputs=halves(shape=(6, 1280)))
def rtp_packed(x):
    codes, scale = _rtp(x, power_of_two=True)
    exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
    words = F.pad(exponents, (0, -scale.shape[1] % 4, 0, -scale.shape[0] % 4)).view(torch.int32)
    return codes, words.t().contiguous().t()[: scale.shape[0]]


@positive(f"{RTP}, the masked sibling", "silu_mul_per_group_128_ue8m0_column", inputs=halves(shape=(2, 3, 512)))
def rtp_masked(x):
    codes, scale = _rtp(x, power_of_two=True)
    return codes, scale.transpose(1, 2).contiguous().transpose(1, 2)


TORCHAO = "pytorch/ao torchao/prototype/moe_training/kernels/float8_rowwise.py"


def _rowwise(x, power_of_two=False):
    amax = x.abs().amax(-1, keepdim=True).to(torch.float64)
    multiplier = (448.0 / amax.clamp(min=1e-12)).to(torch.float32)
    if power_of_two:
        multiplier = torch.exp2(torch.floor(torch.log2(multiplier)))
    return (x.float() * multiplier).clamp(-448.0, 448.0).to(E4M3), multiplier


@positive(f"{TORCHAO} triton_fp8_rowwise_2d_scale_and_cast", "quant_per_token", inputs=spread(shape=(6, 640)))
def torchao_rowwise(x):
    return _rowwise(x)


@positive(
    f"{TORCHAO} triton_fp8_rowwise_2d_scale_and_cast with round_scales_to_power_of_2",
    "quant_per_token_ue8m0",
    inputs=spread(shape=(6, 640)),
)
def torchao_rowwise_power_of_two(x):
    return _rowwise(x, power_of_two=True)
