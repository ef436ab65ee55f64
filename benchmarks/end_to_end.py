"""Time whole models with and without the pass, in turns in one run: models of workloads.py, on one GPU.

    python benchmarks/end_to_end.py [--layers 4] [--only llama] [--mode default] [--json FILE --resume --minutes 9]
    python benchmarks/end_to_end.py --jobs 8 --compile-time ...

What a server sees is how many steps it gets done: steps are called back to back, the next while the GPU runs the one before,
and a step's time is that of at least 20 ms of them, over their number. It is the larger of what the GPU takes and what the
host takes to launch. Host time is what a single request waits for Python: from a step's call to its return, the GPU idle at
the start. Before any is timed, steps of 20 ms raise the clock.

The profiler counts kernels and adds up their times. Sites are the kernels compiled by Triton that only one of both has: without
the pass, what fused kernels replace; with it, fused kernels, and what Inductor must then compute apart. The bound is what the
ratio of the steps would be if the sites took no time at all, and (floor) if they took what a copy of the bytes takes that fused
ops read and write.

Peak memory is what a step holds at most beyond what it found. Outputs are compared with eager's, bit for bit. Processes
(--jobs) fill the compilers' caches before a batch of workloads is timed, so that compiling takes the timing process seconds.
Compile time is measured on demand, last: first calls with empty caches, in turns, the median of three.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch._inductor.utils import fresh_cache
from torch.utils import _pytree as pytree

from fusion_pass.backends import collecting
from fusion_pass.sites import Report
from fusion_pass.traffic import of_node

import profiling
import record
import tables
from progress import Progress
from sites import differing
from timing import bandwidth
from warming import SECONDS_PER_TASK, Warmer, default_processes, threads_each
from workloads import Workload, workloads

WITHOUT, WITH = "without", "with"
DEFAULT, GRAPHS, TUNED, TUNED_GRAPHS = "default", "reduce-overhead", "tuned", "tuned-reduce-overhead"


def _tuning(wanted: bool) -> dict[str, Any]:
    """torchao's quantize_ switches these on for the whole process, so that a mode says what it has."""
    return {"coordinate_descent_tuning": wanted, "coordinate_descent_check_all_directions": wanted}


_WITH_GRAPHS = {"triton.cudagraphs": True}
# What torch.compile's modes set in Inductor; as options both backends take them alike.
MODES: dict[str, dict[str, Any]] = {
    DEFAULT: _tuning(False),
    GRAPHS: _tuning(False) | _WITH_GRAPHS,
    TUNED: _tuning(True),
    TUNED_GRAPHS: _tuning(True) | _WITH_GRAPHS,
}
# By the beginning of their names; what a run measures first, for it may be cut off.
_FIRST = (
    ("llama prefill", DEFAULT),
    ("llama decode", GRAPHS),
    ("llama prefill", GRAPHS),
    ("block-scaled 8192", DEFAULT),
    ("moe training", DEFAULT),
)
_WARMUPS = 4
_BURST_SECONDS = 0.02
_MOST_STEPS = 200
_COMPILE_TURNS = 3
# A fresh machine reads gigabytes of CUDA libraries from disk first.
_START_SECONDS = 120.0

# A workload, a mode, and how many layers were asked for.
Key = tuple[str, str, int]


@dataclass
class Measurement:
    """One workload in one mode; each dict has what was measured without and with the pass, but for ``bound``.

    Attributes:
        step_ms: median time of a step among others.
        host_us: median time until the call returns.
        kernels: GPU kernels per layer.
        gpu_ms: the sum of their times.
        site_ms: the times of those that only one of both has.
        floor_ms: what a copy of the bytes of the fused ops takes; None if no fused ops were found.
        bound: ratios of step times: if sites took no time (``free``), and if they took their floor (``floor``).
        longest: the kernels that take the most time: name, launches, milliseconds.
        peak_mib: memory that a step holds at most beyond what it found; by default mode alone, for CUDA graphs keep theirs.
        compile_s: the first call, caches empty; measured on demand.
        differ: how many elements of the results differ from eager's, of ``elements``.
        spent: seconds that this took, by what was done; compiling may have found the compilers' caches filled.
    """

    workload: str
    mode: str
    layers: int
    step_ms: dict[str, float] = field(default_factory=dict)
    host_us: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)
    gpu_ms: dict[str, float] = field(default_factory=dict)
    site_ms: dict[str, float] = field(default_factory=dict)
    floor_ms: float | None = None
    bound: dict[str, float] = field(default_factory=dict)
    longest: dict[str, list[tuple[str, float, float]]] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    compile_s: dict[str, float] = field(default_factory=dict)
    differ: dict[str, int] = field(default_factory=dict)
    elements: int = 0
    note: str = ""
    error: str = ""
    spent: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """Add the time until the end of the block to ``spent``."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.spent[what] = round(self.spent.get(what, 0.0) + time.monotonic() - start, 1)


def compiled_step(workload: Workload, name: str, mode: str, device: str) -> Callable[[], Any]:
    """A step of the workload without or with the pass; the backends differ, so both can be compiled in one process."""
    backends = (
        {WITHOUT: "inductor", WITH: "fusion_pass"}
        if device == "cuda"
        else {WITHOUT: "aot_eager", WITH: "fusion_pass_eager"}
    )
    options = {"options": MODES[mode]} if device == "cuda" else {}
    compiled = torch.compile(workload.subject, backend=backends[name], dynamic=False, **options)

    def step() -> Any:
        # What the step before returned may be overwritten.
        torch.compiler.cudagraph_mark_step_begin()
        return workload.step(compiled)

    return step


def compile_both(workload: Workload, mode: str, device: str) -> dict[str, Callable[[], Any]]:
    return {name: compiled_step(workload, name, mode, device) for name in (WITHOUT, WITH)}


@contextlib.contextmanager
def compiling(workload: Workload) -> Iterator[None]:
    """What holds wherever a workload is compiled and run."""
    # What another process found to be the fastest configuration while the GPU was shared is not to be trusted.
    untrusted = torch._inductor.config.patch(autotune_local_cache=False)
    with torch.set_grad_enabled(workload.trains), untrusted:
        yield


def compile_one(workload: str, mode: str, layers: int, name: str, device: str) -> None:
    """Fill the compilers' caches with a step of the workload without or with the pass."""
    made = workloads(device)[workload](device, layers)
    with compiling(made):
        compiled_step(made, name, mode, device)()
    torch._dynamo.reset()


def site_bytes(workload: Workload, device: str) -> int:
    """The bytes that the fused ops of a step read and write, each of their tensors once; nothing is generated."""
    torch._dynamo.reset()
    report = Report()
    backend = collecting(report, pretend=torch.device(device))
    with compiling(workload):
        workload.step(torch.compile(workload.subject, backend=backend, dynamic=False))
    torch._dynamo.reset()
    return sum(of_node(op).bytes for op in {site.op: None for site in report.fused} if op is not None)


def measure(
    key: Key, make: Callable[[str, int], Workload], runs: int, device: str, floor_ms: float | None = None
) -> Measurement:
    """Everything about one workload in one mode but its compile time; what raises is recorded."""
    name, mode, layers = key
    result = Measurement(name, mode, layers, floor_ms=floor_ms)
    torch._dynamo.reset()
    try:
        with result.spending("making the model"):
            workload = make(device, layers)
        result.layers, result.note = workload.layers, workload.note
        with compiling(workload):
            _measure(workload, result, runs, device)
    except Exception as error:
        result.error = _first_line(error)
    _free(device)
    return result


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _measure(workload: Workload, result: Measurement, runs: int, device: str) -> None:
    steps = compile_both(workload, result.mode, device)
    for name, step in steps.items():
        with result.spending(f"compiling {name}"):
            step()
    with result.spending("comparing"):
        for _ in range(_WARMUPS if device == "cuda" else 1):
            for step in steps.values():
                step()
        # Compared only now, so that replays of CUDA graphs are.
        expected = pytree.tree_map(torch.clone, workload.step(workload.subject))
        for name, step in steps.items():
            result.differ[name], result.elements = differing(step(), expected)
        del expected
    with result.spending("timing"):
        _time(steps, result, runs, device)
    with result.spending("profiling"):
        _profile(steps, result, workload.layers, device)
        if device == "cuda" and result.mode in (DEFAULT, TUNED):
            result.peak_mib = {name: _peak(step) for name, step in steps.items()}


def _time(steps: dict[str, Callable[[], Any]], result: Measurement, runs: int, device: str) -> None:
    slowest = max(_back_to_back(step, 3, device) for step in steps.values())
    count = min(_MOST_STEPS, math.ceil(_BURST_SECONDS / slowest))
    for step in steps.values():
        _back_to_back(step, count, device)
    hosts: dict[str, list[float]] = {name: [] for name in steps}
    wholes: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(runs):
        for name, step in steps.items():
            hosts[name].append(_host(step, device))
            wholes[name].append(_back_to_back(step, count, device))
    for name in steps:
        result.host_us[name] = statistics.median(hosts[name]) * 1e6
        result.step_ms[name] = statistics.median(wholes[name]) * 1e3


def _profile(steps: dict[str, Callable[[], Any]], result: Measurement, layers: int, device: str) -> None:
    found = {}
    for name, step in steps.items():
        _back_to_back(step, math.ceil(_BURST_SECONDS * 1e3 / result.step_ms[name]), device)
        found[name] = profiling.profile(step, device)
        launches = profiling.whole(found[name])
        result.kernels[name], result.gpu_ms[name] = launches.count / layers, launches.ms
        result.longest[name] = profiling.longest(found[name])
    for name, other in ((WITHOUT, WITH), (WITH, WITHOUT)):
        result.site_ms[name] = profiling.only_in(found[name], found[other])
    result.bound = bound(result.step_ms[WITHOUT], result.site_ms[WITHOUT], result.floor_ms)


def bound(step_ms: float, site_ms: float, floor_ms: float | None) -> dict[str, float]:
    """How many times as fast a step could be whose sites took no time, and one whose sites took their floor."""
    least = {"free": 0.0} if floor_ms is None else {"free": 0.0, "floor": floor_ms}
    return {name: step_ms / max(step_ms - site_ms + ms, 1e-9) for name, ms in least.items()}


def compile_seconds(workload: Workload, mode: str, device: str, turn: int) -> dict[str, float]:
    """The time of the first call without and with the pass, caches empty; the order alternates from turn to turn."""
    taken = {}
    for name in (WITHOUT, WITH)[:: -1 if turn % 2 else 1]:
        torch._dynamo.reset()
        _free(device)
        with compiling(workload), fresh_cache():
            taken[name] = _back_to_back(compiled_step(workload, name, mode, device), 1, device)
    torch._dynamo.reset()
    return taken


def start_compiler(device: str) -> None:
    """Compile something small with both backends, so that no workload pays for the compiler's own start."""
    x = torch.ones(4, 128, device=device)
    small = Workload(lambda x: (x.abs().amax(-1, keepdim=True), x @ x.t()), lambda forward: forward(x), 1)
    # Found in a cache, it would not start Inductor's processes.
    with torch._inductor.config.patch(force_disable_caches=True):
        # The processes that compile start with the first, and must know from the pass how fused kernels are launched.
        for step in reversed(compile_both(small, DEFAULT, device).values()):
            step()


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _host(step: Callable[[], Any], device: str) -> float:
    """Seconds until a call returns, the device idle before and after."""
    _synchronize(device)
    start = time.perf_counter()
    kept = step()
    host = time.perf_counter() - start
    _synchronize(device)
    del kept
    return host


def _back_to_back(step: Callable[[], Any], count: int, device: str) -> float:
    """Seconds per step until the device is done with ``count`` of them, each called when the one before returns."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(count):
        step()
    _synchronize(device)
    return (time.perf_counter() - start) / count


def _peak(step: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


HEADER = [
    "workload",
    "mode",
    "step ms",
    "ratio",
    "bound",
    "GPU ms",
    "site ms",
    "kernels/layer",
    "host µs",
    "peak MiB",
    "compile s",
    "differ",
    "note",
]


def line(m: Measurement) -> list[str]:
    """A line under HEADER: without → with the pass."""
    if m.error:
        return [m.workload, m.mode, *["–"] * (len(HEADER) - 3), m.error]

    def both(measured: dict[str, float], digits: int) -> str:
        return f"{measured[WITHOUT]:.{digits}f} → {measured[WITH]:.{digits}f}" if measured else "–"

    bounds = f"{m.bound['free']:.3f}" if m.bound else "–"
    if "floor" in m.bound:
        bounds += f" (floor {m.bound['floor']:.3f})"
    return [
        m.workload,
        m.mode,
        both(m.step_ms, 3),
        f"{m.step_ms[WITHOUT] / m.step_ms[WITH]:.3f}",
        bounds,
        both(m.gpu_ms, 3),
        both(m.site_ms, 3),
        both(m.kernels, 1),
        both(m.host_us, 0),
        both(m.peak_mib, 1),
        both(m.compile_s, 1),
        f"{m.differ[WITHOUT]} → {m.differ[WITH]} of {m.elements}",
        m.note,
    ]


def read(path: Path) -> dict[Key, Measurement]:
    """The measurements in a file, by workload, mode and the number of layers asked for; of several the last."""
    found = {}
    for asked, fields in record.read(path):
        found[fields["workload"], fields["mode"], asked] = Measurement(**fields)
    return found


def ordered(keys: Sequence[Key]) -> list[Key]:
    """The keys, those of _FIRST first."""

    def rank(key: Key) -> int:
        matching = (i for i, (name, mode) in enumerate(_FIRST) if key[0].startswith(name) and key[1] == mode)
        return next(matching, len(_FIRST))

    return sorted(keys, key=rank)


class Run:
    """One run of the benchmark: what it measures, and what it has measured so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.device = "cpu" if arguments.rehearse else "cuda"
        self.end = time.monotonic() + 60 * arguments.minutes
        self.makers = {n: m for n, m in workloads(self.device).items() if any(part in n for part in arguments.only)}
        self.keys = ordered([(name, mode, arguments.layers) for name in self.makers for mode in arguments.mode])
        self.known = read(arguments.json) if arguments.resume else {}
        self.bytes: dict[str, int] = {}
        self.warmer = Warmer(arguments.jobs, threads_each(arguments.jobs))
        self.progress = Progress(sum(key not in self.known for key in self.keys))

    @property
    def late(self) -> bool:
        return time.monotonic() > self.end

    def measure_all(self) -> None:
        """Batches of as many workloads and modes as processes compile at once, each then timed in quiet."""
        todo = [key for key in self.keys if key not in self.known]
        size = max(1, self.arguments.jobs // 2)
        copied: float | None = None
        for first in range(0, len(todo), size):
            if self.late:
                return
            batch = todo[first : first + size]
            self._warm(batch, first == 0)
            copied = copied or bandwidth(self.device)
            for key in batch:
                if self.late:
                    return
                self.progress.show(f"{key[0]}, {key[1]}")
                bytes_ = self.bytes.get(key[0])
                floor_ms = bytes_ / copied / 1e3 if bytes_ else None
                self._keep(key, measure(key, self.makers[key[0]], self.arguments.runs, self.device, floor_ms=floor_ms))
                self.progress.step()

    def _warm(self, batch: Sequence[Key], first: bool) -> None:
        self.progress.show(f"compiling {len(batch)} workloads")
        tasks = [(*key, name, self.device) for key, name in itertools.product(batch, (WITHOUT, WITH))]
        under_way: list[Future[None]] = self.warmer.submit(compile_one, tasks)
        # Meanwhile, what this process needs itself.
        if first:
            start_compiler(self.device)
        for name in dict.fromkeys(name for name, *_ in batch):
            if name not in self.bytes:
                # What fails is told when it is measured.
                with contextlib.suppress(Exception):
                    self.bytes[name] = site_bytes(self.makers[name](self.device, self.arguments.layers), self.device)
        _free(self.device)
        seconds = SECONDS_PER_TASK * (1 + len(tasks) / max(1, self.arguments.jobs))
        seconds += _START_SECONDS if first else 0
        self.warmer.wait(under_way, min(seconds, max(0.0, self.end - time.monotonic())))

    def _keep(self, key: Key, measured: Measurement) -> None:
        self.known[key] = measured
        print("  ".join(line(measured)), flush=True)
        print("    seconds:", ", ".join(f"{what} {seconds}" for what, seconds in measured.spent.items()), flush=True)
        if self.arguments.json:
            record.append(self.arguments.json, (key[2], dataclasses.asdict(measured)))

    def time_compilation(self) -> None:
        """The compile times that were asked for; each turn is kept."""
        for key in self._to_compile():
            workload = self.makers[key[0]](self.device, key[2])
            taken: dict[str, list[float]] = {WITHOUT: [], WITH: []}
            for turn in range(_COMPILE_TURNS):
                if self.late:
                    return
                self.progress.show(f"compile time of {key[0]}, {key[1]}, turn {turn + 1}")
                for name, seconds in compile_seconds(workload, key[1], self.device, turn).items():
                    taken[name].append(seconds)
                medians = {name: statistics.median(seconds) for name, seconds in taken.items()}
                self._keep(key, dataclasses.replace(self.known[key], compile_s=medians))

    def _to_compile(self) -> list[Key]:
        """The first mode measured of each workload that was named, or the first of all if none was."""
        parts = self.arguments.compile_time
        measured = [key for key in self.keys if key in self.known and not self.known[key].error]
        if not parts:
            return [] if parts is None else measured[:1]
        chosen: dict[str, Key] = {}
        for key in measured:
            if any(part in key[0] for part in parts):
                chosen.setdefault(key[0], key)
        return list(chosen.values())

    def close(self) -> None:
        self.warmer.close()
        self.progress.close()


def run(arguments: argparse.Namespace) -> int:
    name = "CPU, a rehearsal: the times mean nothing" if arguments.rehearse else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}", flush=True)
    this = Run(arguments)
    try:
        this.measure_all()
        this.time_compilation()
    finally:
        this.close()
    measured = [this.known[key] for key in this.keys if key in this.known]
    report(measured, arguments.markdown)
    done = len(measured) == len(this.keys)
    print(f"{len(measured)} of {len(this.keys)}: {'complete' if done else 'go on with --resume'}")
    return 0


def report(measured: Sequence[Measurement], document: Path | None) -> None:
    rows = [line(m) for m in measured]
    print("\n".join(tables.aligned(HEADER, rows)))
    if document:
        tables.write_between_markers(document, "end to end", tables.markdown(HEADER, rows))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--only", nargs="+", default=[""], help="workloads whose name has one of these in it")
    parser.add_argument(
        "--mode", nargs="+", choices=MODES, default=[DEFAULT, GRAPHS], help="tuning takes minutes a model"
    )
    parser.add_argument("--runs", type=int, default=30, help="turns that are timed of each")
    parser.add_argument("--json", type=Path, help="append each measurement to this file, a line of JSON each")
    parser.add_argument("--resume", action="store_true", help="leave out what is in the file already")
    parser.add_argument("--report", action="store_true", help="measure nothing: only show what is in the file")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing after this time")
    parser.add_argument("--jobs", type=int, default=default_processes(), help="processes that compile; 0 for none")
    parser.add_argument(
        "--compile-time",
        nargs="*",
        metavar="NAME",
        help="measure the compile time, too, of workloads whose name has one of these in it, or of the first",
    )
    parser.add_argument("--markdown", type=Path, help="write the table into this document, between its markers")
    parser.add_argument("--rehearse", action="store_true", help="run tiny models on a CPU, where times mean nothing")
    arguments = parser.parse_args(argv)
    if (arguments.resume or arguments.report) and arguments.json is None:
        parser.error("--resume and --report need --json, the file to go on with or to show")
    if arguments.report:
        report(list(read(arguments.json).values()), arguments.markdown)
        return 0
    if not (arguments.rehearse or torch.cuda.is_available()):
        print("this benchmark needs a CUDA device; --rehearse runs without", file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
