"""What a cell's bytes cost: the fastest kernel that only reads its inputs and writes its outputs.

It converts each value to the type of the codes and computes nothing else, so no fused kernel can be faster, and the distance
to it is what the arithmetic costs. Where the transpose is quantized as well, it reads a tile once and writes its codes in
both orders; of FP4 codes, which no cast makes, it writes bytes of the right number, taken from the bits of the values.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from fusion_pass.kernels.arithmetic import cast

from cases import Case

# Values per program and warps: from what suits one row to what suits many.
CONFIGS = ((256, 1), (512, 2), (1024, 1), (1024, 2), (1024, 4), (2048, 4), (4096, 4), (8192, 8))
# Where the transpose is written, too: rows and columns of a program's tile, and warps that leave a thread no more than 128
# values, which are what its registers hold.
TILES = ((32, 64), (32, 128), (64, 64), (64, 128), (128, 64), (128, 128))
TILE_CONFIGS = tuple(
    (tile, warps) for tile, warps in itertools.product(TILES, (1, 2, 4, 8)) if tile[0] * tile[1] <= 128 * 32 * warps
)


@triton.jit
def store_share(scale_ptr, program, scales, scales_each, SCALES: tl.constexpr):
    """Write a program's share of the scales, which are numbered through."""
    lanes = tl.arange(0, SCALES)
    share = program * scales_each + lanes
    present = (lanes < scales_each) & (share < scales)
    tl.store(scale_ptr + share, tl.full([SCALES], 1, scale_ptr.dtype.element_ty), present)


@triton.jit
def bare_kernel(
    x_ptr,
    other_ptr,
    code_ptr,
    scale_ptr,
    sum_ptr,
    values,
    scales,
    scales_each,
    N: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALES: tl.constexpr,
):
    """One program: BLOCK of the (M, N) values and its share of the scales; x has rows of 2N values if WIDE."""
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    mask = at < values
    source = at
    if WIDE:
        source = at + at // N * N
    x = cast(tl.load(x_ptr + source, mask), tl.float32)
    if WIDE:
        x += cast(tl.load(x_ptr + source + N, mask), tl.float32)
    if other_ptr is not None:
        x += cast(tl.load(other_ptr + at, mask), tl.float32)
        tl.store(sum_ptr + at, cast(x, sum_ptr.dtype.element_ty), mask)
    tl.store(code_ptr + at, cast(x, code_ptr.dtype.element_ty), mask)
    if scale_ptr is not None:
        store_share(scale_ptr, program, scales, scales_each, SCALES)


@triton.jit
def bare_both_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    other_code_ptr,
    other_scale_ptr,
    M,
    scales,
    scales_each,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """One program: a ROWS x COLUMNS tile of x (M, N), its codes (M, N) and (N, M), its share of the scales of each.

    WHOLE: tiles fill x, so that nothing is masked.
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    first_column = tl.program_id(1).to(tl.int64) * COLUMNS
    rows = (first_row + tl.arange(0, ROWS))[:, None]
    columns = (first_column + tl.arange(0, COLUMNS))[None, :]
    mask = None if WHOLE else (rows < M) & (columns < N)
    code = cast(cast(tl.load(x_ptr + rows * N + columns, mask), tl.float32), code_ptr.dtype.element_ty)
    tl.store(code_ptr + rows * N + columns, code, mask)
    tl.store(other_code_ptr + columns * M + rows, code, mask)
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    store_share(scale_ptr, program, scales, scales_each, SCALES)
    store_share(other_scale_ptr, program, scales, scales_each, SCALES)


@triton.jit
def bare_both_packed_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    other_code_ptr,
    other_scale_ptr,
    HALF_M,
    scales,
    scales_each,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """As bare_both_kernel, of codes (M, N / 2) and (N, M / 2); x_ptr points to words of two values each.

    A byte has bits of two values, in a row of the words' upper and lower halves, in a column of two rows' words. Rows are read as even and odd ones, so that a byte's two values are in one thread in both directions.
    """
    HALF_N: tl.constexpr = N // 2
    first_pair = tl.program_id(0).to(tl.int64) * (ROWS // 2)
    first_word = tl.program_id(1).to(tl.int64) * (COLUMNS // 2)
    pairs = (first_pair + tl.arange(0, ROWS // 2))[:, None]
    words = (first_word + tl.arange(0, COLUMNS // 2))[None, :]
    mask = None if WHOLE else (pairs < HALF_M) & (words < HALF_N)
    at = 2 * pairs * HALF_N + words
    even = tl.load(x_ptr + at, mask)
    odd = tl.load(x_ptr + at + HALF_N, mask)
    tl.store(code_ptr + at, cast(even >> 12, tl.uint8), mask)
    tl.store(code_ptr + at + HALF_N, cast(odd >> 12, tl.uint8), mask)
    mixed = even ^ odd
    other = 2 * words * HALF_M + pairs
    tl.store(other_code_ptr + other, cast(mixed, tl.uint8), mask)
    tl.store(other_code_ptr + other + HALF_M, cast(mixed >> 24, tl.uint8), mask)
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    store_share(scale_ptr, program, scales, scales_each, SCALES)
    store_share(other_scale_ptr, program, scales, scales_each, SCALES)


def bare(case: Case, block: int, warps: int) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    """The kernel in one configuration, as a function of a case's inputs; codes, scales and sum are what it returns."""

    def run(x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, given: torch.Tensor):
        rows, row = len(x), len(weight)
        codes = torch.empty((rows, row), dtype=case.quantization.code, device=x.device)
        count = case.scales(rows, row)
        kind = torch.float32 if case.quantization.scale_bytes == 4 else torch.uint8
        scales = torch.empty(count, dtype=kind, device=x.device) if count else None
        total = torch.empty_like(x) if case.prologue.residual else None
        programs = triton.cdiv(rows * row, block)
        each = triton.cdiv(count, programs)
        bare_kernel[(programs,)](
            x,
            other if case.prologue.residual else None,
            codes,
            scales,
            total,
            rows * row,
            count,
            each,
            N=row,
            WIDE=case.prologue.wide,
            BLOCK=block,
            SCALES=triton.next_power_of_2(max(1, each)),
            num_warps=warps,
        )
        return codes, scales, total

    return run


def bare_both(case: Case, tile: tuple[int, int], warps: int) -> Callable[..., tuple[torch.Tensor, ...]]:
    """As :func:`bare`, where the transpose is quantized as well: codes and scales of x, then of its transpose."""
    tile_rows, tile_columns = tile
    quantization = case.quantization
    packed = quantization.per_code == 2

    def run(x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, given: torch.Tensor):
        rows, row = x.shape
        count = case.scales(rows, row)
        outputs = []
        for shape in ((rows, row // quantization.per_code), (row, rows // quantization.per_code)):
            outputs.append(torch.empty(shape, dtype=quantization.code, device=x.device))
            outputs.append(torch.empty(count, dtype=torch.uint8, device=x.device))
        grid = (triton.cdiv(rows, tile_rows), triton.cdiv(row, tile_columns))
        each = triton.cdiv(count, grid[0] * grid[1])
        (bare_both_packed_kernel if packed else bare_both_kernel)[grid](
            x.view(torch.int32) if packed else x,
            *outputs,
            rows // quantization.per_code,
            count,
            each,
            N=row,
            ROWS=tile_rows,
            COLUMNS=tile_columns,
            WHOLE=rows % tile_rows == 0 and row % tile_columns == 0,
            SCALES=triton.next_power_of_2(each),
            num_warps=warps,
        )
        return tuple(outputs)

    return run


def candidates(case: Case) -> Iterator[Callable[..., tuple[torch.Tensor | None, ...]]]:
    """The kernel in every configuration."""
    if case.quantization.both:
        for tile, warps in TILE_CONFIGS:
            yield bare_both(case, tile, warps)
    else:
        for block, warps in CONFIGS:
            yield bare(case, block, warps)
