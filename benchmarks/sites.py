"""Time every site with the pass, with plain torch.compile and unfused, beside the floor of its bytes.

    python benchmarks/sites.py [--rows 32 8192] [--row 4096 5120] [--json FILE]

Times are medians of CUDA-graph replays over rotating buffers that exceed the L2 cache. The floor is each input read and
each output written once, at the copy bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fusion_pass
from fusion_pass.testing import compare

from cases import CASES, Case

_ROTATED_BYTES = 200 << 20


def microseconds(fn: Callable[..., Any], buffers: list[tuple[Any, ...]], replays: int = 30) -> float:
    """The time of one call: a CUDA graph of at least 20 calls over the buffers, replayed."""
    calls = [buffers[i % len(buffers)] for i in range(max(20, len(buffers)))]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for arguments in calls[:3]:
            fn(*arguments)
    torch.cuda.synchronize()
    graph, kept = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        kept = [fn(*arguments) for arguments in calls]
    times = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    del kept
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes per microsecond that a copy reads and writes."""
    pairs = [tuple(torch.empty(256 << 20, dtype=torch.uint8, device="cuda") for _ in range(2)) for _ in range(2)]
    return 2 * (256 << 20) / microseconds(lambda a, b: b.copy_(a), pairs)


def compiled(case: Case) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(case.run, dynamic=False)


def measure(case: Case, rows: int, row: int, copy: float) -> dict[str, Any]:
    moved = case.bytes(rows, row, 2)
    count = min(64, max(2, math.ceil(_ROTATED_BYTES / moved)))
    buffers = [case.inputs(rows, row, torch.bfloat16, "cuda") for _ in range(count)]
    expected = case.run(*buffers[0])
    plain = compiled(case)
    plain_differs = compare(plain(*buffers[0]), expected)
    result: dict[str, Any] = {"case": case.name, "M": rows, "N": row, "floor": moved / copy}
    result["inductor"] = microseconds(plain, buffers)
    with fusion_pass.enabled(strict=True):
        fused = compiled(case)
        differs = compare(fused(*buffers[0]), expected)
        result["ours"] = microseconds(fused, buffers)
    result["eager"] = microseconds(case.run, buffers)
    result["differ"], result["inductor differs"], result["of"] = (
        differs.different,
        plain_differs.different,
        differs.elements,
    )
    return result


def line(result: dict[str, Any]) -> str:
    return (
        f"{result['case']:26} {result['M']:6}x{result['N']:<6} floor {result['floor']:7.1f}  ours {result['ours']:7.1f}  "
        f"inductor {result['inductor']:7.1f} ({result['inductor'] / result['ours']:4.2f}x)  eager {result['eager']:7.1f} "
        f"({result['eager'] / result['ours']:5.1f}x)  differ {result['differ']} / inductor {result['inductor differs']} "
        f"of {result['of']}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 512, 8192])
    parser.add_argument("--row", type=int, nargs="+", default=[4096, 5120, 8192])
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device", file=sys.stderr)
        return 2
    copy = bandwidth()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {copy / 1e6:.2f} TB/s; microseconds",
        flush=True,
    )
    results = []
    with torch.no_grad():
        for case in CASES:
            for row in arguments.row:
                for rows in arguments.rows:
                    results.append(measure(case, rows, row, copy))
                    print(line(results[-1]), flush=True)
    ratio = math.exp(statistics.fmean(math.log(r["inductor"] / r["ours"]) for r in results))
    print(
        f"geometric mean over torch.compile: {ratio:.2f}x; slower in {sum(r['ours'] > r['inductor'] for r in results)}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
