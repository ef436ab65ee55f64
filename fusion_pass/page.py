"""One graph as a self-contained HTML page: its sites in colour before the pass, the fused ops after it, misses with their reasons."""

from __future__ import annotations

import html
import itertools
import linecache
import re
from collections.abc import Iterable, Mapping, Sequence

from .sites import FusedSite, Miss, Report
from .traffic import Traffic

_GOLDEN_ANGLE = 137.508
_ASSIGNED = re.compile(r"\s+(?P<name>\w+)\s*(?::|=)")
_PLACE = re.compile(r"(?P<file>.+):(?P<line>\d+) in \S+")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --paper: #fff; --soft: #f3f4f6; --line: #d5d8dc; --quiet: #5c6670; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --paper: #15181b; --soft: #1f2428; --line: #3a4147; --quiet: #9aa4ad; } }
body { margin: 1.5rem; font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
h1 { font-size: 1.3rem; } h2 { font-size: 1.05rem; margin-top: 1.8rem; }
table { border-collapse: collapse; width: 100%; } th, td { text-align: left; vertical-align: top; padding: .35rem .6rem; border-bottom: 1px solid var(--line); }
td:not(.number) { overflow-wrap: anywhere; min-width: 6rem; } td:first-child { min-width: 0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; } th { color: var(--quiet); font-weight: 600; }
code, pre { font: 12.5px/1.5 ui-monospace, monospace; } a { color: inherit; }
.quiet { color: var(--quiet); }
.graphs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 40rem), 1fr)); gap: 1rem; }
pre { margin: 0; padding: .6rem 0; overflow-x: auto; background: var(--soft); border: 1px solid var(--line); }
pre span { display: block; min-width: max-content; padding: 0 .8rem; border-left: 4px solid transparent; }
.site { background: hsl(var(--h) 80% 50% / .2); border-left-color: hsl(var(--h) 80% 50%); }
.missed { border-left-color: #d33; text-decoration: underline wavy #d33; }
.chip { display: inline-block; width: .9em; height: .9em; vertical-align: -.1em; background: hsl(var(--h) 80% 50% / .2); border: 2px solid hsl(var(--h) 80% 50%); }
:target { outline: 2px solid currentColor; }
"""


def page(
    report: Report,
    before: str,
    after: str,
    traffic_before: Mapping[str, Traffic],
    traffic_after: Mapping[str, Traffic],
    title: str,
) -> str:
    """The page, as text.

    Args:
        before, after: the graph as code, without and with the pass.
        traffic_before, traffic_after: what each operation moves, by its node's name.
    """
    sites = {node.name: i for i, site in enumerate(report.fused) for node in site.nodes}
    ops = {name: i for i, site in enumerate(report.fused) for name in _op_names(site)}
    misses = {re.split(r"\W", miss.node)[0]: i for i, miss in enumerate(report.missed)}
    rows = [_site_row(i, site, traffic_before, traffic_after) for i, site in enumerate(report.fused)]
    total = (sum(t.values(), Traffic()) for t in (traffic_before, traffic_after))
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{_text(title)}</h1>",
            *_summary(report, *total),
            *_table("Sites", ("", "site", "where", "operations", "moved by them", "moved by the op"), rows),
            *_table(
                "Misses",
                ("kind", "reason", "stopped at", "where"),
                itertools.starmap(_miss_row, enumerate(report.missed)),
            ),
            '<div class="graphs">',
            *_graph("Before", before, "before", sites, misses),
            *_graph("After", after, "after", ops, {}),
            "</div></body></html>",
            "",
        ]
    )


def _op_names(site: FusedSite) -> list[str]:
    return [] if site.op is None else [site.op.name, *(user.name for user in site.op.users)]


def _summary(report: Report, before: Traffic, after: Traffic) -> Iterable[str]:
    served = sum(site.shared_by for site in report.fused)
    yield f"<p><b>{len(report.fused)}</b> fused ops serve <b>{served}</b> of {report.eligible} quantizing casts.</p>"
    saved = f"{_size(before.bytes)} → {_size(after.bytes)}, {before.kernels} → {after.kernels} kernels"
    yield (
        f"<p>The whole graph moves: <b>{saved}</b>. <span class=quiet>An estimate from shapes, of eager execution: every operation "
        "that is no view is a kernel that reads its tensors and writes its results whole; symbolic sizes count as their hints. "
        "Inductor fuses some of these operations by itself.</span></p>"
    )


def _table(title: str, columns: Sequence[str], rows: Iterable[str]) -> Iterable[str]:
    found = list(rows)
    yield f"<h2>{_text(title)} ({len(found)})</h2>"
    if found:
        yield f"<table><tr>{''.join(f'<th>{_text(c)}</th>' for c in columns)}</tr>"
        yield from found
        yield "</table>"


def _site_row(i: int, site: FusedSite, before: Mapping[str, Traffic], after: Mapping[str, Traffic]) -> str:
    replaced = sum((before.get(name, Traffic()) for name in {n.name for n in site.nodes}), Traffic())
    op = Traffic() if site.op is None else after.get(site.op.name, Traffic())
    shape = "×".join(map(str, site.shape))
    details = str(site).partition("]")[2].rpartition(" at ")[0]
    return (
        f'<tr id="site-{i}"><td><a href="#before-{i}" title="its operations"><span class="chip" style="--h:{_hue(i)}"></span></a></td>'
        f'<td><a href="#after-{i}"><b>{_text(site.name)}</b></a> [{_text(shape)}]{_text(details)}</td>{_place(site.location)}'
        f'<td class="number">{replaced.kernels}</td><td class="number">{_size(replaced.bytes)}</td>'
        f'<td class="number">{_size(op.bytes)}</td></tr>'
    )


def _miss_row(i: int, miss: Miss) -> str:
    return (
        f'<tr id="miss-{i}"><td>{_text(miss.kind)}</td><td>{_text(miss.reason)}</td>'
        f'<td><a href="#missed-{i}"><code>{_text(miss.node)}</code></a></td>{_place(miss.location)}</tr>'
    )


def _place(location: str) -> str:
    """A cell with the user's file and line, and the line itself."""
    match = _PLACE.fullmatch(location)
    line = linecache.getline(match["file"], int(match["line"])).strip() if match else ""
    return f"<td><code>{_text(line)}</code><br><span class=quiet>{_text(location)}</span></td>"


def _graph(title: str, code: str, prefix: str, sites: Mapping[str, int], misses: Mapping[str, int]) -> Iterable[str]:
    """The code line by line, each that computes a node of a site in its colour."""
    yield f"<div><h2>{title}</h2><pre>"
    anchored: set[int] = set()
    lines = []
    for line in code.splitlines():
        match = _ASSIGNED.match(line)
        name = match["name"] if match else ""
        attributes = ""
        if name in sites:
            i = sites[name]
            anchor = "" if i in anchored else f' id="{prefix}-{i}"'
            anchored.add(i)
            attributes = f'{anchor} class="site" style="--h:{_hue(i)}"'
        elif name in misses:
            attributes = f' id="missed-{misses[name]}" class="missed"'
        lines.append(f"<span{attributes}>{_text(line)}</span>")
    yield "".join(lines)
    yield "</pre></div>"


def _hue(i: int) -> int:
    """Hues that are far apart for sites that are close."""
    return round(210 + i * _GOLDEN_ANGLE) % 360


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def _text(value: object) -> str:
    return html.escape(str(value))
