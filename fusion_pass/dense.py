"""Dense tensors of sizes that need not be known, for kernels to write."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch


def empty(size: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised dense tensor. Where a size is symbolic, strides are products of sizes: 0 where torch has 1 if there are no values.

    Of a size that is data, torch.empty has the stride Max(1, size), in which Inductor does not recognise that of its own
    allocation: it hands the kernel a copy, of NaN, and Triton has no FP8 constants.
    """
    if all(isinstance(length, int) for length in size):
        return torch.empty(size, dtype=dtype, device=device)
    *strides, _ = itertools.accumulate(reversed(size), operator.mul, initial=1)
    return torch.empty_strided(size, strides[::-1], dtype=dtype, device=device)
