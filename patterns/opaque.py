"""Norms, activations and quantizers that are registered custom ops: one node each, read by the table of ops."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from fusion_pass.specs import GatedActivation, Granularity, Quantizer, RMSNorm, SpecError, Weight

from . import libraries
from .activations import ActivationSite
from .grammar import Failure, Match, Search, describe
from .norms import NormSite, residual_sum
from .op_table import Call, Written, mismatch, producer, register_op, unregister_op
from .quantizers import QuantizerSite
from .values import FLOATS, Values, dtype, same_shape, same_size, shape, tensor

__all__ = [
    "OpQuantizer",
    "PackedActivation",
    "may_be_known",
    "mismatch",
    "recognise_op",
    "recognise_quantizer_op",
    "register_op",
    "returns_codes",
    "unregister_op",
]

libraries.register()

# Deeper than any rule gets in aten code: what stopped at a known op is always worth saying.
_KNOWN_OP = 1000


class Refused(Exception):  # noqa: N818
    """Why a call of a known op is left alone."""


@dataclass(frozen=True)
class PackedActivation(ActivationSite):
    """An activation of the halves of one tensor; ``gate`` and ``up`` are both that tensor.

    Attributes:
        halves: which half is gate and which is up.
    """

    halves: tuple[int, int] = (0, 1)


@dataclass
class OpQuantizer(QuantizerSite):
    """A quantizer that is one op.

    Attributes:
        scale: the scales it writes.
        rows: if its buffer holds scale (m, g) at g*M + m, the leading sizes of x, the last of which is M; else None.
        strided: whether the graph reads that buffer as (M, G) with transposed strides, not as (G, M).
    """

    scale: fx.Node | None = None
    rows: tuple[Any, ...] | None = None
    strided: bool = False


def may_be_known(node: fx.Node) -> bool:
    """Whether node is, or is a result of, something else than an operation of PyTorch's own."""
    source = node.args[0] if node.target is operator.getitem else node
    target = source.target if isinstance(source, fx.Node) else None
    return getattr(target, "namespace", None) not in ("aten", "prims", None)


def returns_codes(node: fx.Node) -> bool:
    """Whether node is the codes of a quantizer op."""
    found = producer(node)
    return found is not None and found[1] == "codes"


def recognise_op(node: fx.Node, search: Search) -> NormSite | ActivationSite | None:
    """The norm or activation op whose result node is, or None with the reason in ``search.failure``."""
    found = producer(node)
    if found is None or found[1] != "value":
        return None
    call = found[0]
    try:
        return (_norm if call.entry.kind is RMSNorm else _activation)(call, node, search.values)
    except Refused as reason:
        _fail(call.node, f"a call of {call.entry.name} that can be fused", str(reason), search)
        return None


def recognise_quantizer_op(codes: fx.Node, search: Search) -> OpQuantizer | None:
    """The quantizer op whose codes node is, or None with the reason in ``search.failure``."""
    found = producer(codes)
    assert found is not None
    try:
        return _quantizer(found[0], codes, search.values)
    except Refused as reason:
        _fail(found[0].node, f"a call of {found[0].entry.name} that can be fused", str(reason), search)
        return None


def _fail(node: fx.Node, expected: str, seen: str, search: Search) -> None:
    search.failure = Failure(node, f"{describe(node)}: {seen}", expected, _KNOWN_OP)


def _norm(call: Call, node: fx.Node, values: Values) -> NormSite:
    spec = _spec(call)
    assert isinstance(spec, RMSNorm)
    _require(spec.gate is None, "its spec multiplies by a gate, which no part of a call is")
    x, residual, weight = (_operand(call, part) for part in ("x", "residual", "weight"))
    assert x is not None
    size = _row(call, "x")
    _require(spec.residual_sum is None or residual is not None, "its spec adds a residual that the call does not have")
    _require(residual is None or spec.residual_sum is not None, "its spec does not add the residual")
    _require(spec.weight is Weight.NONE or weight is not None, "its spec has a weight that the call does not have")
    _require(weight is None or spec.weight is not Weight.NONE, "its spec does not read the weight")
    if residual is not None:
        _require(same_shape(_shape(call, "residual"), _shape(call, "x")), "x and residual differ in shape")
        _require(dtype(residual) == dtype(x), f"x is {dtype(x)}, residual is {dtype(residual)}")
    if weight is not None:
        _require(same_shape(_shape(call, "weight"), (size,)), f"weight has shape {_shape(call, 'weight')}")
    count = math.prod(_shape(call, "x"))
    _check_value(call, node, spec.product, count)
    nodes = (node, call.node)
    if residual is not None:
        total = _result(call, "sum", values) if "sum" in call.entry.outputs else None
        _require(total is None or same_size(_numel(total), count), "its sum is not one for each value")
        return NormSite(spec, x, residual, None, weight, total, size, nodes)
    return _with_sum(NormSite(spec, x, None, None, weight, None, size, nodes), values)


def _with_sum(site: NormSite, values: Values) -> NormSite:
    """The norm of a sum as a norm with a residual, as for norms in aten code."""
    for added in residual_sum(site.x, Match(), Search(values)):
        if dtype(added["a"]) == dtype(added["b"]) and added["a"] is not added["b"]:
            return replace(
                site,
                spec=replace(site.spec, residual_sum=added["sum_rounding"]),
                x=added["a_used"],
                residual=added["b_used"],
                sum=values.core(site.x),
                nodes=(*site.nodes, *added.nodes),
            )
    return site


def _activation(call: Call, node: fx.Node, values: Values) -> ActivationSite:
    spec = _spec(call)
    assert isinstance(spec, GatedActivation)
    _require(spec.gated, "its spec is of an activation alone, but the call has a gate and up")
    nodes = (node, call.node)
    for part, halves in (("gate_up", (0, 1)), ("up_gate", (1, 0))):
        if part in call.entry.inputs:
            both = _operand(call, part)
            row = _row(call, part)
            assert both is not None
            _require(row % 2 == 0, f"rows of {row} values have no halves")
            _check_value(call, node, spec.product, math.prod(_shape(call, part)[:-1]) * (row // 2))
            return PackedActivation(spec, both, both, row // 2, nodes, halves)
    gate, up = _operand(call, "gate"), _operand(call, "up")
    assert gate is not None and up is not None
    _require(same_shape(_shape(call, "gate"), _shape(call, "up")), "gate and up differ in shape")
    _check_value(call, node, spec.product, math.prod(_shape(call, "gate")))
    return ActivationSite(spec, gate, up, _row(call, "gate"), nodes)


def _quantizer(call: Call, codes: fx.Node, values: Values) -> OpQuantizer:
    spec = _spec(call)
    assert isinstance(spec, Quantizer)
    _require(not spec.needs_given, "its spec reads a calibrated scale, which no part of a call is")
    _require(spec.scale is not None, "its spec returns no scale")
    x = _operand(call, "x")
    assert x is not None
    row = _row(call, "x")
    group = row if spec.group is None else spec.group
    _require(row % group == 0, f"groups of {group} do not divide rows of {row}")
    _require(dtype(codes) == spec.code, f"codes are {dtype(codes)}, its spec says {spec.code}")
    _require(same_size(_numel(codes), math.prod(_shape(call, "x"))), "its codes are not one for each value")
    _require(_is_row_major(call, "codes", codes), "its codes are not contiguous, or a part of a larger buffer")
    scale = _result(call, "scale", values)
    _require(scale is not None, "its scales are not read")
    assert scale is not None
    _require(dtype(scale) is torch.float32, f"scales are {dtype(scale)}")
    rows = _shape(call, "x")[:-1]
    column, strided = _scale_layout(call, scale, (*rows, row // group))
    count = math.prod(rows) * (row // group)
    _require(same_size(_numel(scale), count), f"its {_numel(scale)} scales are not one for each {group} values")
    spec = replace(spec, group=group, granularity=Granularity.GROUP)
    site = OpQuantizer(spec, values.core(x), x, codes, None, (codes, call.node), scale)
    return replace(site, rows=rows, strided=strided) if column else site


def _scale_layout(call: Call, scale: fx.Node, logical: tuple[Any, ...]) -> tuple[bool, bool]:
    """Whether the scales are in columns, and whether the graph reads them as (M, G) with transposed strides."""
    if _is_row_major(call, "scale", scale):
        return False, False
    sizes, strides, whole = _lies(call, "scale", scale)
    _require(whole, "its scales are a part of a larger buffer")
    _require(same_shape(sizes, logical), f"scales of shape {sizes} are neither in rows nor in columns")
    swapped = (*sizes[:-2], sizes[-1], sizes[-2]), (*strides[:-2], strides[-1], strides[-2])
    _require(
        len(sizes) >= 2 and _contiguous(*swapped), f"scales have strides {strides}: neither in rows nor in columns"
    )
    return True, same_shape(shape(scale), sizes) and not _is_contiguous_node(scale)


def _spec(call: Call) -> RMSNorm | GatedActivation | Quantizer:
    indices = [w.index for w in call.written.values()]
    _require(len(set(indices)) == len(indices), "it writes one buffer twice")
    arguments = {name: _fake(call, name) for name in call.arguments if call.entry.reads(name)}
    symbolic = [n for n, v in arguments.items() if isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool))]
    _require(not symbolic, f"{', '.join(symbolic)} is not known when the graph is compiled")
    devices = {v.device for v in arguments.values() if isinstance(v, torch.Tensor)}
    _require(len(devices) == 1, f"its tensors are on {', '.join(map(str, devices))}")
    try:
        spec = call.entry.describe(**arguments)
    except SpecError as error:
        raise Refused(str(error)) from None
    except Exception as error:
        # The user's own code: what it raises is no defect of the pass, and concerns this call alone.
        raise Refused(f"its spec function raised {type(error).__name__}: {error}") from None
    if isinstance(spec, str):
        raise Refused(spec)
    if not isinstance(spec, call.entry.kind):
        raise Refused(f"its spec function returned {spec!r}; allowed: a {call.entry.kind.__name__} or a sentence")
    return spec


def _require(condition: bool, reason: str) -> None:
    if not condition:
        raise Refused(reason)


def _operand(call: Call, part: str) -> fx.Node | None:
    """The node that an argument was: a float tensor, or None if the op has none there."""
    name = call.entry.inputs.get(part)
    if name is None or call.arguments[name] is None:
        return None
    node = call.arguments[name]
    _require(dtype(node) in FLOATS, f"{name} is {dtype(node)}")
    if name in call.written:
        _require(_is_flat(call.written[name]), f"{name} is a part of a larger buffer, or a transposed view of one")
    return node  # type: ignore[no-any-return]


def _fake(call: Call, name: str) -> Any:
    """An argument as the op saw it: a fake tensor, a number."""
    argument = call.arguments[name]
    value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    written = call.written.get(name)
    if written is not None and written.view is not None and written.view[0] is not None:
        return value.as_strided(*written.view)
    return value


def _shape(call: Call, part: str) -> tuple[Any, ...]:
    """The shape in which the op saw an argument."""
    name = call.entry.inputs[part]
    written = call.written.get(name)
    if written is not None and written.view is not None and written.view[0] is not None:
        return tuple(written.view[0])
    return shape(call.arguments[name])


def _row(call: Call, part: str) -> int:
    sizes = _shape(call, part)
    _require(len(sizes) >= 1 and isinstance(sizes[-1], int), f"rows of {sizes[-1:]} values are not of a static length")
    return int(sizes[-1])


def _check_value(call: Call, node: fx.Node, product: torch.dtype, count: Any) -> None:
    _require(dtype(node) == product, f"its result is {dtype(node)}, its spec rounds to {product}")
    for name, written in call.written.items():
        _require(_is_flat(written), f"{name} is a part of a larger buffer, or a transposed view of one")
    _require(same_size(_numel(node), count), f"its result has {_numel(node)} values, not {count}")


def _result(call: Call, part: str, values: Values) -> fx.Node | None:
    """The node that a result is, or None if nothing reads it."""
    if isinstance(where := call.entry.outputs[part], str) and where not in call.written:
        return None
    index = call.index(part)
    for node in values.origins(values.core(call.node)):
        for user in node.users:
            if user.target is operator.getitem and user.args[1] == index:
                return values.core(user)
    return None


def _lies(call: Call, part: str, node: fx.Node) -> tuple[tuple[Any, ...], tuple[Any, ...], bool]:
    """The shape and strides in which the op wrote a result, and whether it wrote the whole of the buffer."""
    where = call.entry.outputs[part]
    written = call.written[where] if isinstance(where, str) else None
    if written is not None and written.view is not None:
        sizes, strides, _ = written.view
        return (tuple(sizes), tuple(strides), _is_whole(written)) if sizes is not None else ((), (), False)
    buffer = tensor(node)
    assert buffer is not None
    return tuple(buffer.shape), tuple(buffer.stride()), True


def _is_whole(written: Written) -> bool:
    """Whether the op saw all of a dense buffer."""
    buffer = tensor(written.base)
    if written.view is None or buffer is None or written.view[0] is None:
        return written.view is None
    sizes, _, offset = written.view
    dense = same_size(math.prod(sizes), buffer.numel()) and same_size(offset, 0)
    return dense and _contiguous(buffer.shape, buffer.stride())


def _is_flat(written: Written) -> bool:
    """Whether the buffer, read in order, holds the values in the order in which the op saw them."""
    return written.view is None or (_is_whole(written) and _contiguous(*written.view[:2]))


def _is_row_major(call: Call, part: str, node: fx.Node) -> bool:
    sizes, strides, whole = _lies(call, part, node)
    return whole and _contiguous(sizes, strides)


def _contiguous(sizes: Any, strides: Any) -> bool:
    expected: Any = 1
    for size, stride in zip(reversed(tuple(sizes)), reversed(tuple(strides)), strict=True):
        if not same_size(size, 1) and not same_size(stride, expected):
            return False
        expected = expected * size
    return True


def _is_contiguous_node(node: fx.Node) -> bool:
    value = tensor(node)
    assert value is not None
    return _contiguous(value.shape, value.stride())


def _numel(node: fx.Node) -> Any:
    value = tensor(node)
    assert value is not None
    return value.numel()
