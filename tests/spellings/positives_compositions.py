"""How callers put norms, activations and quantizers together, and what else reads their values."""

import torch
import torch.nn.functional as F  # noqa: N812

from . import positive
from .inputs import BF16, F16, F32, halves, normed, pair, spread, weightless, with_weights
from .positives_norms import gemma, llama, olmo2
from .quantizers import (
    E4M3,
    int8_per_token,
    per_group_64,
    per_group_128,
    per_token,
    ue8m0_per_group_128,
    vllm_per_token,
)

TRANSFORMERS = "huggingface/transformers src/transformers/models"


def _matmul(codes, scale, weight):
    """What a scaled matrix multiplication computes, for per-token scales."""
    return (codes.float() * scale).to(weight.dtype) @ weight


@positive(
    f"{TRANSFORMERS}/llama/modeling_llama.py LlamaDecoderLayer: the residual is returned",
    "add_rms_norm_per_token",
    inputs=normed(tensors=2),
)
@positive(
    "vllm-project/vllm vllm/model_executor/models/llama.py LlamaDecoderLayer in float16",
    "add_rms_norm_per_token",
    inputs=normed(F16, tensors=2, shape=(6, 256)),
)
def residual_returned(x, residual, weight):
    residual = residual + x
    return *per_token(llama(residual, weight)), residual


@positive(
    f"{TRANSFORMERS}/mixtral/modeling_mixtral.py MixtralDecoderLayer: a router reads the norm",
    "add_rms_norm_per_token",
    inputs=with_weights(normed(tensors=2), (256, 8)),
)
def router(x, residual, weight, gate):
    summed = residual + x
    normalized = llama(summed, weight)
    return *per_token(normalized), normalized @ gate, summed


@positive(
    "sgl-project/sglang python/sglang/srt/models/deepseek_v2.py: two formats of one norm",
    "rms_norm_per_group_128",
    "quant_per_token",
    inputs=normed(),
)
def two_quantizers(x, weight):
    normalized = llama(x, weight)
    return per_group_128(normalized), per_token(normalized)


@positive(
    "sgl-project/sglang python/sglang/srt/models/deepseek_v2.py: three formats of one norm",
    "add_rms_norm_per_token",
    "quant_per_group_64",
    "quant_int8_per_token",
    inputs=normed(tensors=2),
)
def three_quantizers(x, residual, weight):
    normalized = llama(x + residual, weight)
    return per_token(normalized), per_group_64(normalized), int8_per_token(normalized)


@positive(
    f"{TRANSFORMERS}/llama/modeling_llama.py LlamaAttention with torchao: q, k and v each quantize the norm",
    "rms_norm_per_token",
    inputs=with_weights(normed(), (256, 256), (256, 64), (256, 64)),
)
def shared_qkv(x, weight, q, k, v):
    normalized = llama(x, weight)
    return tuple(_matmul(*per_token(normalized), projection) for projection in (q, k, v))


@positive(
    f"{TRANSFORMERS}/llama/modeling_llama.py LlamaMLP with torchao: gate and up quantize the norm, down the product",
    "rms_norm_per_token",
    "silu_mul_per_token",
    inputs=with_weights(normed(), (256, 128), (256, 128), (128, 256)),
)
def whole_mlp(x, weight, gate, up, down):
    normalized = llama(x, weight)
    gated = F.silu(_matmul(*per_token(normalized), gate)) * _matmul(*per_token(normalized), up)
    return _matmul(*per_token(gated), down) + x


@positive(
    f"{TRANSFORMERS}/phi3/modeling_phi3.py Phi3MLP with one projection",
    "add_gemma_rms_norm_per_token",
    "silu_mul_per_token",
    inputs=with_weights(normed(tensors=2), (256, 256), (128, 256)),
)
def whole_mlp_of_one_projection(x, residual, weight, gate_up, down):
    summed = x + residual
    gate, up = _matmul(*per_token(gemma(summed, weight)), gate_up).chunk(2, -1)
    return _matmul(*per_token(F.silu(gate) * up), down), summed


@positive(
    "vllm-project/vllm vllm/model_executor/models/llama.py: B x S x H is flattened behind the norm",
    "rms_norm_per_token",
    inputs=normed(),
)
def flattened_behind_the_norm(x, weight):
    return vllm_per_token(llama(x, weight).reshape(-1, x.shape[-1]))


@positive("vllm-project/vllm: B x S x H is flattened before the norm", "rms_norm_per_group_128", inputs=normed())
def flattened_before_the_norm(x, weight):
    codes, scales = per_group_128(llama(x.view(-1, x.shape[-1]), weight))
    return codes.view(x.shape), scales.view(*x.shape[:-1], -1)


@positive(
    "vllm-project/vllm: flattened between the sum and the norm", "add_rms_norm_per_group_64", inputs=normed(tensors=2)
)
def flattened_behind_the_sum(x, residual, weight):
    summed = x + residual
    return *per_group_64(llama(summed.flatten(0, 1), weight)), summed


@positive(
    f"{TRANSFORMERS}/mixtral/modeling_mixtral.py MixtralExperts: the tokens of one expert",
    "quant_per_group_128",
    inputs=spread(shape=(12, 256)),
)
def expert_tokens(x):
    order = torch.arange(11, -1, -2, device=x.device)
    return per_group_128(x[order])


@positive(
    f"{TRANSFORMERS}/qwen3_moe/modeling_qwen3_moe.py Qwen3MoeSparseMoeBlock: flat tokens of a norm, sorted by expert",
    "rms_norm_per_token",
    "quant_per_group_64",
    inputs=normed(),
)
def sorted_tokens(x, weight):
    flat = llama(x, weight).view(-1, x.shape[-1])
    order = torch.arange(flat.shape[0] - 1, -1, -1, device=x.device)
    return per_token(flat), per_group_64(flat.index_select(0, order))


@positive(
    "sgl-project/sglang python/sglang/srt/layers/moe: gate_up of all experts, (E, T, 2H)",
    "silu_mul_per_group_128",
    inputs=halves(shape=(2, 3, 512)),
)
def experts_of_one_projection(x):
    return per_group_128(F.silu(x[..., :256]) * x[..., 256:])


@positive(
    f"{TRANSFORMERS}/deepseek_v3/modeling_deepseek_v3.py DeepseekV3Attention: the norm of a part of one projection",
    "rms_norm_per_token",
    inputs=lambda device: (*weightless(shape=(6, 320))(device), torch.randn(256, device=device).to(BF16)),
)
def latent_slice(x, weight):
    latent, rotary = x.split([256, 64], dim=-1)
    return *per_token(llama(latent, weight)), rotary + 1


@positive(
    f"{TRANSFORMERS}/deepseek_v3/modeling_deepseek_v3.py DeepseekV3Attention: a norm of each of two parts",
    "rms_norm_per_group_128",
    "rms_norm_per_token",
    inputs=lambda device: (
        *weightless(shape=(6, 384))(device),
        torch.randn(256, device=device).to(BF16),
        torch.randn(128, device=device).to(BF16),
    ),
)
def two_latents(x, query_weight, key_weight):
    query, key = x.split([256, 128], dim=-1)
    return per_group_128(llama(query, query_weight)), per_token(llama(key, key_weight))


@positive(
    f"{TRANSFORMERS}/gemma2/modeling_gemma2.py Gemma2DecoderLayer: a norm, a sum, a norm",
    "add_gemma_rms_norm_per_token",
    inputs=normed(tensors=2),
    sums=True,
)
def norm_sum_norm(x, residual, weight):
    summed = residual + gemma(x, weight)
    return *per_token(gemma(summed, weight)), summed


@positive(
    f"{TRANSFORMERS}/olmo2/modeling_olmo2.py Olmo2DecoderLayer: the norm is added, the sum quantized",
    "quant_per_token",
    inputs=normed(tensors=2),
)
def norm_then_sum(x, residual, weight):
    summed = residual + olmo2(x, weight)
    return *per_token(summed), summed


@positive(
    f"{TRANSFORMERS}/granite/modeling_granite.py GraniteDecoderLayer: the residual multiplier",
    "add_rms_norm_per_token",
    inputs=normed(tensors=2),
)
def residual_multiplier(x, residual, weight):
    summed = residual + x * 0.5
    return *per_token(llama(summed, weight)), summed


@positive(
    f"{TRANSFORMERS}/gemma/modeling_gemma.py GemmaModel: embeddings are scaled first",
    "gemma_rms_norm_per_token",
    inputs=normed(),
)
def scaled_embeddings(x, weight):
    hidden = x * torch.tensor(4.0, dtype=x.dtype, device=x.device)
    return *per_token(gemma(hidden, weight)), hidden


@positive(
    "EleutherAI/gpt-neox megatron/model/transformer.py: parallel residuals",
    "rms_norm_per_token",
    inputs=normed(tensors=3),
)
def parallel_residual(x, attention, mlp, weight):
    normalized = llama(x, weight)
    return *per_token(normalized), x + attention + mlp


@positive(
    "EleutherAI/gpt-neox megatron/model/transformer.py: the norm of a sum of three",
    "add_rms_norm_per_token",
    inputs=normed(tensors=3),
)
def sum_of_three(x, attention, mlp, weight):
    summed = x + attention + mlp
    return *per_token(llama(summed, weight)), summed


@positive(
    f"{TRANSFORMERS}/llama/modeling_llama.py: dropout in eval mode", "add_rms_norm_per_token", inputs=normed(tensors=2)
)
def dropout_in_eval(x, residual, weight):
    summed = residual + F.dropout(x, p=0.1, training=False)
    return *per_token(llama(summed, weight)), summed


@positive(
    f"{TRANSFORMERS}/llama/modeling_llama.py: two layers, each with a sum",
    "add_rms_norm_per_token",
    "add_rms_norm_per_group_128",
    inputs=normed(tensors=3),
)
def two_layers(x, attention, mlp, weight):
    first = x + attention
    second = first + mlp
    return per_token(llama(first, weight)), per_group_128(llama(second, weight)), second


@positive(
    "vllm-project/vllm vllm/model_executor/layers/layernorm.py fused_add_rms_norm: the residual is updated in place",
    "add_rms_norm_per_token",
    inputs=normed(tensors=2),
)
def residual_in_place(x, residual, weight):
    residual.add_(x)
    return per_token(llama(residual, weight))


@positive(
    "microsoft/LoRA loralib/layers.py: an adapter reads the norm",
    "rms_norm_per_token",
    inputs=with_weights(normed(), (256, 8), (8, 256)),
)
def adapter(x, weight, down, up):
    normalized = llama(x, weight)
    return *per_token(normalized), (normalized @ down) @ up


@positive(
    f"{TRANSFORMERS}/llama/modeling_llama.py LlamaAttention: heads are merged, then quantized",
    "quant_per_token",
    inputs=spread(shape=(2, 4, 3, 64)),
)
def merged_heads(attention):
    merged = attention.transpose(1, 2).contiguous().reshape(2, 3, 256)
    return per_token(merged)


@positive(
    "ROCm/aiter aiter/ops/triton fused_flatten_fp8_group_quant: (M, N1, N2) is flattened",
    "quant_per_group_64",
    inputs=spread(shape=(6, 4, 64)),
)
def flattened_heads(x):
    return per_group_64(x.flatten(1))


@positive(
    "sgl-project/sglang python/sglang/srt/models/deepseek_v2.py: a bmm's output, transposed and flattened",
    "quant_per_group_64",
    inputs=spread(shape=(4, 6, 64)),
)
def flattened_bmm(x):
    return per_group_64(x.transpose(0, 1).flatten(1, 2))


@positive(
    f"{TRANSFORMERS}/qwen3/modeling_qwen3.py Qwen3Attention: the norm of each head, quantized per head",
    "rms_norm_per_token",
    inputs=normed(shape=(2, 3, 4, 64)),
)
def norm_of_heads(x, weight):
    return per_token(llama(x, weight))


@positive(
    f"{TRANSFORMERS}/qwen3/modeling_qwen3.py: the last token alone is quantized", "rms_norm_per_token", inputs=normed()
)
def last_token(x, weight):
    return per_token(llama(x[:, -1], weight))


@positive(f"{TRANSFORMERS}/qwen3/modeling_qwen3.py: the last token of the norm", "quant_per_token", inputs=normed())
def last_token_of_the_norm(x, weight):
    normalized = llama(x, weight)
    return per_token(normalized[:, -1]), normalized


@positive(
    "pytorch/ao torchao/quantization: the codes are read by a scaled matmul",
    "rms_norm_int8_per_token",
    inputs=with_weights(normed(shape=(6, 256)), (256, 64)),
)
def int8_matmul(x, weight, projection):
    codes, scale = int8_per_token(llama(x, weight))
    return (codes.float() @ projection.float() * scale).to(x.dtype)


@positive("pytorch/ao torchao/quantization: codes dequantized at once", "rms_norm_per_group_128", inputs=normed())
def fake_quantized(x, weight):
    codes, scales = per_group_128(llama(x, weight))
    return (codes.float().unflatten(-1, (-1, 128)) * scales.unsqueeze(-1)).flatten(-2).to(x.dtype)


@positive("vllm-project/vllm: codes are stored into a buffer", "silu_mul_per_token", inputs=pair())
def stored_codes(gate, up):
    codes, scale = per_token(F.silu(gate) * up)
    buffer = torch.zeros(8, 256, device=gate.device, dtype=torch.uint8)
    buffer[:6] = codes.view(torch.uint8)
    return buffer, scale


@positive("vllm-project/vllm: the gated product is returned too", "silu_mul_per_group_128", inputs=halves())
def product_returned(x):
    product = F.silu(x[:, :256]) * x[:, 256:]
    return *per_group_128(product), product


@positive(
    f"{TRANSFORMERS}/deepseek_v3/modeling_deepseek_v3.py DeepseekV3MoE: shared and routed experts read one norm",
    "add_rms_norm_per_group_128",
    inputs=with_weights(normed(tensors=2), (256, 4)),
)
def shared_experts(x, residual, weight, gate):
    summed = x + residual
    normalized = llama(summed, weight)
    scores = (normalized.view(-1, 256).float() @ gate.float()).sigmoid()
    return per_group_128(normalized), per_group_128(normalized), scores.topk(2, dim=-1), summed


@positive(
    "vllm-project/vllm: power-of-two and plain scales of one product",
    "silu_mul_per_group_128_ue8m0",
    "quant_per_group_128",
    inputs=halves(),
)
def two_scale_rules(x):
    product = F.silu(x[:, :256]) * x[:, 256:]
    return ue8m0_per_group_128(product), per_group_128(product)


@positive("vllm-project/vllm: one row", "add_rms_norm_per_token", inputs=normed(tensors=2, shape=(1, 256)))
def one_row(x, residual, weight):
    return residual_returned(x, residual, weight)


@positive("vllm-project/vllm: a group is the whole row", "rms_norm_per_token", inputs=normed(shape=(6, 128)))
def one_group(x, weight):
    return per_group_128(llama(x, weight))


@positive("NVIDIA/Megatron-LM: sequence first, (S, B, H)", "rms_norm_per_token", inputs=normed())
def sequence_first(x, weight):
    return per_token(llama(x.transpose(0, 1), weight).contiguous())


@positive("pytorch/torchtitan: under autocast", "rms_norm_per_token", inputs=normed())
def under_autocast(x, weight):
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return per_token(llama(x, weight))


@positive(
    "karpathy/nanochat nanochat/fp8.py: float32 activations", "rms_norm_per_token", inputs=normed(F32, shape=(6, 256))
)
def float32_activations(x, weight):
    return per_token(llama(x, weight))


@positive(
    "pytorch/ao torchao/float8: the forward pass of training, the norm saved for backward",
    "rms_norm_per_token",
    inputs=normed(),
    grad=True,
)
def training(x, weight):
    x = x.requires_grad_()
    normalized = llama(x, weight.requires_grad_())
    codes, scale = per_token(normalized.detach())
    return codes, scale, (normalized * 2).detach()


@positive(
    "pytorch/ao torchao/prototype/qat: straight-through estimator", "silu_mul_per_token", inputs=pair(), grad=True
)
def straight_through(gate, up):
    product = F.silu(gate) * up
    codes, scale = per_token(product.detach())
    return product + ((codes.float() * scale).to(product.dtype) - product).detach()


@positive("pytorch/ao torchao/float8: e5m2 of an upstream gradient", "quant_per_token", inputs=spread())
def gradient_to_e5m2(x):
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / 57344.0
    return (x.float() / scale).clamp(-57344.0, 57344.0).to(torch.float8_e5m2), scale


@positive(
    "vllm-project/vllm vllm/attention: keys are cast by a static scale, the norm is quantized dynamically",
    "rms_norm_per_token",
    inputs=normed(),
)
def static_neighbour(x, weight):
    normalized = llama(x, weight)
    return per_token(normalized), (x.float() * 0.25).clamp(-448.0, 448.0).to(E4M3)
