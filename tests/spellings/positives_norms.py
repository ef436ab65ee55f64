"""Every way in which public code writes an RMSNorm, each in front of a quantizer."""

import torch
import torch.nn.functional as F  # noqa: N812

from . import positive
from .inputs import F16, F32, normed, weightless
from .quantizers import (
    int8_per_token,
    per_group_64,
    per_group_128,
    per_token,
    ue8m0_per_group_128,
    vllm_per_token,
)

TRANSFORMERS = "huggingface/transformers src/transformers/models"
MODULE = torch.nn.RMSNorm(256, eps=1e-5)


@positive(f"{TRANSFORMERS}/llama/modeling_llama.py LlamaRMSNorm", "rms_norm_per_token", inputs=normed(), then=per_token)
@positive(
    f"{TRANSFORMERS}/deepseek_v3/modeling_deepseek_v3.py DeepseekV3RMSNorm",
    "rms_norm_per_group_128",
    inputs=normed(),
    then=per_group_128,
)
@positive(
    f"{TRANSFORMERS}/qwen3/modeling_qwen3.py Qwen3RMSNorm",
    "rms_norm_int8_per_token",
    inputs=normed(),
    then=int8_per_token,
)
@positive(
    f"{TRANSFORMERS}/glm4_moe/modeling_glm4_moe.py Glm4MoeRMSNorm",
    "rms_norm_per_group_128_ue8m0",
    inputs=normed(shape=(6, 256)),
    then=ue8m0_per_group_128,
)
@positive(
    f"{TRANSFORMERS}/mistral/modeling_mistral.py MistralRMSNorm",
    "rms_norm_per_token",
    inputs=normed(F16),
    then=per_token,
)
def llama(x, weight):
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + 1e-5)
    return weight * x.to(dtype)


@positive(
    f"{TRANSFORMERS}/llama/modeling_llama.py LlamaRMSNorm, its weight kept in float32",
    "rms_norm_per_token",
    inputs=normed(weight=F32),
    then=per_token,
)
def llama_float_weight(x, weight):
    return llama(x, weight)


@positive(
    f"{TRANSFORMERS}/gemma/modeling_gemma.py GemmaRMSNorm", "gemma_rms_norm_per_token", inputs=normed(), then=per_token
)
@positive(
    f"{TRANSFORMERS}/qwen3_next/modeling_qwen3_next.py Qwen3NextRMSNorm",
    "gemma_rms_norm_per_group_128",
    inputs=normed(),
    then=per_group_128,
)
@positive(
    f"{TRANSFORMERS}/vaultgemma/modeling_vaultgemma.py VaultGemmaRMSNorm",
    "gemma_rms_norm_int8_per_token",
    inputs=normed(),
    then=int8_per_token,
)
def gemma(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + weight.float())).type_as(x)


@positive(
    f"{TRANSFORMERS}/gemma3n/modeling_gemma3n.py Gemma3nRMSNorm", "rms_norm_per_token", inputs=normed(), then=per_token
)
@positive(
    f"{TRANSFORMERS}/gemma4/modeling_gemma4.py Gemma4RMSNorm",
    "rms_norm_per_group_64",
    inputs=normed(),
    then=per_group_64,
)
def gemma4(x, weight):
    h = x.float()
    mean_squared = h.pow(2).mean(-1, keepdim=True) + 1e-6
    h = h * torch.pow(mean_squared, -0.5)
    return (h * weight.float()).type_as(x)


@positive(
    f"{TRANSFORMERS}/gemma4/modeling_gemma4.py Gemma4RMSNorm without scale",
    "rms_norm_per_token",
    inputs=weightless(),
    then=per_token,
)
def gemma4_weightless(x):
    h = x.float()
    return (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + 1e-6, -0.5)).type_as(x)


@positive(f"{TRANSFORMERS}/olmo2/modeling_olmo2.py Olmo2RMSNorm", "rms_norm_per_token", inputs=normed(), then=per_token)
@positive(
    f"{TRANSFORMERS}/gpt_oss/modeling_gpt_oss.py GptOssRMSNorm",
    "rms_norm_per_group_128",
    inputs=normed(weight=F32),
    then=per_group_128,
)
@positive(
    f"{TRANSFORMERS}/deepseek_v4/modeling_deepseek_v4.py DeepseekV4RMSNorm",
    "rms_norm_per_group_128_ue8m0",
    inputs=normed(weight=F32),
    then=ue8m0_per_group_128,
)
def olmo2(x, weight):
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + 1e-6)
    return (weight * x).to(dtype)


@positive(
    f"{TRANSFORMERS}/helium/modeling_helium.py HeliumRMSNorm", "rms_norm_per_token", inputs=normed(), then=per_token
)
@positive(
    f"{TRANSFORMERS}/nemotron_h/modeling_nemotron_h.py NemotronHRMSNorm",
    "rms_norm_per_group_64",
    inputs=normed(shape=(6, 256)),
    then=per_group_64,
)
def helium(x, weight):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-8)
    return (weight.to(torch.float32) * h).to(x.dtype)


@positive(f"{TRANSFORMERS}/t5/modeling_t5.py T5LayerNorm", "rms_norm_per_token", inputs=normed(), then=per_token)
@positive(
    f"{TRANSFORMERS}/umt5/modeling_umt5.py UMT5LayerNorm", "rms_norm_per_token", inputs=normed(F16), then=per_token
)
@positive(
    f"{TRANSFORMERS}/t5/modeling_t5.py T5LayerNorm, its weight kept in float32",
    "rms_norm_per_group_128",
    inputs=normed(weight=F32),
    then=per_group_128,
)
@positive(
    "NVIDIA/apex apex/normalization/fused_layer_norm.py manual_rms_norm",
    "rms_norm_per_group_64",
    inputs=normed(),
    then=per_group_64,
)
def t5(x, weight):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + 1e-6)
    if weight.dtype in (torch.float16, torch.bfloat16):
        x = x.to(weight.dtype)
    return weight * x


@positive(
    "huggingface/diffusers src/diffusers/models/normalization.py RMSNorm",
    "rms_norm_per_token",
    inputs=normed(),
    then=vllm_per_token,
)
@positive(
    f"{TRANSFORMERS}/cpmant/modeling_cpmant.py CpmAntLayerNorm", "rms_norm_per_token", inputs=normed(), then=per_token
)
def cpmant(x, weight):
    variance = x.to(torch.float32).pow(2).mean(dim=-1, keepdim=True)
    return (x * torch.rsqrt(variance + 1e-6)).to(x.dtype) * weight


@positive(
    f"{TRANSFORMERS}/llama4/modeling_llama4.py Llama4TextRMSNorm", "rms_norm_per_token", inputs=normed(), then=per_token
)
@positive("meta-llama/llama llama/model.py RMSNorm", "rms_norm_per_group_128", inputs=normed(F16), then=per_group_128)
@positive(
    "NVIDIA/Megatron-LM megatron/legacy/model/rms_norm.py RMSNorm",
    "rms_norm_per_token",
    inputs=normed(shape=(3, 2, 256)),
    then=vllm_per_token,
)
@positive(
    "microsoft/torchscale torchscale/component/rms_norm.py RMSNorm",
    "rms_norm_int8_per_token",
    inputs=normed(),
    then=int8_per_token,
)
def meta_llama(x, weight):
    h = x.float()
    normalized = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)).type_as(x)
    return normalized * weight


@positive(
    f"{TRANSFORMERS}/llama4/modeling_llama4.py Llama4TextL2Norm",
    "rms_norm_per_token",
    inputs=weightless(),
    then=per_token,
)
def llama4_l2(x):
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)


@positive(
    f"{TRANSFORMERS}/moshi/modeling_moshi.py MoshiRMSNorm",
    "rms_norm_per_token",
    inputs=normed(weight=F32),
    then=per_token,
)
@positive(
    "facebookresearch/lingua lingua/transformer.py RMSNorm",
    "rms_norm_per_group_128",
    inputs=normed(),
    then=per_group_128,
)
def moshi(x, weight):
    def root_mean_square(h):
        return h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-8)

    return (root_mean_square(x.float()) * weight.float()).type_as(x)


@positive(
    f"{TRANSFORMERS}/muse_spark/modeling_muse_spark.py MuseSparkTextCenteredRMSNorm: 1 + weight is rounded to bfloat16",
    "gemma_rms_norm_per_token",
    inputs=normed(),
    then=per_token,
)
def centered_in_bfloat16(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + weight).float()).type_as(x)


@positive(
    f"{TRANSFORMERS}/deepseek_v4/modeling_deepseek_v4.py DeepseekV4UnweightedRMSNorm: the root is rounded to bfloat16",
    "rms_norm_per_token",
    inputs=weightless(),
    then=per_token,
)
def rounded_root(x):
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6).to(x.dtype)


@positive(
    f"{TRANSFORMERS}/imagegpt/modeling_imagegpt.py ImageGPTLayerNorm",
    "rms_norm_per_token",
    inputs=normed(F32),
    then=per_token,
)
def imagegpt(x, weight):
    x = x / torch.sqrt(torch.mean(torch.square(x), dim=-1, keepdim=True) + 1e-5)
    return x * weight


@positive(
    f"{TRANSFORMERS}/qwen3_next/modeling_qwen3_next.py Qwen3NextRMSNormGated",
    "gated_rms_norm_per_token",
    inputs=normed(tensors=2),
    then=per_token,
)
def qwen3_next_gated(x, gate, weight):
    dtype = x.dtype
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    h = weight * h.to(dtype)
    h = h * F.silu(gate.to(torch.float32))
    return h.to(dtype)


@positive(
    "vllm-project/vllm vllm/model_executor/layers/layernorm.py RMSNorm.forward_native",
    "rms_norm_per_token",
    inputs=normed(shape=(6, 256)),
    then=vllm_per_token,
)
def vllm(x, weight):
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(dim=-1, keepdim=True)
    x = x * torch.rsqrt(variance + 1e-6)
    x = x.to(dtype)
    return x * weight


@positive(
    "vllm-project/vllm vllm/model_executor/layers/layernorm.py RMSNorm.forward_native with residual",
    "add_rms_norm_per_token",
    inputs=normed(tensors=2, shape=(6, 256)),
)
def vllm_residual(x, residual, weight):
    dtype = x.dtype
    x = x.to(torch.float32)
    x = x + residual
    stored = x.to(dtype)
    x = x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
    return *vllm_per_token(x.to(dtype) * weight), stored


@positive(
    "vllm-project/vllm vllm/ir/ops/layernorm.py rms_norm: the product is in the weight's dtype",
    "rms_norm_per_group_128",
    inputs=normed(F16, shape=(6, 256)),
    then=per_group_128,
)
@positive(
    "vllm-project/vllm vllm/ir/ops/layernorm.py rms_norm with a float32 weight",
    "rms_norm_per_group_128",
    inputs=normed(weight=F32, shape=(6, 256)),
    then=per_group_128,
)
def vllm_ir(x, weight):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
    return (h.to(weight.dtype) * weight).to(x.dtype)


@positive(
    "vllm-project/vllm vllm/model_executor/layers/layernorm.py GemmaRMSNorm.forward_native",
    "add_gemma_rms_norm_per_token",
    inputs=normed(tensors=2, shape=(6, 256)),
)
@positive(
    "vllm-project/vllm vllm/model_executor/layers/layernorm.py GemmaRMSNorm.forward_native in float16",
    "add_gemma_rms_norm_per_token",
    inputs=normed(F16, tensors=2, shape=(6, 256)),
)
def vllm_gemma(x, residual, weight):
    dtype = x.dtype
    x = x.float() + residual.float() if dtype == torch.float16 else x + residual
    stored = x
    x = x.float()
    x = x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
    x = x * (1.0 + weight.float())
    return *vllm_per_token(x.to(dtype)), stored


@positive(
    "sgl-project/sglang python/sglang/srt/layers/layernorm.py RMSNorm.forward_native",
    "add_rms_norm_per_group_128",
    inputs=normed(tensors=2, shape=(6, 256)),
)
def sglang_residual(x, residual, weight):
    dtype = x.dtype
    h = x.to(torch.float32) + residual.to(torch.float32)
    stored = h.to(dtype)
    h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
    return *per_group_128((h * weight).to(dtype)), stored


@positive(
    "sgl-project/sglang python/sglang/srt/layers/layernorm.py GemmaRMSNorm.forward_native",
    "add_gemma_rms_norm_per_group_128",
    inputs=normed(tensors=2, shape=(6, 256)),
)
def sglang_gemma(x, residual, weight):
    dtype = x.dtype
    x = x + residual
    stored = x
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(dim=-1, keepdim=True) + 1e-6)
    return *per_group_128((h * (1.0 + weight.float())).to(dtype)), stored


@positive(
    "deepseek-ai/DeepSeek-V3 inference/model.py RMSNorm: F.rms_norm",
    "rms_norm_per_group_128",
    inputs=normed(),
    then=per_group_128,
)
@positive("ROCm/aiter op_tests/test_rmsnorm2d.py run_torch", "rms_norm_per_token", inputs=normed(F16), then=per_token)
def functional(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


@positive(
    "pytorch/pytorch torch/nn/functional.py rms_norm without eps", "rms_norm_per_token", inputs=normed(), then=per_token
)
def functional_without_eps(x, weight):
    return F.rms_norm(x, (x.shape[-1],), weight)


@positive("karpathy/nanochat nanochat/gpt.py norm", "rms_norm_per_token", inputs=weightless(), then=per_token)
@positive("KellerJordan/modded-nanogpt train_gpt.py norm", "rms_norm_per_token", inputs=weightless(F32), then=per_token)
def functional_weightless(x):
    return F.rms_norm(x, (x.size(-1),))


@positive(
    "pytorch/torchtitan torchtitan/models/llama3/model/model.py TransformerBlock: nn.RMSNorm",
    "rms_norm_per_token",
    inputs=normed(),
    then=per_token,
)
@positive(
    "NVIDIA/Megatron-LM megatron/core/transformer/torch_norm.py WrappedTorchNorm: nn.RMSNorm",
    "rms_norm_per_group_128",
    inputs=normed(),
    then=per_group_128,
)
def module(x, weight):
    return torch.func.functional_call(MODULE, {"weight": weight}, (x,))


@positive("Lightning-AI/litgpt litgpt/model.py RMSNorm", "rms_norm_per_token", inputs=normed(), then=per_token)
def litgpt(x, weight):
    dtype = x.dtype
    x = x.float()
    mean_square = torch.mean(x * x, dim=-1, keepdim=True)
    normalized = x * torch.rsqrt(mean_square + 1e-6)
    return (normalized * weight.float()).to(dtype=dtype)


@positive(
    "Lightning-AI/litgpt litgpt/model.py RMSNorm with add_unit_offset: 1 + weight is rounded to bfloat16",
    "gemma_rms_norm_per_token",
    inputs=normed(),
    then=per_token,
)
def litgpt_unit_offset(x, weight):
    return litgpt(x, 1 + weight)


@positive(
    "pytorch/torchtune torchtune/modules/rms_norm.py RMSNorm", "rms_norm_per_token", inputs=normed(), then=per_token
)
def torchtune(x, scale):
    h = x.float()
    normalized = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x)
    return normalized * scale


@positive("pytorch-labs/gpt-fast model.py RMSNorm", "rms_norm_int8_per_token", inputs=normed(), then=int8_per_token)
def gpt_fast(x, weight):
    h = x.float()
    normalized = (h * torch.rsqrt(torch.mean(h * h, dim=-1, keepdim=True) + 1e-5)).type_as(x)
    return normalized * weight


@positive("google/gemma_pytorch gemma/model.py RMSNorm", "gemma_rms_norm_per_token", inputs=normed(), then=per_token)
def gemma_pytorch(x, weight):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1 + weight.float())).type_as(x)


@positive(
    "NVIDIA/TransformerEngine tests/pytorch/test_numerics.py TorchRMSNorm",
    "rms_norm_per_token",
    inputs=normed(),
    then=per_token,
)
def transformer_engine(x, weight):
    squares = torch.sum(x.float() ** 2, dim=-1, keepdim=True)
    root = (squares / x.shape[-1] + 1e-5) ** (-1 / 2)
    normalized = x * root
    return (weight.float() * normalized).to(x.dtype)


@positive(
    "NVIDIA/TransformerEngine tests/pytorch/test_numerics.py TorchRMSNorm with zero-centered gamma",
    "gemma_rms_norm_per_group_128",
    inputs=normed(),
    then=per_group_128,
)
def transformer_engine_zero_centered(x, weight):
    squares = torch.sum(x.float() ** 2, dim=-1, keepdim=True)
    normalized = x * (squares / x.shape[-1] + 1e-5) ** (-1 / 2)
    return ((1 + weight.float()) * normalized).to(x.dtype)


@positive(
    "Dao-AILab/flash-attention flash_attn/ops/triton/layer_norm.py rms_norm_ref",
    "rms_norm_per_token",
    inputs=normed(),
    then=per_token,
)
@positive(
    "state-spaces/mamba mamba_ssm/ops/triton/layernorm_gated.py rms_norm_ref",
    "rms_norm_per_group_64",
    inputs=normed(),
    then=per_group_64,
)
def flash_attention(x, weight):
    dtype = x.dtype
    weight, x = weight.float(), x.float()
    root = 1 / torch.sqrt((x.square()).mean(dim=-1, keepdim=True) + 1e-6)
    return (x * root * weight).to(dtype)


@positive(
    "Dao-AILab/flash-attention flash_attn/ops/triton/layer_norm.py rms_norm_ref with residual and zero-centered weight",
    "add_gemma_rms_norm_per_token",
    inputs=normed(tensors=2),
)
def flash_attention_residual(x, residual, weight):
    dtype = x.dtype
    weight, x, residual = weight.float() + 1.0, x.float(), residual.float()
    x = (x + residual).to(x.dtype)
    root = 1 / torch.sqrt((x.square()).mean(dim=-1, keepdim=True) + 1e-6)
    return *per_token((x * root * weight).to(dtype)), x.to(dtype)


@positive("allenai/OLMo olmo/model.py RMSLayerNorm", "rms_norm_per_token", inputs=normed(), then=per_token)
def olmo_original(x, weight):
    dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + 1e-5)
    x = x.to(dtype)
    return weight * x


@positive(
    "ROCm/aiter aiter/ops/triton fused_rms_fp8_group_quant's arithmetic: nothing is rounded before the quantizer",
    "add_rms_norm_per_group_128",
    inputs=normed(tensors=2, shape=(6, 256)),
)
def aiter_unrounded(x, residual, weight):
    h = x.float() + residual.float()
    normalized = h * torch.rsqrt((h * h).sum(-1, keepdim=True) / h.shape[-1] + 1e-6) * weight.float()
    return *per_group_128(normalized), h.to(x.dtype)


@positive(
    "ROCm/aiter op_tests/test_rmsnorm2dFusedAddQuant.py run_torch: the sum is rounded first",
    "add_rms_norm_per_token",
    inputs=normed(tensors=2, shape=(6, 256)),
)
def aiter_reference(x, residual, weight):
    summed = x + residual
    return *per_token(F.rms_norm(summed, (x.shape[-1],), weight, 1e-6)), summed


@positive(
    "InternLM/lmdeploy lmdeploy/pytorch/backends/default/norm.py DefaultRMSNormImpl",
    "add_rms_norm_per_token",
    inputs=normed(tensors=2),
)
def operands_swapped(x, residual, weight):
    summed = torch.add(residual, x)
    h = summed.to(torch.float32)
    root = (1e-5 + torch.mean(torch.mul(h, h), -1, True)).rsqrt()
    return per_token(torch.mul(torch.mul(root, h).to(x.dtype), weight)), summed
