"""Which sites would make a model slower, and are therefore left to Inductor.

An op reads its inputs from memory. Where a pointwise operation computes one that nothing else reads, Inductor would have
fused it with the quantizer; before an op it writes the values, and the op reads them: four bytes a value of 16 bits, 32 µs
at 8192 x 4096 on an H200. What ops save there, by docs/performance.md, is 4 to 15 µs against torch 2.15, and more than 32
against torch 2.11 only after SiLU. With few rows the second launch costs more than the op saves, too.

Where bits matter more than time, FUSION_PASS_ALWAYS=1 fuses such sites as well.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from .patterns.grammar import describe
from .patterns.values import Values, tensor
from .sites import FusedSite, Miss, Report
from .specs import Granularity


def decline(report: Report, values: Values) -> None:
    """Turn the sites of ``report`` that would lose time into misses of kind ``cost``."""
    report.decline(lambda site: _objection(site, values))


def _objection(site: FusedSite, values: Values) -> Miss | None:
    producer = _fused_producer(site, values)
    if producer is None:
        return None
    reason = (
        f"only this site reads {producer.name}, which Inductor fuses with it: writing it for the op to read would take"
        " longer than the op saves (FUSION_PASS_ALWAYS=1 fuses nevertheless)"
    )
    return Miss("cost", reason, f"{site.name}: {describe(producer)}", site.location)


def _fused_producer(site: FusedSite, values: Values) -> fx.Node | None:
    """The pointwise operation that computes an input of the site for it alone; None if each is in memory anyway."""
    x = tensor(site.x)
    if x is None or x.device.type != "cuda" or not _measured(site):
        return None
    internal = set(site.nodes)
    for node in (site.x, site.other):
        if node is None:
            continue
        producer = _behind_views(node, values)
        if _is_pointwise(producer) and all(reader in internal for reader in _readers(producer, values)):
            return producer
    return None


def _measured(site: FusedSite) -> bool:
    """Not: a transpose, which Inductor reads twice; an amax of all values, for which it computes the producer twice.

    And what is an op already has its inputs in memory.
    """
    if site.by_columns or site.columns is not None:
        return False
    if site.quantizer.granularity is Granularity.TENSOR and site.quantizer.needs_amax:
        return False
    return all(getattr(node.target, "namespace", "aten") in ("aten", "prims") for node in site.nodes)


def _behind_views(node: fx.Node, values: Values) -> fx.Node:
    while _is_view(node, values):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_view(node: fx.Node, values: Values) -> bool:
    if node.op != "call_function":
        return False
    part = node.target is operator.getitem
    return part or bool(getattr(node.target, "is_view", False)) or values.is_transparent(node)


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def _readers(node: fx.Node, values: Values) -> Iterator[fx.Node]:
    """Who reads node's values, behind any views."""
    for user in node.users:
        if _is_view(user, values):
            yield from _readers(user, values)
        else:
            yield user
