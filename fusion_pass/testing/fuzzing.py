"""Try a function on many inputs, fused and in eager PyTorch, and shrink an input on which they differ."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..inductor import is_traceable_wrapper_subclass
from ..sites import Report
from . import inputs
from .equivalence import DifferenceError, Graphs, copied, execute, judge

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LEADING = (1, 2, 5, 16, 33)
_MOST_SHOWN = 12
_MOST_ATTEMPTS = 600

Progress = Callable[[int, int, str], None]


@dataclass
class Counterexample:
    """The simplest arguments found on which the fused function differs from eager.

    Attributes:
        args: the arguments.
        values: the kind of values it was found with.
        error: how the results differ, with both graphs.
    """

    args: tuple[Any, ...]
    values: str
    error: DifferenceError

    def __str__(self) -> str:
        shown = "\n".join(f"  argument {i}: {_shown(a)}" for i, a in enumerate(self.args))
        return f"fused and eager differ, found with {self.values!r} values, on\n{shown}\n{self.error}"


@dataclass
class Fuzzed:
    """What was tried.

    Attributes:
        tried: how many inputs.
        sizes: the leading sizes that the function took.
        report: the sites of the graphs.
        counterexample: None if all results were eager's.
    """

    tried: int = 0
    sizes: list[int] = field(default_factory=list)
    report: Report = field(default_factory=Report)
    counterexample: Counterexample | None = None


def fuzz(
    fn: Callable[..., Any],
    args: Sequence[Any],
    *,
    examples: int = 200,
    seed: int = 0,
    progress: Progress = lambda done, total, what: None,
) -> Fuzzed:
    """Compare ``fn``, fused, with eager on varied arguments, bit for bit, until they differ.

    Varied are the values of the plain floating-point tensors among ``args`` (:data:`fusion_pass.testing.inputs.KINDS`: random
    ones of all magnitudes, zero rows, NaN, infinities, negative zeros, subnormals, ties) and the leading size that the first
    tensors share, where eager takes other sizes. A failing input is shrunk: fewer rows, fewer values other than zero,
    simpler ones.

    Args:
        fn: a function or module.
        args: arguments it takes. They are not changed.
        examples: how many inputs to try, over all sizes.
        seed: of the values.
        progress: called with the inputs done, how many there are, and what is tried.

    Raises:
        ValueError: no argument is a floating-point tensor.
    """
    if not any(map(_varied, args)):
        raise ValueError(
            "args has no plain float32, bfloat16 or float16 tensor; allowed: at least one, to vary its values"
        )
    result = Fuzzed()
    generator = torch.Generator().manual_seed(seed)
    sized = list(_sizes(fn, args))
    for number, (size, example) in enumerate(sized):
        result.sizes.append(size)
        graphs = Graphs(fn)
        share = examples // len(sized) + (number < examples % len(sized))
        for kind, candidate in itertools.islice(_candidates(example, generator), share):
            progress(result.tried, examples, f"leading size {size}, {kind}")
            result.tried += 1
            if _problem(fn, graphs, candidate) is not None:
                result.counterexample = _shrunk(fn, graphs, candidate, kind, progress)
                return result
        result.report.extend(graphs.report)
    return result


def _varied(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.dtype in _FLOATS
        and value.numel() > 0
        and not is_traceable_wrapper_subclass(value)
    )


def _sizes(fn: Callable[..., Any], args: Sequence[Any]) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """The arguments, and those of other leading sizes that eager takes."""
    leading = _leading(args)
    yield leading or 0, tuple(args)
    for size in _LEADING:
        if leading is not None and size != leading:
            resized = tuple(_resized(a, leading, size) for a in args)
            if _runs(fn, resized):
                yield size, resized


def _leading(args: Sequence[Any]) -> int | None:
    """The leading size that varies: of the first tensor of two or more dimensions."""
    return next((a.shape[0] for a in args if _varied(a) and a.dim() > 1), None)


def _resized(value: Any, leading: int, size: int) -> Any:
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or value.shape[0] != leading:
        return value
    times = -(-size // leading)
    return value.repeat(times, *[1] * (value.dim() - 1))[:size].clone()


def _runs(fn: Callable[..., Any], args: Sequence[Any]) -> bool:
    try:
        execute(fn, args)
    except Exception:
        return False
    return True


def _candidates(args: tuple[Any, ...], generator: torch.Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The arguments as given, then with every kind of value: in all tensors, and in each alone."""
    yield "given", args
    varied = [i for i, a in enumerate(args) if _varied(a)]
    while True:
        for kind in inputs.KINDS:
            yield kind, tuple(_filled(a, kind, generator) if i in varied else a for i, a in enumerate(args))
        for kind, i in itertools.product(inputs.KINDS, varied if len(varied) > 1 else ()):
            alone = f"{kind} in argument {i}"
            yield alone, tuple(_filled(a, kind, generator) if i == j else a for j, a in enumerate(args))


def _filled(value: torch.Tensor, kind: str, generator: torch.Generator) -> torch.Tensor:
    """A tensor as value is, its strides included, with other values."""
    twin = copied(value)
    try:
        return twin.copy_(inputs.tensor(kind, tuple(value.shape), value.dtype, generator))
    except RuntimeError:  # its elements share memory
        return twin


def _problem(fn: Callable[..., Any], graphs: Graphs, args: Sequence[Any]) -> DifferenceError | None:
    eager = execute(fn, args)
    try:
        fused = graphs.run(args)
    except Exception as error:
        graphs.run_unfused(args)  # if this raises too, it is not the pass's doing
        return graphs.difference(f"eager does not raise, fused does: {type(error).__name__}: {error}", None)
    try:
        problem = judge(fused, eager, lambda: graphs.run_unfused(args), exact=not graphs.reorders())
    except AssertionError as error:
        return graphs.difference(str(error), None)
    return None if problem is None else graphs.difference(*problem)


class _Shrinker:
    """Reduces arguments while they still fail."""

    def __init__(self, fn: Callable[..., Any], graphs: Graphs, args: tuple[Any, ...], progress: Progress) -> None:
        self.fn, self.graphs, self.args, self.progress = fn, graphs, args, progress
        self.attempts = 0

    def accept(self, index: int, value: torch.Tensor) -> bool:
        """Whether the arguments still fail with another value of one; if so they have it now."""
        candidate = (*self.args[:index], value, *self.args[index + 1 :])
        return self.accept_all(candidate)

    def accept_all(self, candidate: tuple[Any, ...]) -> bool:
        if self.attempts >= _MOST_ATTEMPTS:
            return False
        self.attempts += 1
        self.progress(self.attempts, _MOST_ATTEMPTS, "shrinking")
        try:
            failed = _problem(self.fn, self.graphs, candidate) is not None
        except Exception:
            return False
        if failed:
            self.args = candidate
        return failed

    def zero(self, index: int) -> None:
        """Set as many values as possible to zero: all, then ever smaller runs of them."""
        if self.accept(index, torch.zeros_like(self.args[index])):
            return
        run = self.args[index].numel()
        while run > 1:
            run = -(-run // 2)
            for start in range(0, self.args[index].numel(), run):
                flat = self.args[index].contiguous().flatten().clone()
                if flat[start : start + run].count_nonzero():
                    flat[start : start + run] = 0
                    self.accept(index, copied(self.args[index]).copy_(flat.view(self.args[index].shape)))

    def simplify(self, index: int) -> None:
        """Make what is left ones, or integers, or numbers of few digits."""
        value = self.args[index]
        for simple in (
            value.new_ones(()).expand_as(value).where(value != 0, value),
            value.sign(),
            value.round(),
            (value * 8).round() / 8,
        ):
            if not torch.equal(simple, value) and self.accept(index, copied(value).copy_(simple)):
                return

    def take_rows(self) -> None:
        """Keep one leading index, or the first half of them again and again, where eager takes that."""
        leading = _leading(self.args)
        while leading is not None and leading > 1:
            halves = [slice(i, i + 1) for i in range(min(leading, 16))] + [slice(0, -(-leading // 2))]
            if not any(self._take(rows, leading) for rows in halves):
                return
            leading = _leading(self.args)

    def _take(self, rows: slice, leading: int) -> bool:
        tensors = [isinstance(a, torch.Tensor) and a.dim() > 1 and a.shape[0] == leading for a in self.args]
        taken = tuple(a[rows].clone() if t else a for a, t in zip(self.args, tensors, strict=True))
        if not _runs(self.fn, taken):
            return False
        before, self.graphs = self.graphs, Graphs(self.fn)
        if self.accept_all(taken):
            return True
        self.graphs = before.again()
        return False


def _shrunk(
    fn: Callable[..., Any], graphs: Graphs, args: tuple[Any, ...], kind: str, progress: Progress
) -> Counterexample:
    shrinker = _Shrinker(fn, graphs, args, progress)
    shrinker.take_rows()
    for index in [i for i, a in enumerate(args) if _varied(a)]:
        shrinker.zero(index)
        shrinker.simplify(index)
    error = _problem(fn, shrinker.graphs, shrinker.args)
    if error is None:  # not reproduced: an operation that is not deterministic
        error = graphs.difference("the results differed once, and not when run again on the same input", None)
    return Counterexample(shrinker.args, kind, error)


def _shown(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    text = f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if value.is_floating_point() and value.numel():
        nonzero = value.float().ne(0).logical_or(value.float().signbit())
        places = [tuple(p) for p in nonzero.nonzero().tolist()]
        if torch.equal(value, value.new_ones(()).expand_as(value)):
            return f"{text}, ones"
        if len(places) == value.numel() and len(places) > _MOST_SHOWN:
            return f"{text}, from {value.flatten()[:4].tolist()}…"
        shown = ", ".join(f"[{', '.join(map(str, p))}] = {value[p].item()!r}" for p in places[:_MOST_SHOWN])
        more = f" and {len(places) - _MOST_SHOWN} more" if len(places) > _MOST_SHOWN else ""
        return f"{text}, zeros but for {shown}{more}" if places else f"{text}, zeros"
    return text
