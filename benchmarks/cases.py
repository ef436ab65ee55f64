"""The sites that are timed: eager code as models write it, and the bytes each must at least move.

Every prologue meets every quantizer, but those of a matrix and its transpose, which read the matrix as it lies in memory;
the names of both make up the site's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812

E4M3 = torch.float8_e4m3fn
_CALIBRATED = 0.0625


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def gemma_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight.float())).to(x.dtype)


def silu_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def gelu_mul(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def per_token(x: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-10) / 448.0
    return (x.float() / scale).clamp(-448, 448).to(E4M3), scale


def int8_per_token(x: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127.0
    return torch.round(x.float() / scale).clamp(-127, 127).to(torch.int8), scale


def calibrated(x: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor]:
    return ((x.float() * given.reciprocal()).clamp(-448, 448).to(E4M3),)


def per_group(x: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    grouped = x.unflatten(-1, (-1, 128)).float()
    scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (grouped / scale).clamp(-448, 448).to(E4M3).flatten(-2), scale.squeeze(-1)


def per_group_column(x: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = per_group(x, given)
    return codes, scale.transpose(-1, -2).contiguous()


def per_group_tma(x: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scale = per_group(x, given)
    return codes, F.pad(scale, (0, 0, 0, -scale.shape[0] % 4)).t().contiguous().t()[: scale.shape[0]]


def per_group_packed(x: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As DeepGEMM's tests pack power-of-two scales: four exponents to a word, words by columns."""
    grouped = x.float().unflatten(-1, (-1, 128))
    scale = torch.exp2(torch.ceil(torch.log2(grouped.abs().amax(-1).clamp(1e-4) / 448.0)))
    codes = (grouped * (1.0 / scale.unsqueeze(2))).to(E4M3).flatten(-2)
    rows, groups = scale.shape
    exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
    words = F.pad(exponents, (0, -groups % 4, 0, -rows % 4)).view(torch.int32)
    return codes, words.t().contiguous().t()[:rows]


def mx_scaled(x: torch.Tensor, largest: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of 32 values scaled to codes that reach ``largest``, and their E8M0 bytes by the RCEIL rule, as in torchao."""
    grouped = x.unflatten(-1, (-1, 32)).float()
    scale = grouped.abs().amax(-1, keepdim=True) / largest
    finite = (torch.clamp(torch.ceil(torch.log2(scale)), -127, 127) + 127).to(torch.uint8)
    exponent = torch.where(scale.isnan(), 255, torch.where(scale.isinf(), 254, finite))
    multiplier = torch.where(exponent == 0, 1.0, torch.exp2(127 - exponent.to(torch.float32)))
    multiplier = torch.where(exponent == 255, scale, torch.where(exponent == 254, 2.0**-127, multiplier))
    return torch.clamp(grouped * multiplier, min=-largest, max=largest).flatten(-2), exponent.squeeze(-1)


def mxfp8(x: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scaled, exponent = mx_scaled(x, 448.0)
    return scaled.to(E4M3), exponent


def mxfp4(x: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """E2M1 codes, ties to even, two to a byte, the first in its low bits, as torchao packs them."""
    scaled, exponent = mx_scaled(x, 6.0)
    magnitude = scaled.abs()
    bits = magnitude.view(torch.int32)
    # Half of the last place that stays, less one, and the last bit that stays: a carry rounds halves to even.
    normal = bits - 0x3F000000 + 0x1FFFFF + (bits >> 22 & 1) >> 22
    # The float 2^22 counts in halves, which addition rounds to.
    subnormal = (magnitude + 2.0**22).view(torch.int32) - 0x4A800000
    sign = scaled.view(torch.int32) >> 28 & 8
    codes = (torch.where(magnitude < 1, subnormal, normal) | sign).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, exponent


def mxfp8_blocked(x: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes, exponent = mxfp8(x, given)
    rows, groups = exponent.shape
    padded = F.pad(exponent, (0, -groups % 4, 0, -rows % 128))
    tiles = padded.view(padded.shape[0] // 128, 128, padded.shape[1] // 4, 4).permute(0, 2, 1, 3)
    return codes, tiles.reshape(-1, 4, 32, 4).transpose(1, 2).reshape(-1, 32, 16).flatten()


def mxfp8_both(x: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What both products of a linear layer's backward pass need: x and its transpose, in blocks along the rows of each."""
    return (*mxfp8(x, given), *mxfp8(x.t().contiguous(), given))


def mxfp4_both(x: torch.Tensor, given: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (*mxfp4(x, given), *mxfp4(x.t().contiguous(), given))


@dataclass(frozen=True)
class Prologue:
    """What is computed before the quantizer.

    Attributes:
        run: the eager code, of x (M, N), or (M, 2N) if wide, and weight (N,).
        wide: x has rows of 2N values.
        residual: another (M, N) is added before, and the sum returned.
    """

    name: str
    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    wide: bool = False
    residual: bool = False


@dataclass(frozen=True)
class Quantization:
    """How values become codes, and where the scales go.

    Attributes:
        run: the eager code, of the values (M, N) and a calibrated scale (1,).
        group: values per scale, or None for a scale per row.
        scale_bytes: bytes per scale; 0 if no scale is returned.
        code: the dtype of the codes.
        per_code: values per element of that dtype.
        both: the transpose of the values is quantized as well.
    """

    name: str
    run: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]]
    group: int | None = None
    scale_bytes: int = 4
    code: torch.dtype = E4M3
    per_code: int = 1
    both: bool = False

    @property
    def directions(self) -> int:
        return 2 if self.both else 1


PROLOGUES = (
    Prologue("none", lambda x, weight: x),
    Prologue("rms", rms_norm),
    Prologue("add+rms", rms_norm, residual=True),
    Prologue("gemma", gemma_norm),
    Prologue("silu*mul", lambda x, weight: silu_mul(x), wide=True),
    Prologue("gelu*mul", lambda x, weight: gelu_mul(x), wide=True),
)
QUANTIZATIONS = (
    Quantization("token", per_token),
    Quantization("group", per_group, 128),
    Quantization("group-column", per_group_column, 128),
    Quantization("group-tma", per_group_tma, 128),
    Quantization("group-packed", per_group_packed, 128, 1),
    Quantization("static", calibrated, scale_bytes=0),
    Quantization("int8", int8_per_token, code=torch.int8),
    Quantization("mxfp8", mxfp8, 32, 1),
    Quantization("mxfp8-blocked", mxfp8_blocked, 32, 1),
    Quantization("mxfp4", mxfp4, 32, 1, torch.uint8, per_code=2),
    Quantization("mxfp8-both", mxfp8_both, 32, 1, both=True),
    Quantization("mxfp4-both", mxfp4_both, 32, 1, torch.uint8, per_code=2, both=True),
)


@dataclass(frozen=True)
class Case:
    """One site: eager code of x, other (the residual, else x again), weight and the calibrated scale."""

    prologue: Prologue
    quantization: Quantization

    @property
    def name(self) -> str:
        return f"{self.prologue.name} -> {self.quantization.name}"

    @property
    def run(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        """The codes, the scales if they are returned, both of the transpose too if ``both``, and the sum of a residual."""
        prologue, quantize = self.prologue.run, self.quantization.run
        if self.prologue.residual:

            def site(
                x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, given: torch.Tensor
            ) -> tuple[torch.Tensor, ...]:
                total = x + other
                return (*quantize(prologue(total, weight), given), total)
        else:

            def site(
                x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, given: torch.Tensor
            ) -> tuple[torch.Tensor, ...]:
                return quantize(prologue(x, weight), given)

        return site

    def takes(self, rows: int, row: int) -> bool:
        """Whether rows of ``row`` values divide into groups, and columns of ``rows`` values if they are quantized."""
        group = self.quantization.group or 1
        return row % group == 0 and (rows % group == 0 or not self.quantization.both)

    def inputs(self, rows: int, row: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, ...]:
        x = torch.randn(rows, row * 2 if self.prologue.wide else row, device=device).to(dtype)
        other = torch.randn(rows, row, device=device).to(dtype) if self.prologue.residual else x
        return x, other, torch.randn(row, device=device).to(dtype), torch.tensor([_CALIBRATED], device=device)

    def scales(self, rows: int, row: int) -> int:
        """How many scales are returned for each direction, padding left out."""
        quantization = self.quantization
        return rows * (row // (quantization.group or row)) if quantization.scale_bytes else 0

    def bytes(self, rows: int, row: int, itemsize: int) -> int:
        """Every input read once, every output written once; a norm's weight, which stays in the cache, is left out."""
        quantization = self.quantization
        reads = 2 if self.prologue.wide or self.prologue.residual else 1
        writes = 1 if self.prologue.residual else 0
        codes = rows * row // quantization.per_code * quantization.code.itemsize
        scales = self.scales(rows, row) * quantization.scale_bytes
        return rows * row * (reads + writes) * itemsize + quantization.directions * (codes + scales)


CASES = tuple(
    Case(prologue, quantization)
    for prologue in PROLOGUES
    for quantization in QUANTIZATIONS
    if prologue.name == "none" or not quantization.both
)


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
