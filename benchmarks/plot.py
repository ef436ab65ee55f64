"""Draw results as SVG: for every site, the share of the copy bandwidth that each contestant reaches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from html import escape

from contestants import BARE, DEFAULT, OURS, TUNED
from results import Result, geometric_mean

_COLOURS = {OURS: "#1f77b4", BARE: "#999999", DEFAULT: "#d62728", TUNED: "#ff7f0e"}
_WIDTH, _HEIGHT, _MARGIN, _ACROSS = 250, 160, 34, 4
_LABEL_WIDTH = 20


def svg(results: Sequence[Result]) -> str:
    """A panel per site: M across (logarithmic), floor / time upwards, the geometric mean over row lengths and dtypes."""
    sites: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        sites[result.cell.site].append(result)
    down = -(-len(sites) // _ACROSS)
    width, height = _ACROSS * _WIDTH + 10, down * _HEIGHT + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for i, (name, colour) in enumerate(_COLOURS.items()):
        parts.append(
            f'<line x1="{20 + 130 * i}" y1="16" x2="{40 + 130 * i}" y2="16" stroke="{colour}" stroke-width="2"/>'
        )
        parts.append(f'<text x="{45 + 130 * i}" y="20">{name}</text>')
    parts.append('<text x="560" y="20">share of the copy bandwidth, by rows</text>')
    for i, (site, found) in enumerate(sites.items()):
        parts += _panel(site, found, i % _ACROSS * _WIDTH + 5, i // _ACROSS * _HEIGHT + 35)
    return "\n".join([*parts, "</svg>\n"])


def _panel(site: str, found: Sequence[Result], left: float, top: float) -> list[str]:
    inner_width, inner_height = _WIDTH - _MARGIN - 12, _HEIGHT - _MARGIN - 8
    x0, y0 = left + _MARGIN, top + 14
    counts = sorted({r.cell.rows for r in found})
    lowest, highest = math.log2(counts[0]), math.log2(counts[-1])

    def across(rows: int) -> float:
        return x0 + inner_width * ((math.log2(rows) - lowest) / (highest - lowest) if highest > lowest else 0.5)

    def up(share: float) -> float:
        return y0 + inner_height * (1 - min(share, 1.1) / 1.1)

    parts = [f'<text x="{x0}" y="{top + 8}" font-weight="bold">{escape(site)}</text>']
    for share in (0, 0.5, 1):
        parts.append(
            f'<line x1="{x0}" y1="{up(share):.1f}" x2="{x0 + inner_width}" y2="{up(share):.1f}" stroke="#ddd"/>'
        )
        parts.append(f'<text x="{x0 - 4}" y="{up(share) + 3:.1f}" text-anchor="end">{share:g}</text>')
    labelled = float("-inf")
    for rows in counts:
        if across(rows) - labelled >= _LABEL_WIDTH:
            labelled = across(rows)
            text = f"{rows // 1024}k" if rows >= 1024 else str(rows)
            parts.append(
                f'<text x="{labelled:.1f}" y="{y0 + inner_height + 11:.1f}" text-anchor="middle">{text}</text>'
            )
    for name, colour in _COLOURS.items():
        points = []
        for rows in counts:
            share = geometric_mean(r.floor / r.times[name] for r in found if r.cell.rows == rows and name in r.times)
            if share is not None:
                points.append((across(rows), up(share)))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2" fill="{colour}"/>' for x, y in points]
    return parts
