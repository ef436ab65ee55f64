"""Where each scale layout keeps the scale of row m, group g: what patterns recognise a layout by, and kernels write.

Sizes and indices may be numbers, symbolic sizes or tensors.
"""

from __future__ import annotations

from typing import Any

from .specs import ScaleLayout

# TMA descriptors need strides of 16 bytes: four float32 scales, or four words of packed exponents.
TMA_ROWS = 4
_ALIGNED = (ScaleLayout.TMA, ScaleLayout.PACKED)


def aligned_rows(layout: ScaleLayout, rows: Any) -> Any:
    """The distance of two columns, in rows."""
    return ceil_to(rows, TMA_ROWS) if layout in _ALIGNED else rows


def allocated(layout: ScaleLayout, rows: Any, groups: int) -> list[Any]:
    """The contiguous shape in which the scales of one matrix are stored, padding included."""
    if layout is ScaleLayout.ROW:
        return [rows, groups]
    if layout is ScaleLayout.PACKED:
        return [-(-groups // 4), aligned_rows(layout, rows), 4]
    if layout is ScaleLayout.BLOCKED:
        return [ceil_to(rows, 128) * ceil_to(groups, 4)]
    if layout is ScaleLayout.SHUFFLED:
        return [ceil_to(rows, 32) * ceil_to(groups, 8)]
    return [groups, aligned_rows(layout, rows)]


def has_padding(layout: ScaleLayout, rows: Any, groups: int) -> bool:
    """Whether some of what is stored is no scale, or may be none where rows are symbolic."""
    if layout in (ScaleLayout.ROW, ScaleLayout.COLUMN):
        return False
    if not isinstance(rows, int):
        return True
    stored = 1
    for size in allocated(layout, rows, groups):
        stored *= size
    return stored != rows * groups


def address(layout: ScaleLayout, m: Any, g: Any, rows: Any, groups: int) -> Any:
    """The offset of a scale from the first of its matrix."""
    if layout is ScaleLayout.ROW:
        return m * groups + g
    if layout is ScaleLayout.PACKED:
        return (g // 4 * aligned_rows(layout, rows) + m) * 4 + g % 4
    if layout is ScaleLayout.BLOCKED:
        tile = m // 128 * (ceil_to(groups, 4) // 4) + g // 4
        return tile * 512 + m % 32 * 16 + m % 128 // 32 * 4 + g % 4
    if layout is ScaleLayout.SHUFFLED:
        tile = m // 32 * 32 * ceil_to(groups, 8) + g // 8 * 256
        return tile + g % 4 * 64 + m % 16 * 4 + g % 8 // 4 * 2 + m % 32 // 16
    return g * aligned_rows(layout, rows) + m


def ceil_to(size: Any, multiple: int) -> Any:
    """``size`` rounded up to a multiple of ``multiple``."""
    return (size + multiple - 1) // multiple * multiple
