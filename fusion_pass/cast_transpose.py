"""Quantize a matrix and its transpose in one read: what both products of a linear layer's backward pass need.

``rowwise`` is the quantization of x (M, N) in blocks along N; ``columnwise`` that of its transpose (N, M) in blocks along M.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .addresses import ceil_to
from .dense import empty
from .inductor import known
from .layouts import BLOCKED_PADDING, MX_SHUFFLED_PADDING
from .specs import CAST_DTYPES, FusedSpec, NoPrologue, Quantizer, SpecError, decode


class BlockScales(enum.Enum):
    """Where the scale of row r, block c lies, of (R, C) scales.

    LINEAR: (R, C) contiguous. PADDED: (ceil256(R), ceil8(C)) contiguous, zero beyond the scales. SHUFFLED: that shape in
    the order of :func:`fusion_pass.layouts.pack_mx_shuffled`, 127 beyond the scales, where E8M0 is 1. BLOCKED: as
    :func:`fusion_pass.layouts.pack_blocked`, zero beyond the scales.
    """

    LINEAR = "linear"
    PADDED = "padded"
    SHUFFLED = "shuffled"
    BLOCKED = "blocked"

    def allocated(self, rows: Any, blocks: Any) -> tuple[Any, ...]:
        """The shape in which (rows, blocks) scales are stored."""
        if self is BlockScales.LINEAR:
            return rows, blocks
        if self is BlockScales.BLOCKED:
            return ceil_to(rows, 128), ceil_to(blocks, 4)
        return ceil_to(rows, 256), ceil_to(blocks, 8)

    @property
    def padding(self) -> int:
        return {BlockScales.SHUFFLED: MX_SHUFFLED_PADDING, BlockScales.BLOCKED: BLOCKED_PADDING}.get(self, 0)


@dataclass(frozen=True)
class Placement:
    """Where one direction's results lie.

    Attributes:
        scales: the layout of the scales.
        shuffled: whether the bytes of the data are in the order of :func:`fusion_pass.layouts.pack_mfma_shuffled`.
    """

    scales: BlockScales = BlockScales.LINEAR
    shuffled: bool = False

    def encode(self) -> str:
        return f"{self.scales.value} {'shuffled' if self.shuffled else 'linear'}"

    @classmethod
    def decode(cls, text: str) -> Placement:
        scales, data = text.split()
        return cls(BlockScales(scales), data == "shuffled")


LINEAR = Placement()


@dataclass(frozen=True)
class CastTransposeSpec:
    """A quantizer of blocks, and where the results of each direction lie; None for a direction that is not wanted."""

    quantizer: Quantizer
    rowwise: Placement | None = LINEAR
    columnwise: Placement | None = LINEAR

    def __post_init__(self) -> None:
        quantizer = self.quantizer
        group = quantizer.group
        if group is None or group & (group - 1) or not 16 <= group <= 128:
            raise SpecError(f"group of quantizer is {group}; allowed: 16, 32, 64 or 128 values per scale")
        if quantizer.needs_given or quantizer.scale is None:
            raise SpecError("quantizer is calibrated or returns no scale; allowed: one that returns its block scales")
        if self.rowwise is None and self.columnwise is None:
            raise SpecError("rowwise and columnwise are None; allowed: at least one placement")
        for name, placement in self.placements():
            if placement.scales is not BlockScales.LINEAR and quantizer.scale_dtype is torch.float32:
                raise SpecError(f"scales of {name} are {placement.scales.value}; allowed: linear for float32 scales")

    def placements(self) -> list[tuple[str, Placement]]:
        """The wanted directions by name."""
        both = (("rowwise", self.rowwise), ("columnwise", self.columnwise))
        return [(name, placement) for name, placement in both if placement is not None]

    def arguments(self) -> tuple[str, str | None, str | None]:
        """The spec as the arguments of the op ``fusion_pass::cast_transpose``."""
        row, column = (None if p is None else p.encode() for p in (self.rowwise, self.columnwise))
        return FusedSpec(NoPrologue(), self.quantizer).encode(), row, column

    @classmethod
    def of_arguments(cls, quantizer: str, rowwise: str | None, columnwise: str | None) -> CastTransposeSpec:
        row, column = (None if text is None else Placement.decode(text) for text in (rowwise, columnwise))
        return cls(decode(quantizer).quantizer, row, column)

    def check(self, x: torch.Tensor) -> None:
        """Raise ValueError, naming what is wrong, unless x can be quantized in the wanted directions."""
        group = self.quantizer.group
        assert group is not None
        if x.dim() < 2:
            raise ValueError(f"x has shape {tuple(x.shape)}; allowed: (..., N) of two dimensions or more")
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"x is {x.dtype}; allowed: float32, bfloat16, float16")
        rows, row = _rows(x), x.shape[-1]
        for name, count in (("N", row), ("M", rows)):
            # Of a number that is data, nothing but a view that the graph had can say so.
            if known(count % group != 0):
                raise ValueError(
                    f"{name}, of x with shape {tuple(x.shape)}, is {count}; allowed: a multiple of {group}"
                )
        for (name, placement), (count, length) in zip(self.placements(), self.sizes(x), strict=True):
            width = length // self.quantizer.codes_per_byte
            if placement.shuffled and (count % 16 or width % 32):
                raise ValueError(
                    f"{name} data are ({count}, {width}) bytes; allowed to be shuffled: multiples of 16 and of 32"
                )

    def sizes(self, x: torch.Tensor) -> list[tuple[int, int]]:
        """(rows, row length) of each wanted direction."""
        rows, row = _rows(x), x.shape[-1]
        return [(rows, row) if name == "rowwise" else (row, rows) for name, _ in self.placements()]

    def allocate(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Data and scales of each wanted direction, scales with their padding."""
        quantizer, results = self.quantizer, []
        assert quantizer.group is not None
        for (_, placement), (rows, row) in zip(self.placements(), self.sizes(x), strict=True):
            width = row // quantizer.codes_per_byte
            shape = placement.scales.allocated(rows, row // quantizer.group)
            results.append(empty((rows, width), quantizer.stored, x.device))
            if placement.scales is BlockScales.LINEAR:
                results.append(empty(shape, quantizer.scale_dtype, x.device))
            else:
                padded = torch.full(shape, placement.scales.padding, dtype=torch.uint8, device=x.device)
                results.append(padded.view(quantizer.scale_dtype))
        return results


class CastTransposed(NamedTuple):
    """Data and scales of both directions; None for a direction that was not wanted."""

    rowwise: torch.Tensor | None
    rowwise_scale: torch.Tensor | None
    columnwise: torch.Tensor | None
    columnwise_scale: torch.Tensor | None


def _rows(x: torch.Tensor) -> int:
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


def supports(quantizer: Quantizer) -> bool:
    """Whether a cast-transpose can have this quantizer."""
    try:
        CastTransposeSpec(quantizer)
    except SpecError:
        return False
    return quantizer.code in (*CAST_DTYPES, torch.float4_e2m1fn_x2)
