"""Show what the pass did: printed or written to files with FUSION_PASS_DEBUG, and always in the structured trace."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from torch import fx

from . import settings
from .inductor import trace_log, trace_structured
from .sites import Report

_numbers = itertools.count()


def text(graph: fx.Graph) -> str:
    """The graph as readable code, or nothing if no one would read it."""
    if settings.debug() is False and not _tracing():
        return ""
    module = fx.GraphModule({}, graph) if graph.owning_module is None else graph.owning_module
    return _without_source_comments(fx.GraphModule(module, graph).print_readable(print_output=False))


def _without_source_comments(code: str) -> str:
    return "\n".join(line for line in code.splitlines() if line.strip())


def _tracing() -> bool:
    return bool(trace_log.handlers)


def record(report: Report, before: str, after: str) -> None:
    """One rewritten graph: to the structured trace, and wherever FUSION_PASS_DEBUG says."""
    for name, payload in (("before", before), ("after", after)):
        trace_structured(
            "artifact",
            metadata_fn=lambda name=name: {"name": f"fusion_pass_{name}", "encoding": "string"},  # type: ignore[misc]
            payload_fn=lambda payload=payload: payload,  # type: ignore[misc]
        )
    where = settings.debug()
    if where is False:
        return
    if isinstance(where, Path):
        _write(where, report, before, after)
    else:
        print(f"fusion_pass: {report}\n\nrewritten graph:\n{after}", file=sys.stderr)


def _write(folder: Path, report: Report, before: str, after: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"graph_{next(_numbers)}"
    stem.with_suffix(".txt").write_text(f"{report}\n")
    stem.with_suffix(".before.py").write_text(before)
    stem.with_suffix(".after.py").write_text(after)
