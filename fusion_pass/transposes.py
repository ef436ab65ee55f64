"""Quantizers of a matrix's transpose: they read the matrix itself, and if its rows are quantized as well, read it once."""

from __future__ import annotations

from torch import fx

from .cast_transpose import supports
from .patterns.layouts import swaps_last_two
from .patterns.values import FLOATS, Values, dtype, shape
from .sites import FusedSite
from .specs import NoPrologue, ScaleLayout


def read_in_place(sites: list[FusedSite], values: Values) -> list[FusedSite]:
    """The sites, those of transposes reading the matrix, and joined to the site that quantizes its rows alike, if one does."""
    by_rows: dict[object, FusedSite] = {}
    transposed: list[FusedSite] = []
    for site in sites:
        matrix = _transposed_matrix(site, values) if _is_plain(site) else None
        if matrix is not None:
            site.x, site.by_columns = matrix, True
            transposed.append(site)
        elif _is_plain(site) and shape(site.x) == shape(values.core(site.x)):
            by_rows[(values.core(site.x), site.quantizer)] = site
    for site in transposed:
        pair = by_rows.get((values.core(site.x), site.quantizer))
        if pair is not None and pair.columns is None:
            pair.columns = site
            pair.shared_by += site.shared_by
            sites = [s for s in sites if s is not site]
    return sites


def _is_plain(site: FusedSite) -> bool:
    return (
        isinstance(site.prologue, NoPrologue)
        and site.scale_layout is ScaleLayout.ROW
        and site.scale is not None
        and supports(site.quantizer)
    )


def _transposed_matrix(site: FusedSite, values: Values) -> fx.Node | None:
    """The matrix whose transpose a site quantizes, if it is one of whole blocks both ways."""
    core = values.core(site.x)
    if dtype(core) not in FLOATS or len(shape(core)) != 2 or not swaps_last_two(core):
        return None
    matrix, group = core.args[0], site.quantizer.group
    assert isinstance(matrix, fx.Node)
    assert group is not None
    sizes = shape(matrix)
    if not all(isinstance(size, int) and size % group == 0 for size in sizes) or site.row != sizes[0]:
        return None
    return matrix
