"""What kernels write is dense, and rows that they read are evenly spaced; sizes need not be known."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch

from .inductor import known


def empty(size: Sequence[Any], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised dense tensor. Where a size is symbolic, strides are products of sizes: 0 where torch has 1 if there are no values.

    Of a size that is data, torch.empty has the stride Max(1, size), in which Inductor does not recognise that of its own
    allocation: it hands the kernel a copy, of NaN, and Triton has no FP8 constants.
    """
    if all(isinstance(length, int) for length in size):
        return torch.empty(size, dtype=dtype, device=device)
    *strides, _ = itertools.accumulate(reversed(size), operator.mul, initial=1)
    return torch.empty_strided(size, strides[::-1], dtype=dtype, device=device)


def row_distance(x: torch.Tensor) -> Any:
    """The distance of x's rows, which are its last dim, in values; None if they are not evenly spaced or not contiguous."""
    # A dim of one has any stride, also in a tensor that counts as contiguous, and separates no rows. What an unbacked
    # size or stride will be is not known: if that size is one after all, there is no other row to find.
    dims = [(size, stride) for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if not known(size == 1)]
    even = all(known(outer[1] == inner[0] * inner[1]) for outer, inner in itertools.pairwise(dims))
    if not known(x.stride(-1) == 1) or not even:
        return None
    return dims[-1][1] if dims else x.shape[-1]
