"""How launches divide rows among programs and warps: a table from measurements on one H200.

What decides is the cell, the row length, and how many rows there are, where that is known when a launch is compiled.
benchmarks/tune.py measures what the numbers follow; on other GPUs they are untested.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton

from fusion_pass.specs import (
    Activation,
    FusedSpec,
    GatedActivation,
    Granularity,
    NoPrologue,
    RMSNorm,
    ScaleLayout,
    Weight,
)

from .cheaper_scales import quantizes_fp4_pairs
from .tiles import TRITON

# Values that a program holds, where 1 x 1024 tiles and one 4096-value row are nearest the floor.
_TILE_VALUES = 1024
_FEW_VALUES = 1 << 20
_MANY_ROWS = 4096
_MOST_ROWS_SHARED = 64
# From Triton 3.7 on, most of a weight that is to be read with its row is read while the row is added up: docs/tuning.md.
_READS_TOGETHER = TRITON < (3, 7)


@dataclass(frozen=True)
class LaunchConfig:
    """How a matrix of rows of N values is divided among programs and warps.

    Attributes:
        rows: rows per tile.
        groups: groups per tile, a power of two.
        lanes: the group length rounded up to a power of two.
        warps: warps per program.
        late_weight: whether a norm's weight is read after the row is summed: fewer registers, a longer wait.
        narrow: whether a norm's values wait for their sum in the 16 bits they were read in: fewer registers, more instructions.
        parts: programs to a row, each of which reads the row and quantizes its part of ``groups``.
    """

    rows: int
    groups: int
    lanes: int
    warps: int
    late_weight: bool = False
    narrow: bool = False
    parts: int = 1


class Amount(enum.Enum):
    """How much there is to do, as far as it is known when a launch is compiled."""

    FEW = "few"  # values that leave processors idle
    UNKNOWN = "unknown"
    MANY = "many"  # rows enough for programs that take several


def configure(spec: FusedSpec, row: int, rows: Any = None, dtype: torch.dtype = torch.bfloat16) -> LaunchConfig:
    """The launch configuration for ``rows`` rows of ``row`` values of ``dtype``; a number not known as one integer is None or symbolic."""
    many = _MANY_ROWS
    if isinstance(spec.prologue, NoPrologue) and spec.layout not in (ScaleLayout.COLUMN, ScaleLayout.TMA):
        # 2048 rows, us: MXFP8 of 4096 8.1 -> 7.9, static of 7168 12.6 -> 12.3, packed of 14336 23.6 -> 23.1; TMA-aligned 12.7 -> 12.9.
        many = _MANY_ROWS // 2
    return _configured(spec, row, _amount(rows, row, many), _parts(spec, row, rows), dtype)


@cache
def _configured(spec: FusedSpec, row: int, amount: Amount, parts: int, dtype: torch.dtype) -> LaunchConfig:
    groups, lanes = _powers_of_two(spec, row)
    pairs = quantizes_fp4_pairs(spec, dtype)
    if not whole_rows(spec):
        return _tiles(spec, row, groups, lanes, amount, pairs)
    if parts > 1:
        return _split(spec, groups, lanes, parts)
    values = groups * lanes
    # Short rows leave lanes idle unless several share a program.
    rows = max(1, 1024 // values)
    if isinstance(spec.prologue, RMSNorm) and not _adds(spec.prologue):
        if pairs and amount is not Amount.FEW:
            return _norms_to_pairs(spec.prologue, row, rows, groups, lanes, amount is Amount.MANY)
        if amount is Amount.MANY:
            return _many_norms(spec, row, rows, groups, lanes, dtype)
    late = _late_by_table(spec, row, values, amount)
    per_thread = 32 if late else _values_per_thread(spec, row, values, amount)
    return LaunchConfig(rows, groups, lanes, _warps(rows * values, per_thread), late_weight=late)


def _powers_of_two(spec: FusedSpec, row: int) -> tuple[int, int]:
    """The groups of a row, and the values of a group, rounded up."""
    group = group_length(spec, row)
    return triton.next_power_of_2(-(-row // group)), triton.next_power_of_2(group)


def _tiles(spec: FusedSpec, row: int, groups: int, lanes: int, amount: Amount, pairs: bool) -> LaunchConfig:
    """Of whole groups, few or all of a row; of several rows where scales of neighbouring rows are neighbours in memory.

    Args:
        pairs: FP4 codes are formed from pairs.
    """
    few, gated = amount is Amount.FEW, isinstance(spec.prologue, GatedActivation)
    values, rows, per_thread = _TILE_VALUES, 1, 8 if few or gated else 16
    if few and gated:
        values, per_thread = _TILE_VALUES // 2, 4
        rows = 2 if spec.layout in (ScaleLayout.COLUMN, ScaleLayout.TMA) and lanes >= 128 else 1
    elif few and _is_static(spec):
        values = 2 * _TILE_VALUES
    elif (large := _large_tile(spec, row, lanes, amount, pairs)) is not None:
        # FP4 of 8192 rows of 7168: 38.2 -> 36.1 us.
        values, per_thread = large, 32 if pairs and row != 4 * _TILE_VALUES else 16
    elif spec.layout is ScaleLayout.PACKED:
        # Four neighbours in a row are one word, and a tile with all of them writes it at once.
        per_thread = 16
    elif spec.layout is not ScaleLayout.ROW and gated:
        rows, per_thread = (2, 16) if amount is Amount.MANY and lanes < 128 else (1, 8)
    elif spec.layout is ScaleLayout.BLOCKED:
        rows, per_thread = 2, 16
    elif spec.layout is not ScaleLayout.ROW:
        values, rows, per_thread = 2 * _TILE_VALUES, 8, 16
    groups = min(max(1, values // (rows * lanes)), groups)
    return LaunchConfig(rows, groups, lanes, _warps(rows * groups * lanes, per_thread))


def _large_tile(spec: FusedSpec, row: int, lanes: int, amount: Amount, pairs: bool) -> int | None:
    """How many values of many rows a program takes, where more than the usual were faster: whole rows, unless they are long."""
    static, gated = _is_static(spec), isinstance(spec.prologue, GatedActivation)
    if amount is not Amount.MANY or (spec.quantizer.group is None and not static):
        return None
    if row <= 2 * _TILE_VALUES and (gated or spec.layout not in (ScaleLayout.ROW, ScaleLayout.PACKED)):
        return None
    if lanes < 128 and spec.layout not in (ScaleLayout.ROW, ScaleLayout.BLOCKED):
        return None
    held = row if spec.quantizer.group is None else row // spec.quantizer.group * lanes
    if not gated:
        # 8192 rows, us: MXFP8 of 4096 26.1 -> 25.4, of 7168 44.9 -> 42.4, TMA-aligned 44.8 -> 44.1, static of 14336 85.5 -> 83.5.
        return _tile_of(held, 8 * _TILE_VALUES, 0.5 if static else 0.7)
    if spec.layout is ScaleLayout.PACKED:
        return None
    if _is_gelu(spec.prologue) and not static and not pairs:
        values = 2 * _TILE_VALUES
        return values if lanes >= 128 and row % values == 0 else None
    # MXFP8 of 16384 rows of 2880 61.2 -> 56.9 us, of 8192 rows of 7168 71.0 -> 69.8, static of 4096 41.0 -> 39.7.
    return _tile_of(held, 4 * _TILE_VALUES, 0.7 if static or lanes < 128 else 0.8)


def _tile_of(held: int, most: int, filled: float) -> int | None:
    """A tile for all lanes that hold a row, or for ``most`` of them, if rows fill such tiles to so large a part."""
    values = min(triton.next_power_of_2(held), most)
    return values if held >= filled * values * -(-held // values) else None


def _is_static(spec: FusedSpec) -> bool:
    """Whether one given scale is that of all values."""
    return spec.quantizer.group is None and not spec.quantizer.needs_amax


def _is_gelu(prologue: Any) -> bool:
    return prologue.activation in (Activation.GELU, Activation.GELU_TANH)


def _many_norms(spec: FusedSpec, row: int, rows: int, groups: int, lanes: int, dtype: torch.dtype) -> LaunchConfig:
    """Of rows that are read but not written, where arithmetic is in the way: few threads to a row, so that many fit."""
    values, in_pairs, to_fp4 = groups * lanes, _multiplies_in_pairs(spec.prologue), spec.quantizer.e2m1 is not None
    rounded_late, short_fp4 = _is_rounded_late(spec.prologue), to_fp4 and lanes < 128
    if values < 8192:
        wasteful, late = row <= values * 3 // 4, values == 4096 and to_fp4 and rounded_late
        # MXFP8 of 8192 rows of 3072 is 22.0 us, narrow 22.7; of 4096 25.7 both, blocked 26.6 and 26.4, Gemma's norm 27.5 and 26.8.
        of_filled = not short_fp4 and (rounded_late or (in_pairs and groups > 1))
        narrow = values == 4096 and (in_pairs and lanes >= 128 if wasteful else of_filled)
        return LaunchConfig(rows, groups, lanes, _warps(rows * values, 64 if wasteful else 32), late, narrow)
    if values == 8192:
        narrow = in_pairs or (rounded_late and not short_fp4)
        if groups > 1 and not _READS_TOGETHER and dtype is torch.bfloat16:
            # MXFP8, 8192 rows, narrow and with a late weight, us: RMSNorm of 5120 35.0, 33.6 (Triton 3.6: 33.2, 33.6), Gemma's norm
            # of 5120 37.1, 34.2 (33.7, 34.8), of 7168 47.4, 45.9 (44.5, 47.9), per group of 8192 55.5, 52.9 (52.2, 53.3).
            narrow = False
        halved = row == values or to_fp4 or (groups == 1 if in_pairs else lanes < 128 and not rounded_late)
        return LaunchConfig(1, groups, lanes, _warps(values, 64 if halved else 128), not narrow, narrow)
    # Values that are as wide after the sum as they would be during it save few registers; newer Tritons make more of them.
    late, narrow = row != values, row == values or not (in_pairs or spec.quantizer.needs_amax)
    if spec.quantizer.needs_amax and (in_pairs or rounded_late):
        # 8192 rows of 14336, us, with a late weight and narrow: per group 89.9, 91.8, per token 86.0, 85.7, blocked MXFP8 92.9, 87.4;
        # products of 32 bits: per group 94.0, 98.1, per token 93.2, 88.1, blocked MXFP8 93.8, 90.0.
        narrow = (in_pairs and row == values) or (not to_fp4 and (groups == 1 or lanes < 128))
        late = not narrow
    elif rounded_late:
        # Static, 16384 rows of 16384: 189.6 -> 187.6 us.
        late, narrow = True, row == values
    return LaunchConfig(1, groups, lanes, _warps(values, 64 if to_fp4 and rounded_late else 128), late, narrow)


def _norms_to_pairs(prologue: RMSNorm, row: int, rows: int, groups: int, lanes: int, many: bool) -> LaunchConfig:
    """As :func:`_many_norms`, for FP4 codes of pairs, of which a thread has 16 neighbours."""
    values, in_pairs = groups * lanes, _multiplies_in_pairs(prologue)
    if values < 4096 or (values == 4096 and not many):
        return LaunchConfig(rows, groups, lanes, _warps(rows * values, 32), narrow=many and in_pairs)
    if values >= 16384:
        # Of 8192 rows of 16384 narrow and late 89.6 -> 86.0 us; where products are of 32 bits, late alone is 91.3, with both 95.0.
        return LaunchConfig(1, groups, lanes, _warps(values, 128), True, in_pairs or row != values)
    per_thread = 128 if many and row < values == 8192 else 64
    return LaunchConfig(1, groups, lanes, _warps(values, per_thread), not in_pairs, many and in_pairs)


def _is_rounded_late(prologue: Any) -> bool:
    """Whether a norm's product with a weight is of 32 bits, and what is quantized was rounded to 16 after it."""
    late = prologue.rounded is not torch.float32 and not _multiplies_in_pairs(prologue)
    return late and prologue.weight is not Weight.NONE


def _multiplies_in_pairs(prologue: Any) -> bool:
    """Whether a norm's product with its weight is of 16 bits, two at a time."""
    in_16_bits = prologue.normalized is prologue.product is not torch.float32
    return in_16_bits and prologue.weight is Weight.PLAIN


def _parts(spec: FusedSpec, row: int, rows: Any) -> int:
    """How many programs share a row: more than one where whole rows leave processors idle, and are long."""
    in_two_launches = spec.quantizer.granularity is Granularity.TENSOR and spec.quantizer.needs_amax
    if not isinstance(rows, int) or rows > _MOST_ROWS_SHARED or not whole_rows(spec) or in_two_launches:
        return 1
    groups, lanes = _powers_of_two(spec, row)
    parts = _parts_by_table(spec.prologue, min(groups * lanes, 16384), rows)
    return parts if spec.quantizer.group is None else min(parts, groups)


def _parts_by_table(prologue: Any, values: int, rows: int) -> int:
    if isinstance(prologue, GatedActivation):
        # All of a row is activated in each of its programs.
        if rows <= 16:
            return {4096: 4, 8192: 8, 16384: 8}.get(values, 1)
        return 4 if values >= 16384 and rows <= 32 else 1
    if rows <= 16:
        return {2048: 2, 4096: 4, 8192: 8 if _adds(prologue) else 4, 16384: 8}.get(values, 1)
    if _adds(prologue):
        return 2 if values >= 8192 and rows <= 32 else 1
    return 2 if values >= (4096 if rows <= 32 else 8192) else 1


def _adds(prologue: Any) -> bool:
    """Whether a residual is added, and another row read."""
    return isinstance(prologue, RMSNorm) and prologue.residual_sum is not None


def _split(spec: FusedSpec, groups: int, lanes: int, parts: int) -> LaunchConfig:
    """Of rows that ``parts`` programs share."""
    values, in_groups = groups * lanes, spec.quantizer.group is not None
    if isinstance(spec.prologue, GatedActivation):
        warps = 16 if values <= 8192 else 32
    else:
        warps = 8 if values // parts > 1024 or _adds(spec.prologue) else 4
        if values >= 16384 and (in_groups or isinstance(spec.prologue, NoPrologue)):
            warps = 16
    # A thread holds no more of a row than its registers do.
    warps = max(warps, _warps(values, 64))
    return LaunchConfig(
        1, groups // parts if in_groups else 1, lanes if in_groups else lanes // parts, warps, parts=parts
    )


def _values_per_thread(spec: FusedSpec, row: int, values: int, amount: Amount) -> int:
    """Of ``values`` lanes that hold a row of ``row``."""
    few, wasteful = amount is Amount.FEW, row <= values * 3 // 4
    if isinstance(spec.prologue, GatedActivation):
        return _gated_values_per_thread(spec.prologue, values, wasteful, amount)
    if few and values <= 8192:
        # Eight warps, unless that leaves a thread less than a vector, or has more share a scale: 32 x 2048 to MXFP8 1.53 -> 1.47 us.
        shares = values == 2048 and spec.quantizer.group is not None and not _adds(spec.prologue)
        return 16 if shares else max(8, values // 256)
    if _adds(spec.prologue):
        return 32 if values < 8192 else 64 if values == 8192 or amount is Amount.UNKNOWN else 128
    return 32 if values < 8192 or (values == 8192 and not wasteful) else 64


def _gated_values_per_thread(prologue: GatedActivation, values: int, wasteful: bool, amount: Amount) -> int:
    if amount is Amount.FEW:
        return 8 if values <= 8192 else 32
    if values == 8192 and amount is Amount.UNKNOWN:
        return 16
    if values == 8192 and _is_gelu(prologue) and not wasteful:
        return 16
    return 16 if values < 8192 else 32 if values == 8192 and not wasteful else 64


def _late_by_table(spec: FusedSpec, row: int, values: int, amount: Amount) -> bool:
    """Whether twice the warps with a weight that is read late were faster: more programs fit a processor."""
    if not isinstance(spec.prologue, RMSNorm) or row != values:
        return False
    if not _adds(spec.prologue):
        # With the weight, newer Tritons than 3.6 need 81 registers instead of 64: half the programs.
        return values == 16384 and spec.quantizer.group is not None
    return values == 8192 and amount is Amount.UNKNOWN and not spec.quantizer.needs_amax


def _amount(rows: Any, row: int, many: int) -> Amount:
    if not isinstance(rows, int):
        return Amount.UNKNOWN
    return Amount.FEW if rows * row <= _FEW_VALUES else Amount.MANY if rows >= many else Amount.UNKNOWN


def _warps(values: int, per_thread: int) -> int:
    return min(max(1, values // (32 * per_thread)), 32)


def whole_rows(spec: FusedSpec) -> bool:
    """Whether a tile must hold whole rows: to add up a row, or to find its amax."""
    return isinstance(spec.prologue, RMSNorm) or spec.quantizer.granularity is Granularity.ROW


def group_length(spec: FusedSpec, row: int) -> int:
    """Values per group of a tile; where a whole tensor shares the scale, of which tiles have one or more, as many as suit a program."""
    if spec.quantizer.group is not None:
        return spec.quantizer.group
    return row if whole_rows(spec) else min(triton.next_power_of_2(row), _TILE_VALUES)
