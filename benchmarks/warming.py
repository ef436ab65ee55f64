"""Compile much at once: processes that fill the compiler's caches on disk before the one that measures."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

_SECONDS_PER_TASK = 60


class Warmer:
    """A pool of processes that compile; with no processes it does nothing."""

    def __init__(self, processes: int) -> None:
        self.pool: ProcessPoolExecutor | None = None
        self.processes = processes
        if processes:
            spawned = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(processes, mp_context=spawned, initializer=_alone)

    def warm(self, compile_one: Callable[..., None], tasks: Sequence[tuple[Any, ...]]) -> None:
        """Call ``compile_one`` with each task's arguments, and wait; what fails here will fail, and be told, when measured."""
        if self.pool is None:
            return
        # A process may be killed, for memory say; then the one that measures compiles alone.
        with contextlib.suppress(BrokenProcessPool):
            futures = [self.pool.submit(_quietly, compile_one, task) for task in tasks]
            wait(futures, timeout=_SECONDS_PER_TASK * (1 + len(tasks) / self.processes))

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


def default_processes() -> int:
    return min(8, (os.cpu_count() or 2) // 2)


def _alone() -> None:
    # Each process compiles by itself: pools within the pool would only crowd the cores.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    torch._inductor.config.compile_threads = 1


def _quietly(compile_one: Callable[..., None], task: tuple[Any, ...]) -> None:
    with contextlib.suppress(Exception), torch.no_grad():
        compile_one(*task)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
