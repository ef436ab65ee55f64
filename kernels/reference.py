"""The one oracle: what a spec means, in plain PyTorch operations.

Computed eagerly on the device of the code it stands for, it gives that code's bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F  # noqa: N812

from fusion_pass.addresses import address, allocated
from fusion_pass.e2m1 import e2m1_codes
from fusion_pass.specs import (
    Activation,
    FusedSpec,
    GatedActivation,
    Granularity,
    Mean,
    Quantizer,
    RMSNorm,
    Root,
    Rounding,
    ScaleLayout,
    Weight,
)
from fusion_pass.terms import LEAVES, Operand, Term, kind


def reference(
    spec: FusedSpec,
    x: torch.Tensor,
    other: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Shapes, dtypes and order of the results as :func:`fusion_pass.kernels.launch.launch` returns them."""
    value, total = x.float(), None
    if isinstance(spec.prologue, RMSNorm):
        residual = None if spec.prologue.gate is not None else other
        value, total = _rms_norm(spec.prologue, value, residual, weight)
        if spec.prologue.gate is not None:
            assert other is not None
            value = _round(value * _ACTIVATIONS[spec.prologue.gate](other.float()), spec.prologue.gated)
    elif isinstance(spec.prologue, GatedActivation):
        value = _gated(spec.prologue, x, None if other is None else other.float())
    outputs = _quantize(spec.quantizer, value, given)
    if spec.layout is not ScaleLayout.ROW and spec.quantizer.scale is not None:
        outputs[1] = _placed(spec.layout, outputs[1])
    if spec.sum_output is not None:
        assert total is not None
        outputs.append(total.to(spec.sum_output).contiguous())
    if spec.value_output is not None:
        outputs.append(value.to(spec.value_output).contiguous())
    # An op may not return its own input, which .to() and .contiguous() do where nothing changes.
    return [o.clone() if o is x or o is other else o for o in outputs]


def _round(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype).float()


def _rms_norm(
    norm: RMSNorm, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    total = None
    if residual is not None:
        assert norm.residual_sum is not None
        total = x + residual.float()
        x = _round(total, norm.residual_sum)
    if norm.mean is (Mean.DIVIDE if x.device.type == "cpu" else Mean.RECIPROCAL):
        mean = x.square().mean(-1, keepdim=True)
    else:
        squares = x.square().sum(-1, keepdim=True)
        count = torch.full_like(squares, x.shape[-1])
        mean = squares / count if norm.mean is Mean.DIVIDE else squares * count.reciprocal()
    normalized = _round(_over_root(norm, x, mean + norm.eps), norm.normalized)
    if weight is not None:
        factor = _round(weight.float() + 1, norm.shifted) if norm.weight is Weight.ONE_PLUS else weight.float()
        normalized = normalized * factor
    return _round(normalized, norm.product), total


def _placed(layout: ScaleLayout, scale: torch.Tensor) -> torch.Tensor:
    """Scales (..., M, G) as a layout stores them."""
    rows, groups = scale.shape[-2:]
    m, g = torch.arange(rows, device=scale.device)[:, None], torch.arange(groups, device=scale.device)
    at = address(layout, m, g, rows, groups).flatten()
    stored = allocated(layout, rows, groups)
    flat = scale.new_zeros(*scale.shape[:-2], math.prod(stored))
    flat[..., at] = scale.flatten(-2)
    return flat.unflatten(-1, stored)  # type: ignore[no-untyped-call, no-any-return]


_ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    Activation.SILU: F.silu,
    Activation.SIGMOID: torch.sigmoid,
    Activation.GELU: F.gelu,
    Activation.GELU_TANH: lambda x: F.gelu(x, approximate="tanh"),
}


def _activated(spec: GatedActivation, gate: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The activation of a float32 gate that was read in ``dtype``.

    In that dtype if it is rounded to it, as eager code is: with AVX2, a CPU's GELU gives zeros another sign in float32.
    """
    rounding = spec.activated if spec.gated else spec.product
    computed = dtype if rounding is dtype and spec.keeps(dtype) else torch.float32
    return _ACTIVATIONS[spec.activation](gate.to(computed)).float()


def _gated(spec: GatedActivation, x: torch.Tensor, up: torch.Tensor | None) -> torch.Tensor:
    gate = x.float()
    if spec.limit is not None:
        gate = gate.clamp(max=spec.limit)
    if spec.activation is Activation.SIGMOID_PRODUCT:
        scaled = gate if spec.alpha == 1 else _round(gate * spec.alpha, spec.inner)
        active = gate * _round(torch.sigmoid(scaled), spec.inner)
    else:
        active = _activated(spec, gate, x.dtype)
    if up is None:
        return _round(active, spec.product)
    if spec.limit is not None:
        up = up.clamp(-spec.limit, spec.limit)
    if spec.offset:
        up = _round(up + spec.offset, spec.inner)
    return _round(_round(active, spec.activated) * up, spec.product)


def _over_root(norm: RMSNorm, x: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
    if norm.root is Root.RSQRT:
        return x * _round(variance.rsqrt(), norm.root_rounding)
    if norm.root is Root.RECIPROCAL_SQRT:
        return x * variance.sqrt().reciprocal()
    return x / variance.sqrt()


def _quantize(quantizer: Quantizer, value: torch.Tensor, given: torch.Tensor | None) -> list[torch.Tensor]:
    """The codes, and the scale if the quantizer returns one."""
    if quantizer.granularity is Granularity.TENSOR:
        grouped = value.reshape(1, 1, -1)
    else:
        grouped = value.unflatten(-1, (-1, quantizer.group or value.shape[-1]))  # type: ignore[no-untyped-call]
    amax = grouped.new_zeros(*grouped.shape[:-1], 1)
    if quantizer.needs_amax and value.numel():
        amax = grouped.abs().amax(-1, keepdim=True)
    leaves = {"amax": amax, "given": None if given is None else given.float().reshape(())}
    factor = evaluate(quantizer.factor, leaves)
    assert isinstance(factor, torch.Tensor)
    quotient = _round(grouped / factor if quantizer.divides else grouped * factor, quantizer.quotient)
    if quantizer.rounding is Rounding.NEAREST_EVEN:
        quotient = quotient.round()
    elif quantizer.rounding is Rounding.HALF_AWAY:
        whole = quotient.trunc()
        quotient = torch.where((quotient - whole).abs() >= 0.5, whole + quotient.sign(), whole)
    if quantizer.adds_zero:
        quotient = quotient + 0.0
    if quantizer.clamp is not None:
        quotient = quotient.clamp(quantizer.least, quantizer.clamp)
    if quantizer.e2m1 is None:
        outputs = [quotient.to(quantizer.code).reshape(value.shape).contiguous()]
    else:
        codes = e2m1_codes(quantizer.e2m1, quotient).reshape(value.shape)
        outputs = [(codes[..., ::2] | codes[..., 1::2] << 4).contiguous()]
    if quantizer.scale is not None:
        scale = evaluate(quantizer.scale, leaves)
        assert isinstance(scale, torch.Tensor)
        tensor = quantizer.granularity is Granularity.TENSOR
        outputs.append((scale.reshape(1) if tensor else scale.squeeze(-1)).to(quantizer.scale_dtype).contiguous())
    return outputs


_DTYPES = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f32": torch.float32,
    "f64": torch.float64,
    "i32": torch.int32,
}
_OPERATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "max": torch.maximum,
    "min": torch.minimum,
    "mul": torch.mul,
    "div": torch.div,
    "add": torch.add,
    "sub": torch.sub,
    "neg": torch.neg,
    "abs": torch.abs,
    "reciprocal": torch.reciprocal,
    "log2": torch.log2,
    "exp2": torch.exp2,
    "pow2": lambda x: torch.pow(2.0, x),
    "ceil": torch.ceil,
    "floor": torch.floor,
    "round": torch.round,
    "bits": lambda x: x.view(torch.int32),
    "from_bits": lambda x: x.view(torch.float32),
    "bit_and": torch.bitwise_and,
    "bit_or": torch.bitwise_or,
    "shl": torch.bitwise_left_shift,
    "shr": torch.bitwise_right_shift,
    "u8": lambda x: x.to(torch.int32) & 0xFF,
    "isnan": torch.isnan,
    "isinf": torch.isinf,
    "negate": torch.logical_not,
    "where": torch.where,
    **{name: getattr(torch, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
}


def evaluate(
    operand: Operand,
    leaves: Mapping[str, torch.Tensor | None],
    like: str = "f32",
    known: dict[Term, torch.Tensor] | None = None,
) -> torch.Tensor:
    """What a term is worth, from its leaves; a number as a tensor of the type ``like``.

    Terms that occur several times are evaluated once; ``known`` has those of a call before with the same leaves.
    """
    known = {} if known is None else known
    if not isinstance(operand, Term):
        device = next(leaf.device for leaf in leaves.values() if leaf is not None)
        return torch.full((), operand, dtype=_DTYPES[like], device=device)
    if operand.op in LEAVES:
        leaf = leaves[operand.op]
        assert leaf is not None
        return leaf
    if operand not in known:
        like = next((k for k in map(kind, operand.args) if k not in ("number", "bool")), "f32")
        known[operand] = _operation(operand.op, [evaluate(a, leaves, like, known) for a in operand.args])
    return known[operand]


def _operation(op: str, values: list[torch.Tensor]) -> torch.Tensor:
    if op in ("bf16", "f16"):
        return _round(values[0], _DTYPES[op])
    if op == "e4m3fn":
        return _round(values[0].clamp(-448.0, 448.0), torch.float8_e4m3fn)
    if op in _DTYPES:
        return values[0].to(_DTYPES[op])
    return _OPERATIONS[op](*values)
