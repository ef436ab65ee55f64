"""The pass: plan, rewrite and lower one graph, and record what happened."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import logging
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from torch import fx

from . import debug, rounding
from .inductor import CustomGraphPass, counters
from .lower import lower
from .patterns import op_table
from .plan import plan
from .rewrite import rewrite
from .sites import Report

log = logging.getLogger("fusion_pass")


class UnfusedSiteError(RuntimeError):
    """With ``strict=True``, a quantizing cast was left unfused."""


def run(graph: fx.Graph, devices: Collection[str], *, strict: bool = False, to_kernels: bool = False) -> Report:
    """Fuse every provable site of ``graph`` on ``devices``, in place.

    Args:
        to_kernels: lower the fused ops on GPUs to Inductor's Triton-kernel nodes.
        strict: raise :class:`UnfusedSiteError` if a quantizing cast is left.
    """
    with _uncollected():
        return _run(graph, devices, strict, to_kernels)


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


def _run(graph: fx.Graph, devices: Collection[str], strict: bool, to_kernels: bool) -> Report:
    report, values = plan(graph, devices)
    if not report.eligible and not report.missed:
        return report
    before = debug.text(graph)
    if values is not None:
        rewrite(graph, report.fused, values)
    debug.record(report, before, debug.text(graph))
    _count(report)
    if strict and (left := [m for m in report.missed if m.kind == "quantizer"]):
        raise UnfusedSiteError("left unfused:\n" + "\n".join(map(str, left)))
    if to_kernels:
        lower(graph, report.fused)
    return report


def _count(report: Report) -> None:
    for site in report.fused:
        counters["fusion_pass"][site.name] += 1
        counters["fusion_pass"]["fused"] += 1
        counters["fusion_pass"]["shared"] += site.shared_by - 1
    for miss in report.missed:
        counters["fusion_pass"][f"missed_{miss.kind}"] += 1


class FusionPass(CustomGraphPass):  # type: ignore[misc]
    """The pass as Inductor calls it on every post-grad graph."""

    def __init__(self, devices: Collection[str], strict: bool) -> None:
        self.devices = tuple(sorted(devices))
        self.strict = strict

    def __call__(self, graph: fx.Graph) -> None:
        rounding.show(graph)
        run(graph, self.devices, strict=self.strict, to_kernels=True)

    def uuid(self) -> Any:
        # None bypasses Inductor's cache: a registered op whose source cannot be found may change unseen.
        table = op_table.fingerprint()
        return table and ("fusion_pass", source_hash(), self.devices, self.strict, table)


class RoundingGuard(CustomGraphPass):  # type: ignore[misc]
    """Hides rounding points from Inductor's joint-graph passes; :class:`FusionPass` shows them again."""

    def __call__(self, graph: fx.Graph) -> None:
        rounding.hide(graph)

    def uuid(self) -> Any:
        return ("fusion_pass.rounding", source_hash())


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
