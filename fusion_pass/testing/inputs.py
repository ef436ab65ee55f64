"""Values to try: integers whose squares add up exactly, random ones of every magnitude, and the special ones."""

from __future__ import annotations

from collections.abc import Callable

import torch

KINDS = ("integers", "normal", "spread", "tiny", "huge", "zero rows", "special", "ties", "constant")


def tensor(kind: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A tensor of values of a kind, on the CPU.

    Args:
        kind: a name of :data:`KINDS`.
        dtype: a floating-point dtype.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in _VALUES:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(KINDS)}")
    return _VALUES[kind](shape, dtype, generator).to(dtype)


def _integers(shape: tuple[int, ...], _: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(-7, 8, shape, generator=generator).float()


def _normal(shape: tuple[int, ...], _: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def _spread(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Rows, and values in them, of very different magnitudes."""
    limit = 4.0 if dtype is torch.float16 else 12.0
    rows = torch.rand((*shape[:-1], 1), generator=generator) * 2 * limit - limit
    values = torch.randn(shape, generator=generator)
    return values * torch.pow(10.0, rows)


def _tiny(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Subnormals and what is close to them."""
    return torch.randn(shape, generator=generator) * float(torch.finfo(dtype).smallest_normal)


def _huge(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Up to the largest finite value: squares and sums overflow."""
    return (torch.rand(shape, generator=generator) * 2 - 1) * float(torch.finfo(dtype).max)


def _zero_rows(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Half of the rows are zero, of either sign."""
    values = _normal(shape, dtype, generator)
    zero = torch.rand((*shape[:-1], 1), generator=generator) < 0.5
    return torch.where(zero, values * 0.0, values)


def _special(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """A few NaNs, infinities, zeros of either sign, extreme and subnormal values among ordinary ones."""
    info = torch.finfo(dtype)
    subnormal = float(info.smallest_normal) / 4
    table = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 0.0, info.max, info.min, subnormal, -subnormal])
    chosen = table[torch.randint(0, len(table), shape, generator=generator)]
    # Some rows stay ordinary: a single NaN makes the whole of a norm's row NaN.
    share = torch.rand((*shape[:-1], 1), generator=generator).square() * 0.05
    return torch.where(torch.rand(shape, generator=generator) < share, chosen, _normal(shape, dtype, generator))


def _ties(shape: tuple[int, ...], _: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Multiples of an eighth up to 448 = amax: quotients in the middle between two codes."""
    values = torch.randint(-127 * 8, 127 * 8 + 1, shape, generator=generator) / 8
    values[..., :1] = 448.0
    return values


def _constant(shape: tuple[int, ...], _: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Every value of a row is its amax."""
    return torch.randn((*shape[:-1], 1), generator=generator).expand(shape).clone()


_VALUES: dict[str, Callable[[tuple[int, ...], torch.dtype, torch.Generator], torch.Tensor]] = {
    "integers": _integers,
    "normal": _normal,
    "spread": _spread,
    "tiny": _tiny,
    "huge": _huge,
    "zero rows": _zero_rows,
    "special": _special,
    "ties": _ties,
    "constant": _constant,
}
