"""A few quantizers that the other files put behind norms and activations."""

import torch

E4M3 = torch.float8_e4m3fn


def per_token(x):
    scale = x.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-10) / 448.0
    return (x.float() / scale).clamp(-448.0, 448.0).to(E4M3), scale


def per_group_128(x):
    grouped = x.reshape(*x.shape[:-1], x.shape[-1] // 128, 128)
    scale = grouped.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-10) / 448.0
    codes = (grouped.float() / scale).clamp(-448.0, 448.0).to(E4M3)
    return codes.reshape(x.shape), scale.squeeze(-1)


def per_group_64(x):
    grouped = x.reshape(*x.shape[:-1], x.shape[-1] // 64, 64).float()
    scale = grouped.abs().amax(dim=-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (grouped / scale).clamp(-448.0, 448.0).to(E4M3).reshape(x.shape), scale.squeeze(-1)


def per_group_32(x):
    grouped = x.float().unflatten(-1, (-1, 32))
    scales = grouped.abs().amax(-1).clamp(1e-4) / 448.0
    return (grouped / scales.unsqueeze(-1)).clamp(-448.0, 448.0).to(E4M3).flatten(-2), scales


def vllm_per_token(x):
    greatest, _ = x.abs().max(dim=-1)
    scale = (greatest.unsqueeze(-1).to(torch.float32) / 448.0).clamp(min=1.0 / (448.0 * 512.0))
    return (x.to(torch.float32) * scale.to(torch.float32).reciprocal()).clamp(-448.0, 448.0).to(E4M3), scale


def int8_per_token(x):
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127.0
    return torch.round(x.float() / scale).clamp(-127, 127).to(torch.int8), scale


def ue8m0_per_group_128(x):
    grouped = x.reshape(*x.shape[:-1], -1, 128)
    scale = grouped.abs().amax(-1, keepdim=True).float().clamp(min=1e-10) / 448.0
    scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return (grouped.float() / scale).clamp(-448.0, 448.0).to(E4M3).reshape(x.shape), scale.squeeze(-1)


def static(x, scale):
    return (x.to(torch.float32) * scale.reciprocal()).clamp(-448.0, 448.0).to(E4M3)
