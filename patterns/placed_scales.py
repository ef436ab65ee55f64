"""Where views, permutations and paddings put the scales of a matrix: by their numbers, or if there are rows of an unknown number, by the
parts of their indices that each dim counts.

Both have a last dim beside the tensor's: the bytes of a word, once bytes are read as words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fusion_pass.addresses import Part, address, allocated, order, padded
from fusion_pass.specs import ScaleLayout

from . import row_counts
from .row_counts import Linear

_PADDING = -1


@dataclass(frozen=True)
class Numbers:
    """A tensor of the numbers of scales in their matrix; -1 is padding."""

    numbers: torch.Tensor

    @classmethod
    def of(cls, sizes: Sequence[int]) -> Numbers:
        return cls(torch.arange(math.prod(sizes), dtype=torch.int32, device="cpu").view(*sizes, 1))

    def reshaped(self, sizes: Sequence[int], width: int | None = None) -> Numbers:
        return Numbers(self.numbers.reshape(*sizes, self.numbers.shape[-1] if width is None else width))

    def permuted(self, dims: Sequence[int]) -> Numbers:
        return Numbers(self.numbers.permute(*dims, len(dims)))

    def padded(self, sizes: Sequence[int]) -> Numbers | None:
        """With padding behind each dim, up to ``sizes``."""
        more = [after - before for before, after in zip(self.numbers.shape[:-1], sizes, strict=True)]
        if min(more) < 0:
            return None
        pads = [pad for size in reversed(more) for pad in (0, size)]
        return Numbers(torch.nn.functional.pad(self.numbers, (0, 0, *pads), value=_PADDING))

    def layout(self, rows: int, groups: int, packed: bool) -> ScaleLayout | None:
        """The layout that keeps the scales of one matrix where they are."""
        if int(self.numbers.max()) + 1 != rows * groups:
            return None
        for layout in _stored_otherwise(packed):
            stored = math.prod(allocated(layout, rows, groups))
            if stored != self.numbers.numel():
                continue
            m, g = torch.arange(rows, device="cpu")[:, None], torch.arange(groups, device="cpu")
            expected = torch.full((stored,), _PADDING, dtype=torch.int32, device="cpu")
            expected[address(layout, m, g, rows, groups).flatten()] = torch.arange(
                rows * groups, dtype=torch.int32, device="cpu"
            )
            if torch.equal(self.numbers.flatten(), expected):
                return layout
        return None


@dataclass(frozen=True)
class Parts:
    """The parts of rows and groups that each dim of a tensor of scales counts, the slowest first.

    Attributes:
        dims: of each dim; at most one part has no size.
        rows: the number of rows of the matrix, which is unknown.
        padded_rows, padded_groups: how many there are with padding.
    """

    dims: tuple[tuple[Part, ...], ...]
    rows: torch.SymInt
    padded_rows: Linear
    padded_groups: int

    @classmethod
    def of(cls, sizes: Sequence[Any], rows: torch.SymInt, groups: int) -> Parts | None:
        """The scales of a matrix as tensors of these sizes present them; None if these are no sizes of so many."""
        counted, scales = row_counts.of_rows(rows, rows), row_counts.of_rows(rows * groups, rows)
        presented = row_counts.of_rows(math.prod(sizes), rows)
        if counted is None or scales is None or presented is None or not presented.equals(scales):
            return None
        whole = cls(((Part("row", 1, None), Part("group", 1, groups)), ()), rows, counted, groups)
        return whole.reshaped(sizes)

    def reshaped(self, sizes: Sequence[Any], width: int | None = None) -> Parts | None:
        last = math.prod(part.size for part in self.dims[-1]) if width is None else width  # type: ignore[misc]
        numbers = [*map(self._number, sizes), last]
        if numbers.count(None) != 1:
            return None
        left = [part for dim in self.dims for part in dim]
        unknown = numbers.index(None)
        after: list[tuple[Part, ...]] = []
        for size in reversed(numbers[unknown + 1 :]):
            assert size is not None
            taken = self._take_last(left, size)
            if taken is None:
                return None
            after.insert(0, taken)
        before: list[tuple[Part, ...]] = []
        for size in numbers[:unknown]:
            assert size is not None
            first = _take_first(left, size)
            if first is None:
                return None
            before.append(first)
        return replace(self, dims=(*before, tuple(left), *after))

    def permuted(self, dims: Sequence[int]) -> Parts:
        return replace(self, dims=(*(self.dims[dim] for dim in dims), self.dims[-1]))

    def padded(self, sizes: Sequence[Any]) -> Parts | None:
        """With padding behind the whole rows and groups, up to ``sizes``; no other dim may grow."""
        dims, rows, groups = list(self.dims), self.padded_rows, self.padded_groups
        for i, (parts, size) in enumerate(zip(self.dims, sizes, strict=False)):
            held = row_counts.of_rows(size, self.rows)
            if held is None:
                return None
            if parts == (Part("row", 1, None),):
                if not held.is_never_less_than(rows):
                    return None
                rows = held
            elif parts == (Part("group", 1, groups),):
                number = held.number()
                if number is None or number < groups:
                    return None
                groups = number
                dims[i] = (Part("group", 1, groups),)
            elif any(part.size is None for part in parts) or held.number() != math.prod(part.size for part in parts):  # type: ignore[misc]
                return None
        return replace(self, dims=tuple(dims), padded_rows=rows, padded_groups=groups)

    def layout(self, rows: Any, groups: int, packed: bool) -> ScaleLayout | None:
        """The layout that keeps the scales of one matrix where they are, for any number of rows."""
        for layout in _stored_otherwise(packed):
            room, of_groups = padded(layout, rows, groups)
            needed = row_counts.of_rows(room, rows)
            if of_groups != self.padded_groups or needed is None or not needed.equals(self.padded_rows):
                continue
            if _joined(part for dim in self.dims for part in dim) == _joined(order(layout, of_groups)):
                return layout
        return None

    def _number(self, size: Any) -> int | None:
        held = row_counts.of_rows(size, self.rows)
        return None if held is None else held.number()

    def _take_last(self, parts: list[Part], size: int) -> tuple[Part, ...] | None:
        """Take the last of ``parts``, as many as have the size, splitting the slowest of them; None if none have."""
        taken: list[Part] = []
        while size > 1:
            if not parts:
                return None
            part = parts.pop()
            if part.size is not None and size % part.size == 0:
                size //= part.size
                taken.insert(0, part)
                continue
            if not self.padded_rows.is_multiple_of(part.step * size) if part.size is None else part.size % size:
                return None
            upper, lower = _split(part, size)
            parts.append(upper)
            taken.insert(0, lower)
            size = 1
        return tuple(taken)


def _split(part: Part, size: int) -> tuple[Part, Part]:
    """A part's slower part, and its faster one, of a size that divides it."""
    upper = None if part.size is None else part.size // size
    return Part(part.of, part.step * size, upper), Part(part.of, part.step, size)


def _take_first(parts: list[Part], size: int) -> tuple[Part, ...] | None:
    """Take the first of ``parts``, as many as have the size, splitting the fastest of them; None if none have."""
    taken: list[Part] = []
    while size > 1:
        if not parts or parts[0].size is None:
            return None
        part = parts.pop(0)
        assert part.size is not None
        if size % part.size == 0:
            size //= part.size
            taken.append(part)
            continue
        if part.size % size:
            return None
        upper, lower = _split(part, part.size // size)
        taken.append(upper)
        parts.insert(0, lower)
        size = 1
    return tuple(taken)


def _joined(parts: Any) -> list[Part]:
    """The parts without those of one, and neighbours that are parts of one part as that."""
    joined: list[Part] = []
    for part in parts:
        if part.size == 1:
            continue
        slower = joined[-1] if joined else None
        if (
            part.size is not None
            and slower is not None
            and slower.of == part.of
            and slower.step == part.step * part.size
        ):
            joined[-1] = Part(part.of, part.step, None if slower.size is None else slower.size * part.size)
        else:
            joined.append(part)
    return joined


def _stored_otherwise(packed: bool) -> list[ScaleLayout]:
    """The layouts that are not by rows, of words or of scales."""
    return [
        layout for layout in ScaleLayout if layout is not ScaleLayout.ROW and (layout is ScaleLayout.PACKED) is packed
    ]
