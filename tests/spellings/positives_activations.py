"""Every way in which public code writes a gated activation, each in front of a quantizer."""

import torch
import torch.nn.functional as F  # noqa: N812

from . import positive
from .inputs import F16, F32, halves, pair, with_scale
from .quantizers import (
    int8_per_token,
    per_group_64,
    per_group_128,
    per_token,
    static,
    ue8m0_per_group_128,
    vllm_per_token,
)

TRANSFORMERS = "huggingface/transformers src/transformers/models"
VLLM = "vllm-project/vllm vllm/model_executor/layers/activation.py"


@positive(f"{TRANSFORMERS}/llama/modeling_llama.py LlamaMLP", "silu_mul_per_token", inputs=pair(), then=per_token)
@positive(
    f"{TRANSFORMERS}/qwen3_moe/modeling_qwen3_moe.py Qwen3MoeExperts",
    "silu_mul_per_group_128",
    inputs=pair(F16),
    then=per_group_128,
)
@positive(
    f"{TRANSFORMERS}/qwen2/modeling_qwen2.py Qwen2MLP", "silu_mul_int8_per_token", inputs=pair(), then=int8_per_token
)
@positive(
    "Lightning-AI/litgpt litgpt/model.py LLaMAMLP",
    "silu_mul_per_group_64",
    inputs=pair(shape=(2, 3, 256)),
    then=per_group_64,
)
@positive(
    "pytorch/torchtitan torchtitan/models/llama3/model/model.py FeedForward",
    "silu_mul_per_token",
    inputs=pair(F32),
    then=per_token,
)
@positive("deepseek-ai/DeepSeek-V3 inference/model.py MLP", "silu_mul_per_group_128", inputs=pair(), then=per_group_128)
def gate_and_up(gate, up):
    return F.silu(gate) * up


@positive(
    f"{TRANSFORMERS}/llama4/modeling_llama4.py Llama4TextExperts", "silu_mul_per_token", inputs=pair(), then=per_token
)
@positive(
    f"{TRANSFORMERS}/mixtral/modeling_mixtral.py MixtralExperts",
    "silu_mul_per_group_128_ue8m0",
    inputs=pair(),
    then=ue8m0_per_group_128,
)
def up_and_gate(gate, up):
    return up * torch.nn.SiLU()(gate)


@positive(f"{TRANSFORMERS}/phi3/modeling_phi3.py Phi3MLP", "silu_mul_per_token", inputs=halves(), then=per_token)
@positive(
    f"{TRANSFORMERS}/glm4/modeling_glm4.py Glm4MLP",
    "silu_mul_per_group_128",
    inputs=halves(shape=(2, 3, 512)),
    then=per_group_128,
)
@positive(
    f"{TRANSFORMERS}/phi3/modeling_phi3.py Phi3MLP in float16",
    "silu_mul_int8_per_token",
    inputs=halves(F16),
    then=int8_per_token,
)
def phi3(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return up * F.silu(gate)


@positive(f"{VLLM} SiluAndMul.forward_native", "silu_mul_per_token", inputs=halves(), then=vllm_per_token)
@positive(f"{VLLM} SiluAndMul.forward_native", "silu_mul_per_group_128", inputs=halves(F16), then=per_group_128)
@positive(
    "sgl-project/sglang python/sglang/srt/layers/activation.py SiluAndMul.forward_native",
    "silu_mul_per_group_128_ue8m0",
    inputs=halves(),
    then=ue8m0_per_group_128,
)
def vllm(x):
    half = x.shape[-1] // 2
    return F.silu(x[..., :half]) * x[..., half:]


@positive(
    f"{VLLM} MulAndSilu.forward_native: the gate is the second half",
    "silu_mul_per_token",
    inputs=halves(),
    then=per_token,
)
@positive(
    "alibaba/rtp-llm rtp_llm/models_py/triton_kernels/common/activation.py: [up | gate]",
    "silu_mul_per_group_128",
    inputs=halves(),
    then=per_group_128,
)
def up_gate(x):
    half = x.shape[-1] // 2
    return x[..., :half] * F.silu(x[..., half:])


@positive(
    "alibaba/rtp-llm rtp_llm/models_py/triton_kernels/common/activation.py: in float32, not rounded",
    "silu_mul_per_group_128_ue8m0",
    inputs=halves(),
    then=ue8m0_per_group_128,
)
def up_gate_unrounded(x):
    up, gate = x.float().chunk(2, -1)
    return up * F.silu(gate)


@positive(
    "NVIDIA/Megatron-LM megatron/core/fusions/fused_bias_swiglu.py swiglu",
    "silu_mul_per_token",
    inputs=halves(),
    then=per_token,
)
def megatron(y):
    first, second = torch.chunk(y, 2, -1)
    return F.silu(first) * second


@positive(
    "NVIDIA/Megatron-LM megatron/core/fusions/fused_bias_swiglu.py bias_swiglu",
    "silu_mul_per_group_128",
    inputs=lambda device: (*halves()(device), torch.randn(512, device=device).bfloat16()),
    then=per_group_128,
)
def megatron_biased(y, bias):
    return megatron(y + bias)


@positive(
    "ROCm/aiter op_tests/test_activation.py torch_silu_and_mul", "silu_mul_per_token", inputs=halves(), then=per_token
)
def aiter(x):
    half = x.shape[-1] // 2
    gate, up = x.split([half, half], dim=-1)
    return F.silu(gate) * up


@positive(
    "ROCm/aiter aiter/ops/triton fused_reduce_act_mul's arithmetic: float32, not rounded",
    "silu_mul_per_group_128",
    inputs=halves(),
    then=per_group_128,
)
def unrounded(x):
    gate, up = x.float().tensor_split(2, dim=-1)
    return F.silu(gate) * up


@positive(
    "ROCm/aiter aiter/ops/triton fused_silu_mul with silu_convert_to_inp_type: rounded once",
    "silu_mul_per_token",
    inputs=pair(),
    then=per_token,
)
@positive(
    "deepseek-ai/DeepSeek-V3.2-Exp inference/model.py Expert: in float32, cast back",
    "silu_mul_per_group_128",
    inputs=pair(),
    then=per_group_128,
)
def rounded_once(gate, up):
    return (F.silu(gate.float()) * up.float()).type_as(gate)


@positive(
    "vllm-project/vllm csrc/quantization/activation_kernels.cu silu_and_mul_quant's arithmetic",
    "silu_mul_per_token",
    inputs=pair(),
    then=per_token,
)
def activated_rounded_product_not(gate, up):
    return F.silu(gate).float() * up.float()


@positive(
    f"{TRANSFORMERS}/falcon_h1/modeling_falcon_h1.py FalconH1MLP: the gate is multiplied first",
    "silu_mul_per_token",
    inputs=pair(),
    then=per_token,
)
def falcon_h1(gate, up):
    return up * F.silu(gate * 0.75)


@positive(
    "sgl-project/sglang python/sglang/srt/layers/moe/moe_runner/triton.py swiglu limit: gate and up are clamped first",
    "clamped_silu_mul_per_group_128",
    inputs=pair(),
    then=per_group_128,
)
def limited(gate, up):
    return F.silu(gate.clamp(max=7.0)) * up.clamp(min=-7.0, max=7.0)


@positive(
    "facebookresearch/xformers xformers/ops/swiglu_op.py: halves by unbind",
    "silu_mul_per_token",
    inputs=halves(),
    then=per_token,
)
def unbound(x):
    gate, up = x.view(x.shape[0], 2, -1).unbind(1)
    return F.silu(gate) * up


@positive(
    "pytorch/pytorch torch/_torch_docs.py: halves by narrow",
    "silu_mul_per_token",
    inputs=halves(shape=(2, 3, 512)),
    then=per_token,
)
def narrowed(x):
    return F.silu(x.narrow(-1, 0, 256)) * x.narrow(-1, 256, 256)


@positive(
    "pytorch/pytorch torch/_torch_docs.py: gate and up interleaved, as gpt-oss stores them",
    "silu_mul_per_token",
    inputs=halves(),
    then=per_token,
)
def interleaved(x):
    return F.silu(x[..., ::2]) * x[..., 1::2]


@positive("pytorch/pytorch torch/_torch_docs.py: silu_ in place", "silu_mul_per_token", inputs=pair(), then=per_token)
def in_place(gate, up):
    return F.silu(gate.clone(), inplace=True).mul_(up)


@positive(
    "alibaba/rtp-llm rtp_llm fused_activation: the sigmoid is rounded before it multiplies the gate",
    "silu_mul_per_token",
    inputs=pair(),
    then=per_token,
)
def sigmoid_rounded(gate, up):
    return gate * torch.sigmoid(gate) * up


@positive(
    "pytorch/pytorch torch/_torch_docs.py: silu as x * sigmoid(x) in float32",
    "silu_mul_per_token",
    inputs=pair(F32),
    then=per_token,
)
def silu_by_sigmoid(gate, up):
    return gate * torch.sigmoid(gate) * up


@positive(f"{VLLM} GeluAndMul.forward_native", "gelu_mul_per_token", inputs=pair(), then=per_token)
@positive(f"{VLLM} GeluAndMul.forward_native", "gelu_mul_per_group_128", inputs=pair(F32), then=per_group_128)
def gelu(gate, up):
    return F.gelu(gate, approximate="none") * up


@positive(
    "sgl-project/sglang python/sglang/srt/layers/activation.py GeluAndMul.forward_native",
    "gelu_tanh_mul_per_group_128",
    inputs=halves(),
    then=per_group_128,
)
@positive(
    f"{TRANSFORMERS}/gemma/modeling_gemma.py GemmaMLP",
    "gelu_tanh_mul_per_token",
    inputs=halves(F16),
    then=per_token,
)
def gelu_tanh(x):
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


@positive(
    f"{TRANSFORMERS}/qwen3_next/modeling_qwen3_next.py Qwen3NextAttention: a sigmoid gates the attention",
    "sigmoid_mul_per_token",
    inputs=pair(),
    then=per_token,
)
def sigmoid_gate(gate, attention):
    return attention * torch.sigmoid(gate)


def _interleaved(x, limit=7.0):
    gate, up = x[..., ::2], x[..., 1::2]
    gate, up = gate.clamp(min=None, max=limit), up.clamp(min=-limit, max=limit)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


@positive(
    f"{TRANSFORMERS}/gpt_oss/modeling_gpt_oss.py GptOssExperts: a clamped SwiGLU of interleaved columns",
    "clamped_swish_mul_per_token",
    inputs=halves(),
    then=per_token,
)
@positive(
    "openai/gpt-oss gpt_oss/torch/model.py swiglu",
    "clamped_swish_mul_per_group_128",
    inputs=halves(F32),
    then=per_group_128,
)
def clamped_swiglu(x):
    return _interleaved(x)


@positive(
    "vllm-project/vllm csrc/quantization/activation_kernels.cu silu_and_mul_quant: static",
    "silu_mul_static",
    inputs=with_scale(halves()),
)
def silu_static(x, scale):
    return static(vllm(x), scale)


@positive(
    "ROCm/aiter aiter/ops/triton fused_silu_mul with x and scale of one value",
    "silu_mul_static",
    inputs=with_scale(pair()),
)
def silu_static_unrounded(gate, up, scale):
    return static(F.silu(gate.float()) * up.float(), scale)
