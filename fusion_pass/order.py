"""Whether ops can stand in a graph in place of what they replace: what each reads must not be computed from what it returns.

An op returns all at once what the graph computed one after another: codes, a scale, a sum. Where the graph computes one of
what it reads from one of these, or two ops read from each other, no order of the graph is left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import torch
from torch import fx

from .patterns.values import Values
from .sites import FusedSite, Miss, Report

_CYCLE = "what it reads is computed from what it, or another op that reads from it, would return"
_RANDOM = (
    "random numbers are drawn from what it would return before all that it reads is computed: they would be drawn later"
)


def decline(graph: fx.Graph, report: Report, values: Values) -> None:
    """Leave the sites that no order of the graph allows, and those that would reorder random operations.

    In a graph's own order, the least of what a site returns mostly follows the last of what it reads; nothing is searched then.
    """
    order: dict[fx.Node, int] = {}
    if report.fused:
        order = {node: i for i, node in enumerate(graph.nodes)}
    late = [site for site in report.fused if _last(site, order) > _first(site, values, order)]
    if not late:
        return
    drawing = [site for site in late if _draws_between(graph, site, values, order)]
    _leave(report, drawing, _RANDOM)
    while report.fused and (site := _on_cycle(report.fused, values, order)) is not None:
        _leave(report, [site], _CYCLE)


def _leave(report: Report, sites: Iterable[FusedSite], reason: str) -> None:
    for site in sites:
        report.fused.remove(site)
        report.missed.append(Miss("quantizer", reason, site.name, site.location))


def _read(site: FusedSite) -> list[fx.Node]:
    return [node for node in (site.x, site.other, site.weight, site.given) if node is not None]


def _returned(site: FusedSite, values: Values) -> Iterator[fx.Node]:
    """The nodes that rewriting replaces by outputs of the site's op."""
    scale = None if site.scale_copies else site.scale
    for core in (site.codes, scale, site.sum, site.value):
        if core is not None:
            yield from values.origins(core)
    yield from site.scale_copies
    if site.columns is not None:
        yield from _returned(site.columns, values)


def _last(site: FusedSite, order: dict[fx.Node, int]) -> int:
    return max(order[node] for node in _read(site))


def _first(site: FusedSite, values: Values, order: dict[fx.Node, int]) -> int:
    return min(order[node] for node in _returned(site, values))


def _draws_between(graph: fx.Graph, site: FusedSite, values: Values, order: dict[fx.Node, int]) -> bool:
    """Whether an operation that draws random numbers depends on what the site returns, before the last of what it reads."""
    dependent = set(_returned(site, values))
    first, last = _first(site, values, order), _last(site, order)
    for node in graph.nodes:
        if first < order[node] < last and not dependent.isdisjoint(node.all_input_nodes):
            dependent.add(node)
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                return True
    return False


def _on_cycle(sites: Collection[FusedSite], values: Values, order: dict[fx.Node, int]) -> FusedSite | None:
    """The last site of a cycle of the graph as it would be rewritten, or None if that has an order."""
    by: dict[fx.Node, FusedSite] = {}
    for site in sites:
        for node in _returned(site, values):
            by.setdefault(node, site)
    # A cycle passes through a site whose inputs come late, and never below what that returns.
    floor = min(_first(site, values, order) for site in sites)
    done: set[fx.Node] = set()
    for root in by:
        if root not in done and (cycle := _cycle_from(root, by, order, floor, done)):
            found = [by[node] for node in cycle if node in by]
            return max(found, key=lambda site: order[site.codes])
    return None


def _cycle_from(
    root: fx.Node, by: dict[fx.Node, FusedSite], order: dict[fx.Node, int], floor: int, done: set[fx.Node]
) -> list[fx.Node]:
    """The nodes of a cycle among those that root depends on; all of them are ``done`` if there is none."""

    def sources(node: fx.Node) -> Iterator[fx.Node]:
        read = _read(by[node]) if node in by else node.all_input_nodes
        return (source for source in read if order[source] >= floor)

    path = {root: sources(root)}
    while path:
        node, remaining = next(reversed(path.items()))
        source = next(remaining, None)
        if source is None:
            del path[node]
            done.add(node)
        elif source in path:
            nodes = list(path)
            return nodes[nodes.index(source) :]
        elif source not in done:
            path[source] = sources(source)
    return []
