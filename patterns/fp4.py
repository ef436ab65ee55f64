"""FP4 codes: pairs of them packed in bytes, formed by whatever operations on the bits of the scaled values."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusion_pass.e2m1 import e2m1_codes
from fusion_pass.inductor import known, real_tensors
from fusion_pass.specs import E2M1, Sign, Ties

from .intervals import Evaluator, Range, Unproved, concrete, leaf
from .values import FLOATS, VIEWS, Values, aten, cast_dtype, dtype, same_shape, shape, tensor

_INTEGERS = (torch.uint8, torch.int32, torch.int64, torch.int16)
_JOINS = (aten.bitwise_or.Tensor, aten.add.Tensor)
_SHIFTS = (aten.__lshift__.Scalar, aten.bitwise_left_shift.Tensor_Scalar)
# Functions that jump more often than this are no conversions to 16 values.
_MOST_INTERVALS = 1 << 16
_MAGNITUDES = 2**31
_INFINITY_BITS = 0x7F800000


@dataclass
class Packed:
    """Bytes of two FP4 codes each.

    Attributes:
        scaled: the float values that the codes are of.
        rule: how they are formed.
        nodes: the operations from ``scaled``, exclusive, to the bytes.
    """

    scaled: fx.Node
    rule: E2M1
    nodes: tuple[fx.Node, ...]


def packs_codes(node: fx.Node) -> bool:
    """Whether node joins even and odd elements of one tensor to bytes."""
    return (
        node.op == "call_function"
        and node.target in _JOINS
        and dtype(node) is torch.uint8
        and _halves(node) is not None
    )


def recognise_codes(node: fx.Node, values: Values, device_type: str) -> Packed | str:
    """The FP4 codes that node packs, or why they are none."""
    halves = _halves(node)
    assert halves is not None
    (low, joined), (high, shifted) = halves
    if values.core(low) is not values.core(high):
        return "the halves of two tensors"
    with real_tensors():
        between, scaled = _between(values.core(low), values)
        if scaled is None:
            return "codes of no single tensor of floats"
        # Layers repeat: a conversion is proved once.
        key = (device_type, *_written(values.core(low), scaled, values))
        if key not in _proofs:
            _proofs[key] = _rule(values.core(low), scaled, values, device_type)
        rule = _proofs[key]
    return rule if isinstance(rule, str) else Packed(scaled, rule, (node, *joined, *shifted, *between))


_proofs: dict[Any, E2M1 | str] = {}


def _written(codes: fx.Node, scaled: fx.Node, values: Values) -> list[Any]:
    """The operations from ``scaled`` to ``codes`` as text: what a conversion computes, in whatever graph it stands."""
    lines: list[Any] = []
    numbers: dict[fx.Node, int] = {}

    def number(operand: Any) -> Any:
        if not isinstance(operand, fx.Node):
            return [number(o) for o in operand] if isinstance(operand, (list, tuple)) else repr(operand)
        core = values.core(operand)
        if core not in numbers:
            fixed = concrete(core)
            if core is scaled:
                line: Any = ("scaled", dtype(core))
            elif fixed is not None:
                line = ("constant", dtype(core), str(fixed.tolist()))
            else:
                operands = [str(number(a)) for a in core.args]
                line = (core.target, dtype(core), *operands, str(core.kwargs))
            numbers[core] = len(lines)
            lines.append(line)
        return numbers[core]

    number(codes)
    return lines


_Half = tuple[fx.Node, tuple[fx.Node, ...]]


def _halves(node: fx.Node) -> tuple[_Half, _Half] | None:
    """The tensor whose even elements are the low nibbles, the one whose odd elements are the high ones, and the way there."""
    for low, high in itertools.permutations(node.args[:2], 2):
        if not isinstance(low, fx.Node) or not isinstance(high, fx.Node) or node.kwargs:
            continue
        shifted = _unpresented(high)
        multiplied = shifted.target in (aten.mul.Tensor, aten.mul.Scalar) and shifted.args[1] == 16
        if not multiplied and not (shifted.target in _SHIFTS and shifted.args[1] == 4):
            continue
        even, odd = _every_other(low, 0), _every_other(shifted.args[0], 1)
        # Of an unknown length, which is even, they are rounded up and down.
        if even is not None and odd is not None and _known_to_be(shape(low), shape(high)):
            return even, (odd[0], (shifted, *odd[1]))
    return None


def _known_to_be(sizes: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return len(sizes) == len(others) and all(known(a == b) for a, b in zip(sizes, others, strict=True))


def _unpresented(node: fx.Node) -> fx.Node:
    """What lies under views and casts between integers."""
    while node.target in VIEWS or (cast_dtype(node) in _INTEGERS and dtype(node.args[0]) in _INTEGERS):  # type: ignore[arg-type, operator]
        node = node.args[0]  # type: ignore[assignment]
    return node


def _every_other(node: Any, parity: int) -> _Half | None:
    """The tensor of whose elements node has every other one, in order, from ``parity`` on."""
    if not isinstance(node, fx.Node):
        return None
    taken = _unpresented(node)
    if taken.target is aten.slice.Tensor:
        source, dim, start, end, step = (*taken.args, None, None, None, None, None)[:5]
        last = len(shape(source)) - 1  # type: ignore[arg-type]
        size = shape(source)[last]  # type: ignore[arg-type]
        whole = end is None or (isinstance(end, int) and isinstance(size, int) and end >= size) or end == 2**63 - 1
        # Of rows of an odd length the parity changes from one to the next.
        in_pairs = dim in (last, -1) and step == 2 and known(size % 2 == 0)
        if in_pairs and whole and (start or 0) == parity and isinstance(source, fx.Node):
            return source, (taken,)
    if taken.target is aten.select.int:
        source, dim, index = taken.args
        last = len(shape(source)) - 1  # type: ignore[arg-type]
        if dim in (last, -1) and index == parity and shape(source)[last] == 2 and isinstance(source, fx.Node):  # type: ignore[arg-type]
            return source, (taken,)
    return None


def _between(codes: fx.Node, values: Values) -> tuple[tuple[fx.Node, ...], fx.Node | None]:
    """The operations that make codes of the values of one tensor of floats, and that tensor."""
    seen: dict[fx.Node, None] = {}
    sources: set[fx.Node] = set()
    pending = [codes]
    while pending:
        node = values.core(pending.pop())
        value = tensor(node)
        if node in seen or node in sources or value is None:
            continue
        if _is_conversion(node):
            varying = [n for n in node.all_input_nodes if concrete(values.core(n)) is None]
            if not all(tensor(n) is not None and same_shape(shape(n), shape(node)) for n in varying):
                # Elements of one are combined with other elements of another.
                return (), None
            seen[node] = None
            pending += varying
        elif concrete(node) is None:
            sources.add(node)
    scaled = sources.pop() if len(sources) == 1 else None
    if scaled is None or dtype(scaled) not in FLOATS:
        return (), None
    return tuple(seen), scaled


# Products and quotients of two tensors scale values; all else is the conversion.
_SCALINGS = (aten.mul.Tensor, aten.div.Tensor)


def _is_conversion(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target in _SCALINGS and dtype(node) in FLOATS:
        return False
    return concrete(node) is None and node.target not in (aten.reciprocal.default, aten.expand.default)


def _rule(codes: fx.Node, scaled: fx.Node, values: Values, device_type: str) -> E2M1 | str:
    evaluator = Evaluator(scaled, values)
    try:
        bits = torch.tensor([0x7FFFFFFF if device_type == "cuda" else 0x7FC00000])
        nan = evaluator.evaluate(codes, leaf(bits, bits))
        rules = {(ties, sign): E2M1(ties, sign) for ties in Ties for sign in Sign}
        problem = _disprove(rules, codes, evaluator)
    except Unproved as reason:
        return f"a conversion with {reason}, of which nothing can be proved"
    if problem is not None:
        return problem
    if not bool(nan.exact[0]) or not 0 <= int(nan.low[0]) <= 15:
        return "a code of NaN that is none of 16"
    ties, sign = next(iter(rules))
    return E2M1(ties, sign, int(nan.low[0]))


def _disprove(rules: dict[Any, E2M1], codes: fx.Node, evaluator: Evaluator) -> str | None:
    """Drop the rules that differ from the graph on some float, until the rest is proved to agree on all; or say why not."""
    first = torch.tensor([0, 1, _MAGNITUDES, _MAGNITUDES + 1])
    last = torch.tensor([0, _INFINITY_BITS, _MAGNITUDES, _MAGNITUDES + _INFINITY_BITS])
    while first.numel():
        over = leaf(first, last)
        found = evaluator.evaluate(codes, over)
        agreement = {name: _agreement(rule, over, found) for name, rule in rules.items()}
        for name, (agrees, differs) in agreement.items():
            if bool(differs.any()) or bool((over.exact & ~agrees).any()):
                del rules[name]
        if not rules:
            return "codes that are not those of E2M1"
        left = ~torch.stack([agreement[name][0] for name in rules]).all(0)
        first, last = first[left], last[left]
        middle = (first + last) // 2
        first, last = torch.cat([first, middle + 1]), torch.cat([middle, last])
        if first.numel() > _MOST_INTERVALS:
            return "a conversion that takes too many intervals to prove"
    return None


def _agreement(rule: E2M1, over: Range, found: Range) -> tuple[torch.Tensor, torch.Tensor]:
    """On which intervals all codes are those of the rule, and on which none is: a rule's codes grow with the magnitude."""
    low, high = e2m1_codes(rule, over.low), e2m1_codes(rule, over.high)
    constant = (found.low == found.high) & (low == high)
    return constant & (found.low == low), constant & (found.low != low)
