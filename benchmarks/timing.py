"""The time of one call: CUDA-graph replays over rotating buffers; on a CPU, where figures mean nothing, the wall clock."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

_ROTATED_BYTES = 200 << 20  # four times the L2 cache of an H200
_MOST_BUFFERS = 64
_LEAST_CALLS = 20
_LONG_CALL_US = 100.0
_COPIED_BYTES = 256 << 20


def buffer_count(moved: int) -> int:
    """How many sets of buffers are rotated, where a call moves ``moved`` bytes.

    As many as exceed the L2 cache, but at most 64: calls that move less than 0.8 MB find their inputs in the cache, like
    a model's, and so do all that they are compared with.
    """
    return min(_MOST_BUFFERS, max(2, math.ceil(_ROTATED_BYTES / moved)))


def microseconds(fn: Callable[..., Any], buffers: Sequence[tuple[Any, ...]], replays: int = 20) -> float:
    """The median time of one call over ``replays`` replays of a CUDA graph that calls fn on every buffer in turn.

    A graph holds at least 20 calls, or where calls are long (0.1 ms) one per buffer.
    """
    if buffers[0][0].device.type != "cuda":
        return _on_the_wall(fn, buffers)
    calls = [buffers[i % len(buffers)] for i in range(max(_LEAST_CALLS, len(buffers)))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in calls[:3]:
            fn(*arguments)
    torch.cuda.synchronize()
    if _elapsed(lambda: fn(*calls[0])) > _LONG_CALL_US:
        calls = calls[: len(buffers)]
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        # What calls return is kept, so that each writes to memory of its own.
        kept = [fn(*arguments) for arguments in calls]
    graph.replay()
    times = [_elapsed(graph.replay) / len(calls) for _ in range(replays)]
    del kept
    return statistics.median(times)


def _elapsed(fn: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    fn()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3


def _on_the_wall(fn: Callable[..., Any], buffers: Sequence[tuple[Any, ...]]) -> float:
    times = []
    for arguments in buffers[:2]:
        start = time.perf_counter()
        fn(*arguments)
        times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def bandwidth(device: str = "cuda") -> float:
    """Bytes per microsecond that a copy reads and writes."""
    size = _COPIED_BYTES if device == "cuda" else 1 << 20
    pairs = [tuple(torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2)) for _ in range(2)]
    return 2 * size / microseconds(lambda a, b: b.copy_(a), pairs)
