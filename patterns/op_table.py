"""The table of registered custom ops: what each computes, and how its calls stand in a graph.

A library's fused norm, activation or quantizer is one node that no rule over aten operations can read. An entry says what
the op computes, as a spec, and which of its arguments and results play which part.
"""

from __future__ import annotations

import hashlib
import inspect
import operator
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx

from fusion_pass.inductor import parse_schema
from fusion_pass.specs import GatedActivation, Quantizer, RMSNorm

Described = RMSNorm | GatedActivation | Quantizer
Describe = Callable[..., Described | str]

_FORMS = (torch.ops.higher_order.auto_functionalized, torch.ops.higher_order.auto_functionalized_v2)

# The parts that a norm, an activation and a quantizer have, and those they may have.
_PARTS: tuple[tuple[type, frozenset[str], frozenset[str]], ...] = (
    (RMSNorm, frozenset({"x", "value"}), frozenset({"residual", "weight", "sum"})),
    (GatedActivation, frozenset({"gate", "up", "value"}), frozenset()),
    (GatedActivation, frozenset({"gate_up", "value"}), frozenset()),
    (GatedActivation, frozenset({"up_gate", "value"}), frozenset()),
    (Quantizer, frozenset({"x", "codes", "scale"}), frozenset()),
)


@dataclass(frozen=True)
class Entry:
    """One op of the table.

    Attributes:
        schema: as the op's library defines it.
        kind: RMSNorm, GatedActivation or Quantizer.
        describe: from the op's arguments to a spec of that kind, or to a sentence that says why there is none.
        inputs: the argument that plays each part.
        outputs: the argument that takes each result, or the index of the return that is it.
    """

    schema: torch.FunctionSchema
    kind: type
    describe: Describe
    inputs: Mapping[str, str]
    outputs: Mapping[str, str | int]

    @property
    def name(self) -> str:
        return _name(self.schema)

    def reads(self, argument: str) -> bool:
        """Whether the op reads an argument: all but the buffers that it only writes."""
        return argument in self.inputs.values() or argument not in self.outputs.values()

    def fingerprint(self) -> str | None:
        """What the entry depends on, for cache keys; None if that cannot be told."""
        source = _source(self.describe)
        parts = (self.schema, sorted(self.inputs.items()), sorted(self.outputs.items()), source)
        return None if source is None else repr(parts)


_TABLE: dict[str, list[Entry]] = {}


def register_op(
    schema: str,
    spec: Describe,
    *,
    x: str | None = None,
    residual: str | None = None,
    weight: str | None = None,
    gate: str | None = None,
    up: str | None = None,
    gate_up: str | None = None,
    up_gate: str | None = None,
    value: str | int | None = None,
    sum: str | int | None = None,
    codes: str | int | None = None,
    scale: str | int | None = None,
) -> None:
    """Say what a custom op computes, so that the pass fuses it with the quantizer that reads it, or into its producer.

        fusion_pass.register_op(
            "mylib::rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
            lambda x, weight, eps: RMSNorm(eps, product=x.dtype),
            x="x", weight="weight", value=0,
        )

    What fuses then computes the spec, not the op: where the op's own kernel departs from its contract by a unit in the
    last place (a fast division, another order of summation), results do too.

    Args:
        schema: the op's schema, overload included, as its library or ``str(op._schema)`` gives it. An installed op of
            this name with other argument names, types or mutations is left alone.
        spec: called with every argument by its name, except the buffers that the op only writes. Tensors are fake: they
            have shapes and dtypes. Returns an ``RMSNorm``, ``GatedActivation`` or ``Quantizer`` of
            :mod:`fusion_pass.specs`, or a sentence that says why this call must be left alone.
        x, residual, weight: the arguments that a norm reads; ``x`` also names what a quantizer reads: (..., N) floats.
        gate, up: the arguments of a gated activation; or ``gate_up`` or ``up_gate``, one tensor of both halves.
        value: a norm's or activation's result: the argument the op writes it to, or the index of the return that it is.
        sum: likewise, x + residual.
        codes, scale: likewise, the results of a quantizer: (..., N), and float32 with one value per row or group.

    Raises:
        ValueError: the schema cannot be parsed, the parts do not make up a norm, activation or quantizer, a part names no
            argument or return, the op writes an argument that has no part, or ``spec`` does not take the op's arguments.
    """
    inputs = {"x": x, "residual": residual, "weight": weight}
    inputs |= {"gate": gate, "up": up, "gate_up": gate_up, "up_gate": up_gate}
    outputs = {"value": value, "sum": sum, "codes": codes, "scale": scale}
    try:
        parsed = parse_schema(_text(schema))
    except RuntimeError as error:
        raise ValueError(f"schema is {schema!r}; allowed: the schema of an op ({error})") from None
    given = {part: v for part, v in inputs.items() if v is not None}
    results = {part: v for part, v in outputs.items() if v is not None}
    entry = Entry(parsed, _kind([*given, *results]), spec, given, results)
    _check(entry)
    same = [e for e in _TABLE.get(entry.name, []) if signature(e.schema) != signature(parsed)]
    _TABLE[entry.name] = [*same, entry]


def unregister_op(name: str) -> None:
    """Take the op ``name``, as ``"mylib::rms_norm"``, out of the table, in every schema; also those the package knows.

    Raises:
        ValueError: the table has no such op.
    """
    if name not in _TABLE:
        raise ValueError(f"name is {name!r}; allowed: a registered op, one of {', '.join(sorted(_TABLE))}")
    del _TABLE[name]


def fingerprint() -> str | None:
    """A hash of the table for cache keys; None if it has an entry whose source cannot be found."""
    parts = [entry.fingerprint() for entries in _TABLE.values() for entry in entries]
    if None in parts:
        return None
    return hashlib.sha256("\n".join(sorted(map(str, parts))).encode()).hexdigest()


def _kind(given: Collection[str]) -> type:
    for kind, required, optional in _PARTS:
        if required <= set(given) <= required | optional:
            return kind
    raise ValueError(
        f"the parts are {', '.join(given) or 'none'}; allowed: x, value and optionally residual, weight and sum for a norm, "
        "value and gate and up, gate_up or up_gate for an activation, x, codes and scale for a quantizer"
    )


def _check(entry: Entry) -> None:
    arguments = {a.name: a for a in entry.schema.arguments}
    written = {a.name for a in entry.schema.arguments if _is_written(a)}
    for part, name in entry.inputs.items():
        if name not in arguments:
            raise ValueError(f"{part} is {name!r}; allowed: an argument of {_text(entry.schema)}")
    for part, result in entry.outputs.items():
        allowed = range(len(entry.schema.returns)) if isinstance(result, int) else written
        if result not in allowed:
            raise ValueError(
                f"{part} is {result!r}; allowed: an argument that is written or a return of {entry.schema}"
            )
    if unexplained := written - set(entry.outputs.values()):
        raise ValueError(f"no part names {', '.join(sorted(map(str, unexplained)))}, written by {_text(entry.schema)}")
    passed = {name: None for name in arguments if entry.reads(name)}
    try:
        inspect.signature(entry.describe).bind(**passed)
    except TypeError as error:
        raise ValueError(f"spec is called with {', '.join(passed)}, which it does not take: {error}") from None


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def _text(schema: Any) -> str:
    """The schema as its library writes it: ``Tensor!`` prints as ``Tensor($0! -> )``, which does not parse."""
    return re.sub(r"\(\$\d+! -> \)", "!", str(schema))


def _name(schema: Any) -> str:
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else str(schema.name)


def signature(schema: Any) -> Any:
    """What must agree for an entry to describe an op: arguments by name, type and mutation, and the types returned."""
    arguments = tuple((a.name, str(a.type), _is_written(a)) for a in schema.arguments)
    return _name(schema), arguments, tuple(str(r.type) for r in schema.returns)


def _source(function: Any) -> str | None:
    """The file a function is in, by its content, and the values it has captured; None without a file."""
    try:
        content = Path(inspect.getsourcefile(function) or "").read_bytes()
        line = function.__code__.co_firstlineno
    except (AttributeError, OSError, TypeError):
        return None
    captured = [repr(c.cell_contents) for c in function.__closure__ or ()]
    defaults = (function.__defaults__, function.__kwdefaults__)
    return f"{hashlib.sha256(content).hexdigest()}:{line}:{captured}:{defaults}"


@dataclass(frozen=True)
class Written:
    """Where a call's result for one written argument is.

    Attributes:
        index: of the getitem that is the buffer after the call.
        base: the buffer before it.
        view: the (size, stride, offset) through which the op saw the buffer, or None if it saw it as it is. A slice has
            no part of the table, so its size is None.
    """

    index: int
    base: fx.Node
    view: tuple[Any, Any, Any] | None


@dataclass(frozen=True)
class Call:
    """A call of an op of the table, functional as the library wrote it or made so by the compiler.

    Attributes:
        arguments: what each argument was before the call; those the op writes are their whole buffers.
    """

    node: fx.Node
    entry: Entry
    arguments: Mapping[str, Any]
    written: Mapping[str, Written]

    def index(self, part: str) -> int | None:
        """The getitem that is a result, or None if the node itself is."""
        where = self.entry.outputs[part]
        if isinstance(where, str):
            return self.written[where].index
        return None if _returns_one(self.node) else where

    def identity(self) -> Any:
        """What tells this call from another that reads the same: the form, and how its results lie."""
        lies = tuple((name, w.index, _meta(w.base), _frozen(w.view)) for name, w in sorted(self.written.items()))
        return self.node.target, self.entry.name, signature(self.entry.schema), lies

    def reads(self) -> tuple[Any, ...]:
        return tuple(v for name, v in self.arguments.items() if self.entry.reads(name))


def op_of(node: fx.Node) -> torch._ops.OpOverload | None:
    """The op that node calls if the table has its name, functional or functionalized by the compiler."""
    target = node.args[0] if node.target in _FORMS and node.args else node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace in ("aten", "prims"):
        return None
    return target if _name(target._schema) in _TABLE else None


def mismatch(node: fx.Node) -> str | None:
    """Why a call of an op of the table's cannot be read: the installed op is not the one described."""
    op = op_of(node)
    if op is None or _entry(op) is not None:
        return None
    described = " or ".join(_text(e.schema) for e in _TABLE[_name(op._schema)])
    return f"the installed op is {_text(op._schema)}, the table describes {described}"


def read(node: Any) -> Call | None:
    """The call that node is, or None if it calls no op of the table."""
    op = op_of(node) if isinstance(node, fx.Node) and node.op == "call_function" else None
    entry = None if op is None else _entry(op)
    if op is None or entry is None:
        return None
    if node.target not in _FORMS:
        return None if op._schema.is_mutable else Call(node, entry, dict(_positional(op, node)), {})
    mutable = [a.name for a in op._schema.arguments if _is_written(a)]
    first = max(1, len(op._schema.returns))
    buffers = {name: _written(node, name, first, i) for i, name in enumerate(mutable)}
    before = {**node.kwargs, **{name: b and b.base for name, b in buffers.items()}}
    arguments = {a.name: before.get(a.name, a.default_value) for a in op._schema.arguments}
    return Call(node, entry, arguments, {name: b for name, b in buffers.items() if b is not None})


def producer(node: fx.Node) -> tuple[Call, str] | None:
    """The call that computes node, and which of its results node is."""
    getitem = node.target is operator.getitem
    call = read(node.args[0] if getitem else node)
    if call is None:
        return None
    index = node.args[1] if getitem else None
    for part in call.entry.outputs:
        where = call.entry.outputs[part]
        if (isinstance(where, int) or where in call.written) and call.index(part) == index:
            return call, part
    return None


def _entry(op: torch._ops.OpOverload) -> Entry | None:
    wanted = signature(op._schema)
    return next((e for e in _TABLE[_name(op._schema)] if signature(e.schema) == wanted), None)


def _positional(op: torch._ops.OpOverload, node: fx.Node) -> Iterator[tuple[str, Any]]:
    for i, argument in enumerate(op._schema.arguments):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        yield argument.name, given


def _written(node: fx.Node, name: str, first: int, position: int) -> Written | None:
    """The buffer of a written argument in either form; None if the argument is None."""
    kwargs = node.kwargs
    if node.target is _FORMS[0]:
        argument = kwargs[name]
        return Written(first + position, argument, None) if isinstance(argument, fx.Node) else None
    index: Any = kwargs[f"_{name}_base_index"]
    if index is None:
        return None
    bases: Any = kwargs["_all_bases"]
    view = None
    if f"_{name}_size" in kwargs:
        view = tuple(_values(kwargs[f"_{name}_{field}"]) for field in ("size", "stride", "storage_offset"))
    elif f"_{name}_slice_dim" in kwargs:
        view = (None, None, None)
    return Written(first + index, bases[index], view)


def _values(sizes: Any) -> Any:
    """Sizes as numbers: a symbolic one is a node of the graph."""
    if isinstance(sizes, (list, tuple)):
        return tuple(_values(s) for s in sizes)
    return sizes.meta["val"] if isinstance(sizes, fx.Node) else sizes


def _returns_one(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _meta(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    return _frozen((tuple(value.shape), tuple(value.stride()), value.dtype, value.device))


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    return str(value.node.expr) if isinstance(value, torch.SymInt) else value
