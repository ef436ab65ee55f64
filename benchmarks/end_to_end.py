"""Time whole models with and without the pass, in turns in one run: models of workloads.py, on one GPU.

    python benchmarks/end_to_end.py [--layers 4] [--only llama] [--mode default] [--json FILE --resume --minutes 9]

A step's time is from its call to the end of its last kernel; host time is from its call to its return, the GPU idle at the
start. Kernels are counted by the profiler. Peak memory is what a step holds at most beyond what it found. The first call is
timed with the compiler's caches off. Outputs are compared with eager's, bit for bit.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.utils import _pytree as pytree

import record
import tables
from progress import Progress
from sites import differing
from workloads import Workload, workloads

WITHOUT, WITH = "without", "with"
# What torch.compile's modes set in Inductor; as options both backends take them alike.
MODES: dict[str, dict[str, Any]] = {"default": {}, "reduce-overhead": {"triton.cudagraphs": True}}
_WARMUPS = 4


@dataclass
class Measurement:
    """One workload in one mode; each dict has what was measured without and with the pass.

    Attributes:
        step_ms: median time of a step.
        host_us: median time until the call returns.
        kernels: GPU kernels per layer.
        gpu_ms: the sum of their times.
        peak_mib: memory that a step holds at most beyond what it found; by default mode alone, for CUDA graphs keep theirs.
        compile_s: the first call.
        differ: how many elements of the results differ from eager's, of ``elements``.
    """

    workload: str
    mode: str
    layers: int
    step_ms: dict[str, float] = field(default_factory=dict)
    host_us: dict[str, float] = field(default_factory=dict)
    kernels: dict[str, float] = field(default_factory=dict)
    gpu_ms: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    compile_s: dict[str, float] = field(default_factory=dict)
    differ: dict[str, int] = field(default_factory=dict)
    elements: int = 0
    note: str = ""
    error: str = ""


def compile_both(workload: Workload, mode: str, device: str) -> dict[str, Callable[[], Any]]:
    """A step of the workload without and with the pass; the backends differ, so both can be compiled at once."""
    backends = (
        {WITHOUT: "inductor", WITH: "fusion_pass"}
        if device == "cuda"
        else {WITHOUT: "aot_eager", WITH: "fusion_pass_eager"}
    )
    options = {"options": MODES[mode]} if device == "cuda" and MODES[mode] else {}
    steps = {}
    for name, backend in backends.items():
        compiled = torch.compile(workload.subject, backend=backend, dynamic=False, **options)
        steps[name] = _step(workload, compiled)
    return steps


def _step(workload: Workload, compiled: Callable[..., Any]) -> Callable[[], Any]:
    def step() -> Any:
        # What the step before returned may be overwritten.
        torch.compiler.cudagraph_mark_step_begin()
        return workload.step(compiled)

    return step


def measure(
    name: str, make: Callable[[str, int], Workload], mode: str, layers: int, runs: int, device: str
) -> Measurement:
    """Everything about one workload in one mode; what raises is recorded."""
    result = Measurement(name, mode, layers)
    torch._dynamo.reset()
    try:
        workload = make(device, layers)
        result.layers, result.note = workload.layers, workload.note
        with torch.set_grad_enabled(workload.trains):
            _measure(workload, result, runs, device)
    except Exception as error:
        result.error = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:300]
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return result


def _measure(workload: Workload, result: Measurement, runs: int, device: str) -> None:
    steps = compile_both(workload, result.mode, device)
    with torch._inductor.config.patch(force_disable_caches=True):
        for name, step in steps.items():
            result.compile_s[name] = _seconds(step, device)
    for _ in range(_WARMUPS if device == "cuda" else 1):
        for step in steps.values():
            step()
    # Compared only now, so that replays of CUDA graphs are.
    expected = pytree.tree_map(torch.clone, workload.step(workload.subject))
    for name, step in steps.items():
        result.differ[name], result.elements = differing(step(), expected)
    del expected
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for _ in range(runs):
        for name, step in steps.items():
            taken[name].append(_host_and_step(step, device))
    for name, step in steps.items():
        host, whole = zip(*taken[name], strict=True)
        result.host_us[name], result.step_ms[name] = statistics.median(host) * 1e6, statistics.median(whole) * 1e3
        if device == "cuda":
            result.kernels[name], result.gpu_ms[name] = _kernels(step, workload.layers)
            if result.mode == "default":
                result.peak_mib[name] = _peak(step)


def start_compiler(device: str) -> None:
    """Compile something small with both backends, so that no workload pays for the compiler's own start."""
    x = torch.ones(4, 128, device=device)
    small = Workload(lambda x: (x.abs().amax(-1, keepdim=True), x @ x.t()), lambda forward: forward(x), 1)
    for step in compile_both(small, "default", device).values():
        step()


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _seconds(step: Callable[[], Any], device: str) -> float:
    return _host_and_step(step, device)[1]


def _host_and_step(step: Callable[[], Any], device: str) -> tuple[float, float]:
    """Seconds until the call returned, and until the device was done."""
    _synchronize(device)
    start = time.perf_counter()
    kept = step()
    host = time.perf_counter() - start
    _synchronize(device)
    whole = time.perf_counter() - start
    del kept
    return host, whole


def _kernels(step: Callable[[], Any], layers: int) -> tuple[float, float]:
    """Kernels per layer, and the milliseconds that all of them take."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    events = [
        e
        for e in profile.events()
        if e.device_type == DeviceType.CUDA
        and not e.name.startswith(("Memcpy", "Memset"))
        and not getattr(e, "is_user_annotation", False)
    ]
    return len(events) / layers, sum(e.time_range.elapsed_us() for e in events) / 1e3


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
    "GPU ms",
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

    return [
        m.workload,
        m.mode,
        both(m.step_ms, 3),
        f"{m.step_ms[WITHOUT] / m.step_ms[WITH]:.3f}",
        both(m.gpu_ms, 3),
        both(m.kernels, 1),
        both(m.host_us, 0),
        both(m.peak_mib, 1),
        both(m.compile_s, 1),
        f"{m.differ[WITHOUT]} → {m.differ[WITH]} of {m.elements}",
        m.note,
    ]


def read(path: Path) -> dict[tuple[str, str, int], Measurement]:
    """The measurements in a file, by workload, mode and the number of layers asked for."""
    found = {}
    for asked, fields in record.read(path):
        found[fields["workload"], fields["mode"], asked] = Measurement(**fields)
    return found


def run(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    device = "cpu" if arguments.rehearse else "cuda"
    makers = {n: make for n, make in workloads(device).items() if any(part in n for part in arguments.only)}
    keys = [(name, mode, arguments.layers) for name in makers for mode in arguments.mode]
    known = read(arguments.json) if arguments.resume else {}
    todo = [key for key in keys if key not in known]
    progress = Progress(len(todo))
    start_compiler(device)
    for key in todo:
        if time.monotonic() - start > 60 * arguments.minutes:
            break
        name, mode, layers = key
        progress.show(f"{name}, {mode}")
        known[key] = measure(name, makers[name], mode, layers, arguments.runs, device)
        progress.step()
        if arguments.json:
            record.append(arguments.json, (layers, dataclasses.asdict(known[key])))
    progress.close()
    measured = [known[key] for key in keys if key in known]
    print(torch.cuda.get_device_name() if device == "cuda" else "CPU, a rehearsal: the times mean nothing")
    report(measured, arguments.markdown)
    print(f"{len(measured)} of {len(keys)}: {'complete' if len(measured) == len(keys) else 'go on with --resume'}")
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
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--runs", type=int, default=30, help="steps timed of each")
    parser.add_argument("--json", type=Path, help="append each measurement to this file, a line of JSON each")
    parser.add_argument("--resume", action="store_true", help="leave out what is in the file already")
    parser.add_argument("--report", action="store_true", help="measure nothing: only show what is in the file")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing after this time")
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
