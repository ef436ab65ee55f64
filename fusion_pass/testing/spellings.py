"""The pieces of random programs: norms, activations and quantizers in the ways they are written, and what stands between.

Each takes a ``spelling`` and ``flags``, numbers that choose among its variants.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from ..e2m1 import MIDPOINTS

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
BLOCK = 32
CODES = (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)


def norm(x: torch.Tensor, weight: torch.Tensor, spelling: int, flags: int) -> torch.Tensor:
    """An RMSNorm of x (..., N) with weight (N,)."""
    h = x.float()
    squares = h.pow(2) if flags & 1 else h * h
    mean = squares.mean(-1, keepdim=True) if flags & 2 else squares.sum(-1, keepdim=True) / h.shape[-1]
    variance = mean + (1e-6, 1e-5, 0.0, 1e-12)[flags >> 2 & 3]
    inverse = variance.rsqrt() if spelling % 4 else 1.0 / variance.sqrt()
    h = h / variance.sqrt() if spelling % 4 == 3 else h * inverse
    if spelling % 5 == 0:
        return weight * h.to(x.dtype)
    if spelling % 5 == 1:
        # Every other one adds in the weight's dtype.
        return (h * (1.0 + (weight if spelling // 5 % 2 else weight.float()))).to(x.dtype)
    if spelling % 5 == 2:
        return h.to(x.dtype)
    if spelling % 5 == 3:
        return h * weight.float()
    return (weight.float() * h).to(x.dtype)


def activation(gate: torch.Tensor, up: torch.Tensor, spelling: int) -> torch.Tensor:
    """A gated activation of two tensors of one shape."""
    variants: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: F.silu(gate) * up,
        lambda: up.float() * F.silu(gate.float()),
        lambda: (gate.float() * torch.sigmoid(gate.float()) * up.float()).to(gate.dtype),
        lambda: up * torch.sigmoid(gate),
        lambda: F.relu(gate) * up,
        lambda: F.silu(gate),
        lambda: F.silu(gate.float()).to(gate.dtype) * up,
    )
    return variants[spelling % len(variants)]()


def scale_of(grouped: torch.Tensor, bound: float, spelling: int, flags: int) -> torch.Tensor:
    """The dequantization scale of groups (..., G, K)."""
    amax = grouped.abs().amax(-1, keepdim=True) if flags & 1 else grouped.abs().max(-1, keepdim=True).values
    if spelling % 7 == 6:
        return 1.0 / (bound / amax.float().clamp(min=1e-12))  # type: ignore[no-any-return]
    amax = amax if spelling % 7 == 5 else amax.float().clamp(min=1e-10)
    scale = amax / bound if flags & 2 else amax * (1.0 / bound)
    if spelling % 7 == 1:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    if spelling % 7 == 2:
        scale = scale.clamp(min=1e-4)
    if spelling % 7 == 3:
        scale = torch.where(scale < 1e-3, 1.0, scale)
    if spelling % 7 == 4:
        scale = scale.clamp(max=0.05)
    return scale


def quantize(x: torch.Tensor, spelling: int, flags: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes as x, and scales (..., G), or (..., G, M) for transposed ones; groups are rows where no group divides them."""
    code = CODES[spelling % 4]
    bound = 127.0 if code is torch.int8 else torch.finfo(code).max
    row = x.shape[-1]
    group = (row, 128, 64, 32)[flags % 4]
    group = row if row % group else group
    grouped = x.unflatten(-1, (-1, group))  # type: ignore[no-untyped-call]
    scale = scale_of(grouped, bound, spelling, flags).float()
    grouped = grouped.float()
    quotient = grouped * scale.reciprocal() if flags & 4 else grouped / scale
    if code is torch.int8:
        quotient = quotient.round()
    codes = quotient.clamp(-bound, bound).to(code).flatten(-2)
    if spelling % 7 == 1 and flags & 4:
        scale = torch.log2(scale).add(127).clamp(0, 254).to(torch.uint8)
    scale = scale.squeeze(-1)
    transposed = flags & 8 and scale.dim() > 1
    return codes, scale.transpose(-1, -2).contiguous() if transposed else scale


def in_blocks(x: torch.Tensor, spelling: int) -> tuple[torch.Tensor, torch.Tensor]:
    """MXFP8 codes as x (M, N), or MXFP4 codes (M, N / 2), and E8M0 scales (M, N / 32); 32 divides N."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))  # type: ignore[no-untyped-call]
    # The exponent of the codes' largest power of two: 2 for E2M1, 8 for e4m3fn.
    largest = (8, 8, 2, 2)[spelling % 4]
    # Without the sign bit: a CPU's amax gives NaN either sign, by the strides of what it reads.
    exponent = blocks.abs().amax(-1, keepdim=True).view(torch.int32) >> 23 & 0xFF
    biased = (exponent - largest).clamp(min=1)
    scale = (biased << 23).view(F32)
    values = (blocks / scale if spelling % 3 else blocks * scale.reciprocal()).flatten(-2)
    codes = values.clamp(-448.0, 448.0).to(CODES[0]) if largest == 8 else packed(e2m1(values, spelling))
    return codes, biased.to(torch.uint8).squeeze(-1)


def e2m1(values: torch.Tensor, spelling: int) -> torch.Tensor:
    """E2M1 codes in bytes, by counting the midpoints below a value or by searching them."""
    if spelling % 8 < 4:
        magnitude = sum((values.abs() >= midpoint).to(torch.uint8) for midpoint in MIDPOINTS)
    else:
        magnitude = torch.bucketize(values.abs(), torch.tensor(MIDPOINTS, device=values.device)).to(torch.uint8)
    return magnitude | ((values < 0).to(torch.uint8) << 3)


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Two codes a byte, the first in the low bits."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def dequantized(x: torch.Tensor, spelling: int, flags: int) -> torch.Tensor:
    """x through a quantizer and back: what the next layer reads, so that sites stand one behind the other."""
    codes, scale = quantize(x, spelling, flags & 7)
    if scale.dtype is torch.uint8:
        scale = torch.exp2(scale.float() - 127)
    grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))  # type: ignore[no-untyped-call]
    return (grouped * scale.unsqueeze(-1)).flatten(-2).to(x.dtype)  # type: ignore[no-any-return]


def broken(x: torch.Tensor, spelling: int, other: torch.Tensor) -> torch.Tensor:
    """What stands between a producer and a quantizer and must not be skipped."""
    variants: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: x * 0.5,
        lambda: F.relu(x),
        lambda: x + 1,
        lambda: x.flip(-1),
        lambda: torch.where(other > 0, x, torch.zeros_like(x)),
        lambda: x.to(F16).to(x.dtype),
        lambda: x.clamp(-3, 3),
        lambda: -x,
        lambda: x.abs(),
        lambda: x - x.mean(-1, keepdim=True),
        lambda: x.to(BF16).to(x.dtype),
        lambda: x * x,
    )
    return variants[spelling % len(variants)]()


def cast(x: torch.Tensor, spelling: int) -> torch.Tensor:
    """x in another dtype, from which it does not come back."""
    return x.to((BF16, F16, F32)[spelling % 3])


def changed(x: torch.Tensor, spelling: int, other: torch.Tensor) -> None:
    """Change x in place: whole, in part, or through a view."""
    variants: tuple[Callable[[], object], ...] = (
        lambda: x.add_(1),
        lambda: x.neg_(),
        lambda: x[..., : x.shape[-1] // 4].fill_(2),
        lambda: x.copy_(other),
        lambda: x.view(-1)[:1].mul_(2),
        lambda: x.transpose(0, -1).neg_(),
        lambda: x[:1].copy_(other[:1]),
        lambda: F.relu(x, inplace=True),
    )
    variants[spelling % len(variants)]()


def viewed(x: torch.Tensor, spelling: int) -> torch.Tensor:
    """x presented otherwise, copied or not; for some spellings in another shape."""
    row = x.shape[-1]
    half = row // 2 if row % 2 == 0 else row
    variants: tuple[Callable[[], torch.Tensor], ...] = (
        lambda: x.reshape(-1, row).view(x.shape),
        lambda: x.transpose(0, -2).contiguous() if x.dim() > 2 else x.contiguous(),
        lambda: x.transpose(0, -2).transpose(0, -2) if x.dim() > 2 else x,
        lambda: x.clone(),
        lambda: x.unsqueeze(0).squeeze(0),
        lambda: x.unflatten(-1, (-1, half)).flatten(-2),  # type: ignore[no-untyped-call]
        lambda: x.reshape(-1, row),
        lambda: x[:1],
        lambda: x.unflatten(-1, (-1, half)),  # type: ignore[no-untyped-call]
        lambda: torch.cat([x, x]),
        lambda: x.expand(2, *x.shape),
        lambda: x.transpose(0, -2) if x.dim() > 2 else x,
        lambda: x[..., :half],
    )
    return variants[spelling % len(variants)]()
