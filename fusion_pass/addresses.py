"""Where each scale layout keeps the scale of row m, group g: what patterns recognise a layout by, and kernels write.

Sizes and indices may be numbers, symbolic sizes or tensors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from .specs import ScaleLayout

# TMA descriptors need strides of 16 bytes: four float32 scales, or four words of packed exponents.
TMA_ROWS = 4
_MULTIPLES = {
    ScaleLayout.TMA: (TMA_ROWS, 1),
    ScaleLayout.PACKED: (TMA_ROWS, 4),
    ScaleLayout.BLOCKED: (128, 4),
    ScaleLayout.SHUFFLED: (32, 8),
}


def multiples(layout: ScaleLayout) -> tuple[int, int]:
    """Of how many rows, and of how many groups, what is stored is a multiple."""
    return _MULTIPLES.get(layout, (1, 1))


def padded(layout: ScaleLayout, rows: Any, groups: int) -> tuple[Any, int]:
    """For how many rows and groups there is room, padding included."""
    of_rows, of_groups = multiples(layout)
    return ceil_to(rows, of_rows), ceil_to(groups, of_groups)


def allocated(layout: ScaleLayout, rows: Any, groups: int) -> list[Any]:
    """The contiguous shape in which the scales of one matrix are stored, padding included."""
    rows, groups = padded(layout, rows, groups)
    if layout is ScaleLayout.ROW:
        return [rows, groups]
    if layout is ScaleLayout.PACKED:
        return [groups // 4, rows, 4]
    if layout in (ScaleLayout.BLOCKED, ScaleLayout.SHUFFLED):
        return [rows * groups]
    return [groups, rows]


def has_padding(layout: ScaleLayout, rows: Any, groups: int) -> bool:
    """Whether some of what is stored is no scale, or may be none where rows are symbolic."""
    if layout in (ScaleLayout.ROW, ScaleLayout.COLUMN):
        return False
    return not isinstance(rows, int) or padded(layout, rows, groups) != (rows, groups)


class Part(NamedTuple):
    """A part of a scale's row or group: that index // step % size. The uppermost part of rows has no size: they are as many as there are."""

    of: str
    step: int
    size: int | None


def order(layout: ScaleLayout, groups: int) -> tuple[Part, ...]:
    """What the offset of a scale counts in each layout, the slowest first, of so many groups with their padding."""
    row, group = Part("row", 1, None), Part("group", 1, groups)
    of_four = Part("group", 1, 4)
    if layout is ScaleLayout.ROW:
        return row, group
    if layout is ScaleLayout.PACKED:
        return Part("group", 4, groups // 4), row, of_four
    if layout is ScaleLayout.BLOCKED:
        tiles = Part("row", 128, None), Part("group", 4, groups // 4)
        return *tiles, Part("row", 1, 32), Part("row", 32, 4), of_four
    if layout is ScaleLayout.SHUFFLED:
        tiles = Part("row", 32, None), Part("group", 8, groups // 8)
        return *tiles, of_four, Part("row", 1, 16), Part("group", 4, 2), Part("row", 16, 2)
    return group, row


def address(layout: ScaleLayout, m: Any, g: Any, rows: Any, groups: int) -> Any:
    """The offset of a scale from the first of its matrix."""
    rows, groups = padded(layout, rows, groups)
    offset, stride = 0, 1
    for part in reversed(order(layout, groups)):
        size = rows // part.step if part.size is None else part.size
        offset = offset + (m if part.of == "row" else g) // part.step % size * stride
        stride = stride * size
    return offset


def ceil_to(size: Any, multiple: int) -> Any:
    """``size`` rounded up to a multiple of ``multiple``."""
    return size if multiple == 1 else (size + multiple - 1) // multiple * multiple
