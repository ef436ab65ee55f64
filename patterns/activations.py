"""Gated activations, activation(gate) * up, and activations alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fusion_pass.specs import Activation, GatedActivation

from .clamps import clamped, clamped_above
from .grammar import (
    ADD,
    DIV,
    MUL,
    POW,
    Match,
    Pattern,
    Search,
    either,
    elementwise,
    equal,
    made_by,
    number,
    op,
    quiet,
    tagged,
    value,
)
from .values import aten, shape

_bare_gate = value("gate")
_gate = either(quiet(clamped_above(_bare_gate, "gate_limit")), _bare_gate)
_sigmoid = aten.sigmoid.default


def _silu(rounding: str) -> Pattern:
    # F.silu is decomposed to this before a pass sees it, and eager's kernel computes the same.
    one_plus_exp = op(ADD, op((aten.exp.default,), op((aten.neg.default,), _gate)), equal(1), commutative=True)
    return either(op((aten.silu.default,), _gate, rounding=rounding), op(DIV, _gate, one_plus_exp, rounding=rounding))


def _sigmoid_product(rounding: str) -> Pattern:
    argument = either(op(MUL, _gate, number("alpha"), rounding="inner", commutative=True), _gate)
    return op(MUL, _gate, op((_sigmoid,), argument, rounding="inner"), rounding=rounding, commutative=True)


def _gelu(rounding: str) -> Pattern:
    half = op(MUL, _gate, equal(0.5), commutative=True)
    scaled = op(MUL, _gate, equal(0.5**0.5), commutative=True)
    one_plus_erf = op(ADD, op((aten.erf.default,), scaled), equal(1), commutative=True)
    return op(MUL, half, one_plus_erf, rounding=rounding, commutative=True)


def _gelu_tanh(rounding: str) -> Pattern:
    square = op(MUL, _gate, _gate, shapes=elementwise)
    cube = either(op(MUL, square, _gate, commutative=True, shapes=elementwise), op(POW, _gate, equal(3)))
    polynomial = op(ADD, _gate, op(MUL, cube, equal(0.044715), commutative=True), commutative=True)
    inner = op(MUL, polynomial, equal((2 / torch.pi) ** 0.5), commutative=True)
    one_plus_tanh = op(ADD, op((aten.tanh.default,), inner), equal(1), commutative=True)
    half = op(MUL, _gate, equal(0.5), commutative=True)
    return op(MUL, half, one_plus_tanh, rounding=rounding, commutative=True)


# Eager code computes a function of its own in one kernel, where products and sums may be contracted: only such nodes are
# taken for it, not the same operations one by one.
def _activation(rounding: str) -> Pattern:
    return either(
        tagged("activation", Activation.SILU, _silu(rounding)),
        tagged("activation", Activation.SIGMOID_PRODUCT, _sigmoid_product(rounding)),
        tagged("activation", Activation.SIGMOID, op((_sigmoid,), _gate, rounding=rounding)),
        tagged("activation", Activation.GELU, made_by(aten.gelu.default, _gelu(rounding))),
        tagged("activation", Activation.GELU_TANH, made_by(aten.gelu.default, _gelu_tanh(rounding))),
    )


_bare_up = value("up")
_limited_up = either(quiet(clamped(_bare_up, "up_low", "up_limit")), _bare_up)
_shifted_up = op(ADD, _limited_up, number("offset"), rounding="inner", commutative=True)
_up = either(quiet(_shifted_up), _limited_up)

gated = op(MUL, _activation("activated"), _up, rounding="product", commutative=True, shapes=elementwise)
alone = _activation("product")


@dataclass(frozen=True)
class ActivationSite:
    """A recognised gated activation and the nodes its kernel reads."""

    spec: GatedActivation
    gate: fx.Node
    up: fx.Node | None
    size: int
    nodes: tuple[fx.Node, ...]


def recognise_activation(node: fx.Node, search: Search) -> ActivationSite | None:
    """The gated activation whose result node is, or None with the reason in ``search.failure``."""
    for match in either(gated, alone)(node, Match(), search):
        size = shape(match["gate_used"])[-1]
        if not isinstance(size, int):
            search.fail(match["gate"], match, "rows of a static length", f"rows of {size} values")
            continue
        if match.get("offset") == 0:
            search.fail(match["up"], match, "an offset that is not zero", "one that turns -0 to 0")
            continue
        limit = match.get("gate_limit")
        both = (match.get("up_low"), match.get("up_limit")) == (None if limit is None else -limit, limit)
        if not both and "up" in match.captures:
            search.fail(match["up"], match, f"the gate's bound, {limit}, for up", f"{match.get('up_limit')}")
            continue
        spec = GatedActivation(
            match["activation"],
            match.get("activated", torch.float32),
            match["product"],
            inner=match.get("inner", torch.float32),
            alpha=match.get("alpha", 1.0),
            limit=limit,
            offset=match.get("offset", 0.0),
            gated="up" in match.captures,
        )
        return ActivationSite(spec, match["gate_used"], match.get("up_used"), size, match.nodes)
    return None
