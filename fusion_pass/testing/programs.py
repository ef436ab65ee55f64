"""Random programs of norms, activations, quantizers and what stands between them, as Hypothesis strategies.

A program is data and is interpreted, so that a failure prints as a short list of steps that can be pasted into a test:

    from hypothesis import given
    from fusion_pass.testing.programs import check, programs

    @given(programs())
    def test_my_rules(program):
        check(program)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ..sites import Report
from . import inputs, spellings
from .equivalence import check_traced

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

KINDS = (
    *("norm", "norm", "add", "add", "residual", "activate", "quantize", "quantize", "quantize", "again", "through"),
    *("view", "alter", "cast", "change", "change value", "use", "drop", "blocks", "blocks", "layer", "layer", "gated"),
)
SHAPES = (
    *((2, 3, 256), (6, 256), (2, 3, 128), (5, 96), (1, 64), (3, 33), (2, 2, 2, 64), (128,), (4, 1), (1, 1, 384)),
    *((64, 96), (2, 32, 64)),
)
DTYPES = (torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Step:
    """One step: what it does, to which of the values so far (the latest is 0), and in which of its spellings."""

    kind: str
    source: int = 0
    other: int = 0
    spelling: int = 0
    flags: int = 0


@dataclass(frozen=True)
class Program:
    """A function of two tensors and a weight, with its inputs.

    Attributes:
        steps: in their order.
        shape, dtype: of the two tensors; the weight has the size of a row.
        values: which values they hold, a name of :data:`fusion_pass.testing.inputs.KINDS`.
        dynamic: whether sizes are symbols.
        seed: of the values.
    """

    steps: tuple[Step, ...]
    shape: tuple[int, ...] = (2, 3, 256)
    dtype: torch.dtype = torch.bfloat16
    values: str = "integers"
    dynamic: bool = False
    seed: int = 0

    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        x, y = (inputs.tensor(self.values, self.shape, self.dtype, generator) for _ in range(2))
        weight = 1 + torch.randn(self.shape[-1], generator=generator) / 8
        return x, y, weight.to(self.dtype)

    def __call__(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        run = _Run(x, y, weight)
        for step in self.steps:
            getattr(run, step.kind.replace(" ", "_"))(step)
        return run.results


class _Run:
    """The values of a program that is being interpreted; each method is a kind of step."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> None:
        self.weight = weight
        self.streams = [x, y]  # inputs and sums: what residual streams are
        self.values: list[torch.Tensor] = []
        self.results: list[torch.Tensor] = []
        self.quantized: Callable[[], Any] = lambda: ()

    def value(self, i: int) -> torch.Tensor:
        # The latest first: what was just computed is quantized most often.
        known = self.streams + self.values
        return known[-1 - i % len(known)]

    def stream(self, i: int) -> torch.Tensor:
        return self.streams[-1 - i % len(self.streams)]

    def norm(self, step: Step) -> None:
        source, weight = self.stream(step.source), self.weight
        if step.other == 7:
            # A weight that is computed, maybe from the very sum that is normed.
            weight = self.stream(step.spelling).reshape(-1)[: source.shape[-1]]
        if source.shape[-1] == weight.shape[-1]:
            self.values.append(spellings.norm(source, weight, step.spelling, step.flags))

    def add(self, step: Step) -> None:
        source, other = self.stream(step.source), self.stream(step.other)
        if source.shape == other.shape and len(self.streams) < 5:
            wide = (source.float() + other.float()).to(source.dtype)
            self.streams.append(source + other if step.flags & 1 else wide)

    def residual(self, step: Step) -> None:
        """A value joins the stream, as a layer's output does."""
        stream, value = self.stream(step.source), self.value(step.other)
        if stream.shape == value.shape and len(self.streams) < 5:
            self.streams.append(stream + value.to(stream.dtype))

    def activate(self, step: Step) -> None:
        gate, up = self.value(step.source), self.value(step.other)
        if step.flags & 8 and gate.shape[-1] % 2 == 0:
            gate, up = (gate.float() if step.flags & 4 else gate).chunk(2, -1)
        if gate.shape == up.shape:
            self.values.append(spellings.activation(gate, up, step.spelling))

    def quantize(self, step: Step) -> None:
        value = self.value(step.source)
        self.quantized = lambda: spellings.quantize(value, step.spelling, step.flags)
        self.again(step)

    def layer(self, step: Step) -> None:
        """A sum, its norm and a quantizer, which are seldom drawn one behind the other."""
        self.add(step)
        self.norm(replace(step, source=0))
        self.quantize(replace(step, source=0))

    def gated(self, step: Step) -> None:
        """A gated activation and a quantizer."""
        self.activate(step)
        self.quantize(replace(step, source=0))

    def again(self, step: Step) -> None:
        """The latest quantization once more, as q, k and v do it; which results are read varies."""
        results = self.quantized()
        self.results += results if step.other < 6 else results[step.other % 2 :][:1]

    def blocks(self, step: Step) -> None:
        """MX codes of a matrix, of its transpose, or of both."""
        value = self.value(step.source)
        if value.dim() == 0:
            return
        matrix = value.reshape(-1, value.shape[-1])
        ways = (1, 2, 3)[step.other % 3]
        if ways & 1 and matrix.shape[1] % spellings.BLOCK == 0:
            self.results += spellings.in_blocks(matrix, step.spelling)
        if ways & 2 and matrix.shape[0] % spellings.BLOCK == 0:
            self.results += spellings.in_blocks(matrix.t().contiguous(), step.spelling)

    def through(self, step: Step) -> None:
        self.values.append(spellings.dequantized(self.value(step.source), step.spelling, step.flags))

    def view(self, step: Step) -> None:
        self.values.append(spellings.viewed(self.value(step.source), step.spelling))

    def alter(self, step: Step) -> None:
        taken, other = self.value(step.source), self.stream(step.other)
        if taken.shape == other.shape:
            self.values.append(spellings.broken(taken, step.spelling, other))

    def cast(self, step: Step) -> None:
        self.values.append(spellings.cast(self.value(step.source), step.spelling))

    def change(self, step: Step) -> None:
        self._change(self.stream(step.source), step)

    def change_value(self, step: Step) -> None:
        self._change(self.value(step.source), step)

    def _change(self, target: torch.Tensor, step: Step) -> None:
        other = self.stream(step.other)
        if target.shape == other.shape and target.is_contiguous():
            spellings.changed(target, step.spelling, other)

    def drop(self, step: Step) -> None:
        """Dead code: what is computed here is not read."""
        spellings.quantize(self.value(step.source), step.spelling, step.flags)

    def use(self, step: Step) -> None:
        value = self.value(step.source)
        self.results.append(value.float().abs().amax(0) if step.flags & 1 else value + 0)


def check(program: Program) -> Report:
    """Raise AssertionError unless the program, fused, has eager's bits; what was fused and missed in it."""
    return check_traced(program, program.arguments(), dynamic=program.dynamic)


def programs(min_steps: int = 3, max_steps: int = 14) -> SearchStrategy[Program]:
    """A Hypothesis strategy for programs; simpler ones have fewer steps, plain integers and static sizes."""
    from hypothesis import strategies as st

    steps = st.builds(
        Step,
        kind=st.sampled_from(KINDS),
        source=st.integers(0, 7),
        other=st.integers(0, 7),
        spelling=st.integers(0, 27),
        flags=st.integers(0, 15),
    )
    return st.builds(
        Program,
        steps=st.lists(steps, min_size=min_steps, max_size=max_steps).map(tuple),
        shape=st.sampled_from(SHAPES),
        dtype=st.sampled_from(DTYPES),
        values=st.sampled_from(inputs.KINDS),
        # Tracing with symbols takes several times as long.
        dynamic=st.integers(0, 7).map(lambda n: n == 7),
        seed=st.integers(0, 3),
    )
