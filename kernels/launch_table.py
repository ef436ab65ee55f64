"""How launches divide rows among programs and warps: a table from measurements on one H200.

What decides is the cell, the row length, and how many rows there are, where that is known when a launch is compiled.
benchmarks/tune.py measures what the numbers follow; on other GPUs they are untested.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeGuard

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

# Values that a program holds, where 1 x 1024 tiles and one 4096-value row are nearest the floor.
_TILE_VALUES = 1024
_FEW_VALUES = 1 << 20
_MANY_ROWS = 4096
_FEW_ROWS = 128
_MOST_ROWS_SHARED = 64


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
        first_weight: whether a norm's weight is read before the row; where neither this nor ``late_weight`` is, assemblers may read
            most of it while the row is added up.
        inline_mean: whether a norm's mean takes no call: fewer instructions and registers, so that more programs fit, which is
            slower where memory is busy already.
        own_scales: whether threads that hold a group store its scale: no exchange between warps, but smaller stores, and more of them.
    """

    rows: int
    groups: int
    lanes: int
    warps: int
    late_weight: bool = False
    narrow: bool = False
    parts: int = 1
    first_weight: bool = False
    inline_mean: bool = False
    own_scales: bool = False


class Amount(enum.Enum):
    """How much there is to do, as far as it is known when a launch is compiled."""

    FEW = "few"  # values that leave processors idle, or whole rows that each have one
    UNKNOWN = "unknown"  # or between few and many
    MANY = "many"  # rows enough for programs that take several


def configure(spec: FusedSpec, row: int, rows: Any = None, dtype: torch.dtype = torch.bfloat16) -> LaunchConfig:
    """The launch configuration for ``rows`` rows of ``row`` values of ``dtype``; a number not known as one integer is None or symbolic."""
    return _configured(spec, row, _amount(spec, row, rows), _parts(spec, row, rows), dtype)


@cache
def _configured(spec: FusedSpec, row: int, amount: Amount, parts: int, dtype: torch.dtype) -> LaunchConfig:
    config = _by_amount(spec, row, amount, parts, dtype)
    return replace(config, own_scales=config.own_scales or _stores_own_scales(spec, row, config, amount))


def _by_amount(spec: FusedSpec, row: int, amount: Amount, parts: int, dtype: torch.dtype) -> LaunchConfig:
    """How programs and warps divide rows; of many norms to FP4, for which it was measured with the rest, also who stores scales."""
    groups, lanes = _powers_of_two(row, group_length(spec, row))
    pairs = quantizes_fp4_pairs(spec, dtype)
    if not whole_rows(spec):
        return _tiles(spec, row, groups, lanes, amount, pairs)
    in_pairs = pairs and parts == 1 and amount is not Amount.FEW
    if in_pairs and _is_norm_of_one(spec.prologue):
        if amount is Amount.UNKNOWN and (4096 <= groups * lanes <= 8192 or row == 16384):
            return _some_norms(spec, row, groups, lanes)
        return _norms_to_pairs(spec.prologue, row, groups, lanes, amount is Amount.MANY)
    config = _of_whole_rows(spec, row, groups, lanes, amount) if parts == 1 else _split(spec, groups, lanes, parts)
    # FP4 codes are bound by instructions.
    return replace(config, inline_mean=True) if spec.quantizer.e2m1 is not None else config


def _stores_own_scales(spec: FusedSpec, row: int, config: LaunchConfig, amount: Amount) -> bool:
    """Whether warps would wait for an exchange of scales."""
    if spec.quantizer.group is None:
        return False
    to_fp4 = spec.quantizer.e2m1 is not None
    if amount is Amount.FEW and isinstance(spec.prologue, RMSNorm):
        # us: RMSNorm column-major of 128 x 5120 3.33 -> 3.10, MXFP8 of 1 x 8192 1.55 -> 1.50, but packed of 8 x 7168 1.67 -> 1.72, MXFP4 of
        # 32 x 16384 2.78 -> 2.98.
        return spec.layout is not ScaleLayout.PACKED and not (to_fp4 and config.groups >= 256)
    if isinstance(spec.prologue, GatedActivation) and amount is not Amount.FEW and config.lanes < 128:
        # us: MXFP4 of 2048 x 2880 9.45 -> 8.42, MXFP8 of 8192 x 2880 32.3 -> 30.5; of 7168 64.5 and 65.2. Triton 3.9: MXFP4 of 8192 x 14336
        # 146 -> 134.
        wasteful = _is_wasteful(row, triton.next_power_of_2(row))
        return wasteful or (to_fp4 and amount is Amount.MANY)
    return amount is Amount.FEW and spec.layout in (ScaleLayout.COLUMN, ScaleLayout.TMA)


def _of_whole_rows(spec: FusedSpec, row: int, groups: int, lanes: int, amount: Amount) -> LaunchConfig:
    """Of a row by each program, or of several that are short."""
    values, rows = groups * lanes, _rows_to_a_program(groups * lanes)
    if _is_norm_of_one(spec.prologue):
        if amount is Amount.MANY:
            return _many_norms(spec, row, rows, groups, lanes)
        if amount is Amount.UNKNOWN and 4096 <= values <= 16384 and _rounds_product(spec):
            return _some_norms(spec, row, groups, lanes)
    late = _late_by_table(spec, row, values, amount)
    per_thread = 32 if late else _values_per_thread(spec, row, values, amount)
    few = amount is Amount.FEW
    # Sums, us: 512 rows of 14336 16.4 -> 15.3, 2048 of 2880 12.9 -> 12.5, of 7168 28.0 -> 27.2, 8192 of 7168 99.2 -> 98.7.
    first = adds_rows(spec.prologue) and _has_weight(spec.prologue) and values >= 4096 and not (few or late)
    # Few rows without a call: 128 of 1024 1.92 -> 1.88, others 0 to 2 % less.
    inline = few and isinstance(spec.prologue, RMSNorm)
    warps = _warps(rows * values, per_thread)
    return LaunchConfig(rows, groups, lanes, warps, late_weight=late, first_weight=first, inline_mean=inline)


def _some_norms(spec: FusedSpec, row: int, groups: int, lanes: int) -> LaunchConfig:
    """Of 512 to 4095 rows that are read but not written, or of a number that is not known: few threads to a row, so that all run at once."""
    values, filled = groups * lanes, row == groups * lanes
    # 2048 rows, us: Gemma -> blocked MXFP8 of 3072 8.0 -> 7.4, of 5120 12.9 -> 10.8, RMSNorm per group of 16384 34.1 -> 27.1, column-major of
    # 14336 32.6 -> 26.1; 512 rows per token of 14336 10.1 -> 9.1, per group of 16384 11.4 -> 9.2. To MXFP4 2048 rows of 2880 8.8 -> 7.0, of
    # 4096 9.1 -> 8.1, of 5120 12.5 -> 10.7.
    warps = 2 if _is_wasteful(row, values) and values < 16384 else 4
    first, narrow = _has_weight(spec.prologue), values == 16384
    inline = narrow and (filled or groups == 1)
    if spec.quantizer.e2m1 is not None:
        inline = not _multiplies_in_pairs(spec.prologue)
    return LaunchConfig(1, groups, lanes, warps, narrow=narrow, first_weight=first, inline_mean=inline)


def _rows_to_a_program(values: int) -> int:
    """Short rows leave lanes idle unless several share a program."""
    return max(1, 1024 // values)


def _is_wasteful(row: int, values: int) -> bool:
    """Whether a row leaves a quarter of its lanes idle."""
    return row <= values * 3 // 4


@cache
def _powers_of_two(row: int, group: int) -> tuple[int, int]:
    """The groups of a row, and the values of a group, rounded up."""
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
        if _is_static(spec):
            # Of 8 x 16384 1.71 -> 1.64 us.
            lanes = min(lanes, values)
    elif few:
        rows = 2 if spec.layout is ScaleLayout.PACKED else 1
        if _is_static(spec):
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
        if spec.quantizer.e2m1 is not None:
            # Sixteen values to a thread: 40000 rows of 14336 658 -> 602 us, by tiles of 1024 614.
            return values if held % values == 0 else _TILE_VALUES
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


def _many_norms(spec: FusedSpec, row: int, rows: int, groups: int, lanes: int) -> LaunchConfig:
    """Of rows that are read but not written, where arithmetic is in the way: few threads to a row, so that many fit."""
    values = groups * lanes
    if row == values and _takes_four_warps(spec, groups, lanes):
        # Of 8192 values, us: per token 50.1 -> 49.1, per group 51.7 -> 49.4, blocked 53.1 -> 50.7; products of 32 bits 51.3 -> 49.1,
        # 53.4 -> 52.3, 55.6 -> 51.0. Of 4096 those per group take 29.0 narrow, 27.6 not, but 65536 rows to MXFP8 187.3 and 192.2.
        narrow = values > 4096 or (_is_rounded_late(spec.prologue) and (lanes < 128 or groups == 1))
        return LaunchConfig(1, groups, lanes, 4, narrow=narrow, first_weight=True, inline_mean=True)
    if row < values == 4096 and _rounds_product(spec):
        return _many_norms_under_4096(spec, row, groups, lanes)
    if values < 8192:
        return _many_short_norms(spec, row, rows, groups, lanes)
    return (_many_norms_of_8192 if values == 8192 else _many_long_norms)(spec, row, groups, lanes)


def _takes_four_warps(spec: FusedSpec, groups: int, lanes: int) -> bool:
    """Whether rows that fill their tiles are fastest by four warps, without a call, and with the weight read first."""
    if not _rounds_product(spec):
        return False
    if groups * lanes == 16384:
        # Products of 32 bits per group 103.3 with a late weight and the call, 106.8 so.
        return not _is_static(spec) and (_multiplies_in_pairs(spec.prologue) or groups == 1 or lanes < 128)
    return 4096 <= groups * lanes < 16384


def _many_norms_under_4096(spec: FusedSpec, row: int, groups: int, lanes: int) -> LaunchConfig:
    """Of 2049 to 4095 values, to FP8 or int8."""
    in_pairs, wasteful = _multiplies_in_pairs(spec.prologue), _is_wasteful(row, 4096)
    if not (wasteful or in_pairs or groups == 1 or lanes < 128):
        # Gemma column-major of 65536 rows of 3584 212.5 us, by two warps 231.2.
        return LaunchConfig(1, groups, lanes, 4, narrow=True)
    # 8192 rows of 2880 and 3072, us: per token 21.4 -> 20.1, per group 22.5 -> 20.1, MXFP8 20.5 -> 19.2, blocked 22.6 -> 20.7; products of
    # 32 bits 23.1 -> 20.8, but per token, where 65536 rows narrow take 157 for 151, 21.7 -> 20.7 only if not narrow. Of 3584 without a call
    # per token 24.5 -> 23.5, per group 26.6 -> 25.3, 65536 rows 195 -> 179.
    narrow = in_pairs or groups > 1 or not wasteful
    return LaunchConfig(1, groups, lanes, 2, narrow=narrow, first_weight=True, inline_mean=not wasteful)


def _many_short_norms(spec: FusedSpec, row: int, rows: int, groups: int, lanes: int) -> LaunchConfig:
    """Of up to 2048 values, or of up to 4096 to FP4 or of products that are not rounded."""
    values, wasteful, rounded_late = groups * lanes, _is_wasteful(row, groups * lanes), _is_rounded_late(spec.prologue)
    to_fp4 = values == 4096 and spec.quantizer.e2m1 is not None
    narrow = to_fp4 and lanes >= 128 and (rounded_late or (_multiplies_in_pairs(spec.prologue) and groups > 1))
    late = to_fp4 and rounded_late
    # Per token of 1536 12.8 -> 11.5.
    first = values == 2048 and wasteful and groups == 1 and _rounds_product(spec)
    warps = _warps(rows * values, 64 if wasteful else 32)
    return LaunchConfig(rows, groups, lanes, warps, late, narrow, first_weight=first)


def _many_norms_of_8192(spec: FusedSpec, row: int, groups: int, lanes: int) -> LaunchConfig:
    """Of 8192 values, of which rows may leave some idle."""
    in_pairs, to_fp4, short = _multiplies_in_pairs(spec.prologue), spec.quantizer.e2m1 is not None, lanes < 128
    wasteful = _is_wasteful(row, 8192)
    narrow = in_pairs or (_is_rounded_late(spec.prologue) and not (to_fp4 and short))
    # Blocked MXFP8 of 5120 34.9 -> 33.0, of 7168 45.5 -> 45.0 (products of 32 bits 35.5 -> 33.2, 47.2 -> 45.6), but those per token of
    # 7168 45.0 -> 52.0, where 65536 rows of 5120 take 242 -> 235.
    first = narrow and not to_fp4 and (in_pairs or groups > 1 or wasteful)
    # Of 5120 per token by two warps 32.2, by four 33.5.
    spread = in_pairs and groups == 1
    four = row == 8192 or to_fp4 or (spread and not wasteful) or (short and not narrow)
    return LaunchConfig(1, groups, lanes, 4 if four else 2, not narrow, narrow, first_weight=first, inline_mean=spread)


def _many_long_norms(spec: FusedSpec, row: int, groups: int, lanes: int) -> LaunchConfig:
    """Of more than 8192 values."""
    values, in_pairs, to_fp4 = groups * lanes, _multiplies_in_pairs(spec.prologue), spec.quantizer.e2m1 is not None
    rounded_late, whole_group = _is_rounded_late(spec.prologue), groups == 1
    # Values that are as wide after the sum as they would be during it save few registers; newer Tritons make more of them.
    late, narrow, inline = row != values, row == values or not (in_pairs or spec.quantizer.needs_amax), False
    if spec.quantizer.needs_amax and (in_pairs or rounded_late):
        # 8192 rows of 14336, us, with a late weight and narrow: per token 86.0, 85.7, blocked MXFP8 92.9, 87.4; products of 32 bits:
        # per token 93.2, 88.1, blocked MXFP8 93.8, 90.0. Without a call per token 85.7 -> 84.7 and 89.8 -> 88.6, MXFP8 84.6 -> 86.7.
        narrow = (in_pairs and row == values) or (not to_fp4 and (whole_group or lanes < 128))
        late = not narrow
        inline = whole_group and row != values
        if late and row != values and not to_fp4:
            # Both, without a call: per group 90.0 -> 87.3, products of 32 bits 94.6 -> 93.1.
            narrow = inline = True
    elif rounded_late:
        # Static, 16384 rows of 16384: 189.6 -> 187.6 us.
        late, narrow = True, row == values
    warps = _warps(values, 64 if to_fp4 and rounded_late else 128)
    return LaunchConfig(1, groups, lanes, warps, late, narrow, inline_mean=inline)


def _norms_to_pairs(prologue: RMSNorm, row: int, groups: int, lanes: int, many: bool) -> LaunchConfig:
    """As :func:`_many_norms`, for FP4 codes of pairs, of which a thread has 16 neighbours."""
    values, in_pairs, filled = groups * lanes, _multiplies_in_pairs(prologue), row == groups * lanes
    if values < 4096:
        rows = _rows_to_a_program(values)
        warps = _warps(rows * values, 32)
        return LaunchConfig(rows, groups, lanes, warps, narrow=many and in_pairs, inline_mean=True)
    if values < 16384:
        return (_pairs_of_4096 if values == 4096 else _pairs_of_8192)(prologue, row, groups, lanes)
    warps = _warps(values, 128)
    if not filled:
        # 8192 rows of 14336 with their own scales 82.7 -> 80.6 us, rounded products 73.9 -> 72.5.
        return LaunchConfig(1, groups, lanes, warps, narrow=True, inline_mean=True, own_scales=True)
    # Of 8192 rows of 16384 narrow and late 89.6 -> 86.0 us; where products are of 32 bits, late alone is 91.3, with both 95.0, and without a
    # call as fast with Triton 3.6, 109.6 with 3.9. Own scales are 1 to 21 % more.
    return LaunchConfig(1, groups, lanes, warps, True, in_pairs, inline_mean=in_pairs)


def _pairs_of_4096(prologue: RMSNorm, row: int, groups: int, lanes: int) -> LaunchConfig:
    """Of 4096 values, of which rows may leave some idle."""
    # 8192 rows, us: of 2880 20.2 -> 17.9, of f16 20.1 -> 17.1, products of 32 bits 21.3 -> 20.0, of 4096 25.9 -> 24.7. Rounded products of 4096
    # with Triton 3.9 24.5 -> 23.0, with 3.6 22.8 -> 23.4; with their own scales 23.7 and 23.2.
    own, first = row < 4096 or not _multiplies_in_pairs(prologue), _has_weight(prologue)
    return LaunchConfig(1, groups, lanes, 2, narrow=True, first_weight=first, inline_mean=True, own_scales=own)


def _pairs_of_8192(prologue: RMSNorm, row: int, groups: int, lanes: int) -> LaunchConfig:
    """Of 8192 values, of which rows may leave some idle."""
    filled, wasteful = row == 8192, _is_wasteful(row, 8192)
    config = LaunchConfig(1, groups, lanes, 4 if filled else 2, narrow=True, inline_mean=True, own_scales=True)
    if _multiplies_in_pairs(prologue):
        # 8192 rows of 7168 38.6 -> 37.5 us, of 8192 41.9 -> 43.6.
        return replace(config, own_scales=not filled)
    if wasteful and prologue.rounded is torch.float16:
        # 65536 rows of 5120 219 -> 211 us, with the weight first 234; with Triton 3.9 230 -> 211 and 210.
        return replace(config, late_weight=True)
    # Of 8192 46.5 -> 46.2 us, with Triton 3.9 46.8 -> 45.6; of 5120 31.8 -> 30.9, with Triton 3.9 33.3 -> 30.2; of 7168 43.8 -> 42.4, with
    # the weight first 45.1.
    return replace(config, first_weight=_has_weight(prologue) and (filled or wasteful))


def _rounds_product(spec: FusedSpec) -> bool:
    """Whether a norm has a weight, and FP8 or int8 codes of products in 16 bits."""
    rounds = _multiplies_in_pairs(spec.prologue) or _is_rounded_late(spec.prologue)
    return rounds and spec.quantizer.e2m1 is None


def _is_rounded_late(prologue: Any) -> bool:
    """Whether a norm's product with a weight is of 32 bits, and what is quantized was rounded to 16 after it."""
    late = prologue.rounded is not torch.float32 and not _multiplies_in_pairs(prologue)
    return late and _has_weight(prologue)


def _has_weight(prologue: Any) -> bool:
    return prologue.weight is not Weight.NONE


def _multiplies_in_pairs(prologue: Any) -> bool:
    """Whether a norm's product with its weight is of 16 bits, two at a time."""
    in_16_bits = prologue.normalized is prologue.product is not torch.float32
    return in_16_bits and (prologue.weight is Weight.PLAIN or prologue.shifted is prologue.product)


def _parts(spec: FusedSpec, row: int, rows: Any) -> int:
    """How many programs share a row: more than one where whole rows leave processors idle, and are long."""
    in_two_launches = spec.quantizer.granularity is Granularity.TENSOR and spec.quantizer.needs_amax
    if not isinstance(rows, int) or rows > _MOST_ROWS_SHARED or not whole_rows(spec) or in_two_launches:
        return 1
    groups, lanes = _powers_of_two(row, group_length(spec, row))
    parts = _parts_by_table(spec, row, min(groups * lanes, 16384), rows)
    return parts if spec.quantizer.group is None else min(parts, groups)


def _parts_by_table(spec: FusedSpec, row: int, values: int, rows: int) -> int:
    if isinstance(spec.prologue, GatedActivation):
        # All of a row is activated in each of its programs.
        if rows <= 16:
            return {4096: 4, 8192: 8, 16384: 8}.get(values, 1)
        return 4 if values >= 16384 and rows <= 32 else 1
    if rows <= 16:
        return {2048: 2, 4096: 4, 8192: 8 if adds_rows(spec.prologue) else 4, 16384: 8}.get(values, 1)
    return (_parts_of_sums if adds_rows(spec.prologue) else _parts_of_one)(spec, row, values, rows)


def _parts_of_sums(spec: FusedSpec, row: int, values: int, rows: int) -> int:
    """Of 17 to 64 rows to which others are added."""
    if values < 8192 or rows > 32:
        return 1
    # 32 rows, us: MXFP8 of 5120 3.14 -> 2.67, per group of 7168 3.33 -> 2.95, MXFP4 3.37 -> 2.91, packed of 14336 3.98 -> 3.85; per group of
    # 16384 3.76 -> 4.18, per token of 8192 2.5 % more.
    return 4 if spec.quantizer.group is not None and (values == 8192 or row < values) else 2


def _parts_of_one(spec: FusedSpec, row: int, values: int, rows: int) -> int:
    """Of 17 to 64 rows that are read alone."""
    blocked, in_groups = spec.layout is ScaleLayout.BLOCKED, spec.quantizer.group is not None
    if values >= 16384:
        if blocked and rows > 48:
            # 64 x 16384 4.18 -> 3.84 us, 48 x 16384 3.22 -> 3.54.
            return 1
        # MXFP4 of 17 x 16384 2.60 -> 2.32 us, column-major of 32 x 14336 3.29 -> 3.14, int8 of 28 x 16384 3.53 -> 3.34; blocked of 32 x 16384
        # 5 % more, static of 32 x 14336 2.79 -> 3.04.
        return 4 if rows <= 32 and spec.quantizer.needs_amax and not blocked else 2
    if blocked and values == 8192 and rows > 32 and not _is_wasteful(row, values):
        # 48 x 7168 2.73 -> 2.41 us; of 5120 2.30 -> 2.32.
        return 2
    to_fp4 = spec.quantizer.e2m1 is not None
    if (values == 8192 and in_groups) or (values == 4096 and rows > 32 and to_fp4):
        # 64 rows, us: MXFP8 of 5120 2.36 -> 2.23, per group of 8192 2.87 -> 2.76, MXFP4 of 4096 2.53 -> 2.39.
        return 4
    return 2 if values >= (4096 if rows <= 32 else 8192) else 1


def adds_rows(prologue: Any) -> bool:
    """Whether a residual is added, and another row read."""
    return isinstance(prologue, RMSNorm) and prologue.residual_sum is not None


def _is_norm_of_one(prologue: Any) -> TypeGuard[RMSNorm]:
    """Whether rows are normalized as they are read, with no other added."""
    return isinstance(prologue, RMSNorm) and prologue.residual_sum is None


def _split(spec: FusedSpec, groups: int, lanes: int, parts: int) -> LaunchConfig:
    """Of rows that ``parts`` programs share."""
    values, in_groups = groups * lanes, spec.quantizer.group is not None
    if isinstance(spec.prologue, GatedActivation):
        warps = 16 if values <= 8192 else 32
    else:
        sums = adds_rows(spec.prologue)
        warps = 8 if values // parts > 1024 or sums else 4
        # Sums of 8192 that four programs share: MXFP4 of 28 x 7168 2.99 -> 2.45 us, by eight warps 2.96.
        if (values >= 16384 and (in_groups or isinstance(spec.prologue, NoPrologue))) or (
            sums and values == 8192 and parts == 4
        ):
            warps = 16
    # A thread holds no more of a row than its registers do.
    warps = max(warps, _warps(values, 64))
    groups, lanes = (groups // parts, lanes) if in_groups else (1, lanes // parts)
    return LaunchConfig(1, groups, lanes, warps, parts=parts)


def _values_per_thread(spec: FusedSpec, row: int, values: int, amount: Amount) -> int:
    """Of ``values`` lanes that hold a row of ``row``."""
    few, wasteful = amount is Amount.FEW, _is_wasteful(row, values)
    if isinstance(spec.prologue, GatedActivation):
        return _gated_values_per_thread(spec.prologue, values, wasteful, amount)
    if few and values <= 8192:
        # Eight warps, unless that leaves a thread less than a vector, or has more share a scale: 32 x 2048 to MXFP8 1.53 -> 1.47 us.
        shares = values == 2048 and spec.quantizer.group is not None and not adds_rows(spec.prologue)
        return 16 if shares else max(8, values // 256)
    if adds_rows(spec.prologue):
        return 32 if values < 8192 else 64 if values == 8192 or amount is not Amount.MANY else 128
    return 32 if values < 8192 or (values == 8192 and not wasteful) else 64


def _gated_values_per_thread(prologue: GatedActivation, values: int, wasteful: bool, amount: Amount) -> int:
    if amount is Amount.FEW:
        return 8 if values <= 8192 else 16
    if values == 8192 and amount is Amount.UNKNOWN:
        return 16
    if values == 8192 and _is_gelu(prologue) and not wasteful:
        return 16
    return 16 if values < 8192 else 32 if values == 8192 and not wasteful else 64


def _late_by_table(spec: FusedSpec, row: int, values: int, amount: Amount) -> bool:
    """Whether twice the warps with a weight that is read late were faster: more programs fit a processor."""
    if not isinstance(spec.prologue, RMSNorm) or row != values or amount is not Amount.UNKNOWN:
        return False
    if not adds_rows(spec.prologue):
        # With the weight, newer Tritons than 3.6 need 81 registers instead of 64: half the programs.
        return values == 16384 and spec.quantizer.group is not None
    return values == 8192 and not spec.quantizer.needs_amax


def _amount(spec: FusedSpec, row: int, rows: Any) -> Amount:
    if not isinstance(rows, int):
        return Amount.UNKNOWN
    # Whole rows that each have a processor: gated, 128 of 16384 per token 6.7 -> 5.5 us, GELU 7.3 -> 5.5; norms of 14336 4.9 -> 4.5.
    if rows * row <= _FEW_VALUES or (rows <= _FEW_ROWS and whole_rows(spec)):
        return Amount.FEW
    return Amount.MANY if rows >= _least_of_many(spec, row) else Amount.UNKNOWN


def _least_of_many(spec: FusedSpec, row: int) -> int:
    """How many rows are many."""
    if isinstance(spec.prologue, GatedActivation) and _is_static(spec):
        # 2048 rows of 4096 11.6 -> 11.2 us, of 7168 18.7 -> 18.5.
        return _MANY_ROWS // 2
    if isinstance(spec.prologue, NoPrologue):
        # 2048 rows, us: MXFP8 of 4096 8.1 -> 7.9, static of 7168 12.6 -> 12.3, packed of 14336 23.6 -> 23.1; TMA-aligned 12.7 -> 12.9.
        return _MANY_ROWS if spec.layout in (ScaleLayout.COLUMN, ScaleLayout.TMA) else _MANY_ROWS // 2
    if not _is_norm_of_one(spec.prologue) or not _rounds_product(spec):
        return _MANY_ROWS
    groups, lanes = _powers_of_two(row, group_length(spec, row))
    if groups * lanes == 8192 and (groups > 1 or _multiplies_in_pairs(spec.prologue)):
        # 2048 rows, us: MXFP8 of 5120 10.8 -> 10.5, per token of 7168 14.4 -> 13.7, per group 14.7 -> 14.1, of 8192 15.5 -> 14.9, but with
        # products of 32 bits per token of 7168 14.2 -> 15.9; 512 rows of 5120 4.6 -> 4.8.
        return _MANY_ROWS // 2
    return _MANY_ROWS


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
