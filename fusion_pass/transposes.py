"""Quantizers of a matrix's transpose: they read the matrix itself, and if its rows are quantized as well, read it once."""

from __future__ import annotations

import dataclasses

from torch import fx

from .cast_transpose import supports
from .patterns.layouts import swaps_last_two
from .patterns.values import FLOATS, Values, dtype, same_shape, shape
from .sites import FusedSite
from .specs import Granularity, NoPrologue, Quantizer, ScaleLayout


def read_in_place(sites: list[FusedSite], values: Values) -> list[FusedSite]:
    """The sites, those of transposes reading the matrix, and joined to the site that quantizes its rows alike, if one does."""
    by_rows: dict[object, FusedSite] = {}
    transposed: list[tuple[FusedSite, fx.Node]] = []
    for site in sites:
        matrix = _transposed_matrix(site, values) if _is_plain(site) else None
        if matrix is not None:
            transposed.append((site, matrix))
            if site.quantizer.granularity is Granularity.GROUP or not isinstance(shape(matrix)[0], int):
                site.x, site.by_columns = matrix, True
                site.spec = dataclasses.replace(site.spec, quantizer=_in_blocks(site))
        elif _is_plain(site) and same_shape(shape(site.x), shape(values.core(site.x))):
            by_rows[(values.core(site.x), site.row, _in_blocks(site))] = site
    for site, matrix in transposed:
        # The same values in rows of another length are another matrix.
        pair = by_rows.get((values.core(matrix), shape(matrix)[-1], _in_blocks(site)))
        if pair is not None and pair.columns is None:
            pair.spec = dataclasses.replace(pair.spec, quantizer=_in_blocks(pair))
            pair.columns = site
            pair.shared_by += site.shared_by
            sites = [s for s in sites if s is not site]
    return sites


def _is_plain(site: FusedSite) -> bool:
    return (
        isinstance(site.prologue, NoPrologue)
        and site.scale_layout is ScaleLayout.ROW
        and site.scale is not None
        and supports(_in_blocks(site))
    )


def _in_blocks(site: FusedSite) -> Quantizer:
    """The site's quantizer; one of whole rows, which the plan has where rows are as long as a block, as one of blocks."""
    if site.quantizer.granularity is not Granularity.ROW:
        return site.quantizer
    return dataclasses.replace(site.quantizer, group=site.row, granularity=Granularity.GROUP)


def _transposed_matrix(site: FusedSite, values: Values) -> fx.Node | None:
    """The matrix whose transpose a site quantizes, if it is one of whole blocks both ways."""
    core = values.core(site.x)
    if dtype(core) not in FLOATS or len(shape(core)) != 2 or not swaps_last_two(core):
        return None
    matrix, group = core.args[0], _in_blocks(site).group
    assert isinstance(matrix, fx.Node)
    assert group is not None
    rows, row = shape(matrix)
    if not isinstance(row, int) or row % group:
        return None
    if isinstance(rows, int):
        return matrix if rows % group == 0 and site.row == rows else None
    # Scales for each of the transpose's rows prove that a row, however long, is of whole blocks.
    assert site.scale is not None
    scales = shape(site.scale)
    return matrix if site.row == group and len(scales) > 1 and scales[0] == row else None
