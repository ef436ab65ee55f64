"""What a cell's bytes cost: the fastest kernel that only reads its inputs and writes its outputs.

It converts each value to the type of the codes and computes nothing else, so no fused kernel can be faster, and the distance
to it is what the arithmetic costs. Of FP4 codes, which no cast makes, it writes bytes of the right number, taken from the bits
of the values. Where the transpose is quantized as well, it reads a tile once and writes its codes in both orders.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from fusion_pass.kernels.arithmetic import INTERPRETED, cast

from fusion_pass.mx_specs import MX_BLOCK

from cases import Case

# Values per program and warps: from what suits one row to what suits many.
CONFIGS = (
    (256, 1),
    (512, 2),
    (512, 4),
    (1024, 1),
    (1024, 2),
    (1024, 4),
    (1024, 8),
    (2048, 4),
    (4096, 4),
    (4096, 8),
    (8192, 8),
    (8192, 16),
)
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
    FP4: tl.constexpr,
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
    if FP4:
        bits = cast(x, x_ptr.dtype.element_ty).to(tl.int16, bitcast=True)
        first, second = tl.split(tl.reshape(bits, (BLOCK // 2, 2)))
        at = program * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        tl.store(code_ptr + at, (((first >> 12) & 0x0F) | ((second >> 8) & 0xF0)).to(tl.uint8), at < values // 2)
    else:
        tl.store(code_ptr + at, cast(x, code_ptr.dtype.element_ty), mask)
    if scale_ptr is not None:
        store_share(scale_ptr, program, scales, scales_each, SCALES)


if INTERPRETED:

    @triton.jit
    def joined(a, b, c, d):
        """Tiles of bytes as the bytes of words, the first the lowest."""
        return a.to(tl.int32) | (b.to(tl.int32) << 8) | (c.to(tl.int32) << 16) | (d.to(tl.int32) << 24)

else:

    @triton.jit
    def joined(a, b, c, d):
        """Tiles of bytes as the bytes of words, the first the lowest: four words by eight instructions."""
        return tl.inline_asm_elementwise(
            """
            {
                .reg .b32 p, q, r, s;
                prmt.b32 p, $4, $5, 0x5140;
                prmt.b32 q, $6, $7, 0x5140;
                prmt.b32 r, $4, $5, 0x7362;
                prmt.b32 s, $6, $7, 0x7362;
                prmt.b32 $0, p, q, 0x5410;
                prmt.b32 $1, p, q, 0x7632;
                prmt.b32 $2, r, s, 0x5410;
                prmt.b32 $3, r, s, 0x7632;
            }
            """,
            "=r,=r,=r,=r,r,r,r,r",
            [a, b, c, d],
            tl.int32,
            is_pure=True,
            pack=4,
        )


@triton.jit
def copied_codes(x_ptr, code_ptr, at, mask):
    """The codes of the values at ``at``, as bytes, which are also written there."""
    code = cast(cast(tl.load(x_ptr + at, mask), tl.float32), code_ptr.dtype.element_ty)
    tl.store(code_ptr + at, code, mask)
    return code.to(tl.uint8, bitcast=True)


@triton.jit
def bare_both_kernel(
    x_ptr,
    code_ptr,
    scale_ptr,
    other_code_ptr,
    other_scale_ptr,
    BLOCKS,
    scales,
    scales_each,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """One program: a ROWS x COLUMNS tile of x (M, N), its codes (M, N) and (N, M), its share of the scales of each.

    Rows are read four apart, so that a thread has the bytes of a word of the transpose. BLOCKS is M / 32, a whole number:
    so the compiler knows where 16 bytes lie aligned.
    WHOLE: tiles fill x, so that nothing is masked.
    """
    QUADS = 8 * BLOCKS
    quads = (tl.program_id(0).to(tl.int64) * (ROWS // 4) + tl.arange(0, ROWS // 4))[:, None]
    columns = (tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = None if WHOLE else (quads < QUADS) & (columns < N)
    at = 4 * quads * N + columns
    word = joined(
        copied_codes(x_ptr, code_ptr, at, mask),
        copied_codes(x_ptr, code_ptr, at + N, mask),
        copied_codes(x_ptr, code_ptr, at + 2 * N, mask),
        copied_codes(x_ptr, code_ptr, at + 3 * N, mask),
    )
    tl.store(other_code_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + columns * QUADS + quads, word, mask)
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
    BLOCKS,
    scales,
    scales_each,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    SCALES: tl.constexpr,
):
    """As bare_both_kernel, of codes (M, N / 2) and (N, M / 2), 16 bits of the transpose to a thread.

    x_ptr points to words of two values each. A byte has bits of both its values: of the two halves of a word, or of those
    halves of two rows' words that are the values of one column.
    """
    WORDS: tl.constexpr = N // 2
    QUADS = 8 * BLOCKS
    quads = (tl.program_id(0).to(tl.int64) * (ROWS // 4) + tl.arange(0, ROWS // 4))[:, None]
    words = (tl.program_id(1).to(tl.int64) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2))[None, :]
    mask = None if WHOLE else (quads < QUADS) & (words < WORDS)
    at = 4 * quads * WORDS + words
    first = tl.load(x_ptr + at, mask)
    second = tl.load(x_ptr + at + WORDS, mask)
    third = tl.load(x_ptr + at + 2 * WORDS, mask)
    fourth = tl.load(x_ptr + at + 3 * WORDS, mask)
    tl.store(code_ptr + at, cast(first >> 12, tl.uint8), mask)
    tl.store(code_ptr + at + WORDS, cast(second >> 12, tl.uint8), mask)
    tl.store(code_ptr + at + 2 * WORDS, cast(third >> 12, tl.uint8), mask)
    tl.store(code_ptr + at + 3 * WORDS, cast(fourth >> 12, tl.uint8), mask)
    # The low byte of each half is of the first two rows, the high one of the others.
    mixed = ((first ^ second) & 0x00FF00FF) | ((third ^ fourth) & ~0x00FF00FF)
    pair_ptr = other_code_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + 2 * words * QUADS + quads
    tl.store(pair_ptr, mixed.to(tl.int16), mask)
    tl.store(pair_ptr + QUADS, (mixed >> 16).to(tl.int16), mask)
    program = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    store_share(scale_ptr, program, scales, scales_each, SCALES)
    store_share(other_scale_ptr, program, scales, scales_each, SCALES)


def bare(case: Case, block: int, warps: int) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    """The kernel in one configuration, as a function of a case's inputs; codes, scales and sum are what it returns."""

    def run(x: torch.Tensor, other: torch.Tensor, weight: torch.Tensor, given: torch.Tensor):
        rows, row = len(x), len(weight)
        per_code = case.quantization.per_code
        codes = torch.empty((rows, row // per_code), dtype=case.quantization.code, device=x.device)
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
            FP4=per_code == 2,
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
            rows // MX_BLOCK,
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
