"""What the pass found in a graph: the sites it fuses, and the near misses with their reasons."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from .mx_specs import MX_BLOCK, NVFP4_BLOCK
from .specs import (
    DTYPE_NAMES,
    Activation,
    FusedSpec,
    GatedActivation,
    Granularity,
    NoPrologue,
    Prologue,
    Quantizer,
    RMSNorm,
    ScaleLayout,
    Weight,
)
from .terms import Operand, Term, is_power_of_two


@dataclass
class FusedSite:
    """One place where a fused op replaces a quantizer and what precedes it.

    Attributes:
        spec: what the fused op computes.
        x, other, weight, given: the nodes it reads (other: the residual of a norm, or the up half of a gated activation;
            given: a calibrated scale).
        row: values per row of x.
        codes, scale: the values it replaces, scale None if nothing reads it; for a column layout ``scale_copies`` are the transposed copies it replaces.
        halves: which half of each row of x is x and which is other, if one tensor holds both.
        scale_rows: the leading sizes of x whose last the layout of the scales moves, if they are not stored by rows.
        scale_strided: whether the copies are read as (M, G) with transposed strides.
        sum, value: the values of the residual sum and of the prologue, if the graph reads them elsewhere.
        nodes: the operations it stands for, the quantizing cast first.
        shared_by: how many quantizing casts of the graph this one op serves.
        by_columns: whether it quantizes the transpose of x, which is a matrix.
        columns: the site that quantizes the transpose of the same x, which the op serves as well.
    """

    spec: FusedSpec
    x: fx.Node
    other: fx.Node | None
    weight: fx.Node | None
    row: int
    codes: fx.Node
    nodes: tuple[fx.Node, ...]
    given: fx.Node | None = None
    scale: fx.Node | None = None
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
    extras: tuple[str, ...] = ()
    by_columns: bool = False
    columns: FusedSite | None = None

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
        layout = "" if self.scale_layout is ScaleLayout.ROW else f"_{self.scale_layout.value}"
        directions = "_by_columns" if self.by_columns else "_both_ways" if self.columns is not None else ""
        return f"{prologue_name(self.prologue)}_{quantizer_name(self.quantizer)}{layout}{directions}"

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        shared = f", shared by {self.shared_by} casts" if self.shared_by > 1 else ""
        extras = f", also returns {' and '.join(self.extras)}" if self.extras else ""
        return f"{self.name} [{shape}] -> {DTYPE_NAMES[self.quantizer.code]}{extras}{shared} at {self.location}"


@dataclass(frozen=True)
class Miss:
    """A site that was left as it is, in whole or in part.

    Attributes:
        kind: ``quantizer`` (a quantizing cast that no rule explains), ``prologue`` (a quantizer that fused alone),
            ``op`` (a call of a registered op that was left as it is), ``cost`` (a site that would be slower fused),
            ``device`` (one whose kernel the GPU cannot run),
            ``limit`` (one beyond FUSION_PASS_LIMIT), or ``failure`` (a defect of the pass).
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

    def decline(self, objection: Callable[[FusedSite], Miss | None]) -> None:
        """Replace the sites that have an objection by the miss that it is."""
        kept = []
        for site in self.fused:
            miss = objection(site)
            if miss is None:
                kept.append(site)
            else:
                self.missed.append(miss)
        self.fused[:] = kept

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
        names = {Activation.SIGMOID_PRODUCT: "silu" if prologue.alpha == 1 else "swish"}
        limited = "" if prologue.limit is None else "clamped_"
        return f"{limited}{names.get(prologue.activation, prologue.activation.value)}{'_mul' if prologue.gated else ''}"
    assert isinstance(prologue, RMSNorm)
    norm = "gemma_rms_norm" if prologue.weight is Weight.ONE_PLUS else "rms_norm"
    if prologue.gate is not None:
        return f"gated_{norm}"
    return norm if prologue.residual_sum is None else f"add_{norm}"


def quantizer_name(quantizer: Quantizer) -> str:
    prefix = "int8_" if quantizer.code is torch.int8 else ""
    if not quantizer.needs_amax:
        return f"{prefix}static"
    granularity = {
        Granularity.ROW: "per_token",
        Granularity.GROUP: f"per_group_{quantizer.group}",
        Granularity.TENSOR: "per_tensor",
    }[quantizer.granularity]
    power_of_two = "_ue8m0" if is_power_of_two(_unbounded(quantizer.factor)) else ""
    as_bytes = quantizer.scale_dtype is torch.uint8
    if as_bytes and quantizer.group == MX_BLOCK and not prefix:
        return "mxfp8" if quantizer.e2m1 is None else "mxfp4"
    if quantizer.e2m1 is not None:
        prefix = "fp4_"
        if quantizer.scale_dtype is torch.float8_e4m3fn and quantizer.group == NVFP4_BLOCK:
            return "nvfp4"
    return f"{prefix}{granularity}{power_of_two}{'_bytes' if as_bytes else ''}"


def _unbounded(operand: Operand) -> Operand:
    """A term without its outermost bounds: vLLM's floor of UE8M0 scales is no power of two."""
    bounded = isinstance(operand, Term) and operand.op in ("max", "min", "reciprocal")
    return _unbounded(operand.args[0]) if isinstance(operand, Term) and bounded else operand


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
