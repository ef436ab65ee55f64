"""Whether a function, fused, has the bits of eager PyTorch: the assertion, and how results are judged.

Tracing decomposes operations, and a decomposition may depart from eager by itself. So the graph is also run without the pass: only
what is eager's there and is not after the pass is held against the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from ..fake_device import copy_module
from ..inductor import is_concrete_int, is_traceable_wrapper_subclass, mark_static, trace
from ..sites import Report
from .comparison import Comparison, unequal

# Of codes, where the sums of squares of a norm are added up in another order; and how far floats then are apart.
_REORDERED_CODES = 1e-3
_REORDERED_EPS = 4
# A CPU computes silu in one kernel other than its decomposition does: that is not the pass's doing.
_KEPT = (torch.ops.aten.silu.default,)


class DifferenceError(AssertionError):
    """A fused function has other results than eager.

    Attributes:
        comparison: how many elements differ.
        report: what was fused.
        before, after: the graphs without and with the pass, as code.
    """

    def __init__(self, what: str, comparison: Comparison | None, report: Report, before: str, after: str) -> None:
        super().__init__(f"{what}\n{report}\n\nbefore the pass:\n{before}\n\nafter the pass:\n{after}")
        self.what = what
        self.comparison = comparison
        self.report = report
        self.before = before
        self.after = after


@dataclass
class Execution:
    """What a function returned and what it left in its arguments."""

    results: Any
    arguments: Any

    def tensors(self) -> list[torch.Tensor]:
        leaves = pytree.tree_leaves((self.results, self.arguments))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def execute(fn: Callable[..., Any], args: Sequence[Any]) -> Execution:
    """Run fn on copies of args."""
    copies = pytree.tree_map(lambda a: copied(a) if isinstance(a, torch.Tensor) else a, tuple(args))
    with torch.no_grad():
        return Execution(fn(*copies), copies)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, even if elements share memory."""
    storage = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8, device=tensor.device).untyped_storage()
    storage.copy_(tensor.untyped_storage(), non_blocking=False)
    twin = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return twin.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())  # type: ignore[call-overload, no-any-return]


def judge(
    fused: Execution, eager: Execution, unfused: Callable[[], Execution], exact: bool
) -> tuple[str, Comparison] | None:
    """What is wrong with the fused results, or None.

    Args:
        unfused: runs the graph without the pass; called only where something differs.
        exact: whether every bit counts; otherwise the order of a norm's sum of squares may differ.
    """
    plain: list[torch.Tensor] | None = None
    for i, (a, e) in enumerate(zip(fused.tensors(), eager.tensors(), strict=True)):
        if (a.shape, a.dtype) != (e.shape, e.dtype):
            raise AssertionError(f"output {i} is {a.dtype} {tuple(a.shape)}, in eager {e.dtype} {tuple(e.shape)}")
        differs = unequal(a, e)
        if a.stride() == e.stride() and not differs.any():
            continue
        plain = unfused().tensors() if plain is None else plain
        if plain[i].stride() == e.stride() != a.stride():
            return f"output {i} has strides {a.stride()}, in eager {e.stride()}", Comparison(a.numel(), 0, 0.0)
        differs &= ~unequal(plain[i], e)
        if not exact:
            differs &= _beyond_reordering(a, e, differs)
        if differs.any():
            distance = (a.double() - e.double()).abs()[differs]
            finite = distance[distance.isfinite()]
            largest = float(finite.max()) if finite.numel() else 0.0
            found = Comparison(a.numel(), int(differs.sum()), largest)
            return f"output {i}: {found}", found
    return None


def _beyond_reordering(a: torch.Tensor, e: torch.Tensor, differs: torch.Tensor) -> torch.Tensor:
    if a.element_size() == 1:
        few = int(differs.sum()) <= max(1.0, _REORDERED_CODES * a.numel())
        return torch.zeros_like(differs) if few else differs
    info = torch.finfo(e.dtype) if e.is_floating_point() else None
    if info is None:
        return differs
    return ~torch.isclose(a, e, rtol=_REORDERED_EPS * info.eps, atol=float(info.smallest_normal), equal_nan=True)


def assert_fusion_equivalent(
    fn: Callable[..., Any],
    *args: Any,
    dynamic: bool = False,
    sites: Sequence[str] | None = None,
    exact: bool | None = None,
) -> Report:
    """Assert that ``fn(*args)``, compiled with the pass, has eager's results, bit for bit; what it leaves in args, too.

    The rewritten graph is run node by node, on the device of the arguments: on a GPU by the Triton kernels, on a CPU by
    plain PyTorch. Arguments are copied.

    Args:
        fn: a function or module.
        dynamic: compile with symbolic sizes, all but the last of each tensor: kernels take rows of a static length.
        sites: the names of the sites that must fuse, in any order, such as ``["rms_norm_per_token"]``; None for any or none.
        exact: whether every bit must be eager's. None: yes, unless a norm of other values than small integers runs as a
            kernel, which adds up the squares in its own order; then a thousandth of the codes may differ, and floats by
            four units in the last place.

    Returns:
        What was fused and missed.

    Raises:
        DifferenceError: an AssertionError that shows both graphs.
    """
    graphs = Graphs(fn, dynamic)
    eager = execute(fn, args)
    fused = graphs.run(args)
    report = graphs.report
    if sites is not None and sorted(sites) != sorted(site.name for site in report.fused):
        raise graphs.difference(f"the sites are {sorted(s.name for s in report.fused)}, not {sorted(sites)}", None)
    exact = not graphs.reorders() if exact is None else exact
    problem = judge(fused, eager, lambda: graphs.run_unfused(args), exact)
    if problem is not None:
        raise graphs.difference(*problem)
    return report


class Graphs:
    """A function compiled with the pass and without it, and what its graphs were."""

    def __init__(self, fn: Callable[..., Any], dynamic: bool = False) -> None:
        self.fn, self.dynamic = fn, dynamic
        self.report = Report()
        self.before: list[str] = []
        self.after: list[str] = []
        self.kernels = False
        # Each is compiled anew for every shape it meets, and after so many times no more: not at all, silently.
        torch.compiler.reset()
        self._fused = torch.compile(fn, backend=self._backend(fuse=True), dynamic=dynamic)
        self._unfused = torch.compile(fn, backend=self._backend(fuse=False), dynamic=dynamic)

    def again(self) -> Graphs:
        """The same anew: another function compiled since has made this one forgotten."""
        return Graphs(self.fn, self.dynamic)

    def run(self, args: Sequence[Any]) -> Execution:
        return execute(self._given(self._fused), args)

    def run_unfused(self, args: Sequence[Any]) -> Execution:
        return execute(self._given(self._unfused), args)

    def _given(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        return (lambda *args: compiled(*map(_with_static_rows, args))) if self.dynamic else compiled

    def reorders(self) -> bool:
        """Whether a kernel adds up a norm's squares in an order other than eager's."""
        from ..kernels.arithmetic import INTERPRETED

        norms = any("rms_norm" in site.name for site in self.report.fused)
        return norms and (self.kernels or INTERPRETED)

    def difference(self, what: str, comparison: Comparison | None) -> DifferenceError:
        return DifferenceError(what, comparison, self.report, "\n".join(self.before), "\n".join(self.after))

    def _backend(self, fuse: bool) -> Callable[..., Any]:
        from .. import floats, graph_pass, inductor, registration

        def compiler(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            if fuse:
                self.kernels |= any(isinstance(t, torch.Tensor) and t.is_cuda for t in inputs)
                floats.specialize(gm.graph, registration.DEVICES, strict=True)
                self.before.append(_code(gm))
                found = graph_pass.run(gm.graph, registration.DEVICES)
                _raise_failures(found)
                self.report.extend(found)
                gm.graph.lint()  # type: ignore[no-untyped-call]
                gm.recompile()
                self.after.append(_code(gm))
            return torch.no_grad()(gm.forward)  # type: ignore[no-any-return]

        return lambda gm, inputs: inductor.compile_without_joint_passes(gm, inputs, compiler)


def _with_static_rows(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() and not is_traceable_wrapper_subclass(value):
        mark_static(value, value.dim() - 1)
    return value


def check_traced(fn: Callable[..., Any], args: Sequence[torch.Tensor], *, dynamic: bool = False) -> Report:
    """As :func:`assert_fusion_equivalent`, several times faster: traced without Dynamo, on CPU tensors, every bit exact.

    The fused ops run as plain PyTorch, also under TRITON_INTERPRET=1: what is checked is the rewriting.

    Args:
        dynamic: trace with symbols for all sizes but the last, and run the graph with another leading size, too.
    """
    from .. import graph_pass, ops

    traced = trace(fn, args, _KEPT, dynamic)
    plain = copy_module(traced)
    report = graph_pass.run(traced.graph, ("cpu",))
    _raise_failures(report)
    traced.graph.lint()
    traced.recompile()
    for given in [args, *_larger(args, plain)] if dynamic else [args]:
        with ops.plain_on_cpu():
            fused = execute(traced, given)
        problem = judge(fused, execute(fn, given), lambda given=given: execute(plain, given), exact=True)  # type: ignore[misc]
        if problem is not None:
            raise DifferenceError(*problem, report, _code(plain), _code(traced))
    return report


def _larger(args: Sequence[torch.Tensor], traced: fx.GraphModule) -> list[tuple[torch.Tensor, ...]]:
    """The arguments with one more leading index, if the graph takes them."""
    size = args[0].shape[0]
    if args[0].dim() < 2 or size < 2:
        return []
    inputs = [node.meta["val"] for node in traced.graph.nodes if node.op == "placeholder"]
    if any(is_concrete_int(n) for value in inputs for n in value.shape[:-1]):  # tracing has specialised it
        return []
    larger = []
    for a in args:
        sizes = [n + 1 if n == size else n for n in a.shape[:-1]]
        larger.append(a.new_zeros(*sizes, a.shape[-1]).copy_(a.flatten()[: a.shape[-1]].expand(*sizes, a.shape[-1])))
    try:
        execute(traced, larger)
    except (RuntimeError, AssertionError):
        return []
    return [tuple(larger)]


def _raise_failures(report: Report) -> None:
    failures = [miss for miss in report.missed if miss.kind == "failure"]
    if failures:
        raise AssertionError("\n".join(map(str, failures)))


def _code(gm: fx.GraphModule) -> str:
    from .. import debug

    return debug.code(gm.graph)
