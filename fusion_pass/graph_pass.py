"""The pass: plan, rewrite and lower one graph, and record what happened."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import fx

from . import cost, debug, distances, floats, hardware, hidden_casts, inductor, order, registration, settings
from .failures import ExpectedError, FusionPassError, Undo, contained, during, tell
from .inductor import CustomGraphPass, SchedulePass, counters, spread_schedule
from .lower import lower
from .patterns import op_table
from .plan import plan
from .rewrite import rewrite
from .sites import Miss, Report

# TORCH_LOGS=fusion_pass shows a line for each graph, TORCH_LOGS=+fusion_pass its sites and misses.
log = logging.getLogger("fusion_pass")


class UnfusedSiteError(ExpectedError):
    """With ``strict=True``, a quantizing cast was left unfused."""


def run(graph: fx.Graph, devices: Collection[str], *, strict: bool = False, to_kernels: bool = False) -> Report:
    """Fuse every provable site of ``graph`` on ``devices``, in place.

    If that fails, the graph is as it was, a :class:`fusion_pass.failures.FusionPassWarning` is given, and the report has a
    miss of kind ``failure``.

    Args:
        to_kernels: lower the fused ops on GPUs to Inductor's Triton-kernel nodes.
        strict: raise :class:`UnfusedSiteError` if a quantizing cast is left, and
            :class:`fusion_pass.failures.FusionPassError` if the pass fails.
    """
    errors: list[FusionPassError] = []
    limit, always = settings.limit(), settings.always()
    with _uncollected(), contained(graph, strict=strict, errors=errors) as undo, during("run"):
        return _run(graph, undo, devices, strict, to_kernels, limit, always)
    missed = [Miss("failure", str(error), error.site or "the graph", "an unknown line") for error in errors]
    return Report(missed=missed)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """No garbage collections: each walks every object of a compiling process, which takes longer than the pass."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _run(
    graph: fx.Graph,
    undo: Undo,
    devices: Collection[str],
    strict: bool,
    to_kernels: bool,
    limit: int | None,
    always: bool,
) -> Report:
    with during("plan"):
        report, values = plan(graph, devices)
        hardware.decline(report)
        if values is not None and not always:
            cost.decline(report, values)
        if values is not None:
            order.decline(graph, report, values)
    if not report.eligible and not report.missed:
        return report
    with during("record"):
        before = debug.picture(graph)
    if limit is not None:
        _limit(report, limit)
    undo.remember()
    if values is not None:
        with during("rewrite"):
            rewrite(graph, report.fused, values)
    with during("record"):
        debug.record(report, before, debug.picture(graph))
    if strict and (left := [m for m in report.missed if m.kind == "quantizer"]):
        raise UnfusedSiteError("left unfused:\n" + "\n".join(map(str, left)))
    if to_kernels:
        with during("lower"):
            lower(graph, report.fused)
    _count(report)
    if log.isEnabledFor(logging.INFO):
        log.info("%s", str(report).partition("\n")[0])
        log.debug("%s", report)
    return report


# How many sites the process has fused so far, for FUSION_PASS_LIMIT.
_applied = 0


def _limit(report: Report, limit: int) -> None:
    """Drop the sites beyond the first FUSION_PASS_LIMIT of the process; a site reads only what earlier ones return."""
    kept = max(0, limit - _applied)
    for number, site in enumerate(report.fused[kept:], start=_applied + kept + 1):
        reason = f"site {number} of the process, beyond FUSION_PASS_LIMIT={limit}"
        report.missed.append(Miss("limit", reason, site.name, site.location))
    del report.fused[kept:]


def _count(report: Report) -> None:
    global _applied
    _applied += len(report.fused)
    for site in report.fused:
        counters["fusion_pass"][site.name] += 1
        counters["fusion_pass"]["fused"] += 1
        counters["fusion_pass"]["shared"] += site.shared_by - 1
    for miss in report.missed:
        counters["fusion_pass"][f"missed_{miss.kind}"] += 1


class _InstalledPass(CustomGraphPass):  # type: ignore[misc]
    """A pass that stands in the config.

    Args and raises: as :func:`fusion_pass.register`.
    """

    def __init__(self, devices: Sequence[str] = ("cuda",), strict: bool = False) -> None:
        self.devices = tuple(sorted(registration.checked(devices)))
        self.strict = strict


class FusionPass(_InstalledPass):
    """The pass as Inductor calls it on every post-grad graph, or a manager of passes that has Inductor's slot.

    :func:`fusion_pass.register` installs it; whoever puts it into a manager must call that too, for what stands in
    Inductor's other slots.
    """

    def __call__(self, graph: fx.Graph) -> None:
        with contained(graph, strict=self.strict) as undo, during("show casts"):
            if hidden := hidden_casts.hidden(graph):
                undo.remember()
                hidden_casts.show(hidden)
        run(graph, self.devices, strict=self.strict, to_kernels=True)

    def uuid(self) -> Any:
        # None bypasses Inductor's cache: a registered op whose source cannot be found may change unseen, and which sites
        # of a graph a limit leaves depends on the graphs before it.
        if settings.limit() is not None:
            return None
        always = settings.always()
        return _cache_key(self.strict, lambda: self._key(always))

    def _key(self, always: bool) -> Any:
        table = op_table.fingerprint()
        return table and ("fusion_pass", source_hash(), self.devices, self.strict, always, table)


class CastGuard(_InstalledPass):
    """Hides casts from passes that would drop or replace them; :class:`FusionPass` shows them again.

    Before it does, floats that sites need as numbers become constants.
    """

    def __call__(self, graph: fx.Graph) -> None:
        floats.specialize(graph, self.devices, strict=self.strict)
        with contained(graph, strict=self.strict) as undo, during("hide casts"):
            casts = [] if inductor.KEEPS_ROUNDINGS else hidden_casts.roundings(graph)
            if casts := casts + hidden_casts.exponents(graph, self.devices):
                undo.remember()
                hidden_casts.hide(graph, casts)

    def uuid(self) -> Any:
        return _cache_key(self.strict, lambda: ("fusion_pass.hidden_casts", source_hash()))


class DistanceKeeper(SchedulePass):  # type: ignore[misc]
    """Has Inductor's scheduler count launches as the nodes they replaced; strict as :func:`fusion_pass.register` takes it."""

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict

    def __call__(self, nodes: list[Any]) -> list[Any]:
        try:
            with during("keep distances"):
                spread_schedule(nodes, distances.noted)
        except FusionPassError as error:
            if self.strict:
                raise
            tell(error)
        return nodes

    def uuid(self) -> Any:
        return _cache_key(self.strict, lambda: ("fusion_pass.distances", source_hash()))


def _cache_key(strict: bool, key: Callable[[], Any]) -> Any:
    """The key, or if there is none for an exception, None, which bypasses Inductor's cache."""
    try:
        with during("cache key"):
            return key()
    except FusionPassError as error:
        if strict:
            raise
        tell(error)
        return None


@cache
def source_hash() -> str:
    """A hash of the sources of the package, its patterns and its kernels, and of the versions of torch and Triton."""
    from . import kernels, patterns

    digest = hashlib.sha256(f"torch {torch.__version__} triton {triton.__version__}".encode())
    for folder in (Path(__file__), Path(kernels.__file__), Path(patterns.__file__)):
        for path in sorted(folder.parent.glob("*.py")):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
