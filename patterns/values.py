"""Which nodes of a graph hold the same value, and where that value was rounded.

Eager code writes one value many ways: `x.float()` twice, a view before or after a cast, a clone. Patterns look at values,
not at nodes, so that a rule names an operation once and matches it behind any of these.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.immutable_collections import immutable_dict, immutable_list

from fusion_pass.inductor import fixed_size, stored_number

from . import op_table

aten = torch.ops.aten
prims = torch.ops.prims

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Order-preserving: the flattened result is the flattened argument.
VIEWS = frozenset(
    {
        aten.view.default,
        aten._unsafe_view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.alias.default,
        aten.detach.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.lift_fresh_copy.default,
        prims.view_of.default,
    }
)
CASTS = frozenset({prims.convert_element_type.default, aten._to_copy.default})


def tensor(node: Any) -> torch.Tensor | None:
    """The fake tensor a node stands for, or None if it stands for something else."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a node's tensor, numbers where they are known to be."""
    return tuple([fixed_size(size) for size in sizes(node)])


def sizes(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a node's tensor as they were computed: functions of the sizes they depend on, also where they are known to be numbers."""
    value = tensor(node)
    assert value is not None
    return tuple(value.shape)


def readers(node: fx.Node) -> list[fx.Node]:
    """The users of a node's values, which its sizes are not."""
    return [user for user in node.users if user.target is not aten.sym_size.int]


def dtype(node: fx.Node) -> torch.dtype | None:
    value = tensor(node)
    return None if value is None else value.dtype


def cast_dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype a cast node converts to, or None if the node is not a plain cast on one device."""
    if node.target not in CASTS:
        return None
    source, result = tensor(node.args[0]), tensor(node)
    if source is None or result is None or source.device != result.device:
        return None
    return result.dtype


def _is_rounding(node: fx.Node) -> bool:
    """Whether node is a cast from one float dtype to another."""
    source = node.args[0] if node.args else None
    return cast_dtype(node) in FLOATS and isinstance(source, fx.Node) and dtype(source) in FLOATS


def _widens(source: torch.dtype, target: torch.dtype) -> bool:
    return source == target or (source in (torch.bfloat16, torch.float16) and target == torch.float32)


class Values:
    """The value numbering of one graph.

    ``core(node)`` is the first node that computes node's value, behind order-preserving views, copies and exact casts.
    Two nodes hold the same values in the same flat order if their cores are the same node.
    """

    def __init__(self, graph: fx.Graph) -> None:
        # Cores that hold one number each, or None, as far as anyone has asked.
        self.numbers: dict[fx.Node, float | None] = {}
        self._core: dict[fx.Node, fx.Node] = {}
        self._source: dict[fx.Node, fx.Node] = {}
        self._origins: dict[fx.Node, list[fx.Node]] = {}
        first: dict[Any, fx.Node] = {}
        for node in graph.nodes:
            source = _transparent_source(node)
            if source is not None:
                self._source[node] = source
                self._core[node] = self._core[source]
                continue
            key = self._key(node) if is_pure(node) else _lifted(node) or self._call_key(node)
            core = node if key is None else first.setdefault(key, node)
            self._core[node] = core
            self._origins.setdefault(core, []).append(node)

    def core(self, node: fx.Node) -> fx.Node:
        return self._core.get(node, node)

    def origins(self, core: fx.Node) -> list[fx.Node]:
        """Every node that computes the value of ``core`` anew; views, copies and exact casts of it follow from these."""
        return self._origins.get(core, [core])

    def is_transparent(self, node: fx.Node) -> bool:
        """Whether node only presents its argument's value: a view, a copy or an exact cast."""
        return self._transparent_source(node) is not None

    def unrounded(self, node: fx.Node) -> tuple[fx.Node, torch.dtype] | None:
        """The operation beneath node and the dtype its f32 result is rounded to, or None if it is rounded to two.

        An operation on bf16 tensors computes in f32 and rounds: its rounding is its own dtype.
        """
        core = self.core(node)
        rounding: torch.dtype | None = torch.float32
        while _is_rounding(core):
            target = dtype(core)
            if rounding not in (torch.float32, target):
                return None
            rounding = target
            core = self.core(core.args[0])  # type: ignore[arg-type]
        own = dtype(core)
        if own is torch.bfloat16 or own is torch.float16:
            if rounding not in (torch.float32, own):
                return None
            rounding = own
        assert rounding is not None
        return core, rounding

    def is_rounding(self, node: Any) -> bool:
        """Whether node is a cast that rounds floats."""
        return isinstance(node, fx.Node) and self.core(node) is node and _is_rounding(node)

    def unrounded_dtype(self, node: Any) -> torch.dtype | None:
        """The narrowest dtype that is known to hold node's value exactly."""
        return dtype(self.core(node)) if isinstance(node, fx.Node) else None

    def chain(self, node: fx.Node) -> Iterator[fx.Node]:
        """node, and what lies beneath its views, copies and exact casts, down to the core."""
        source: fx.Node | None = node
        while source is not None:
            yield source
            source = self._transparent_source(source)

    def _transparent_source(self, node: fx.Node) -> fx.Node | None:
        # Rewriting adds nodes after the numbering.
        return self._source.get(node) or (None if node in self._core else _transparent_source(node))

    def _key(self, node: fx.Node) -> Any:
        return (node.target, self._freeze(node.args), self._freeze(node.kwargs))

    def _call_key(self, node: fx.Node) -> Any:
        """Calls of a known custom op that read the same give the same, whatever buffers they write."""
        call = op_table.read(node)
        return None if call is None else (call.identity(), self._freeze(call.reads()))

    def _freeze(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            result = tensor(value)
            core = self.core(value)
            # A view changes what a reduction or a broadcast does with the same value.
            return core if result is None else (core, _dims(result.shape), result.dtype)
        if isinstance(value, (list, tuple, immutable_list)):
            return tuple(map(self._freeze, value))
        if isinstance(value, (dict, immutable_dict)):
            return tuple((k, self._freeze(v)) for k, v in value.items())
        # 1, 1.0 and True are equal but not the same argument; so are 0.0 and -0.0.
        return (type(value), repr(value) if isinstance(value, float) else value)


def _dims(sizes: Any) -> tuple[Any, ...]:
    return tuple([s.node.expr if isinstance(s, torch.SymInt) else s for s in sizes])


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal, without adding a guard on symbolic ones."""
    return bool(_dims([a]) == _dims([b]))


def same_shape(a: Any, b: Any) -> bool:
    return bool(_dims(a) == _dims(b))


def _lifted(node: fx.Node) -> Any:
    """A key of the number that tracing lifted out of the code, once for each time it was written."""
    number = stored_number(node) if node.op == "get_attr" else None
    value = tensor(node)
    if number is None or value is None or number != number:
        return None
    return ("number", repr(number), value.dtype, value.device, value.dim())


def _transparent_source(node: fx.Node) -> fx.Node | None:
    view = node.target in VIEWS
    if not view and node.target not in CASTS:
        return None
    source = node.args[0]
    if tensor(node) is None or tensor(source) is None:
        return None
    assert isinstance(source, fx.Node)
    if view:
        return source
    target = cast_dtype(node)
    return source if target is not None and _widens(dtype(source), target) else None  # type: ignore[arg-type]


def is_pure(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and node.target.namespace in ("aten", "prims")
        and not node.target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in node.target.tags
    )
