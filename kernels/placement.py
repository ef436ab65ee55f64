"""Where a cast-transpose writes the codes and block scales of one direction: rows and columns are those of what it writes."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .fused_quant import scale_address


@triton.jit
def code_address(row, column, WIDTH, SHUFFLED: tl.constexpr, UNIT: tl.constexpr = 1):
    """Where in a row of WIDTH units of UNIT bytes the unit ``column`` lies, in units.

    If SHUFFLED, as fusion_pass.layouts.pack_mfma_shuffled has it: in tiles of 16 rows by 32 bytes, by columns of 16 bytes.
    """
    if SHUFFLED:
        HALF: tl.constexpr = 16 // UNIT
        tile = row // 16 * 16 * WIDTH + column // (2 * HALF) * (32 * HALF)
        at = tile + column % (2 * HALF) // HALF * (16 * HALF) + row % 16 * HALF + column % HALF
    else:
        at = row * WIDTH + column
    return at


@triton.jit
def block_scale_address(row, block, ROWS, BLOCKS, LAYOUT: tl.constexpr):
    """Where the scale of a block lies among (ROWS, BLOCKS); LAYOUT is a value of fusion_pass.cast_transpose.BlockScales."""
    if LAYOUT == "linear":
        at = row * BLOCKS + block
    elif LAYOUT == "padded":
        at = row * ((BLOCKS + 7) // 8 * 8) + block
    else:
        at = scale_address(row, block, ROWS, BLOCKS, LAYOUT, True)
    return at
