"""Where each scale layout keeps the scale of row m, group g: what patterns recognise a layout by, and kernels write.

Sizes and indices may be numbers, symbolic sizes or tensors.
"""

from __future__ import annotations

from typing import Any

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


def address(layout: ScaleLayout, m: Any, g: Any, rows: Any, groups: int) -> Any:
    """The offset of a scale from the first of its matrix."""
    rows, groups = padded(layout, rows, groups)
    if layout is ScaleLayout.ROW:
        return m * groups + g
    if layout is ScaleLayout.PACKED:
        return (g // 4 * rows + m) * 4 + g % 4
    if layout is ScaleLayout.BLOCKED:
        tile = m // 128 * (groups // 4) + g // 4
        return tile * 512 + m % 32 * 16 + m % 128 // 32 * 4 + g % 4
    if layout is ScaleLayout.SHUFFLED:
        tile = m // 32 * 32 * groups + g // 8 * 256
        return tile + g % 4 * 64 + m % 16 * 4 + g % 8 // 4 * 2 + m % 32 // 16
    return g * rows + m


def ceil_to(size: Any, multiple: int) -> Any:
    """``size`` rounded up to a multiple of ``multiple``."""
    return size if multiple == 1 else (size + multiple - 1) // multiple * multiple
