"""Gated activations: activation(gate) * up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from fusion_pass.specs import Activation, GatedActivation

from .grammar import ADD, DIV, MUL, Match, Search, either, elementwise, equal, op, value
from .values import aten, shape

_gate = value("gate")
_one_plus_exp = op(
    ADD,
    op((aten.exp.default,), op((aten.neg.default,), _gate)),
    equal(1),
    commutative=True,
)


def _silu(rounding: str):  # type: ignore[no-untyped-def]
    # F.silu is decomposed to this before a pass sees it, and eager's kernel computes the same.
    return either(
        op((aten.silu.default,), _gate, rounding=rounding),
        op(DIV, _gate, _one_plus_exp, rounding=rounding),
    )


silu_mul = op(MUL, _silu("activated"), value("up"), rounding="product", commutative=True, shapes=elementwise)


@dataclass(frozen=True)
class ActivationSite:
    """A recognised gated activation and the nodes its kernel reads."""

    spec: GatedActivation
    gate: fx.Node
    up: fx.Node
    size: int
    nodes: tuple[fx.Node, ...]


def recognise_activation(node: fx.Node, search: Search) -> ActivationSite | None:
    """The gated activation whose result node is, or None with the reason in ``search.failure``."""
    for match in silu_mul(node, Match(), search):
        size = shape(match["gate_used"])[-1]
        if not isinstance(size, int):
            search.fail(match["gate"], match, "rows of a static length", f"rows of {size} values")
            continue
        spec = GatedActivation(Activation.SILU, match.get("activated", torch.float32), match["product"])
        return ActivationSite(spec, match["gate_used"], match["up_used"], size, match.nodes)
    return None
