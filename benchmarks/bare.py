"""What a cell's bytes cost: the fastest kernel that only reads its inputs and writes its outputs.

It converts each value to the type of the codes and computes nothing else, so no fused kernel can be faster, and the distance
to it is what the arithmetic costs.
"""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from fusion_pass.kernels.arithmetic import cast

from cases import Case

# Values per program and warps: from what suits one row to what suits many.
CONFIGS = ((256, 1), (512, 2), (1024, 1), (1024, 2), (1024, 4), (2048, 4), (4096, 4), (8192, 8))


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
        lanes = tl.arange(0, SCALES)
        share = program * scales_each + lanes
        present = (lanes < scales_each) & (share < scales)
        tl.store(scale_ptr + share, tl.full([SCALES], 1, scale_ptr.dtype.element_ty), present)


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


def candidates(case: Case) -> Iterator[Callable[..., tuple[torch.Tensor | None, ...]]]:
    """The kernel in every configuration."""
    for block, warps in CONFIGS:
        yield bare(case, block, warps)
