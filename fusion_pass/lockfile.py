"""Record which sites a model has, and notice when one is lost.

A change of the model, of torch or of a library may spell an operation in a way that no rule knows: the model then still computes
the same, only slower. A file of the expected sites, kept with the code, turns that into a failing test.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .explanation import explain
from .sites import FusedSite, Miss, Report
from .specs import DTYPE_NAMES

_VERSION = 1


class LockfileError(ValueError):
    """A file is no lockfile, or one of another version; the message names it and what is allowed."""


class LostSiteError(AssertionError):
    """A site of the lockfile does not fuse any more; the message is a diff, with the near misses there are now."""


@dataclass(frozen=True)
class Lock:
    """The sites of a model.

    Attributes:
        device: the device type they were found for, or None for that of the arguments.
        sites: how often each occurs, by what it is: its name and shape, what it returns, how many casts it serves, and the file and
            function it is in. Line numbers are left out: they change with every edit.
    """

    device: str | None
    sites: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.sites.values())

    def text(self) -> str:
        """As stored: JSON with sorted keys, a line for each kind of site."""
        content = {"version": _VERSION, "device": self.device, "sites": dict(sorted(self.sites.items()))}
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Lock:
        """Read a lockfile.

        Raises:
            FileNotFoundError: there is none; the message says how to write it.
            LockfileError: it is no lockfile, or of another version.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no lockfile {path}: write it with fusion_pass.lock") from None
        except json.JSONDecodeError as error:
            raise LockfileError(f"{path} is no JSON ({error}); allowed: what fusion_pass.lock wrote") from None
        version = content.get("version") if isinstance(content, dict) else None
        if version != _VERSION:
            raise LockfileError(f"version is {version!r} in {path}; allowed: {_VERSION}")
        return cls(content["device"], content["sites"])

    @classmethod
    def of(cls, report: Report, device: str | None) -> Lock:
        return cls(device, collections.Counter(map(_identity, report.fused)))


def lock(fn: Callable[..., Any], *args: Any, path: str | Path, device: str | None = None, **kwargs: Any) -> Lock:
    """Write the sites that fuse in ``fn(*args, **kwargs)`` to a file, to be kept beside the code.

    Args:
        device: as :func:`fusion_pass.explain` takes it: "cuda" needs no GPU.
    """
    found = Lock.of(explain(fn, *args, device=device, **kwargs), device)
    Path(path).write_text(found.text(), encoding="utf-8")
    return found


def check(fn: Callable[..., Any], *args: Any, path: str | Path, device: str | None = None, **kwargs: Any) -> str:
    """Compare the sites that fuse in ``fn(*args, **kwargs)`` with those of a file that :func:`lock` has written.

    Args:
        device: None for the one in the file.

    Returns:
        A sentence: how many sites there are, and which are new and not in the file yet.

    Raises:
        LostSiteError: a site is lost, or serves fewer casts.
        FileNotFoundError: there is no such file.
    """
    expected = Lock.read(Path(path))
    device = expected.device if device is None else device
    report = explain(fn, *args, device=device, **kwargs)
    found = Lock.of(report, device)
    diff = _diff(expected.sites, found.sites)
    if any(line.startswith("-") for line in diff):
        raise LostSiteError("\n".join([f"sites of {path} are lost:", *diff, *_misses(report.missed)]))
    if diff:
        return "\n".join([f"{found.total} sites, new ones among them: write {path} again to keep them", *diff])
    return f"{found.total} sites, as in {path}"


def _diff(expected: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    lines = []
    for site in sorted({*expected, *found}):
        change = found.get(site, 0) - expected.get(site, 0)
        if change:
            lines.append(f"{'+' if change > 0 else '-'} {abs(change)} x {site}")
    return lines


def _misses(missed: list[Miss]) -> list[str]:
    return ["near misses now:", *(f"  {miss}" for miss in missed)] if missed else ["there are no near misses now"]


def _identity(site: FusedSite) -> str:
    shape = "x".join(map(str, site.shape))
    extras = f", also returns {' and '.join(site.extras)}" if site.extras else ""
    shared = f", shared by {site.shared_by} casts" if site.shared_by > 1 else ""
    return f"{site.name} [{shape}] -> {DTYPE_NAMES[site.quantizer.code]}{extras}{shared} in {_place(site.location)}"


def _place(location: str) -> str:
    """File and function of a location, without the folder and the line."""
    match = re.fullmatch(r"(?P<file>.+):\d+ in (?P<function>\S+)", location)
    return f"{Path(match['file']).name} {match['function']}" if match else location
