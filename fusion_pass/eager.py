"""Facts about eager PyTorch that differ between its versions, asked of the installed one."""

from __future__ import annotations

from functools import cache

import torch

from .inductor import real_tensors


@cache
def overflow_code(code: torch.dtype) -> int | None:
    """The code of a value too large for an fp8 dtype, or None where the cast saturates.

    The e4m3fn cast of older torch versions gives NaN and that of newer ones saturates.
    """
    with real_tensors():
        huge = torch.tensor(1e9, device="cpu").to(code)
        saturates = float(huge.float()) == torch.finfo(code).max
        return None if saturates else int(huge.view(torch.uint8))


def eager_cast_saturates(code: torch.dtype) -> bool:
    """Whether a value too large for an fp8 dtype becomes its largest."""
    return overflow_code(code) is None
