"""The sites that are timed: eager code as models write it, and the bytes each must at least move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

E4M3 = torch.float8_e4m3fn


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def per_token(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-10) / 448.0
    return (x.float() / scale).clamp(-448, 448).to(E4M3), scale


def per_group(x: torch.Tensor, group: int = 128) -> tuple[torch.Tensor, torch.Tensor]:
    grouped = x.unflatten(-1, (-1, group)).float()
    scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (grouped / scale).clamp(-448, 448).to(E4M3).flatten(-2), scale.squeeze(-1)


def column(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return codes, scale.transpose(-1, -2).contiguous()


@dataclass(frozen=True)
class Case:
    """One site.

    Attributes:
        run: the eager code, of x (M, N), other (M, N) or x (M, 2N), and weight (N,).
        wide: x has rows of 2N values.
        residual: other is read, and the sum returned.
    """

    name: str
    run: Callable[..., Any]
    wide: bool = False
    residual: bool = False

    def inputs(self, rows: int, row: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
        x = torch.randn(rows, row * 2 if self.wide else row, device=device).to(dtype)
        other = torch.randn(rows, row, device=device).to(dtype) if self.residual else x
        return x, other, torch.randn(row, device=device).to(dtype)

    def bytes(self, rows: int, row: int, itemsize: int) -> int:
        """Every input read once, every output written once; the scales are left out."""
        reads = 2 if self.wide or self.residual else 1
        writes = 1 if self.residual else 0
        return rows * row * ((reads + writes) * itemsize + 1)


def _add_norm(quantize: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
    def run(x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor) -> Any:
        total = x + other
        return (*quantize(rms_norm(total, weight)), total)

    return run


def _silu_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


CASES = [
    Case("rms -> token", lambda x, o, w: per_token(rms_norm(x, w))),
    Case("add+rms -> token", _add_norm(per_token), residual=True),
    Case("rms -> group", lambda x, o, w: per_group(rms_norm(x, w))),
    Case("add+rms -> group, column", _add_norm(lambda y: column(*per_group(y))), residual=True),
    Case("silu*mul -> token", lambda x, o, w: per_token(_silu_mul(x)), wide=True),
    Case("silu*mul -> group", lambda x, o, w: per_group(_silu_mul(x)), wide=True),
    Case("silu*mul -> group, column", lambda x, o, w: column(*per_group(_silu_mul(x))), wide=True),
    Case("token", lambda x, o, w: per_token(x)),
    Case("group, column", lambda x, o, w: column(*per_group(x))),
]
