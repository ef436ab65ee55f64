"""What the kernels of sites compile to for an NVIDIA GPU, on any machine: instructions, registers, programs that fit.

    python benchmarks/machine_code.py --site "rms -> token" "none -> mxfp4-both" --rows 8192 --row 4096 7168
    python benchmarks/machine_code.py --site "rms -> group" --rows 8 --row 7168 --set parts=1 groups=64 --sass rms.sass

Triton comes with the assembler and the disassembler, so no GPU is needed. The same kernel differs between versions of Triton
by registers, of which the last one over a bound costs a program on each processor: compare them before a table relies on it.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from fusion_pass.kernels import cast_transpose
from fusion_pass.kernels import launch as launching
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import mangle_type

import fusion_pass
from fusion_pass.cast_transpose import CastTransposeSpec

from cases import CASES, case_named
from tune import operands, recognised

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<name>[A-Z]\w*)")
# Of a processor of sm_90. A warp gets registers in eights a thread.
_REGISTERS, _WARPS, _PROGRAMS, _UNIT = 65536, 64, 32, 8
_ALIGNED = 16


@dataclasses.dataclass
class Launch:
    """A kernel as it would be launched: programs, and arguments with tensors that have no memory."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


@dataclasses.dataclass
class MachineCode:
    """What a launch runs.

    Attributes:
        programs: how many fit a processor by registers and warps.
        names: how often each instruction occurs, by name without its modifiers.
        text: the disassembly.
    """

    warps: int
    registers: int
    shared: int
    names: collections.Counter[str]
    text: str

    @property
    def instructions(self) -> int:
        return sum(self.names.values())

    @property
    def programs(self) -> int:
        registers = -(-self.registers // _UNIT) * _UNIT * 32 * self.warps
        return min(_REGISTERS // registers, _WARPS // self.warps, _PROGRAMS)


class _Recorder:
    """Stands for kernels, and keeps what they would be launched with."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []

    def __call__(self, kernel: Any) -> Any:
        recorder = self

        class Recorded:
            def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
                return lambda **arguments: recorder.launches.append(Launch(kernel, grid, arguments))

        return Recorded()


def launches(site: str, rows: int, row: int, dtype: str, fields: dict[str, Any] | None = None) -> list[Launch]:
    """The launches of a site as on an sm_90 GPU; ``fields`` replaces those of the configuration that the table gives."""
    case = case_named(site)
    inputs = case.inputs(rows, row, getattr(torch, dtype), "meta")
    recorder, configure = _Recorder(), launching.configure

    def configured(*arguments: Any) -> Any:
        return dataclasses.replace(configure(*arguments), **(fields or {}))

    if case.quantization.both:
        cast_transpose.launch_into_buffers(_both_ways(case, row, dtype), inputs[0], recorder)
        return recorder.launches
    spec = recognised(site, row, getattr(torch, dtype))
    with (
        mock.patch.object(launching, "configure", configured),
        mock.patch.object(launching, "_runs_on_sm_90", lambda _: True),
    ):
        launching.launch_into_buffers(spec, *operands(case, inputs), wrap=recorder)
    return recorder.launches


def _both_ways(case: Any, row: int, dtype: str) -> CastTransposeSpec:
    torch._dynamo.reset()
    with torch.no_grad():
        report = fusion_pass.explain(case.run, *case.inputs(128, row, getattr(torch, dtype), "cpu"), device="cuda")
    op = report.fused[0].op
    assert op is not None
    return CastTransposeSpec.of_arguments(*op.args[1:])


def compiled(launch: Launch, capability: int = 90) -> MachineCode:
    """Compile a launch, specialised as Triton does: integers that are one are constants, multiples of 16 are known as such."""
    signature, constants, attributes = {}, {}, {}
    arguments = dict(launch.arguments)
    warps = arguments.pop("num_warps")
    for at, parameter in enumerate(launch.kernel.params):
        value = arguments[parameter.name]
        is_one = isinstance(value, int) and not isinstance(value, bool) and value == 1
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name], constants[(at,)] = "constexpr", value
            continue
        stored = value.view(torch.uint8) if getattr(value, "dtype", None) is torch.float8_e8m0fnu else value
        signature[parameter.name] = mangle_type(stored)
        if isinstance(value, torch.Tensor) or value % _ALIGNED == 0:
            attributes[(at,)] = [["tt.divisibility", _ALIGNED]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    text, usage = _disassembled(binary.asm["cubin"])
    names = collections.Counter(m["name"] for m in map(_INSTRUCTION.match, text.splitlines()) if m)
    # What fills the last line is no work.
    names.pop("NOP", None)
    found = re.search(r"REG:(\d+)", usage)
    assert found is not None, usage
    return MachineCode(warps, int(found[1]), binary.metadata.shared, names, text)


def _disassembled(cubin: bytes) -> tuple[str, str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(  # type: ignore[return-value]
            subprocess.run([_TOOLS / tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )


def _lines(arguments: argparse.Namespace) -> Iterator[str]:
    fields = {name: _parsed(value) for name, _, value in (field.partition("=") for field in arguments.set)}
    for site, row, rows, dtype in itertools.product(arguments.site, arguments.row, arguments.rows, arguments.dtype):
        for launch in launches(site, rows, row, dtype, fields):
            code = compiled(launch)
            if arguments.sass:
                arguments.sass.write_text(code.text)
            often = " ".join(f"{name} {count}" for name, count in code.names.most_common(arguments.most))
            yield (
                f"{site:24} {rows:6}x{row:<6} {dtype:9} {launch.kernel.__name__:28} grid {launch.grid!s:16} "
                f"{code.warps:2} warps, {code.instructions:5} instructions, {code.registers:3} registers, "
                f"{code.shared:6} bytes shared, {code.programs:2} programs fit: {often}"
            )


def _parsed(value: str) -> Any:
    return {"True": True, "False": False}[value] if value in ("True", "False") else int(value)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--site", nargs="+", required=True, choices=names, metavar="SITE", help="as in sites.py")
    parser.add_argument("--rows", nargs="+", type=int, default=[8192])
    parser.add_argument("--row", nargs="+", type=int, default=[4096])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16"))
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="fields of LaunchConfig")
    parser.add_argument("--most", type=int, default=8, help="how many of the most frequent instructions to name")
    parser.add_argument("--sass", type=Path, help="write the disassembly of the last kernel to this file")
    print(f"Triton {triton.__version__}, sm_90")
    for line in _lines(parser.parse_args(arguments)):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
