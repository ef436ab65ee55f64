"""What was measured of each cell: kept on disk as lines of JSON, shown as a table, summed up against the goals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import record
from cases import CASES
from contestants import BARE, DEFAULT, EAGER, OURS, TUNED

COLUMNS = (OURS, BARE, DEFAULT, TUNED, EAGER)
_MANY_VALUES = 32 << 20
_BARE_SHARE = 0.92
# A tile that is quantized along its rows and along its columns goes through shared memory, and has twice the codes.
_BARE_SHARE_BOTH = 0.85
_BOTH = frozenset(case.name for case in CASES if case.quantization.both)
_FEW_ROWS = 32
_FEW_ROWS_FACTOR = 1.3


@dataclass(frozen=True)
class Cell:
    """One site at one size: (rows, row) values of ``dtype``.

    Attributes:
        traced_rows: the rows with which it is compiled for any number of them; None if it is for its own alone.
    """

    site: str
    rows: int
    row: int
    dtype: str
    traced_rows: int | None = None

    def __str__(self) -> str:
        return f"{self.site}  {self.size} {self.dtype}"

    @property
    def size(self) -> str:
        return f"{self.rows}x{self.row}" + ("" if self.traced_rows is None else f" by {self.traced_rows}")


@dataclass
class Result:
    """What was measured of one cell.

    Attributes:
        floor: microseconds to move the cell's bytes at the copy bandwidth of the same run.
        times: microseconds by contestant.
        differ: how many elements of its outputs differ from eager's in their bits, by contestant.
        elements: how many elements the outputs have.
        errors: what went wrong, by contestant.
    """

    cell: Cell
    floor: float = 0.0
    times: dict[str, float] = field(default_factory=dict)
    differ: dict[str, int] = field(default_factory=dict)
    elements: int = 0
    errors: dict[str, str] = field(default_factory=dict)

    def ratio(self, over: str, under: str = OURS) -> float | None:
        """The time of ``over`` divided by that of ``under``; None if either was not measured."""
        if over not in self.times or under not in self.times:
            return None
        return self.times[over] / self.times[under]

    @property
    def compiled(self) -> float | None:
        """The faster of torch.compile's two times, or None if there is neither."""
        return min((self.times[name] for name in (DEFAULT, TUNED) if name in self.times), default=None)


def append(path: Path, result: Result) -> None:
    record.append(path, asdict(result))


def read(path: Path) -> list[Result]:
    """The results in a file, the last of each cell."""
    found: dict[Cell, Result] = {}
    for fields in record.read(path):
        result = Result(**{**fields, "cell": Cell(**fields["cell"])})
        found[result.cell] = result
    return list(found.values())


def header(results: Iterable[Result] = ()) -> list[str]:
    others = sorted({name for r in results for name in r.times} - set(COLUMNS))
    return [
        "site",
        "MxN",
        "dtype",
        "floor",
        *COLUMNS,
        *others,
        "bare/ours",
        "compile/ours",
        "differ",
        "compile differs",
    ]


def row(result: Result, columns: Sequence[str]) -> list[str]:
    """The cells of a table's line under ``columns``, as :func:`header` gives them."""
    fixed = {
        "site": result.cell.site,
        "MxN": result.cell.size,
        "dtype": result.cell.dtype,
        "floor": _time(result.floor),
        "bare/ours": _ratio(result.ratio(BARE)),
        "compile/ours": _ratio(_over_compiled(result)),
        "differ": _count(result, OURS),
        "compile differs": _count(result, DEFAULT),
    }
    return [
        fixed[c]
        if c in fixed
        else "error"
        if c in result.errors
        else _time(result.times[c])
        if c in result.times
        else "–"
        for c in columns
    ]


def _time(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _count(result: Result, name: str) -> str:
    if name not in result.differ:
        return "–"
    return "0" if result.differ[name] == 0 else f"{result.differ[name]} ({result.differ[name] / result.elements:.1e})"


def _over_compiled(result: Result) -> float | None:
    ours = result.times.get(OURS)
    return None if ours is None or result.compiled is None else result.compiled / ours


def geometric_mean(ratios: Iterable[float]) -> float | None:
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(statistics.fmean(logarithms)) if logarithms else None


def summary(results: Sequence[Result]) -> list[str]:
    """Means over rivals, the cells that lose to torch.compile, those that miss a goal, and what went wrong."""
    lines = []
    names = [*COLUMNS[1:], *sorted({name for r in results for name in r.times} - set(COLUMNS))]
    for name in names:
        ratios = [ratio for r in results if (ratio := r.ratio(name)) is not None]
        if ratios:
            lines.append(
                f"{name} / ours: geometric mean {geometric_mean(ratios):.3f}, least {min(ratios):.3f}, of {len(ratios)} cells"
            )
    lines += _listed("slower than torch.compile", results, _over_compiled, lambda ratio: ratio < 1)
    large = [r for r in results if r.cell.rows * r.cell.row >= _MANY_VALUES]
    one, both = ([r for r in large if (r.cell.site in _BOTH) is wanted] for wanted in (False, True))
    lines += _under_bare("bare / ours", one, _BARE_SHARE)
    if both:
        lines += _under_bare("bare / ours of a matrix and its transpose", both, _BARE_SHARE_BOTH)
    few = [r for r in results if r.cell.rows <= _FEW_ROWS]
    lines += _listed(
        f"ours / bare over {_FEW_ROWS_FACTOR} up to {_FEW_ROWS} rows",
        few,
        lambda r: r.ratio(OURS, BARE),
        lambda factor: factor > _FEW_ROWS_FACTOR,
    )
    differing = [r for r in results if r.differ.get(OURS)]
    lines.append(
        f"differ from eager in any bit: {len(differing)} cells, {sum(r.differ[OURS] for r in differing)} elements"
    )
    lines += [f"    error in {r.cell}, {name}: {error}" for r in results for name, error in r.errors.items()]
    return lines


def _under_bare(title: str, results: Sequence[Result], least: float) -> list[str]:
    return _listed(
        f"{title} under {least} from 32 Mi values on",
        results,
        lambda r: r.ratio(BARE),
        lambda share: share < least,
    )


def _listed(
    title: str,
    results: Sequence[Result],
    measure: Callable[[Result], float | None],
    misses: Callable[[float], bool],
) -> list[str]:
    """How many of the results that have the measure miss, and which, the worst first."""
    measured = [(r, value) for r in results if (value := measure(r)) is not None]
    missed = [(r, value) for r, value in measured if misses(value)]
    missed.sort(key=lambda pair: abs(math.log(pair[1])), reverse=True)
    return [f"{title}: {len(missed)} of {len(measured)} cells", *(f"    {value:.3f}  {r.cell}" for r, value in missed)]
