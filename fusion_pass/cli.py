"""The command line: ``python -m fusion_pass explain|fuzz|lock|check module:name``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import targets
from .registration import DEVICE_NAMES, names_device

_EPILOG = """\
The target is a function, a torch.nn.Module, or a class of one that is made without arguments: module:name with the current folder on
the path, or path/to/file.py:name. Its arguments are what a function returns that takes none: that of --args, or else <name>_args
beside the target; or random tensors that --inputs describes.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if a comparison fails, 2 if the command line is wrong."""
    parsed = _parser().parse_args(argv)
    # As for `python file.py`: what lies in the current folder can be imported.
    sys.path.insert(0, "")
    try:
        fn = targets.load(parsed.target)
        args = targets.arguments(parsed.target, parsed.args, parsed.inputs)
    except targets.TargetError as error:
        print(f"fusion_pass: {error}", file=sys.stderr)
        return 2
    finally:
        sys.path.remove("")
    with torch.no_grad():
        return parsed.run(fn, args, parsed)  # type: ignore[no-any-return]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusion_pass", description="What fuses in a function, and that it has eager's bits."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, run, about in (
        ("explain", _explain, "say what fuses in a function and what does not, and why"),
        ("fuzz", _fuzz, "compare a function, fused, with eager on many inputs; exit with 1 if they differ"),
        ("lock", _lock, "write the sites of a function to a file"),
        ("check", _check, "exit with 1 if a site in the file is lost"),
    ):
        command = commands.add_parser(
            name,
            help=about,
            description=f"{about[0].upper()}{about[1:]}.",
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        command.add_argument("target", help="module:name or path/to/file.py:name")
        command.add_argument(
            "--args", metavar="MODULE:NAME", help="a function without arguments that returns the tuple of arguments"
        )
        command.add_argument("--inputs", metavar="TENSORS", help="instead, random tensors: 'bf16[8, 256], bf16[256]'")
        if name == "fuzz":
            command.add_argument("--examples", type=_count, default=200, help="how many inputs to try (200)")
            command.add_argument("--seed", type=int, default=0, help="of the random values (0)")
        else:
            command.add_argument("--device", type=_device, help="pretend to be on a device: cuda needs no GPU")
        if name in ("lock", "check"):
            command.add_argument(
                "--file", type=Path, default=Path("fusion.lock.json"), help="the file (fusion.lock.json)"
            )
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"is {text!r}; allowed: a positive number")
    return int(text)


def _device(text: str) -> str:
    if not names_device(text):
        raise argparse.ArgumentTypeError(f"is {text!r}; allowed: {DEVICE_NAMES}")
    return text


def _explain(fn: Callable[..., Any], args: tuple[Any, ...], parsed: argparse.Namespace) -> int:
    from .explanation import explain

    print(explain(fn, *args, device=parsed.device))
    return 0


def _fuzz(fn: Callable[..., Any], args: tuple[Any, ...], parsed: argparse.Namespace) -> int:
    from .testing import fuzz

    start = time.monotonic()
    with _Progress() as progress:
        result = fuzz(fn, args, examples=parsed.examples, seed=parsed.seed, progress=progress)
    if result.counterexample is not None:
        print(result.counterexample)
        return 1
    sites = sorted({site.name for site in result.report.fused})
    print(
        f"{result.tried} inputs, leading sizes {', '.join(map(str, result.sizes))}: fused and eager are equal ({time.monotonic() - start:.0f} s)"
    )
    print(f"sites: {', '.join(sites) or 'none, so nothing was tested'}")
    return 0


def _lock(fn: Callable[..., Any], args: tuple[Any, ...], parsed: argparse.Namespace) -> int:
    from .lockfile import lock

    print(f"{lock(fn, *args, path=parsed.file, device=parsed.device).total} sites written to {parsed.file}")
    return 0


def _check(fn: Callable[..., Any], args: tuple[Any, ...], parsed: argparse.Namespace) -> int:
    from .lockfile import LockfileError, LostSiteError, check

    try:
        print(check(fn, *args, path=parsed.file, device=parsed.device))
    except LockfileError as error:
        print(f"fusion_pass: {error}", file=sys.stderr)
        return 2
    except (LostSiteError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


class _Progress:
    """One line that is written over on a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.last = 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if now - self.last < (0.1 if self.terminal else 10):
            return
        self.last = now
        line = f"{done}/{total} {what}"
        print(
            f"\r{line:<70.70}" if self.terminal else line,
            end="" if self.terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.terminal:
            print("\r" + " " * 70, end="\r", file=sys.stderr, flush=True)
