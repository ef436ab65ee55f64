"""Compile many cells at once: processes that fill the compiler's caches on disk before the one that measures."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import torch

import contestants
from cases import CASES
from results import Cell

_SECONDS_PER_CELL = 120


class Warmer:
    """A pool of processes that compile; with no processes it does nothing."""

    def __init__(self, processes: int) -> None:
        self.pool: ProcessPoolExecutor | None = None
        if processes:
            spawned = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(processes, mp_context=spawned, initializer=_alone)

    def warm(self, cells: Sequence[Cell], names: Sequence[str], device: str) -> None:
        """Compile the cells as the contestants ``names`` have them; what fails here will fail, and be told, when measured."""
        if self.pool is None:
            return
        wanted = [name for name in names if name in contestants.COMPILED]
        # A process may be killed, for memory say; then the one that measures compiles alone.
        with contextlib.suppress(BrokenProcessPool):
            tasks = [self.pool.submit(_compile, cell, name, device) for cell in cells for name in wanted]
            wait(tasks, timeout=_SECONDS_PER_CELL * max(1, len(cells)))

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


def _alone() -> None:
    # Each process compiles by itself: pools within the pool would only crowd the cores.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch._inductor.config.compile_threads = 1


def _compile(cell: Cell, name: str, device: str) -> None:
    case = next(case for case in CASES if case.name == cell.site)
    with contextlib.suppress(Exception), torch.no_grad():
        contestants.compiled(name, case, case.inputs(cell.rows, cell.row, getattr(torch, cell.dtype), device))
    if device == "cuda":
        torch.cuda.empty_cache()
