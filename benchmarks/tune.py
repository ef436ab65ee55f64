"""Sweep the launch configurations of each site on this GPU: the table in kernels/launch_table.py.

    python benchmarks/tune.py [--site "rms -> token"] [--row 4096 8192] [--rows 32 8192] [--json FILE --resume --minutes 9]

For each site and size, the fastest configuration beside the chosen one; then for each site, row length and class of M the one
that is fastest over the class, which is what a table should hold. Sites are those of cases.py, as the pass recognises them.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fusion_pass.kernels import launch as launching
from fusion_pass.kernels.cheaper_scales import with_cheaper_scales
from fusion_pass.kernels.launch_table import LaunchConfig, configure, whole_rows

import fusion_pass
from fusion_pass.specs import FusedSpec, RMSNorm

import record
from cases import CASES, Case, case_named
from progress import Progress
from results import geometric_mean
from timing import buffer_count, microseconds
from warming import Warmer, default_processes

SITES = (
    "none -> token",
    "none -> group-column",
    "none -> static",
    "none -> mxfp8-blocked",
    "rms -> token",
    "rms -> group",
    "rms -> static",
    "add+rms -> token",
    "add+rms -> group-column",
    "silu*mul -> token",
    "silu*mul -> group",
    "silu*mul -> static",
    "gelu*mul -> group",
)
# What each field of a configuration may be; a field that LaunchConfig lacks is not swept.
_CHOICES: dict[str, tuple[Any, ...]] = {
    "rows": (1, 2, 4, 8),
    "groups": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    "warps": (1, 2, 4, 8, 16, 32),
    "late_weight": (False, True),
    "narrow": (False, True),
    "first_weight": (False, True),
    "inline_mean": (False, True),
    "own_scales": (False, True),
}
_OF_NORMS = ("late_weight", "narrow", "first_weight", "inline_mean")
_OF_GROUPS = ("own_scales",)
_VALUES_PER_THREAD = (4, 128)
# Programs that share a row, and the most rows for which they are tried.
_PARTS = (2, 4, 8)
_SHARED_ROWS = 128
_CLASSES = {"few (M ≤ 32)": 32, "some (M ≤ 1024)": 1024, "many": float("inf")}
_REPLAYS = 9

Key = tuple[str, int, int, str]
Configuration = tuple[tuple[str, Any], ...]


@dataclasses.dataclass
class Sweep:
    """The times of the configurations of one site at one size, in microseconds; the first is the chosen one."""

    site: str
    rows: int
    row: int
    dtype: str
    times: list[tuple[Configuration, float]]

    @property
    def chosen(self) -> tuple[Configuration, float]:
        return self.times[0]

    @property
    def best(self) -> tuple[Configuration, float]:
        return min(self.times, key=lambda timed: timed[1])


@cache
def recognised(site: str, row: int, dtype: torch.dtype) -> FusedSpec:
    """What the pass sees in a case; it takes no GPU."""
    case = case_named(site)
    torch._dynamo.reset()
    with torch.no_grad():
        return fusion_pass.explain(case.run, *case.inputs(8, row, dtype, "cpu"), device="cuda").fused[0].spec


def operands(case: Case, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, ...]:
    """x, other, weight and given as the kernel of a case takes them."""
    x, other, weight, given = inputs
    calibrated = given if case.quantization.scale_bytes == 0 else None
    if case.prologue.wide:
        return (*x.chunk(2, -1), None, calibrated)
    if case.prologue.name == "none":
        return x, None, None, calibrated
    return x, other if case.prologue.residual else None, weight, calibrated


def candidates(chosen: LaunchConfig, whole: bool, idle: tuple[str, ...]) -> Iterator[LaunchConfig]:
    """The chosen configuration, then the others with a sensible number of values to a thread.

    Args:
        whole: a program must hold whole rows: the number of groups is given.
        idle: fields that make no difference.
    """
    yield chosen
    fields = [f.name for f in dataclasses.fields(chosen) if f.name in _CHOICES and f.name not in idle]
    choices = [(chosen.groups,) if name == "groups" and whole else _CHOICES[name] for name in fields]
    least, most = _VALUES_PER_THREAD
    for values in itertools.product(*choices):
        config = dataclasses.replace(chosen, **dict(zip(fields, values, strict=True)))
        held = config.rows * config.groups * config.lanes
        small = held <= 8192 or config.rows == 1
        once = not (config.late_weight and config.first_weight)
        if config != chosen and small and once and least <= held / (32 * config.warps) <= most:
            yield config


def unshared(config: LaunchConfig, grouped: bool) -> LaunchConfig:
    """The configuration of whole rows for one of rows that programs share."""
    longer = {"groups": config.groups * config.parts} if grouped else {"lanes": config.lanes * config.parts}
    return dataclasses.replace(config, parts=1, **longer)


def shared(config: LaunchConfig, grouped: bool) -> Iterator[LaunchConfig]:
    """For a configuration of one whole row, those of programs that share it; ``grouped`` rows have several scales."""
    for parts, warps in itertools.product(_PARTS, _CHOICES["warps"]):
        shorter = {"groups": config.groups // parts} if grouped else {"lanes": config.lanes // parts}
        split = dataclasses.replace(
            config, parts=parts, warps=warps, rows=1, late_weight=False, narrow=False, first_weight=False, **shorter
        )
        held = split.groups * split.lanes
        if split.groups and held >= 64 * warps and held * parts <= 64 * 32 * warps:
            yield split


def launch(site: str, dtype: str, config: LaunchConfig, inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    spec = recognised(site, inputs[2].numel(), getattr(torch, dtype))
    with mock.patch.object(launching, "configure", lambda *_, **__: config):
        return launching.launch(spec, *operands(case_named(site), inputs))


def compile_one(site: str, rows: int, row: int, dtype: str, config: LaunchConfig, device: str) -> None:
    launch(site, dtype, config, case_named(site).inputs(rows, row, getattr(torch, dtype), device))


def chosen(key: Key) -> LaunchConfig:
    """The configuration that a launch at this size takes."""
    site, rows, row, dtype = key
    of = getattr(torch, dtype)
    return configure(with_cheaper_scales(recognised(site, row, of), of), row, rows, of)


def configurations(key: Key) -> list[LaunchConfig]:
    site, rows, row, dtype = key
    spec = recognised(site, row, getattr(torch, dtype))
    whole, grouped = whole_rows(spec), spec.quantizer.group is not None
    taken = chosen(key)
    unsplit = unshared(taken, grouped)
    idle = (() if isinstance(spec.prologue, RMSNorm) else _OF_NORMS) + (() if grouped else _OF_GROUPS)
    found = [taken, *candidates(unsplit, whole, idle)]
    if whole and rows <= _SHARED_ROWS:
        found += shared(unsplit, grouped)
    return list(dict.fromkeys(found))


def sweep(key: Key, device: str, most: int | None = None) -> Sweep:
    """Time the configurations of one site at one size; one that does not compile or run counts as endless."""
    site, rows, row, dtype = key
    case = case_named(site)
    count = buffer_count(case.bytes(rows, row, 2))
    buffers = [case.inputs(rows, row, getattr(torch, dtype), device) for _ in range(count)]
    times = [
        (tuple(dataclasses.asdict(config).items()), _time(site, dtype, config, buffers))
        for config in configurations(key)[:most]
    ]
    return Sweep(site, rows, row, dtype, times)


def _time(site: str, dtype: str, config: LaunchConfig, buffers: list[tuple[torch.Tensor, ...]]) -> float:
    try:
        return microseconds(lambda *inputs: launch(site, dtype, config, inputs), buffers, replays=_REPLAYS)
    except Exception as error:
        print(f"{site}, {config}: {type(error).__name__}: {error}"[:300], file=sys.stderr)
        return float("inf")


def read(path: Path) -> dict[Key, Sweep]:
    """The sweeps in a file."""
    found = {}
    for fields in record.read(path):
        times = [(tuple((name, value) for name, value in config), us) for config, us in fields.pop("times")]
        made = Sweep(**fields, times=times)
        found[made.site, made.rows, made.row, made.dtype] = made
    return found


def by_class(sweeps: Sequence[Sweep]) -> list[str]:
    """For each site, row length and class of M: the configuration that is fastest over the class, and the chosen ones."""
    groups: dict[tuple[str, int, str, str], list[Sweep]] = defaultdict(list)
    for found in sweeps:
        name = next(name for name, most in _CLASSES.items() if found.rows <= most)
        groups[found.site, found.row, found.dtype, name].append(found)
    lines = []
    for (site, row, dtype, name), members in sorted(groups.items()):
        shared = set.intersection(*({config for config, _ in m.times} for m in members))
        mean = {c: geometric_mean(dict(m.times)[c] / m.best[1] for m in members) or 0.0 for c in shared}
        best = min(mean, key=lambda c: mean[c])
        chosen = geometric_mean(m.chosen[1] / m.best[1] for m in members)
        lines.append(
            f"{site:26} {row:6} {dtype:9} {name:16} {_shown(best):36} {mean[best]:.3f}  chosen: "
            f"{' / '.join(dict.fromkeys(_shown(m.chosen[0]) for m in members))} {chosen:.3f}"
        )
    return lines


def by_size(sweeps: Sequence[Sweep]) -> list[str]:
    return [
        f"{s.site:26} {s.rows:6}x{s.row:<6} {s.dtype:9} chosen {s.chosen[1]:8.2f} ({_shown(s.chosen[0])})  "
        f"best {s.best[1]:8.2f} ({_shown(s.best[0])})  {s.chosen[1] / s.best[1]:.3f}"
        for s in sweeps
    ]


def _shown(config: Configuration) -> str:
    return " ".join(f"{name}={value}" for name, value in config if name != "lanes")


def run(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    device = "cpu" if arguments.rehearse else "cuda"
    keys = [
        (site, rows, row, arguments.dtype)
        for site, row, rows in itertools.product(arguments.site, arguments.row, arguments.rows)
        if case_named(site).takes(rows, row)
    ]
    known = read(arguments.json) if arguments.resume else {}
    todo = [key for key in keys if key not in known]
    progress, warmer = Progress(len(todo)), Warmer(arguments.jobs)
    try:
        for key in todo:
            if time.monotonic() - start > 60 * arguments.minutes:
                break
            progress.show(" ".join(map(str, key)))
            warmer.warm(compile_one, [(*key, config, device) for config in configurations(key)[: arguments.most]])
            known[key] = sweep(key, device, arguments.most)
            progress.step()
            if arguments.json:
                record.append(arguments.json, dataclasses.asdict(known[key]))
    finally:
        warmer.close()
        progress.close()
    found = [known[key] for key in keys if key in known]
    print("\n".join([*by_size(found), "", "the fastest over each class, as a factor of each size's own best:"]))
    print("\n".join(by_class(found)))
    print(f"{len(found)} of {len(keys)} sweeps: {'complete' if len(found) == len(keys) else 'go on with --resume'}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 512, 8192])
    parser.add_argument("--row", type=int, nargs="+", default=[2048, 4096, 5120, 7168, 8192])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    # The kernel of a matrix and its transpose has one configuration.
    sites = [case.name for case in CASES if not case.quantization.both]
    parser.add_argument("--site", nargs="+", choices=sites, default=list(SITES))
    parser.add_argument("--json", type=Path, help="append each sweep to this file, a line of JSON each")
    parser.add_argument("--resume", action="store_true", help="leave out the sweeps that are in the file already")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no sweep after this time")
    parser.add_argument("--jobs", type=int, default=default_processes(), help="processes that compile; 0 for none")
    parser.add_argument("--most", type=int, help="try only so many configurations of each")
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU, where times mean nothing")
    arguments = parser.parse_args(argv)
    if arguments.resume and arguments.json is None:
        parser.error("--resume needs --json, the file to go on with")
    if not (arguments.rehearse or torch.cuda.is_available()):
        print("this benchmark needs a CUDA device; --rehearse runs without", file=sys.stderr)
        return 2
    with torch.no_grad():
        return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
