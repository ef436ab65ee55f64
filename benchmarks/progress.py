"""A progress bar on standard error."""

from __future__ import annotations

import sys
import time

_WIDTH = 24


class Progress:
    """Shows how many of ``total`` steps are done, what is under way, and how long the rest will take.

    Where standard error is no terminal, each step is a line of its own, and nothing is overwritten.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.start = time.monotonic()
        self.overwrites = sys.stderr.isatty()

    def show(self, doing: str) -> None:
        filled = _WIDTH * self.done // max(1, self.total)
        bar = "█" * filled + "░" * (_WIDTH - filled)
        elapsed = time.monotonic() - self.start
        left = f", {elapsed / self.done * (self.total - self.done):.0f} s left" if self.done else ""
        line = f"{bar} {self.done}/{self.total} {elapsed:.0f} s{left}  {doing}"
        print(
            f"\r\x1b[K{line[:158]}" if self.overwrites else line,
            end="" if self.overwrites else "\n",
            file=sys.stderr,
            flush=True,
        )

    def step(self) -> None:
        self.done += 1

    def close(self) -> None:
        if self.overwrites:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
