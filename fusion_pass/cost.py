"""Which sites would make a model slower, and are therefore left to Inductor.

An op reads its inputs from memory. Where a pointwise operation computes one that nothing else reads, Inductor would have
fused it with the quantizer; before an op it writes the values, and the op reads them: four bytes a value of 16 bits, 32 µs
at 8192 x 4096 on an H200. What ops save there, by docs/performance.md, is 4 to 15 µs against torch 2.15, and more than 32
against torch 2.11 only after SiLU. With few rows the second launch costs more than the op saves, too. Copies of rows are such
operations: of merged heads, of rows that are not evenly spaced in memory, of interleaved ones. Transposes are not: Inductor reads
those twice.

Where bits matter more than time, FUSION_PASS_ALWAYS=1 fuses such sites as well.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx

from .dense import row_distance
from .inductor import known
from .patterns.grammar import describe
from .patterns.values import Values, aten, same_shape, tensor
from .sites import FusedSite, Miss, Report
from .specs import Granularity

# Each value is one that is read: Inductor reads it in the kernel that needs it, as the tag of pointwise operations says of others.
_GATHERS = frozenset(
    {
        aten.constant_pad_nd.default,
        aten.embedding.default,
        aten.flip.default,
        aten.gather.default,
        aten.index.Tensor,
        aten.index_select.default,
    }
)


def decline(report: Report, values: Values) -> None:
    """Turn the sites of ``report`` that would lose time into misses of kind ``cost``."""
    report.decline(lambda site: _objection(site, values))


def _objection(site: FusedSite, values: Values) -> Miss | None:
    x = tensor(site.x)
    if x is None or x.device.type != "cuda" or not _saves_less(site):
        return None
    inputs = [node for node in (site.x, site.other) if node is not None]
    scattered = next((node for node in inputs if _is_scattered(node)), None)
    if scattered is not None:
        reason = f"rows of {scattered.name} are not evenly spaced and dense: copying them for the op to read would take"
        return _miss(site, scattered, reason)
    producer = next(filter(None, (_fused_producer(node, set(site.nodes), values) for node in inputs)), None)
    if producer is None:
        return None
    reason = (
        f"only this site reads {producer.name}, which Inductor fuses with it: writing it for the op to read would take"
    )
    return _miss(site, producer, reason)


def _miss(site: FusedSite, node: fx.Node, reason: str) -> Miss:
    whole = f"{reason} longer than the op saves (FUSION_PASS_ALWAYS=1 fuses nevertheless)"
    return Miss("cost", whole, f"{site.name}: {describe(node)}", site.location)


def _fused_producer(node: fx.Node, internal: set[fx.Node], values: Values) -> fx.Node | None:
    """The pointwise operation or the copy that computes an input for the nodes of a site alone; None if it is in memory anyway."""
    producer = _behind_views(node, values)
    if not (_is_pointwise(producer) or _is_copy(producer)):
        return None
    return producer if all(reader in internal for reader in _readers(producer, values)) else None


def _saves_less(site: FusedSite) -> bool:
    """Whether fusing would save less time than writing and rereading the input costs.

    Never for: a transpose, which Inductor reads twice; an amax of all values, for which it computes the producer twice; FP4 codes, on
    which ops save 1.3 to 3 times as long, and 1.3 us of few rows. And what is an op already has its inputs in memory.
    """
    if site.by_columns or site.columns is not None or site.quantizer.e2m1 is not None:
        return False
    if site.quantizer.granularity is Granularity.TENSOR and site.quantizer.needs_amax:
        return False
    return all(getattr(node.target, "namespace", "aten") in ("aten", "prims") for node in site.nodes)


def _behind_views(node: fx.Node, values: Values) -> fx.Node:
    while _is_view(node, values) and not _is_copy(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_view(node: fx.Node, values: Values) -> bool:
    if node.op != "call_function":
        return False
    part = node.target is operator.getitem
    return part or bool(getattr(node.target, "is_view", False)) or values.is_transparent(node)


def _is_copy(node: fx.Node) -> bool:
    """Whether node has the rows of its argument elsewhere in memory, and is no transpose."""
    source = tensor(node.args[0]) if node.target is aten.clone.default else None
    result = tensor(node)
    if source is None or result is None or _is_transposed(source):
        return False
    return not same_shape(source.stride(), result.stride())


def _is_scattered(node: fx.Node) -> bool:
    """Whether an op would copy node's rows before its kernel reads them."""
    value = tensor(node)
    return value is not None and value.dim() > 0 and not _is_transposed(value) and row_distance(value) is None


def _is_transposed(value: torch.Tensor) -> bool:
    """Whether neighbours in memory are of another dim than the last."""
    *others, last = value.stride() or (1,)
    # What an unbacked stride will be is not known.
    return not known(last == 1) and any(known(stride == 1) for stride in others)


def _is_pointwise(node: fx.Node) -> bool:
    return torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in _GATHERS


def _readers(node: fx.Node, values: Values) -> Iterator[fx.Node]:
    """Who reads node's values, behind any views."""
    for user in node.users:
        if _is_view(user, values):
            yield from _readers(user, values)
        else:
            yield user
