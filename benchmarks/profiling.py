"""Which kernels a step launches and what they take, and which of them differ between two compilations of one model."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType

_STEPS = 3
# What Triton compiled: Inductor's kernels, and the fused ones.
_COMPILED = re.compile(r"triton_|fused_quant_(split_)?kernel|cast_transpose_kernel")


class Launches(NamedTuple):
    """How often a step launches a kernel, and the milliseconds of all these launches."""

    count: float
    ms: float


Profile = dict[str, Launches]


def profile(step: Callable[[], Any], device: str) -> Profile:
    """The kernels of a step by name, means of a few steps; on a CPU its operations, for rehearsals."""
    activity = torch.profiler.ProfilerActivity.CUDA if device == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        for _ in range(_STEPS):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    for event in profiler.events():
        if _is_kernel(event, device):
            found[event.name].append(event.time_range.elapsed_us() / 1e3)
    return {name: Launches(len(times) / _STEPS, sum(times) / _STEPS) for name, times in found.items()}


def _is_kernel(event: Any, device: str) -> bool:
    if device != "cuda":
        return event.cpu_parent is None
    return (
        event.device_type == DeviceType.CUDA
        and not event.name.startswith(("Memcpy", "Memset"))
        and not getattr(event, "is_user_annotation", False)
    )


def whole(of: Profile) -> Launches:
    """All kernels together."""
    return Launches(sum(k.count for k in of.values()), sum(k.ms for k in of.values()))


def longest(of: Profile, count: int = 12) -> list[tuple[str, float, float]]:
    """The kernels that take the most time: name, launches, milliseconds."""
    return [(name, *launches) for name, launches in sorted(of.items(), key=lambda item: -item[1].ms)[:count]]


def only_in(one: Profile, other: Profile) -> float:
    """Milliseconds of those launches of Triton-compiled kernels in ``one`` that ``other`` has no counterpart of.

    A kernel's counterpart has its name, without the number that Inductor appends in each graph. Where ``one`` launches kernels of
    a name more often, the surplus counts, at their mean time.
    """
    counterparts = _numberless(other)
    total = 0.0
    for name, (count, ms) in _numberless(one).items():
        surplus = count - counterparts.get(name, Launches(0, 0)).count
        total += ms * max(0.0, surplus) / count
    return total


def _numberless(of: Profile) -> Profile:
    merged: Profile = {}
    for full, launches in of.items():
        if _COMPILED.search(full):
            name = re.sub(r"_\d+$", "", full)
            before = merged.get(name, Launches(0, 0))
            merged[name] = Launches(before.count + launches.count, before.ms + launches.ms)
    return merged
