"""What the pass found in a graph: the sites it fuses, and the near misses with their reasons."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .specs import (
    DTYPE_NAMES,
    FusedSpec,
    GatedActivation,
    NoPrologue,
    Prologue,
    Quantizer,
    RMSNorm,
    ScaleLayout,
    Weight,
)


@dataclass
class FusedSite:
    """One place where a fused op replaces a quantizer and what precedes it.

    Attributes:
        spec: what the fused op computes.
        x, other, weight: the nodes it reads (other: the residual of a norm, or the up half of a gated activation).
        row: values per row of x.
        halves: which half of each row of x is x and which is other, if one tensor holds both.
        codes, scale: the values it replaces; for a column layout ``scale_copies`` are the transposed copies it replaces.
        scale_rows: the leading sizes of x whose last a column layout swaps with the groups, if it has one.
        scale_strided: whether the copies are read as (M, G) with transposed strides.
        sum, value: the values of the residual sum and of the prologue, if the graph reads them elsewhere.
        nodes: the operations it stands for, the quantizing cast first.
        shared_by: how many quantizing casts of the graph this one op serves.
    """

    spec: FusedSpec
    x: fx.Node
    other: fx.Node | None
    weight: fx.Node | None
    row: int
    codes: fx.Node
    scale: fx.Node
    nodes: tuple[fx.Node, ...]
    scale_copies: tuple[fx.Node, ...] = ()
    scale_rows: tuple[Any, ...] | None = None
    scale_strided: bool = False
    halves: tuple[int, int] | None = None
    sum: fx.Node | None = None
    value: fx.Node | None = None
    shared_by: int = 1
    op: fx.Node | None = None
    location: str = ""
    shape: tuple[Any, ...] = ()
    outputs: tuple[str, ...] = field(default=("code", "scale"))

    @property
    def prologue(self) -> Prologue:
        return self.spec.prologue

    @property
    def quantizer(self) -> Quantizer:
        return self.spec.quantizer

    @property
    def scale_layout(self) -> ScaleLayout:
        return self.spec.layout

    @property
    def name(self) -> str:
        """The site in one word, as counters name it: ``add_rms_norm_per_token``."""
        return f"{prologue_name(self.prologue)}_{quantizer_name(self.quantizer)}" + (
            "_column" if self.scale_layout is ScaleLayout.COLUMN else ""
        )

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        shared = f", shared by {self.shared_by} casts" if self.shared_by > 1 else ""
        extras = f", also returns {' and '.join(self.outputs[2:])}" if len(self.outputs) > 2 else ""
        return f"{self.name} [{shape}] -> {DTYPE_NAMES[self.quantizer.code]}{extras}{shared} at {self.location}"


@dataclass(frozen=True)
class Miss:
    """A site that was left as it is, in whole or in part.

    Attributes:
        kind: ``quantizer`` (a quantizing cast that no rule explains), ``prologue`` (a quantizer that fused alone), or
            ``op`` (a call of a registered op that was left as it is).
        reason: what stopped the match.
        node: the operation at which it stopped, as text.
        location: the user's file and line.
    """

    kind: str
    reason: str
    node: str
    location: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}; stopped at {self.node} ({self.location})"


@dataclass
class Report:
    """What one or more graphs contained."""

    fused: list[FusedSite] = field(default_factory=list)
    missed: list[Miss] = field(default_factory=list)
    eligible: int = 0

    def extend(self, other: Report) -> None:
        self.fused += other.fused
        self.missed += other.missed
        self.eligible += other.eligible

    def __str__(self) -> str:
        served = sum(site.shared_by for site in self.fused)
        lines = [f"{len(self.fused)} fused ops serve {served} of {self.eligible} quantizing casts"]
        lines += [f"  fused  {site}" for site in self.fused]
        lines += [f"  missed {miss}" for miss in self.missed]
        return "\n".join(lines)


def prologue_name(prologue: Prologue) -> str:
    if isinstance(prologue, NoPrologue):
        return "quant"
    if isinstance(prologue, GatedActivation):
        return f"{prologue.activation.value}_mul"
    assert isinstance(prologue, RMSNorm)
    norm = "gemma_rms_norm" if prologue.weight is Weight.ONE_PLUS else "rms_norm"
    return norm if prologue.residual_sum is None else f"add_{norm}"


def quantizer_name(quantizer: Quantizer) -> str:
    granularity = "per_token" if quantizer.group is None else f"per_group_{quantizer.group}"
    prefix = "int8_" if quantizer.code is torch.int8 else ""
    return prefix + granularity + ("_ue8m0" if quantizer.power_of_two else "")


_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def location(*nodes: fx.Node) -> str:
    """The innermost user frame of the first node that has one, or of a node just before it.

    torchao's quantization nodes carry no stack trace; what computes their input, or reads their codes, often does.
    """
    for node in (*nodes, *_around(nodes[0])):
        frames = list(_FRAME.finditer(node.meta.get("stack_trace") or ""))
        if frames:
            frame = frames[-1]
            return f"{frame['file']}:{frame['line']} in {frame['function']}"
    return "an unknown line"


def _around(node: fx.Node, steps: int = 12) -> list[fx.Node]:
    before, found = node, []
    for _ in range(steps):
        before = before.prev
        if before.op == "root":
            break
        found.append(before)
    return found


def dtype_text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
