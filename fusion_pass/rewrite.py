"""Rewrite: put one fused op in the place of each planned site."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import torch
from torch import fx

from . import inductor, ops
from .cast_transpose import LINEAR, CastTransposeSpec
from .failures import during
from .patterns.values import CASTS, VIEWS, Values, aten, dtype, is_pure, same_shape, same_size, shape, tensor
from .sites import FusedSite
from .specs import GatedActivation, NoPrologue, RMSNorm

_PARTS = VIEWS | {
    aten.expand.default,
    aten.permute.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.t.default,
    aten.transpose.int,
    aten.unbind.int,
    operator.getitem,
}
# What may share its argument's memory; a clone never does.
_ALIASES = _PARTS - {aten.clone.default, aten.lift_fresh_copy.default} | {aten.view.dtype}
# Views that are told the sizes of their result.
_SIZED = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)


def rewrite(graph: fx.Graph, sites: Iterable[FusedSite], values: Values) -> None:
    """Insert the ops of ``sites``, give their outputs to the users of the values they replace, and drop what is dead."""
    editor = _Editor(graph, values)
    for site in sites:
        with during("rewrite", site):
            editor.insert(site)
    if editor.replaced:
        _erase_dead(graph, [*editor.replaced, *_read_sizes(graph)])
        inductor.sort_topologically(graph)


def _read_sizes(graph: fx.Graph) -> list[fx.Node]:
    """Replace the sizes that are read from tensors, which would keep these alive, where they are numbers after all."""
    sizes = {
        node: inductor.fixed_size(node.meta.get("val"))
        for node in graph.find_nodes(op="call_function", target=aten.sym_size.int)
    }
    numbers = {node: size for node, size in sizes.items() if isinstance(size, int)}
    for user in {user for node in numbers for user in node.users}:
        user.args, user.kwargs = fx.node.map_arg((user.args, user.kwargs), lambda n: numbers.get(n, n))
    return list(numbers)


def _erase_dead(graph: fx.Graph, replaced: Iterable[fx.Node]) -> None:
    """Erase what was replaced, and what only led to that: a pass over the whole graph would take longer than the rest."""
    pending = list(replaced)
    while pending:
        node = pending.pop()
        if node.users or node.op != "call_function" or node._erased or _has_effect(node):
            continue
        pending += node.all_input_nodes
        graph.erase_node(node)


def _has_effect(node: fx.Node) -> bool:
    return not is_pure(node) and node.is_impure()


class _Editor:
    def __init__(self, graph: fx.Graph, values: Values) -> None:
        self.graph = graph
        self.values = values
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        # Nodes that an earlier site replaced, where a later site's inputs may still name them.
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.evaluated: dict[str, Any] = {}
        # Outputs of ops whose memory the graph returns.
        self.returned: set[fx.Node] = set()

    def insert(self, site: FusedSite) -> None:
        inputs = [self._resolve(n) for n in (site.x, site.other, site.weight, site.given) if n is not None]
        # After the last input; the sort that follows moves users behind it.
        after = max(inputs, key=lambda n: self.order[n])
        self.cursor = after
        inputs = [self._before_cast(n) for n in inputs]
        site.op = self._transposing(site, *inputs) if site.by_columns or site.columns else self._fused(site, inputs)
        site.op.meta["stack_trace"] = next(
            (n.meta["stack_trace"] for n in site.nodes if n.meta.get("stack_trace")), None
        )
        outputs = [self._call(operator.getitem, (site.op, i)) for i in range(len(site.op.meta["val"]))]
        remaining = iter(outputs)
        self._replace(self.values.origins(site.codes), next(remaining))
        if site.scale_copies:
            scale = self._as_stored(site.scale_copies[0], next(remaining))
            self._replace(site.scale_copies, self._swapped(scale) if site.scale_strided else scale)
        elif site.scale is not None:
            self._replace_scale(site.scale, next(remaining))
        for value in (site.sum, site.value):
            if value is not None:
                self._replace(self.values.origins(value), next(remaining))
        if site.columns is not None:
            assert site.columns.scale is not None
            self._replace(self.values.origins(site.columns.codes), next(remaining))
            self._replace_scale(site.columns.scale, next(remaining))

    def _before_cast(self, node: fx.Node) -> fx.Node:
        """node's values as a part of what was cast, if node is a part of an exact cast; else node.

        The halves of ``x.float()`` are in memory only if Inductor writes them for the op to read; those of x are there. On a CPU, eager
        activations of the one have other bits than those of a copy of the other, by how they lie in memory.
        """
        value = tensor(node)
        if value is None or value.device.type == "cpu":
            return node
        steps: list[fx.Node] = []
        whole = node
        while whole.target in _PARTS and not whole.kwargs:
            steps.append(whole)
            whole = whole.args[0]  # type: ignore[assignment]
        if not steps or whole.target not in CASTS or not self.values.is_transparent(whole):
            return node
        part: fx.Node = whole.args[0]  # type: ignore[assignment]
        for step in reversed(steps):
            part = self._call(step.target, (part, *step.args[1:]))
        return part

    def _fused(self, site: FusedSite, inputs: list[fx.Node]) -> fx.Node:
        x, other, weight, given = self._present(site, inputs)
        arguments = {NoPrologue: (x,), RMSNorm: (x, other, weight), GatedActivation: (x, other)}[type(site.prologue)]
        return self._call(ops.OPS[type(site.prologue)], (*arguments, given, site.spec.encode()))

    def _transposing(self, site: FusedSite, matrix: fx.Node) -> fx.Node:
        spec = CastTransposeSpec(site.quantizer, None if site.by_columns else LINEAR)
        return self._call(torch.ops.fusion_pass.cast_transpose.default, (matrix, *spec.arguments()))

    def _as_stored(self, copy: fx.Node, scale: fx.Node) -> fx.Node:
        """Scales in the dtype of the copy they replace: packed exponents are read as words."""
        return scale if dtype(copy) == dtype(scale) else self._call(aten.view.dtype, (scale, dtype(copy)))

    def _present(self, site: FusedSite, inputs: list[fx.Node]) -> tuple[fx.Node | None, ...]:
        """x, other and weight in the shapes the op takes: rows of ``site.row`` values, other as x, weight flat."""
        remaining = iter(inputs)
        x, other, weight, given = (
            None if n is None else next(remaining) for n in (site.x, site.other, site.weight, site.given)
        )
        assert x is not None
        if site.halves is not None:
            x, other = self._halves(x, site.row, site.halves)
        if not same_size(shape(x)[-1] if shape(x) else 1, site.row):
            x = self._call(aten.reshape.default, (x, [-1, site.row]))
        if site.scale_rows is not None and not same_shape(shape(x)[:-1], site.scale_rows):
            # At most one is symbolic.
            rows = [-1 if isinstance(size, torch.SymInt) else size for size in site.scale_rows]
            x = self._call(aten.reshape.default, (x, [*rows, site.row]))
        if other is not None and not same_shape(shape(other), shape(x)):
            other = self._call(aten.reshape.default, (other, self._sizes(x)))
        if weight is not None and len(shape(weight)) != 1:
            weight = self._call(aten.reshape.default, (weight, [site.row]))
        return x, other, weight, given

    def _halves(self, both: fx.Node, row: int, halves: tuple[int, int]) -> list[fx.Node]:
        """The halves of the rows of one tensor, in the given order; views, not copies."""
        if not same_size(shape(both)[-1], 2 * row):
            both = self._call(aten.reshape.default, (both, [-1, 2 * row]))
        last = len(shape(both)) - 1
        return [self._call(aten.slice.Tensor, (both, last, half * row, (half + 1) * row)) for half in halves]

    def _swapped(self, scale: fx.Node) -> fx.Node:
        rank = len(shape(scale))
        return self._call(aten.permute.default, (scale, [*range(rank - 2), rank - 1, rank - 2]))

    def _resolve(self, node: fx.Node) -> fx.Node:
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def _replace_scale(self, core: fx.Node, scale: fx.Node) -> None:
        """Ops return f32 or byte scales; one the graph computed in bf16 is cast back for those who read it as such."""
        for origin in self.values.origins(core):
            if dtype(origin) == dtype(scale):
                self._replace([origin], scale)
                continue
            if dtype(scale) is torch.uint8:
                self._replace([origin], self._call(aten.view.dtype, (scale, dtype(origin))))
                continue
            self._replace(self._widened(origin, dtype(scale)), scale)
            self._replace([origin], self._call(torch.ops.prims.convert_element_type.default, (scale, dtype(origin))))

    def _widened(self, origin: fx.Node, wanted: torch.dtype | None) -> list[fx.Node]:
        """The exact casts of origin's value to ``wanted``, behind any views."""
        found: list[fx.Node] = []
        pending = [origin]
        while pending:
            for user in pending.pop().users:
                if self.values.is_transparent(user):
                    (found if dtype(user) == wanted else pending).append(user)
        return found

    def _replace(self, nodes: Iterable[fx.Node], output: fx.Node) -> None:
        for node in nodes:
            if not node.users:
                continue
            view = output
            if not same_shape(shape(output), shape(node)):
                view = self._call(aten.reshape.default, (output, list(self._sizes(node))))
            if _is_returned(node):
                view = self._unshared(view)
            node.replace_all_uses_with(view)
            self.replaced[node] = view

    def _unshared(self, view: fx.Node) -> fx.Node:
        """A view of an op's output, or a copy if the graph returns that already: eager's results are tensors of their own.

        What computed one value twice is one op, but callers may write into one result and still read the other.
        """
        output = view
        while output.target in _ALIASES and output.target is not operator.getitem:
            output = output.args[0]  # type: ignore[assignment]
        if output in self.returned:
            return self._call(aten.clone.default, (view,))
        self.returned.add(output)
        return view

    def _sizes(self, node: fx.Node) -> list[Any]:
        """node's sizes as arguments of a view: at most one symbolic size is inferred, more are read from the graph."""
        sizes: list[Any] = list(shape(node))
        unread = [i for i, size in enumerate(sizes) if isinstance(size, torch.SymInt)]
        for dim in unread[:] if len(unread) > 1 else ():
            size = self._size(node, dim)
            if size is not None:
                sizes[dim] = size
                unread.remove(dim)
        if len(unread) > 1:
            raise RuntimeError(f"no tensors have the symbolic sizes {[sizes[dim] for dim in unread]} of {node.name}")
        return [-1 if i in unread else size for i, size in enumerate(sizes)]

    def _size(self, node: fx.Node, dim: int) -> fx.Node | None:
        """The number that the size of a dim is: read from a tensor, or computed before node was."""
        source = self._source_of(node, dim)
        if source is not None:
            return self._call(aten.sym_size.int, source)
        number = self._numbers.get(shape(node)[dim].node.expr)
        return number if number is not None and self.order[number] < self.order[node] else None

    @cached_property
    def _numbers(self) -> dict[Any, fx.Node]:
        """The sizes that the graph has as values: its inputs, what it computes of them, and what it tells views."""
        numbers: dict[Any, fx.Node] = {}
        for node in self.graph.nodes:
            if isinstance(node.meta.get("val"), torch.SymInt):
                numbers.setdefault(node.meta["val"].node.expr, node)
            elif node.target in _SIZED and len(node.args) == 2 and tensor(node) is not None:
                for size, told in zip(shape(node), node.args[1], strict=True):
                    if isinstance(size, torch.SymInt) and isinstance(told, fx.Node):
                        numbers.setdefault(size.node.expr, told)
        return numbers

    def _source_of(self, node: fx.Node, dim: int) -> tuple[fx.Node, int] | None:
        """A tensor and its dim of that size: an input or output of the op, never the node that goes away or a view."""
        for candidate in reversed(list(self.order)):
            value = tensor(candidate)
            if value is None or candidate is node or self.order[candidate] > self.order[self.cursor]:
                continue
            for i, size in enumerate(value.shape):
                if same_size(size, shape(node)[dim]) and not self.values.is_transparent(candidate):
                    return candidate, i
        return None

    def _call(self, target: Any, args: tuple[Any, ...]) -> fx.Node:
        with self.graph.inserting_after(self.cursor):
            node = self.graph.call_function(target, args)
        if target is operator.getitem:
            node.meta["val"] = args[0].meta["val"][args[1]]
        else:
            node.meta["val"] = self._evaluated(target, args)
        self.order[node] = self.order[self.cursor]
        self.cursor = node
        return node

    def _evaluated(self, target: Any, args: tuple[Any, ...]) -> Any:
        """The call's fake result. Layers repeat: calls alike share one, and Inductor gives each its own storage."""
        key = str((target, fx.node.map_arg(args, _described)))
        if key not in self.evaluated:
            values = fx.node.map_arg(args, lambda n: n.meta["val"])
            with inductor.fake_mode_of(self.graph):
                self.evaluated[key] = target(*values)
        return self.evaluated[key]


def _is_returned(node: fx.Node) -> bool:
    """Whether the graph returns node's memory, as it is or behind views."""
    seen = {node}
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user.op == "output":
                return True
            if user.target in _ALIASES and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _described(node: fx.Node) -> str:
    """A tensor's metadata, or a size's expression, as text."""
    value = tensor(node)
    if value is None:
        return str(node.meta["val"])
    return f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()} {value.storage_offset()}"
