"""The sole reader of the environment."""

from __future__ import annotations

import os
from pathlib import Path


def debug() -> Path | bool:
    """FUSION_PASS_DEBUG: unset or 0 is off, 1 prints, anything else is a directory to write to."""
    value = os.environ.get("FUSION_PASS_DEBUG", "")
    if value in ("", "0"):
        return False
    return True if value == "1" else Path(value)
