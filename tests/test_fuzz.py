"""Random programs of norms, activations, quantizers and what stands between them: fused, they keep eager's bits.

Programs are drawn as data and interpreted, so that a failure prints as a short list of steps. Norms read small integers, whose
squares add up exactly; everything else is a function of single values. FUSION_PASS_FUZZ_EXAMPLES sets how many are drawn.
"""

from __future__ import annotations

import collections
import os
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._inductor.decomposition import select_decomp_table
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_pass import graph_pass, ops
from fusion_pass.testing import compare

EXAMPLES = int(os.environ.get("FUSION_PASS_FUZZ_EXAMPLES", "250"))
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2, INT8 = torch.float8_e4m3fn, torch.float8_e5m2, torch.int8
SHAPE = (2, 3, 256)
# A CPU computes silu in one kernel other than its decomposition does: that is not the pass's doing.
DECOMPOSITIONS = {op: f for op, f in select_decomp_table().items() if op is not torch.ops.aten.silu.default}
FUSED: collections.Counter[str] = collections.Counter()


@dataclass(frozen=True)
class Step:
    """One step: what it does, to which of the values so far, and in which of its spellings."""

    kind: str
    source: int
    other: int
    spelling: int
    flags: int


steps = st.builds(
    Step,
    kind=st.sampled_from(
        ["norm", "norm", "add", "add", "act", "quant", "quant", "quant", "view", "break", "in place", "use"]
    ),
    source=st.integers(0, 7),
    other=st.integers(0, 7),
    spelling=st.integers(0, 15),
    flags=st.integers(0, 15),
)
programs = st.lists(steps, min_size=3, max_size=12)


def norm(x, weight, spelling, flags):
    h = x.float()
    squares = h.pow(2) if flags & 1 else h * h
    mean = squares.mean(-1, keepdim=True) if flags & 2 else squares.sum(-1, keepdim=True) / h.shape[-1]
    variance = mean + 1e-6
    inverse = variance.rsqrt() if spelling % 4 else 1.0 / variance.sqrt()
    h = h / variance.sqrt() if spelling % 4 == 3 else h * inverse
    if spelling % 5 == 0:
        return weight * h.to(x.dtype)
    if spelling % 5 == 1:
        return (h * (1.0 + weight.float())).to(x.dtype)
    if spelling % 5 == 2:
        return h.to(x.dtype)
    if spelling % 5 == 3:
        return h * weight.float()
    return (weight.float() * h).to(x.dtype)


def activation(gate, up, spelling):
    if spelling % 5 == 0:
        return F.silu(gate) * up
    if spelling % 5 == 1:
        return up.float() * F.silu(gate.float())
    if spelling % 5 == 2:
        return (gate.float() * torch.sigmoid(gate.float()) * up.float()).to(gate.dtype)
    if spelling % 5 == 3:
        return up * torch.sigmoid(gate)
    return F.relu(gate) * up


def scale_of(grouped, bound, spelling, flags):
    """A dequantization scale, and whether values are multiplied by another."""
    amax = grouped.abs().amax(-1, keepdim=True) if flags & 1 else grouped.abs().max(-1, keepdim=True).values
    if spelling % 7 == 6:
        return 1.0 / (bound / amax.float().clamp(min=1e-12))
    amax = amax if spelling % 7 == 5 else amax.float().clamp(min=1e-10)
    scale = amax / bound if flags & 2 else amax * (1.0 / bound)
    if spelling % 7 == 1:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    if spelling % 7 == 2:
        scale = scale.clamp(min=1e-4)
    if spelling % 7 == 3:
        scale = torch.where(scale < 1e-3, 1.0, scale)
    if spelling % 7 == 4:
        scale = scale.clamp(max=0.05)
    return scale


def quantize(x, spelling, flags, dim=-1):
    code = (E4M3, E4M3, E5M2, INT8)[spelling % 4]
    bound = 127.0 if code is INT8 else torch.finfo(code).max
    group = (x.shape[-1], 128, 64, 32)[flags % 4]
    grouped = x.unflatten(-1, (-1, group))
    scale = scale_of(grouped, bound, spelling, flags).float()
    grouped = grouped.float()
    quotient = grouped * scale.reciprocal() if flags & 4 else grouped / scale
    if code is INT8:
        quotient = quotient.round()
    codes = quotient.clamp(-bound, bound).to(code).flatten(-2)
    scale = scale.squeeze(-1)
    return codes, scale.transpose(-1, -2).contiguous() if flags & 8 else scale


def broken(x, spelling, other):
    """What stands between a producer and a quantizer and must not be skipped."""
    return (
        lambda: x * 0.5,
        lambda: F.relu(x),
        lambda: x + 1,
        lambda: x.flip(-1),
        lambda: torch.where(other > 0, x, torch.zeros_like(x)),
        lambda: x.to(F16).to(x.dtype),
        lambda: x.clamp(-3, 3),
        lambda: -x,
    )[spelling % 8]()


def changed(x, spelling, other):
    """An in-place change, of integers to integers."""
    if spelling % 4 == 0:
        x.add_(1)
    elif spelling % 4 == 1:
        x.neg_()
    elif spelling % 4 == 2:
        x[..., :64] = 2
    else:
        x.copy_(other)


def viewed(x, spelling):
    return (
        lambda: x.reshape(-1, x.shape[-1]).view(x.shape),
        lambda: x.transpose(0, 1).contiguous(),
        lambda: x.transpose(0, 1).transpose(0, 1),
        lambda: x.clone(),
        lambda: x.unsqueeze(0).squeeze(0),
        lambda: x.view(2, 3, 4, 64).flatten(-2),
    )[spelling % 6]()


def interpret(program):
    """The program as a function of two tensors of small integers and a weight."""

    def fn(x, y, weight):
        integers, values, results = [x, y], [], []

        def value(i):
            # The latest first: what was just computed is quantized most often.
            known = integers + values
            return known[-1 - i % len(known)]

        for step in program:
            source, other = (integers[-1 - i % len(integers)] for i in (step.source, step.other))
            if step.kind == "norm":
                values.append(norm(source, weight, step.spelling, step.flags))
            elif step.kind == "add":
                # Few sums of sums, so that squares still add up exactly.
                if len(integers) < 5 and source.shape == other.shape:
                    integers.append(source + other if step.flags & 1 else (source.float() + other.float()).to(BF16))
            elif step.kind == "act":
                gate, up = value(step.source), value(step.other)
                if gate.shape == up.shape:
                    values.append(activation(gate, up, step.spelling))
            elif step.kind == "quant":
                results += quantize(value(step.source), step.spelling, step.flags)
            elif step.kind == "view":
                values.append(viewed(value(step.source), step.spelling))
            elif step.kind == "break":
                taken = value(step.source)
                if taken.shape == other.shape:
                    values.append(broken(taken, step.spelling, other))
            elif step.kind == "in place" and source.shape == other.shape:
                changed(source, step.spelling, other)
            elif step.kind == "use":
                results.append(value(step.source).float().abs().amax(0) if step.flags & 1 else value(step.source) + 0)
        return results

    return fn


def arguments():
    x, y = (torch.randint(-7, 8, SHAPE).to(BF16) for _ in range(2))
    return x, y, (1 + torch.randn(SHAPE[-1]) / 8).to(BF16)


def check(program):
    fn, inputs = interpret(program), arguments()
    eager, fused = [t.clone() for t in inputs], [t.clone() for t in inputs]
    expected = fn(*eager)
    traced = make_fx(functionalize(fn), decomposition_table=DECOMPOSITIONS, tracing_mode="fake")(*inputs)
    traced.graph.eliminate_dead_code()
    report = graph_pass.run(traced.graph, ("cpu",))
    traced.recompile()
    actual = traced(*fused)
    FUSED.update(site.name for site in report.fused)
    FUSED.update({"programs": 1, "programs with a site": bool(report.fused), "misses": len(report.missed)})
    for a, e in zip(actual, expected, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (e.dtype, e.shape, e.stride()), report
    result = compare((actual, fused), (expected, eager))
    assert result.equal, f"{result}\n{report}"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the rewriting is fuzzed on a CPU")
def test_random_programs_keep_eagers_bits(monkeypatch):
    # The reference in place of the kernels: what is fuzzed is the rewriting.
    monkeypatch.setattr(ops, "INTERPRETED", False)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=EXAMPLES < 1000,
    )
    @given(programs)
    def fuzz(program):
        torch.manual_seed(0)
        check(program)

    FUSED.clear()
    fuzz()
    print(dict(FUSED))
    # Programs that fuse nothing would test nothing.
    assert FUSED["programs with a site"] > FUSED["programs"] / 3
    assert len(FUSED) > 20
