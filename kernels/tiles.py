"""How programs read tiles of (rows, groups, lanes) values: which lanes hold values, and which of them a thread holds."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

# Vectors are dealt to threads along one axis of a load first: up to Triton 3.6 along its first, from 3.7 on along the one before the last.
SEGMENTS_FIRST = tl.constexpr(tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7))


@triton.jit
def load(ptr, mask):
    """What lies at the pointers, or zero outside the mask; a mask of None has everything inside."""
    if mask is None:
        x = tl.load(ptr)
    else:
        x = tl.load(ptr, mask, other=0.0)
    return x


@triton.jit
def load_at(ptr, at, mask):
    """What lies at ``ptr + at``, or None if there is no ``ptr``."""
    if ptr is None:
        value = None
    else:
        value = load(ptr + at, mask)
    return value


@triton.constexpr_function
def vector_of(*outputs):
    """How many neighbouring values a thread holds: 16 codes make a store, of wider outputs fewer values."""
    widths = [output.dtype.element_ty.primitive_bitwidth // 8 for output in outputs if output is not None]
    return 16 // max([1, *widths])


@triton.jit
def inside_row(columns, lanes, N: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    """Which lanes of GROUPS groups, one of several such tiles of a row or the only one, are values of it; None if all are."""
    # Masks cost an instruction for each register that a load fills.
    if lanes.shape[2] == GROUP and N % (GROUPS * GROUP) == 0:
        inside = None
    else:
        inside = (lanes < GROUP) & (columns < N)
    return inside


@triton.jit
def within(rows, M, inside, PROGRAM_ROWS: tl.constexpr):
    """The mask of a tile: None if its program has one row, which is there, and all of whose lanes are inside."""
    if PROGRAM_ROWS == 1:
        mask = inside
    elif inside is None:
        mask = rows < M
    else:
        mask = (rows < M) & inside
    return mask


@triton.jit
def vectors_of_segments(first, VALUES: tl.constexpr, SEGMENT: tl.constexpr):
    """VALUES columns from the ``first`` on, by segments and vectors of 8 values, of which loads of 16 bits give threads segments."""
    segments = tl.arange(0, VALUES // SEGMENT)
    vectors = tl.arange(0, SEGMENT // 8)
    if SEGMENTS_FIRST:
        at = segments[:, None, None] * SEGMENT + vectors[None, :, None] * 8
    else:
        at = segments[None, :, None] * SEGMENT + vectors[:, None, None] * 8
    return first + at + tl.arange(0, 8)[None, None, :]


@triton.jit
def load_tile(ptr, at, mask, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """A (ROWS, GROUPS, LANES) tile of what lies at ``ptr + at``, which is such a tile or one row's vectors; None if there is no ``ptr``."""
    value = load_at(ptr, at, mask)
    if value is not None and value.shape[2] != LANES:
        if not SEGMENTS_FIRST:
            value = tl.permute(value, (1, 0, 2))
        value = tl.reshape(value, (ROWS, GROUPS, LANES))
    return value
