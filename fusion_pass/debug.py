"""Show what the pass did: printed or written to files with FUSION_PASS_DEBUG, and always in the structured trace."""

from __future__ import annotations

import contextlib
import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

from torch import fx

from . import settings
from .inductor import trace_log, trace_structured
from .page import page
from .sites import Report
from .traffic import Traffic, of_graph

_numbers = itertools.count()

# Each graph has one of these files: its number is taken.
_CLAIMS = _REPORT, _FAILED = (".txt", ".failed.txt")


@dataclass(frozen=True)
class Picture:
    """A graph as it was: its code, and what each operation moves; empty if no one would look at them."""

    code: str = ""
    traffic: dict[str, Traffic] = field(default_factory=dict)


def picture(graph: fx.Graph) -> Picture:
    where = settings.debug()
    if where is False and not _tracing():
        return Picture()
    return Picture(code(graph), of_graph(graph) if isinstance(where, Path) else {})


def code(graph: fx.Graph) -> str:
    """The graph as readable code."""
    module = fx.GraphModule({}, graph) if graph.owning_module is None else graph.owning_module
    return _without_source_comments(fx.GraphModule(module, graph).print_readable(print_output=False))


def _without_source_comments(code: str) -> str:
    return "\n".join(line for line in code.splitlines() if line.strip())


def _tracing() -> bool:
    return bool(trace_log.handlers)


def record(report: Report, before: Picture, after: Picture) -> None:
    """One rewritten graph: to the structured trace, and wherever FUSION_PASS_DEBUG says."""
    for name, payload in (("before", before.code), ("after", after.code)):
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
        print(f"fusion_pass: {report}\n\nrewritten graph:\n{after.code}", file=sys.stderr)


def record_failure(traceback: str) -> None:
    """A failure of the pass, where FUSION_PASS_DEBUG says."""
    where = settings.debug()
    if isinstance(where, Path):
        _claimed(where, _FAILED).write_text(traceback, encoding="utf-8")
    elif where:
        print(f"fusion_pass: {traceback}", file=sys.stderr)


def _write(folder: Path, report: Report, before: Picture, after: Picture) -> None:
    text = _claimed(folder, _REPORT)
    text.write_text(f"{report}\n", encoding="utf-8")
    stem = text.with_suffix("")
    stem.with_suffix(".before.py").write_text(before.code, encoding="utf-8")
    stem.with_suffix(".after.py").write_text(after.code, encoding="utf-8")
    shown = page(report, before.code, after.code, before.traffic, after.traffic, f"fusion-pass: {stem.name}")
    stem.with_suffix(".html").write_text(shown, encoding="utf-8")


def _claimed(folder: Path, suffix: str) -> Path:
    """A new file ``graph_N`` of the next number that no graph in the folder has: ranks and workers may share the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        stem = folder / f"graph_{next(_numbers)}"
        if not any(stem.with_suffix(kind).exists() for kind in _CLAIMS):
            with contextlib.suppress(FileExistsError):
                stem.with_suffix(suffix).touch(exist_ok=False)
                return stem.with_suffix(suffix)
