"""Compare a fused computation with the unfused one, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Comparison:
    """How two results differ.

    Attributes:
        elements: how many elements were compared.
        different: how many differ in their bits; NaNs are equal to each other whatever their payload.
        largest: the largest absolute difference of two finite elements.
    """

    elements: int
    different: int
    largest: float

    @property
    def equal(self) -> bool:
        return self.different == 0

    def __str__(self) -> str:
        if self.equal:
            return f"all {self.elements} elements equal, bit for bit"
        return f"{self.different} of {self.elements} elements differ, by at most {self.largest:.3g}"


def compare(actual: Any, expected: Any) -> Comparison:
    """Compare two results of one structure, element by element in their bits.

    Raises:
        AssertionError: the results differ in structure, or a pair of tensors in shape, dtype or device.
    """
    left, left_spec = pytree.tree_flatten(actual)
    right, right_spec = pytree.tree_flatten(expected)
    assert left_spec == right_spec, f"structure {left_spec} is not {right_spec}"
    elements, different, largest = 0, 0, 0.0
    for a, b in zip(left, right, strict=True):
        if not isinstance(a, torch.Tensor):
            assert a == b, f"{a!r} is not {b!r}"
            continue
        differs = unequal(a, b)
        elements += a.numel()
        different += int(differs.sum())
        distance = (a.double() - b.double()).abs()[differs]
        largest = max(largest, _largest(distance))
    return Comparison(elements, different, largest)


def _largest(distance: torch.Tensor) -> float:
    finite = distance[distance.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def unequal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two tensors of one shape, dtype and device differ in their bits; NaNs are equal to each other."""
    for name in ("shape", "dtype", "device"):
        assert getattr(a, name) == getattr(b, name), f"{name} {getattr(a, name)} is not {getattr(b, name)}"
    bits = _BITS[a.element_size()]
    differs = a.contiguous().view(bits) != b.contiguous().view(bits)
    if a.is_floating_point():
        differs &= ~(a.double().isnan() & b.double().isnan())
    return differs
