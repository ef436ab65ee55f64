"""Tables of text, for terminals and for documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

Rows = Sequence[Sequence[str]]


def aligned(header: Sequence[str], rows: Rows) -> list[str]:
    """Lines of text whose columns are as wide as their widest cell."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return ["  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in lines]


def markdown(header: Sequence[str], rows: Rows) -> list[str]:
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in rows)]


def write_between_markers(document: Path, name: str, lines: Sequence[str]) -> None:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->`` in a document.

    Raises:
        ValueError: the document lacks the markers.
    """
    text, opening, closing = document.read_text(), f"<!-- {name} -->", f"<!-- /{name} -->"
    if opening not in text or closing not in text:
        raise ValueError(f"{document} lacks {opening} … {closing}; allowed: a document with both markers")
    before, rest = text.split(opening, 1)
    after = rest.split(closing, 1)[1]
    document.write_text("\n".join([before + opening, "", *lines, "", closing + after]))
