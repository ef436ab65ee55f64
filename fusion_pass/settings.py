"""The sole reader of this package's own environment variables, ``FUSION_PASS_*``."""

from __future__ import annotations

import os
from pathlib import Path


def debug() -> Path | bool:
    """FUSION_PASS_DEBUG: unset or 0 is off, 1 prints, anything else is a directory to write to."""
    value = os.environ.get("FUSION_PASS_DEBUG", "")
    if value in ("", "0"):
        return False
    return True if value == "1" else Path(value)


def limit() -> int | None:
    """FUSION_PASS_LIMIT: fuse only the first so many sites of the process; unset is all of them.

    Raises:
        ValueError: it is not a number of sites.
    """
    value = os.environ.get("FUSION_PASS_LIMIT", "")
    if not value:
        return None
    if not value.isdecimal():
        raise ValueError(f"FUSION_PASS_LIMIT is {value!r}; allowed: a number of sites, 0 or more")
    return int(value)


def always() -> bool:
    """FUSION_PASS_ALWAYS: 1 fuses also the sites that are expected to be slower fused; unset or 0 leaves them to Inductor.

    Raises:
        ValueError: it is neither.
    """
    value = os.environ.get("FUSION_PASS_ALWAYS", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"FUSION_PASS_ALWAYS is {value!r}; allowed: 0 or 1")
    return value == "1"
