"""Recognise and plan: from a graph to the sites that can be fused, without changing it.

Every quantizing cast is named first. Casts of one value are then planned together: the first takes the value's prologue
(and returns the value if anything else reads it), the others quantize the value.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from .failures import during
from .inductor import lies_contiguous
from .kernels.launch import check_row
from .patterns.activations import ActivationSite, recognise_activation
from .patterns.fp4 import packs_codes
from .patterns.grammar import Failure, Search, describe
from .patterns.layouts import stored_copies
from .patterns.norms import NormSite, recognise_norm
from .patterns.opaque import (
    OpQuantizer,
    PackedActivation,
    may_be_known,
    mismatch,
    recognise_op,
    recognise_quantizer_op,
    returns_codes,
)
from .patterns.quantizers import QuantizerSite, casts_to_codes, quantizes, recognise_quantizer
from .patterns.values import FLOATS, Values, cast_dtype, dtype, readers, same_shape, same_size, shape, tensor
from .sites import FusedSite, Miss, Report, location
from .specs import FusedSpec, Granularity, NoPrologue, Quantizer, ScaleLayout, SpecError, decode
from .terms import Term, kind
from .transposes import read_in_place

# A prologue search that matched fewer operations than this saw an ordinary producer, not an unknown norm.
_NEAR_MISS = 2


def plan(
    graph: fx.Graph, devices: Collection[str], numbers: Mapping[fx.Node, float] = MappingProxyType({})
) -> tuple[Report, Values | None]:
    """The sites of ``graph`` on ``devices`` in topological order, and what was left, with the reason.

    Also the graph's values, which rewriting needs again, or None if it quantizes nothing.

    Args:
        numbers: inputs that are to be taken for constants.
    """
    planner = _Planner(graph, devices, numbers)
    return planner.run(), getattr(planner, "values", None)


@dataclass
class _Group:
    """The distinct quantizers of one value, and how many casts each serves."""

    quantizers: list[QuantizerSite]
    served: list[int]

    def __str__(self) -> str:
        return str(_Located(self.quantizers[0].codes))


@dataclass
class _Located:
    """An operation with the user's line, for messages: found only if one is given."""

    node: fx.Node

    def __str__(self) -> str:
        return f"{self.node.name}: {describe(self.node)} ({location(self.node)})"


class _Planner:
    values: Values

    def __init__(self, graph: fx.Graph, devices: Collection[str], numbers: Mapping[fx.Node, float]) -> None:
        self.graph = graph
        self.devices = devices
        self.numbers = numbers
        self.report = Report()
        # Most graphs quantize nothing: number their values only if they do.
        called = [n for n in graph.nodes if n.op == "call_function"]
        self.known = [n for n in called if may_be_known(n)]
        quantizers = {n for n in self.known if returns_codes(n)}
        # Packed codes first: the cast of an e4m3fn block scale is then known to be theirs.
        packed = [n for n in called if packs_codes(n) and self._on_device(n)]
        self.casts = packed + [n for n in called if (n in quantizers or casts_to_codes(n)) and self._on_device(n)]
        self.order: dict[fx.Node, int] = {}
        self.produced: set[fx.Node] = set()

    def _on_device(self, node: fx.Node) -> bool:
        value = tensor(node)
        return value is not None and value.device.type in self.devices

    def run(self) -> Report:
        for node in self.known:
            if (reason := mismatch(node)) is not None:
                self._refuse("op", reason, node)
        if self.casts:
            self.values = Values(self.graph)
            self.values.numbers.update(self.numbers)
            self.casts = [n for n in self.casts if returns_codes(n) or quantizes(n, self.values)]
            self.order = {node: i for i, node in enumerate(self.graph.nodes)}
            for value, group in self._groups().items():
                with during("plan", group):
                    self.report.fused += self._plan_group(value, group)
            self.report.fused = read_in_place(self.report.fused, self.values)
        return self.report

    def _groups(self) -> dict[fx.Node, _Group]:
        groups: dict[fx.Node, _Group] = {}
        found: dict[fx.Node, tuple[_Group, int]] = {}
        scales: set[fx.Node] = set()
        for cast in self.casts:
            core = self.values.core(cast)
            if core in scales:
                continue
            # A quantizer that is one op already is eligible if something fuses into it: _plan_group counts it then.
            self.report.eligible += casts_to_codes(cast) or packs_codes(cast)
            if core in found:
                group, index = found[core]
                group.served[index] += 1
                continue
            with during("plan", _Located(cast)):
                site: QuantizerSite | None = self._if_expressible("quantizer", cast, self._quantizer, cast)
            if site is not None:
                group = groups.setdefault(site.x, _Group([], []))
                found[core] = group, len(group.quantizers)
                group.quantizers.append(site)
                group.served.append(1)
                if site.reader is not None:
                    scales.update(site.reader.terms)
        return groups

    def _quantizer(self, cast: fx.Node) -> QuantizerSite | None:
        search = Search(self.values)
        if returns_codes(cast):
            found = recognise_quantizer_op(cast, search)
            if found is None:
                self._miss("op", search.failure, cast)
            return found
        if not shape(cast):
            self._refuse("quantizer", "a single value has no row", cast)
            return None
        site = recognise_quantizer(cast, search, _device(cast))
        if site is None:
            self._miss("quantizer", search.failure, cast)
        elif not _contiguous(cast):
            self._refuse("quantizer", "its codes are not contiguous", cast)
        else:
            return site
        return None

    def _plan_group(self, value: fx.Node, group: _Group) -> list[FusedSite]:
        sites: list[FusedSite] = []
        claimed: set[fx.Node] = set()
        for quantizer in group.quantizers:
            claimed |= {self.values.core(n) for n in quantizer.nodes}
        prologue = self._prologue(value, group)
        for quantizer, served in zip(group.quantizers, group.served, strict=True):
            site = None
            if prologue is not None:
                site = self._with_prologue(prologue, value, quantizer, claimed, alone=len(group.quantizers) == 1)
                prologue = None
                if site is not None and not self._runs(site, "prologue"):
                    site = None
            # An op quantizes in one kernel already: worth replacing only together with what it reads.
            if site is None and not isinstance(quantizer, OpQuantizer):
                site = self._bare(value, quantizer)
            if site is not None:
                claimed_here = claimed | {self.values.core(n) for n in site.nodes}
                site = self._with_layout(self._with_scale(site, quantizer, claimed_here), claimed_here, quantizer)
            if site is not None and self._runs(site, "quantizer"):
                site.shared_by = served
                site.location = location(*site.nodes[1:], site.codes)
                sites.append(site)
                self.report.eligible += served if isinstance(quantizer, OpQuantizer) else 0
        return sites

    def _if_expressible(
        self, kind: str, node: fx.Node, recognise: Callable[..., Any], argument: fx.Node | Search
    ) -> Any:
        """What was recognised; None, and a miss, if its numbers are none that specs or terms are made of."""
        try:
            return recognise(argument)
        except (ValueError, ArithmeticError, IndexError) as error:
            self._refuse(kind, f"no spec has what it computes: {error}", node)
            return None

    def _runs(self, site: FusedSite, kind: str) -> bool:
        """Whether the op takes the site's rows and can read its spec back; what it would raise is a miss of this site alone."""
        try:
            check_row(decode(site.spec.encode()), site.row)
        except SpecError:
            self._refuse(kind, "a bound or an operand is not finite, which specs cannot tell kernels", site.codes)
        except ValueError as error:
            self._refuse(kind, str(error), site.codes)
        else:
            return True
        return False

    def _prologue(self, value: fx.Node, group: _Group) -> NormSite | ActivationSite | None:
        """The norm or activation that computes value, if one does and every quantizer's rows divide its rows."""
        failures: list[Failure] = []
        for recognise in (
            lambda search: recognise_op(value, search),
            lambda search: recognise_norm(value, search, _device(value)),
            lambda search: recognise_activation(value, search),
        ):
            search = Search(self.values)
            site: NormSite | ActivationSite | None = self._if_expressible("prologue", value, recognise, search)  # type: ignore[assignment]
            if site is not None:
                length = group.quantizers[0].spec.group
                if length is None or site.size % length == 0:
                    return site
                self._refuse("prologue", f"groups of {length} do not divide rows of {site.size}", value)
                return None
            if search.failure is not None:
                failures.append(search.failure)
        deepest = max(failures, key=lambda f: f.depth, default=None)
        if deepest is not None and deepest.depth >= _NEAR_MISS:
            self._miss("prologue", deepest, value)
        return None

    def _with_prologue(
        self,
        prologue: NormSite | ActivationSite,
        value: fx.Node,
        quantizer: QuantizerSite,
        claimed: set[fx.Node],
        alone: bool,
    ) -> FusedSite | None:
        claimed = claimed | {self.values.core(n) for n in prologue.nodes}
        spec = prologue.spec
        x, other, weight, summed = self._inputs(prologue)
        sum_output = None
        if summed is not None and not self._feeds_only(summed, claimed):
            sum_output, summed = self._read_as(summed, claimed)
        else:
            summed = None
        value_needed = not alone or not self._feeds_only(value, claimed)
        # Further quantizers read the value as it is.
        value_output, valued = self._read_as(value, claimed) if alone else (dtype(value), value)
        if isinstance(prologue, NormSite) and prologue.residual is not None and other is None:
            spec = dataclasses.replace(prologue.spec, residual_sum=None)
        fused = FusedSpec(
            spec,
            _over_rows(quantizer, prologue.size),
            sum_output=sum_output,
            value_output=value_output if value_needed else None,
        )
        site = FusedSite(
            spec=fused,
            x=x,
            other=other,
            weight=weight,
            row=prologue.size,
            given=quantizer.given,
            codes=quantizer.codes,
            nodes=(*quantizer.nodes, *prologue.nodes),
            sum=summed,
            value=valued if value_needed else None,
            shape=shape(value),
            halves=prologue.halves if isinstance(prologue, PackedActivation) else None,
        )
        if not _contiguous(*(v for v in (site.sum, site.value) if v is not None)):
            self._refuse("prologue", "the residual sum or the value is read elsewhere and is not contiguous", value)
            return None
        if not self._acyclic(site):
            self._refuse("prologue", "an input of the norm is computed from its residual sum", value)
            return None
        self.produced |= {v for v in (site.sum, site.value) if v is not None}
        site.extras += tuple(n for n in ("sum", "value") if getattr(site, n) is not None)
        return site

    def _inputs(
        self, prologue: NormSite | ActivationSite
    ) -> tuple[fx.Node, fx.Node | None, fx.Node | None, fx.Node | None]:
        """x, other and weight as the op reads them, and the sum it adds up, if it does."""
        if isinstance(prologue, PackedActivation):
            return prologue.gate, prologue.up, None, None
        if isinstance(prologue, ActivationSite):
            wanted = shape(prologue.gate)
            up = None if prologue.up is None else self._input(prologue.up, wanted)
            return self._input(prologue.gate, wanted), up, None, None
        wanted = shape(prologue.x)
        weight = None if prologue.weight is None else self._input(prologue.weight, (prologue.size,))
        if prologue.gate is not None:
            return self._input(prologue.x, wanted), self._input(prologue.gate, wanted), weight, None
        if prologue.residual is None:
            return self._input(prologue.x, wanted), None, weight, None
        if prologue.sum is not None and prologue.sum in self.produced:
            # Another site already adds and returns this sum.
            return self._input(prologue.sum, wanted), None, weight, None
        return self._input(prologue.x, wanted), self._input(prologue.residual, wanted), weight, prologue.sum

    def _input(self, node: fx.Node, wanted: tuple[Any, ...]) -> fx.Node:
        """The deepest presentation of node's value that has its dtype and the wanted shape."""
        core = self.values.core(node)
        chain = [n for n in self.values.chain(node) if dtype(n) == dtype(core)]
        fitting = [n for n in chain if same_shape(shape(n), wanted)]
        return fitting[-1] if fitting else chain[0]

    def _bare(self, value: fx.Node, quantizer: QuantizerSite) -> FusedSite | None:
        used = [n for n in self.values.chain(quantizer.x_used) if dtype(n) == dtype(value)]
        presentation = self._row_of(used or [value], quantizer.spec.group)
        x = value if presentation is None else presentation
        length = quantizer.spec.group if presentation is None else shape(x)[-1]
        if not isinstance(length, int):
            self._refuse("quantizer", f"rows of {length} values; kernels take rows of a static length", value)
            return None
        return FusedSite(
            spec=FusedSpec(NoPrologue(), _over_rows(quantizer, length)),
            x=x,
            other=None,
            weight=None,
            given=quantizer.given,
            row=length,
            codes=quantizer.codes,
            nodes=quantizer.nodes,
            shape=shape(x),
        )

    def _row_of(self, used: list[fx.Node], group: int | None) -> fx.Node | None:
        """The deepest presentation whose rows are whole groups; longer ones say what the groups are groups of."""
        present = [n for n in used if shape(n) and isinstance(shape(n)[-1], int)]
        if group is None:
            return present[-1] if present else None
        divisible = [n for n in present if shape(n)[-1] % group == 0]
        divisible = [n for n in divisible if shape(n)[-1] > group] or divisible
        return divisible[-1] if divisible else None

    def _with_scale(self, site: FusedSite, quantizer: QuantizerSite, claimed: set[fx.Node]) -> FusedSite:
        """The site returning what the graph reads of its scales: the first such value, or what alone is made of it."""
        reader = quantizer.reader
        if reader is None:
            assert isinstance(quantizer, OpQuantizer)
            site.scale = quantizer.scale
            return site
        read = {core: term for core, term in reader.terms.items() if "amax" in term.leaves()}
        outside = [core for core in read if self._outside_uses(core, claimed)]
        if not outside:
            return site
        core = min(outside, key=lambda n: self.order[n])
        # The amax itself always can be.
        stored = core if _storable(core, read[core]) else min(read, key=lambda n: self.order[n])
        seen: set[fx.Node] = set()
        while len(outside) == 1:
            users = {self.values.core(user) for _, user in self._outside_uses(core, claimed | seen)}
            term = reader.follow(next(iter(users))) if len(users) == 1 else None
            if term is None:
                break
            seen.add(core)
            core = users.pop()
            read[core] = term
            if _storable(core, term):
                stored = core
        site.scale = stored
        site.spec = dataclasses.replace(
            site.spec,
            quantizer=dataclasses.replace(
                site.quantizer, scale=read[stored], scale_dtype=_scale_dtype(stored, read[stored])
            ),
        )
        return site

    def _with_layout(self, site: FusedSite, claimed: set[fx.Node], quantizer: QuantizerSite) -> FusedSite | None:
        """The site with the layout of its scales; None if it can have no other and cannot have that."""
        group = site.quantizer.group
        if site.scale is None:
            return site
        if isinstance(quantizer, OpQuantizer) and quantizer.rows is not None:
            site.scale_strided = quantizer.strided
            origins = tuple(self.values.origins(site.scale))
            if self._stored(site, ScaleLayout.COLUMN, origins, quantizer.rows, site.row):
                return site
            self._refuse("op", "its column-major scales have other rows than its producer's input", site.codes)
            return None
        outside = self._outside_uses(site.scale, claimed)
        if group is not None and outside:
            for rows, row in self._matrices(site, shape(outside[0][0])):
                layout, copies = stored_copies(outside, rows, row // group)
                if copies and self._stored(site, layout, copies, rows, row):
                    return site
        if not _contiguous(site.scale):
            self._refuse("quantizer", "its scales are not contiguous", quantizer.codes)
            return None
        return site

    def _matrices(self, site: FusedSite, presented: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], int]]:
        """Leading sizes of x and lengths of its rows that the scales may be matrices of: x's own, or as they are presented."""
        x, group = shape(site.x), site.quantizer.group
        assert group is not None and site.scale is not None
        own = x[:-1] if len(x) > 1 and same_size(x[-1], site.row) else ()
        all_rows = (_product(shape(site.scale)) // (site.row // group),)
        matrices = [(rows, site.row) for rows in (own, all_rows, presented[:-1]) if rows]
        # Without a prologue, only the scales say what a row is: flattened heads are quantized as heads.
        groups = presented[-1] if len(presented) > 1 and isinstance(site.prologue, NoPrologue) else None
        if isinstance(groups, int) and groups * group != site.row:
            matrices.append((presented[:-1], groups * group))
        return matrices

    def _stored(
        self,
        site: FusedSite,
        layout: ScaleLayout,
        copies: tuple[fx.Node, ...],
        rows: tuple[Any, ...],
        row: int,
    ) -> bool:
        """Have the site store scales in a layout, as of matrices of the given rows, if x can be presented as those."""
        if not all(same_shape(shape(copy), shape(copies[0])) for copy in copies):
            return False
        if layout is ScaleLayout.PACKED and site.quantizer.scale_dtype is not torch.uint8:
            return False
        has_rows = same_size(shape(site.x)[-1], row) and same_shape(shape(site.x)[:-1], rows)
        if not has_rows and sum(isinstance(size, torch.SymInt) for size in rows) > 1:
            return False
        site.spec = dataclasses.replace(site.spec, layout=layout)
        site.scale_copies, site.scale_rows, site.row = copies, rows, row
        return True

    def _read_as(self, value: fx.Node, claimed: set[fx.Node]) -> tuple[torch.dtype, fx.Node]:
        """The dtype in which a sum or value is read outside, and the node read: often only its rounding to bf16 is."""
        outside = {user for _, user in self._outside_uses(value, claimed)}
        casts = {self.values.core(user) for user in outside if cast_dtype(user) in FLOATS}
        # What the graph itself rounds to bf16 is bf16 before it is anything else.
        if (
            dtype(value) is torch.float32
            and len(casts) == 1
            and all(self.values.core(user) in casts for user in outside)
        ):
            cast = casts.pop()
            return dtype(cast), cast  # type: ignore[return-value]
        return dtype(value), value  # type: ignore[return-value]

    def _feeds_only(self, core: fx.Node, claimed: set[fx.Node]) -> bool:
        return not self._outside_uses(core, claimed)

    def _outside_uses(self, core: fx.Node, claimed: set[fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
        """(presentation, user) for every use of core's value, through views and casts, by an operation not claimed."""
        uses, pending = [], list(self.values.origins(core))
        while pending:
            node = pending.pop()
            for user in readers(node):
                if self.values.is_transparent(user) and self.values.core(user) is core:
                    pending.append(user)
                elif self.values.core(user) not in claimed:
                    uses.append((node, user))
        return uses

    def _acyclic(self, site: FusedSite) -> bool:
        """Whether every input comes before every value the op would produce."""
        inputs = [n for n in (site.x, site.other, site.weight, site.given) if n is not None]
        outputs = {o for v in (site.sum, site.value) if v is not None for o in self.values.origins(v)}
        first = min((self.order[o] for o in outputs), default=len(self.order))
        return not any(_depends_on(n, outputs, self.order, first) for n in inputs if self.order[n] > first)

    def _miss(self, kind: str, failure: Failure | None, node: fx.Node) -> None:
        if failure is None:
            self._refuse(kind, "no rule applies", node)
        else:
            reason = f"expected {failure.expected}, found {failure.seen}"
            self.report.missed.append(Miss(kind, reason, failure.node.name, location(failure.node, node)))

    def _refuse(self, kind: str, reason: str, node: fx.Node) -> None:
        self.report.missed.append(Miss(kind, reason, f"{node.name}: {describe(node)}", location(node)))


def _device(node: fx.Node) -> str:
    value = tensor(node)
    assert value is not None
    return str(value.device.type)


def _contiguous(*nodes: fx.Node) -> bool:
    """Fused ops return contiguous tensors; a consumer that relies on other strides must keep its producer."""
    return all(lies_contiguous(value) for value in map(tensor, nodes) if value is not None)


def _over_rows(quantizer: QuantizerSite, row: int) -> Quantizer:
    """The quantizer over rows of ``row`` values: groups as long as a row are per token, but those of FP4 codes stay groups."""
    if quantizer.spec.group != row or quantizer.spec.e2m1 is not None:
        return quantizer.spec
    return dataclasses.replace(quantizer.spec, group=None, granularity=Granularity.ROW)


def _product(sizes: Iterable[Any]) -> Any:
    return functools.reduce(operator.mul, sizes, 1)


def _storable(core: fx.Node, term: Term) -> bool:
    """Whether an op can return the value: a float, or an exponent as a byte."""
    if kind(term) == "i32":
        return dtype(core) in (torch.uint8, torch.float8_e8m0fnu)
    return dtype(core) in (*FLOATS, torch.float8_e4m3fn)


def _scale_dtype(core: fx.Node, term: Term) -> torch.dtype:
    if kind(term) == "i32":
        return torch.uint8
    return torch.float8_e4m3fn if dtype(core) is torch.float8_e4m3fn else torch.float32


def _depends_on(node: fx.Node, targets: set[fx.Node], order: dict[fx.Node, int], first: int) -> bool:
    seen: set[fx.Node] = set()
    pending: list[fx.Node] = [node]
    while pending:
        current = pending.pop()
        if current in targets:
            return True
        upstream: Iterable[fx.Node] = current.all_input_nodes
        for source in upstream:
            if source not in seen and order[source] >= first:
                seen.add(source)
                pending.append(source)
    return False
