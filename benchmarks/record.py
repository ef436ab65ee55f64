"""Results on disk: a line of JSON each, so that a run that is cut off loses one at most and the next goes on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append(path: Path, values: Any) -> None:
    """Add a line to a file, after one that was cut off also."""
    torn = path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(values) + "\n")


def read(path: Path) -> Iterator[Any]:
    """What the lines of a file hold; one that was cut off is left out."""
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)
