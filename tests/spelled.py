"""Plain PyTorch code as models write it, which the pass must recognise and the kernels must reproduce."""

import torch
import torch.nn.functional as F  # noqa: N812

E4M3 = torch.float8_e4m3fn


def rms_norm(x, weight, eps=1e-6):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def per_token(x, dtype=E4M3, floor=1e-10):
    bound = torch.finfo(dtype).max
    scale = x.abs().amax(-1, keepdim=True).float()
    scale = (scale if floor is None else scale.clamp(min=floor)) / bound
    return (x.float() / scale).clamp(-bound, bound).to(dtype), scale


def per_group(x, group=128, dtype=E4M3, floor=1e-10):
    bound = torch.finfo(dtype).max
    grouped = x.reshape(*x.shape[:-1], -1, group).float()
    scale = grouped.abs().amax(-1, keepdim=True)
    scale = (scale if floor is None else scale.clamp(min=floor)) / bound
    codes = (grouped / scale).clamp(-bound, bound).to(dtype)
    return codes.reshape(x.shape), scale.squeeze(-1)


def column(codes, scale):
    return codes, scale.transpose(-1, -2).contiguous()


def silu_mul(gate, up):
    return F.silu(gate) * up


def exact_rows(*shape, device, dtype=torch.bfloat16):
    """Small integers: their sum of squares is exact in float32, whatever the order of summation."""
    return torch.randint(-15, 16, shape, device=device).to(dtype)
