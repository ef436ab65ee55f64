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
_LONG_CALL_US = 500.0
_WARM_UP_US = 20_000.0  # an idle GPU's clock takes milliseconds to rise
_COPIED_BYTES = 256 << 20


def buffer_count(moved: int) -> int:
    """How many sets of buffers are rotated, where a call moves ``moved`` bytes.

    As many as exceed the L2 cache, but at most 64: calls that move less than 0.8 MB find their inputs in the cache, like
    a model's, and so do all that they are compared with.
    """
    return min(_MOST_BUFFERS, max(2, math.ceil(_ROTATED_BYTES / moved)))


def microseconds(fn: Callable[..., Any], buffers: Sequence[tuple[Any, ...]], replays: int = 20) -> float:
    """The median time of one call over ``replays`` replays of a CUDA graph that calls fn on every buffer in turn."""
    return median(timed(fn, buffers), replays)


def median(replay: Callable[[], float], replays: int = 20) -> float:
    """The median of what a function of :func:`timed` returns."""
    return statistics.median(replay() for _ in range(replays))


def in_turns(replays: dict[str, Callable[[], float]], rounds: int = 20) -> dict[str, float]:
    """The medians of functions of :func:`timed` that are called in turns, so that what changes with time affects all alike."""
    samples = [[replay() for replay in replays.values()] for _ in range(rounds)]
    return {name: statistics.median(column) for name, column in zip(replays, zip(*samples, strict=True), strict=True)}


def timed(fn: Callable[..., Any], buffers: Sequence[tuple[Any, ...]]) -> Callable[[], float]:
    """A function that replays a CUDA graph of calls of fn on every buffer, and returns the time of one in microseconds.

    A graph holds at least 20 calls, or where they are long (0.5 ms on the GPU) one per buffer. The clock is up already.
    """
    if buffers[0][0].device.type != "cuda":
        wall = _on_the_wall(fn, buffers)
        return lambda: wall
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in [*buffers, *buffers][:3]:
            fn(*arguments)
    torch.cuda.synchronize()
    alone = _captured(fn, buffers[:1])
    alone()
    long = _elapsed(alone) > _LONG_CALL_US
    del alone
    count = len(buffers) if long else max(_LEAST_CALLS, len(buffers))
    replay = _captured(fn, [buffers[i % len(buffers)] for i in range(count)])
    warm = 0.0
    while warm < _WARM_UP_US:
        warm += _elapsed(replay)
    return lambda: _elapsed(replay) / count


def _captured(fn: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> Callable[[], None]:
    """A replay of the calls. What they return is kept with it, so that each writes to memory of its own."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [fn(*arguments) for arguments in calls]

    def replay() -> None:
        assert kept
        graph.replay()

    return replay


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
