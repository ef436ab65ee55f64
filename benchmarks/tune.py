"""Sweep launch configurations of each cell on this GPU, and print the fastest beside the one that is chosen.

    python benchmarks/tune.py [--row 4096 8192] [--rows 32 8192]

``configure`` in kernels/launch.py holds what follows from such a sweep.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from unittest import mock

import torch
from fusion_pass.kernels import launch as launching
from fusion_pass.kernels.launch import LaunchConfig, configure

from fusion_pass.specs import FusedSpec, GatedActivation, NoPrologue, Quantizer, RMSNorm, ScaleLayout

from sites import bandwidth, microseconds

BF16 = torch.bfloat16
NORM = RMSNorm(1e-6, normalized=BF16, product=BF16)
ADD_NORM = RMSNorm(1e-6, normalized=BF16, product=BF16, residual_sum=BF16)
SILU = GatedActivation(activated=BF16, product=BF16)
TOKEN, GROUP = Quantizer.dynamic(), Quantizer.dynamic(group=128, amax_floor=1e-10)
CELLS = {
    "rms -> token": FusedSpec(NORM, TOKEN),
    "add+rms -> token": FusedSpec(ADD_NORM, TOKEN, sum_output=BF16),
    "rms -> group": FusedSpec(NORM, GROUP),
    "add+rms -> group, column": FusedSpec(ADD_NORM, GROUP, ScaleLayout.COLUMN, sum_output=BF16),
    "silu*mul -> token": FusedSpec(SILU, TOKEN),
    "silu*mul -> group": FusedSpec(SILU, GROUP),
    "token": FusedSpec(NoPrologue(), TOKEN),
    "group, column": FusedSpec(NoPrologue(), GROUP, ScaleLayout.COLUMN),
}


def candidates(spec: FusedSpec, row: int) -> Iterator[LaunchConfig]:
    chosen = configure(spec, row)
    whole = isinstance(spec.prologue, RMSNorm) or spec.quantizer.group is None
    for rows, groups, warps in itertools.product(
        (1, 2, 4), (chosen.groups,) if whole else (2, 4, 8, 16), (1, 2, 4, 8, 16)
    ):
        values = rows * groups * chosen.lanes
        if 2 <= values // (32 * warps) <= 128:
            yield LaunchConfig(rows, groups, chosen.lanes, warps)


def inputs(spec: FusedSpec, rows: int, row: int) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    both = torch.randn(rows, 2 * row, device="cuda").to(BF16)
    weight = torch.randn(row, device="cuda").to(BF16)
    if isinstance(spec.prologue, GatedActivation):
        gate, up = both.chunk(2, -1)
        return gate, up, None
    x = both[:, :row].contiguous()
    if isinstance(spec.prologue, RMSNorm):
        return x, None if spec.sum_output is None else both[:, row:].contiguous(), weight
    return x, None, None


def sweep(name: str, spec: FusedSpec, counts: list[int], row: int, copy: float) -> None:
    """Time every candidate at each number of rows, and rank by the geometric mean."""
    configs = [configure(spec, row), *(c for c in candidates(spec, row) if c != configure(spec, row))]
    times: dict[LaunchConfig, list[float]] = {config: [] for config in configs}
    floors = []
    for rows in counts:
        reads = (2 if inputs(spec, 1, row)[1] is not None else 1) + (spec.sum_output is not None)
        moved = rows * row * (2 * reads + 1)
        floors.append(f"{moved / copy:.1f}")
        buffers = [inputs(spec, rows, row) for _ in range(max(2, min(32, (200 << 20) // moved)))]
        for config in configs:
            with mock.patch.object(launching, "configure", lambda *_, config=config, **__: config):
                times[config].append(microseconds(lambda *a: launching.launch(spec, *a), buffers, replays=7))
    best = sorted(configs, key=lambda c: math.prod(times[c]))[:4]
    print(f"{name}, rows of {row}, M = {counts}: floor {floors}, chosen {_shown(configs[0], times)}")
    for config in best:
        print(f"    {_shown(config, times)}", flush=True)


def _shown(config: LaunchConfig, times: dict[LaunchConfig, list[float]]) -> str:
    measured = " ".join(f"{t:.1f}" for t in times[config])
    return f"{measured} ({config.rows} rows, {config.groups} groups, {config.warps} warps)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 8192])
    parser.add_argument("--row", type=int, nargs="+", default=[2048, 4096, 5120, 8192])
    parser.add_argument("--cell", nargs="+", default=list(CELLS))
    arguments = parser.parse_args()
    copy = bandwidth()
    for name, row in itertools.product(arguments.cell, arguments.row):
        sweep(name, CELLS[name], arguments.rows, row, copy)
    return 0


if __name__ == "__main__":
    sys.exit(main())
