"""Tiny random-weight configurations of the architectures that transformers ships."""

import transformers

_TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}

# Model class -> what its configuration needs beside the common sizes.
ARCHITECTURES = {
    "Llama": {},
    "Mistral": {"head_dim": 32},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
    "Qwen3Moe": {"head_dim": 32, **_EXPERTS},
    "Gemma": {"head_dim": 32},
    "Gemma2": {"head_dim": 32},
    "Gemma3Text": {"head_dim": 32},
    "Glm4": {"head_dim": 32},
    "Glm4Moe": {
        "head_dim": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "Phi3": {},
    "DeepseekV3": {
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 32,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
    },
    "Olmo2": {},
    "GptOss": {"head_dim": 32, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Granite": {},
    "SmolLM3": {},
    "Cohere": {},
    "Starcoder2": {},
}


def build(name, **sizes):
    """A bf16 model of the architecture, in eval mode, without gradients; ``sizes`` override the common ones."""
    config = getattr(transformers, f"{name}Config")(**{**_TINY, **ARCHITECTURES[name], **sizes})
    config._attn_implementation = "eager" if name in ("Gemma2", "GptOss") else "sdpa"
    model = getattr(transformers, f"{name}Model")(config)
    return model.bfloat16().eval().requires_grad_(False)
