"""Compile much at once: processes that fill the compiler's caches on disk before the one that measures."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

SECONDS_PER_TASK = 60.0


class Warmer:
    """A pool of processes that compile, each with ``threads`` of Inductor's own; with no processes it does nothing."""

    def __init__(self, processes: int, threads: int = 1) -> None:
        self.pool: ProcessPoolExecutor | None = None
        self.processes, self.threads = processes, threads
        self._start()

    def _start(self) -> None:
        if self.processes:
            spawned = multiprocessing.get_context("spawn")
            self.pool = ProcessPoolExecutor(
                self.processes, mp_context=spawned, initializer=_alone, initargs=(self.threads,)
            )

    def warm(self, compile_one: Callable[..., None], tasks: Sequence[tuple[Any, ...]]) -> None:
        """Call ``compile_one`` with each task's arguments, and wait; what fails here will fail, and be told, when measured."""
        self.wait(self.submit(compile_one, tasks), SECONDS_PER_TASK * (1 + len(tasks) / max(1, self.processes)))

    def submit(self, compile_one: Callable[..., None], tasks: Sequence[tuple[Any, ...]]) -> list[Future[None]]:
        """As :meth:`warm`, without waiting."""
        futures: list[Future[None]] = []
        if self.pool is not None:
            # A process may be killed, for memory say; then the one that measures compiles alone.
            with contextlib.suppress(BrokenProcessPool):
                futures += [self.pool.submit(_quietly, compile_one, task) for task in tasks]
        return futures

    def wait(self, futures: Sequence[Future[None]], seconds: float) -> None:
        """Until all is done; what is not done in time is stopped, so that it disturbs no measurement."""
        if wait(futures, timeout=seconds).not_done:
            for process in multiprocessing.active_children():
                process.terminate()
            self.close()
            self._start()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)


def threads_each(processes: int) -> int:
    """How many cores each of as many processes has, for tasks of many kernels."""
    return max(1, (os.cpu_count() or 1) // max(1, processes))


def default_processes() -> int:
    return min(8, (os.cpu_count() or 2) // 2)


def _alone(threads: int) -> None:
    # With one, a process compiles by itself: pools of as many as there are cores, within the pool, would only crowd them.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)
    torch._inductor.config.compile_threads = threads
    # Keys of the compilers' caches name the first module in which pickle finds a layout of torch, which is the script under
    # its second name if it imports torch; the process that measures would look for other keys.
    sys.modules.pop("__mp_main__", None)


def _quietly(compile_one: Callable[..., None], task: tuple[Any, ...]) -> None:
    with contextlib.suppress(Exception), torch.no_grad():
        compile_one(*task)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
