"""Time every site with the pass, with plain torch.compile and unfused, beside bare traffic and the floor of its bytes.

    python benchmarks/sites.py --grid quick --json quick.jsonl --plot quick.svg
    python benchmarks/sites.py --grid full --json full.jsonl --resume --minutes 9     # again, until it says it is complete

    ours           with the pass
    bare           the fastest of a few kernels that only read the inputs and write outputs: what these bytes cost
    compile        torch.compile of the same code without the pass, default options
    compile-tuned  the same with Inductor's coordinate_descent_tuning
    eager          unfused
    floor          the bytes at the copy bandwidth of this run

Times are medians in microseconds per call, of CUDA-graph replays over rotating buffers. Each contestant's outputs are compared
with eager's, bit for bit, in the same run. Kernels of installed libraries join where they compute a site.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fusion_pass.testing import compare

import bare
import contestants
import plot
import results
import tables
from cases import CASES, PROLOGUES, QUANTIZATIONS, Case, case_named
from contestants import BARE, EAGER
from progress import Progress
from results import Cell, Result
from timing import bandwidth, buffer_count, in_turns, median, microseconds, timed
from warming import Warmer, default_processes

_ALL = {
    "rows": (1, 8, 32, 128, 512, 2048, 8192, 16384, 65536),
    "row": (1024, 2048, 2880, 3072, 4096, 5120, 7168, 8192, 14336, 16384),
    "dtype": ("bfloat16", "float16"),
    "prologue": tuple(p.name for p in PROLOGUES),
    "quantizer": tuple(q.name for q in QUANTIZATIONS),
}
_SHORT_US = 20.0
GRIDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "quick": {
        "rows": (32, 512, 8192),
        "row": (4096, 7168),
        "dtype": ("bfloat16",),
        "prologue": ("none", "rms", "add+rms", "silu*mul"),
        "quantizer": ("token", "group", "group-column", "mxfp8", "mxfp8-both", "mxfp4-both"),
    },
    "full": _ALL,
    "rehearsal": {
        "rows": (3,),
        "row": (256,),
        "dtype": ("bfloat16",),
        "prologue": ("none", "add+rms", "silu*mul"),
        "quantizer": ("group-column",),
    },
}
_COMPARED_AT_ONCE = 1 << 26
# What eager code holds at most beside its inputs and outputs: a few float32 tensors.
_EAGER_BYTES_PER_VALUE = 32


def cells(grid: dict[str, Sequence[Any]], memory: float, traced_rows: int | None = None) -> Iterator[Cell]:
    """The cells of a grid that divide into groups and take no more than ``memory`` bytes; sizes vary slowest."""
    wanted = [c for c in CASES if c.prologue.name in grid["prologue"] and c.quantization.name in grid["quantizer"]]
    for rows, row, dtype, case in itertools.product(grid["rows"], grid["row"], grid["dtype"], wanted):
        moved = case.bytes(rows, row, 2)
        if case.takes(rows, row) and buffer_count(moved) * moved + rows * row * _EAGER_BYTES_PER_VALUE <= memory:
            yield Cell(case.name, rows, row, dtype, traced_rows)


def differing(actual: Any, expected: Any) -> tuple[int, int]:
    """How many elements of two results differ in their bits, and of how many; in parts, for comparing takes memory.

    Raises:
        AssertionError: the results differ in structure, or a pair of tensors in shape, dtype or device.
    """
    left, right = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(left) == len(right), f"{len(left)} outputs are not {len(right)}"
    different, elements = 0, 0
    for a, b in zip(left, right, strict=True):
        assert a.shape == b.shape, f"shape {a.shape} is not {b.shape}"
        for parts in zip(a.flatten().split(_COMPARED_AT_ONCE), b.flatten().split(_COMPARED_AT_ONCE), strict=True):
            comparison = compare(*parts)
            different += comparison.different
            elements += comparison.elements
    return different, elements


def compile_one(cell: Cell, name: str, device: str) -> Callable[..., Any]:
    case, any_rows = case_named(cell.site), cell.traced_rows is not None
    rows = cell.rows if cell.traced_rows is None else cell.traced_rows
    inputs = case.inputs(rows, cell.row, getattr(torch, cell.dtype), device)
    return contestants.compiled(name, case, inputs, any_rows)


def measure(cell: Cell, names: Sequence[str], copy: float, device: str) -> Result:
    """Time one cell; what raises is recorded with the contestant that did."""
    case = case_named(cell.site)
    moved = case.bytes(cell.rows, cell.row, 2)
    result = Result(cell, floor=moved / copy)
    try:
        buffers = [
            case.inputs(cell.rows, cell.row, getattr(torch, cell.dtype), device) for _ in range(buffer_count(moved))
        ]
        expected = case.run(*buffers[0])
    except Exception as error:
        result.errors[EAGER] = _first_line(error)
        return result
    short: dict[str, Callable[[], float]] = {}
    for name in names:
        _attempt(name, case, buffers, expected, result, short)
    result.times |= in_turns(short)
    short.clear()
    if device == "cuda":
        del buffers, expected
        torch.cuda.empty_cache()
    return result


def _attempt(
    name: str, case: Case, buffers: list[Any], expected: Any, result: Result, short: dict[str, Callable[[], float]]
) -> None:
    """Time a contestant; what takes less than 20 us is kept in ``short``, to be timed again in turns with the others."""
    try:
        for contestant, run in _runs(name, case, buffers, expected, result).items():
            replay = timed(run, buffers)
            result.times[contestant] = median(replay)
            if result.times[contestant] < _SHORT_US:
                short[contestant] = replay
    except Exception as error:
        result.errors[name] = _first_line(error)


def _runs(name: str, case: Case, buffers: list[Any], expected: Any, result: Result) -> dict[str, Callable[..., Any]]:
    """What is timed for a contestant of the command line: itself, or each of its libraries."""
    if name == BARE:
        return {name: min(bare.candidates(case), key=lambda run: microseconds(run, buffers))}
    if name == EAGER:
        return {name: case.run}
    if name == "rivals":
        return contestants.rivals(case, buffers[0])
    if result.cell.traced_rows is None:
        fn = contestants.compiled(name, case, buffers[0])
    else:
        fn = compile_one(result.cell, name, buffers[0][0].device.type)
    result.differ[name], result.elements = differing(fn(*buffers[0]), expected)
    return {name: fn}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


def run(arguments: argparse.Namespace) -> int:
    """Measure what is not yet in the file, in batches that are compiled in parallel and then timed in quiet."""
    start = time.monotonic()
    device = "cpu" if arguments.grid == "rehearsal" else "cuda"
    copy = bandwidth(device)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU, a rehearsal: the times mean nothing"
    print(f"{name}, torch {torch.__version__}, copy {copy / 1e6:.2f} TB/s; microseconds", flush=True)
    memory = arguments.memory * 2**30
    if device == "cuda":
        memory = min(memory, 0.6 * torch.cuda.get_device_properties(0).total_memory)
    wanted = list(cells({key: getattr(arguments, key) for key in _ALL}, memory, arguments.traced_rows))
    if arguments.sample is not None and arguments.sample < len(wanted):
        wanted = random.Random(0).sample(wanted, arguments.sample)
    known = {r.cell: r for r in results.read(arguments.json)} if arguments.resume else {}
    todo = [cell for cell in wanted if cell not in known]
    progress, warmer = Progress(len(todo)), Warmer(arguments.jobs)
    batch_size = max(1, 4 * arguments.jobs)
    try:
        for first in range(0, len(todo), batch_size):
            batch = todo[first : first + batch_size]
            if time.monotonic() - start > 60 * arguments.minutes:
                break
            if arguments.jobs:
                progress.show(f"compiling {len(batch)} cells")
            compiled = [name for name in arguments.contestants if name in contestants.COMPILED]
            warmer.warm(compile_one, [(cell, name, device) for cell in batch for name in compiled])
            for cell in batch:
                if time.monotonic() - start > 60 * arguments.minutes:
                    break
                progress.show(str(cell))
                known[cell] = measure(cell, arguments.contestants, copy, device)
                progress.step()
                if arguments.json:
                    results.append(arguments.json, known[cell])
    finally:
        warmer.close()
        progress.close()
    report([known[cell] for cell in wanted if cell in known], len(wanted), arguments)
    return 0


def report(found: list[Result], wanted: int, arguments: argparse.Namespace) -> None:
    header = results.header(found)
    rows = [results.row(result, header) for result in found]
    print("\n".join([*tables.aligned(header, rows), "", *results.summary(found)]))
    print(f"{len(found)} of {wanted} cells: {'complete' if len(found) == wanted else 'go on with --resume'}")
    if arguments.plot:
        arguments.plot.write_text(plot.svg(found))
    if arguments.markdown:
        lines = [*tables.markdown(header, rows), "", "```", *results.summary(found), "```"]
        of_any = "" if arguments.traced_rows is None else " of any number of rows"
        tables.write_between_markers(arguments.markdown, f"sites {arguments.grid}{of_any}", lines)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--grid", choices=GRIDS, default="quick", help="which cells; rehearsal needs no GPU, and times mean nothing"
    )
    for name, values in _ALL.items():
        made.add_argument(
            f"--{name}",
            nargs="+",
            type=type(values[0]),
            choices=values if name != "rows" else None,
            help=f"instead of the grid's: {' '.join(map(str, values))}",
        )
    made.add_argument(
        "--traced-rows", type=int, help="compile with so many rows, for any number of them, and not for a cell's alone"
    )
    made.add_argument("--sample", type=int, help="only so many of the cells, drawn at random, the same each time")
    every = (contestants.OURS, BARE, contestants.DEFAULT, contestants.TUNED, EAGER, "rivals")
    made.add_argument("--contestants", nargs="+", choices=every, default=list(every))
    made.add_argument("--json", type=Path, help="append each cell's result to this file, a line of JSON each")
    made.add_argument("--resume", action="store_true", help="leave out the cells that are in the file already")
    made.add_argument("--report", action="store_true", help="measure nothing: only show what is in the file")
    made.add_argument("--minutes", type=float, default=float("inf"), help="start no cell after this time")
    made.add_argument("--jobs", type=int, default=default_processes(), help="processes that compile; 0 for none")
    made.add_argument(
        "--memory", type=float, default=64, help="leave out cells that take more GiB; at most 60 %% of the device's"
    )
    made.add_argument("--plot", type=Path, help="draw the results into this SVG file")
    made.add_argument("--markdown", type=Path, help="write the table into this document, between its markers")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    for name, values in GRIDS[arguments.grid].items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, values)
    if (arguments.resume or arguments.report) and arguments.json is None:
        parser().error("--resume and --report need --json, the file to go on with or to show")
    if arguments.report:
        found = results.read(arguments.json)
        report(found, len(found), arguments)
        return 0
    if arguments.grid != "rehearsal" and not torch.cuda.is_available():
        print("this benchmark needs a CUDA device; --grid rehearsal runs without", file=sys.stderr)
        return 2
    with torch.no_grad():
        return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
