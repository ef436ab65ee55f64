"""RMSNorm, as it is spelled: x * rsqrt(mean(x * x) + eps) * weight, with and without a residual added first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fusion_pass.specs import Activation, Mean, RMSNorm, Root, Weight

from .grammar import (
    ADD,
    DIV,
    MUL,
    POW,
    SQRT,
    Match,
    Pattern,
    Search,
    either,
    elementwise,
    equal,
    inverse,
    number,
    op,
    per_column,
    per_row,
    quiet,
    reduce_rows,
    tagged,
    value,
)
from .values import aten, dtype, shape, tensor


def _count(argument: Any, match: Match, search: Search) -> Iterator[Match]:
    """The number of values in a row: binds ``count``, and ``count_device`` to where a tensor holds it."""
    held = tensor(argument)
    for found in number("count")(argument, match, search):
        bound = found.bind("count_device", None if held is None else held.device.type)
        if bound is not None:
            yield bound


_x = value("x")
_square = either(op(POW, _x, equal(2)), op(MUL, _x, _x, shapes=elementwise))
_mean_square = either(
    reduce_rows((aten.mean.dim,), _square, size="n"),
    op(DIV, reduce_rows((aten.sum.dim_IntList,), _square, size="n"), _count),
)
_variance = op(ADD, _mean_square, number("eps"), commutative=True)
_root = op(SQRT, _variance)
_rsqrt = (aten.rsqrt.default,)
_rounded_rsqrt = op(_rsqrt, _variance, rounding="root_rounding")
_inverse_rms = either(
    # ATen computes pow(x, -0.5) as rsqrt(x).
    tagged("root", Root.RSQRT, either(_rounded_rsqrt, op(POW, _variance, equal(-0.5), rounding="root_rounding"))),
    tagged("root", Root.RECIPROCAL_SQRT, inverse(_root)),
)


def _normalized(rounding: str) -> Pattern:
    return either(
        op(MUL, _x, _inverse_rms, rounding=rounding, commutative=True, shapes=per_row),
        tagged("root", Root.DIVIDE_SQRT, op(DIV, _x, _root, rounding=rounding, shapes=per_row)),
    )


_weight = either(
    tagged("weight_rule", Weight.ONE_PLUS, op(ADD, value("weight"), equal(1), rounding="shifted", commutative=True)),
    tagged("weight_rule", Weight.PLAIN, value("weight")),
)

# x̂ rounds to `normalized` before the weight, the product to `product`.
rms_norm = either(
    op(MUL, _normalized("normalized"), _weight, rounding="product", commutative=True, shapes=per_column),
    _normalized("product"),
)

_gate = value("gate")
_one_plus_exp = op(ADD, op((aten.exp.default,), op((aten.neg.default,), _gate)), equal(1), commutative=True)
_gating = either(
    tagged("gate_rule", Activation.SILU, op(DIV, _gate, _one_plus_exp)),
    tagged("gate_rule", Activation.SIGMOID, op((aten.sigmoid.default,), _gate)),
)
# Mamba-2 and its kin multiply the normed value with the activation of a gate.
gated_norm = op(MUL, rms_norm, _gating, rounding="gated", commutative=True, shapes=elementwise)

residual_sum = op(ADD, value("a"), value("b"), rounding="sum_rounding", shapes=elementwise)


@dataclass(frozen=True)
class NormSite:
    """A recognised RMSNorm: the spec, and the nodes its kernel reads and could also write."""

    spec: RMSNorm
    x: fx.Node
    residual: fx.Node | None
    gate: fx.Node | None
    weight: fx.Node | None
    sum: fx.Node | None
    size: int
    nodes: tuple[fx.Node, ...]


def recognise_norm(node: fx.Node, search: Search, device_type: str) -> NormSite | None:
    """The RMSNorm whose result node is, or None with the reason in ``search.failure``."""
    for match in either(rms_norm, quiet(gated_norm))(node, Match(), search):
        site = _describe(match, search, device_type)
        if site is not None:
            return site
    return None


def _describe(match: Match, search: Search, device_type: str) -> NormSite | None:
    size = match["n"]
    if not isinstance(size, int):
        search.fail(match["x"], match, "rows of a static length", f"rows of {size} values")
        return None
    if match.get("count", float(size)) != size:
        search.fail(match["x"], match, f"a mean over all {size} values", f"a sum over {match['count']:g}")
        return None
    weight = match.get("weight")
    if weight is not None and shape(weight)[-1] != size:
        search.fail(weight, match, f"a weight of {size} values")
        return None
    norm = RMSNorm(
        eps=match["eps"],
        weight=match.get("weight_rule", Weight.NONE),
        mean=_mean(match, device_type),
        normalized=match.get("normalized", torch.float32),
        product=match["product"],
        root=match["root"],
        root_rounding=match.get("root_rounding", torch.float32),
        gate=match.get("gate_rule"),
        gated=match.get("gated", torch.float32),
        shifted=match.get("shifted", torch.float32),
    )
    x = match["x_used"]
    added = _residual(x, match, search) if norm.gate is None else None
    if added is None:
        return NormSite(norm, x, None, match.get("gate_used"), match.get("weight_used"), None, size, match.nodes)
    spec = RMSNorm(**{**vars(norm), "residual_sum": added["sum_rounding"]})
    nodes = (*match.nodes, *added.nodes)
    return NormSite(spec, added["a_used"], added["b_used"], None, match.get("weight_used"), match["x"], size, nodes)


def _mean(match: Match, device_type: str) -> Mean:
    """Eager code divides by the number of values on a CPU, and by a tensor of the device; else eager CUDA multiplies."""
    if device_type == "cpu" or match.get("count_device") == device_type:
        return Mean.DIVIDE
    return Mean.SCALAR if "count" in match.captures else Mean.RECIPROCAL


def _residual(x: fx.Node, match: Match, search: Search) -> Match | None:
    """x as a sum of two tensors of its shape, if it is one; a f32 sum of low-precision tensors counts as unrounded."""
    for added in residual_sum(x, Match(), Search(search.values)):
        if dtype(added["a"]) == dtype(added["b"]) and added["a"] is not added["b"]:
            return added
    return None
