"""Every layout in which public code hands scales to a matrix multiplication."""

import torch
import torch.nn.functional as F  # noqa: N812

from . import positive
from .inputs import halves, normed, pair, spread
from .positives_activations import vllm as silu_and_mul
from .positives_norms import llama
from .quantizers import E4M3, per_group_32, per_group_64, per_group_128, per_token, ue8m0_per_group_128

VLLM = "vllm-project/vllm vllm/model_executor/layers/quantization"
LAYOUT = "deepseek-ai/DeepGEMM tests/test_layout.py"


@positive(f"{VLLM}/input_quant_fp8.py QuantFP8 with column_major_scales", "quant_per_group_128_column", inputs=spread())
@positive(
    f"{VLLM}/input_quant_fp8.py QuantFP8 with column_major_scales, batched",
    "quant_per_group_128_column",
    inputs=spread(shape=(2, 3, 256)),
)
def transposed_strided(x):
    codes, scales = per_group_128(x)
    return codes, scales.transpose(-2, -1).contiguous().transpose(-1, -2)


@positive(
    "ROCm/aiter aiter/ops/quant.py per_group_quant with transpose_scale", "quant_per_group_64_column", inputs=spread()
)
def transposed(x):
    codes, scales = per_group_64(x)
    return codes, scales.t().contiguous()


@positive(
    "pytorch/ao torchao/prototype/blockwise_fp8_training/linear.py: scales as scale.T",
    "quant_per_group_64_column",
    inputs=spread(),
)
def transposed_by_property(x):
    codes, scales = per_group_64(x)
    return codes, scales.T.contiguous().T


@positive("pytorch/pytorch torch/_torch_docs.py: mT", "quant_per_group_128_column", inputs=spread(shape=(2, 3, 256)))
def transposed_by_mt(x):
    codes, scales = per_group_128(x)
    return codes, scales.mT.contiguous()


@positive("pytorch/pytorch torch/_torch_docs.py: permute and clone", "quant_per_group_128_column", inputs=spread())
def permuted(x):
    codes, scales = per_group_128(x)
    return codes, scales.permute(1, 0).clone(memory_format=torch.contiguous_format)


@positive(
    "ROCm/aiter aiter/ops/triton fused_rms_fp8_group_quant with transpose_scale: the transposed bytes viewed as rows",
    "rms_norm_per_group_64_column",
    inputs=normed(shape=(6, 256)),
)
def transposed_bytes(x, weight):
    codes, scales = per_group_64(llama(x, weight))
    return codes, scales.transpose(0, 1).contiguous().view(*scales.shape)


@positive(
    "vllm-project/vllm vllm rms_norm_per_block_quant with is_scale_transposed",
    "add_rms_norm_per_group_128_column",
    inputs=normed(tensors=2, shape=(6, 256)),
)
def norm_transposed(x, residual, weight):
    summed = x + residual
    codes, scales = per_group_128(llama(summed, weight))
    return codes, scales.t().contiguous().t(), summed


@positive(
    f"{VLLM}/utils/fp8_utils.py silu_mul_per_token_group_quant_fp8_colmajor",
    "silu_mul_per_group_128_column",
    inputs=halves(),
)
def activation_transposed(x):
    codes, scales = per_group_128(silu_and_mul(x))
    return codes, scales.t().contiguous().t()


@positive(
    f"{VLLM}/utils/fp8_utils.py silu_mul_per_token_group_quant_fp8_colmajor with use_ue8m0",
    "silu_mul_per_group_128_ue8m0_column",
    inputs=halves(),
)
def activation_ue8m0_transposed(x):
    codes, scales = ue8m0_per_group_128(silu_and_mul(x))
    return codes, scales.t().contiguous()


@positive(
    "alibaba/rtp-llm rtp_llm masked expert batch: scales (E, G, T)",
    "silu_mul_per_group_64_column",
    inputs=pair(shape=(2, 3, 256)),
)
def expert_batch(gate, up):
    codes, scales = per_group_64(F.silu(gate) * up)
    return codes, scales.transpose(1, 2).contiguous().transpose(1, 2)


@positive("vllm-project/vllm: scales used both by rows and by columns", "quant_per_group_128", inputs=spread())
def both_orders(x):
    codes, scales = per_group_128(x)
    return codes, scales, scales.t().contiguous()


@positive("ROCm/aiter csrc rmsnorm_quant: per-token scales as a vector", "rms_norm_per_token", inputs=normed())
def vector(x, weight):
    codes, scales = per_token(llama(x, weight))
    return codes, scales.squeeze(-1)


@positive(
    "pytorch/pytorch aten _scaled_mm: per-token scales flattened", "quant_per_token", inputs=spread(shape=(2, 3, 256))
)
def flat_vector(x):
    codes, scales = per_token(x)
    return codes.view(-1, 256), scales.view(-1, 1)


@positive("pytorch/pytorch aten _scaled_mm: transposed without a copy", "quant_per_group_128", inputs=spread())
def transposed_view(x):
    codes, scales = per_group_128(x)
    return codes, scales.t()


@positive(
    f"{VLLM}/utils/fp8_utils.py: a scale buffer allocated by columns and filled",
    "quant_per_group_128",
    inputs=spread(),
)
def filled_buffer(x):
    codes, scales = per_group_128(x)
    buffer = torch.empty((2, 6), dtype=torch.float32, device=x.device).permute(-1, -2)
    buffer.copy_(scales)
    return codes, buffer


def _tma_aligned(scales):
    rows, groups = scales.shape
    padded = F.pad(scales, (0, 0, 0, -rows % 4))
    return padded.t().contiguous().t()[:rows, :groups]


@positive(f"{LAYOUT} get_mn_major_tma_aligned_tensor", "quant_per_group_128_tma", inputs=spread())
def tma_aligned(x):
    codes, scales = per_group_128(x)
    return codes, _tma_aligned(scales)


@positive(
    "alibaba/rtp-llm rtp_llm silu_and_mul_contiguous_fp8_post_quant",
    "silu_mul_per_group_128_ue8m0_tma",
    inputs=halves(),
)
def up_gate_tma_aligned(x):
    up, gate = x.float().chunk(2, -1)
    codes, scales = ue8m0_per_group_128(up * F.silu(gate))
    return codes, _tma_aligned(scales)


@positive(
    f"{LAYOUT} get_mn_major_tma_aligned_packed_ue8m0_tensor",
    "quant_per_group_64_ue8m0_bytes_packed",
    inputs=spread(shape=(6, 1024)),
)
@positive(
    f"{LAYOUT} get_mn_major_tma_aligned_packed_ue8m0_tensor, groups that fill no word",
    "quant_per_group_64_ue8m0_bytes_packed",
    inputs=spread(shape=(8, 384)),
)
def packed(x):
    grouped = x.float().unflatten(-1, (-1, 64))
    scales = torch.exp2(torch.ceil(torch.log2(grouped.abs().amax(-1).clamp(1e-4) / 448.0)))
    codes = (grouped * (1.0 / scales.unsqueeze(2))).to(E4M3).flatten(-2)
    rows, groups = scales.shape
    exponents = (scales.view(torch.int32) >> 23).to(torch.uint8)
    words = F.pad(exponents, (0, -groups % 4, 0, -rows % 4)).view(torch.int32)
    return codes, words.t().contiguous().t()[:rows]


@positive(
    "pytorch/pytorch torch/float8_e8m0fnu: power-of-two scales as bytes",
    "quant_per_group_128_ue8m0_bytes",
    inputs=spread(),
)
def exponent_bytes(x):
    codes, scales = ue8m0_per_group_128(x)
    return codes, scales.to(torch.float8_e8m0fnu).view(torch.uint8)


@positive(
    "pytorch/ao torchao/prototype/mx_formats/utils.py to_blocked",
    "quant_per_group_32_blocked",
    inputs=spread(shape=(128, 256)),
)
def blocked(x):
    codes, scales = per_group_32(x)
    tiles = scales.view(1, 128, 2, 4).permute(0, 2, 1, 3)
    return codes, tiles.reshape(-1, 4, 32, 4).transpose(1, 2).reshape(-1, 32, 16).flatten()


@positive(
    "pytorch/ao torchao/prototype/mx_formats/utils.py to_blocked, of several tiles of rows: a copy of a copy",
    "quant_per_group_32_blocked",
    inputs=spread(shape=(160, 288)),
)
def blocked_in_two_copies(x):
    codes, scales = per_group_32(x)
    padded = F.pad(scales, (0, 3, 0, 96))
    tiles = padded.view(2, 128, 3, 4).permute(0, 2, 1, 3)
    return codes, tiles.reshape(-1, 4, 32, 4).transpose(1, 2).reshape(-1, 32, 16).flatten()


@positive(
    "ROCm/aiter aiter/utility/fp4_utils.py e8m0_shuffle's order",
    "quant_per_group_32_shuffled",
    inputs=spread(shape=(32, 256)),
)
def shuffled(x):
    codes, scales = per_group_32(x)
    return codes, scales.view(1, 2, 16, 1, 2, 4).permute(0, 3, 5, 2, 4, 1).contiguous().view(32, 8)
