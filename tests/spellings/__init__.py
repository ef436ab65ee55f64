"""A survey, as data, of how public code writes norms, gated activations, quantizers and scale layouts.

Each spelling follows the op sequence and the constants of the code it cites, in plain PyTorch. Positives must fuse into the
sites they name; negatives look like them and must keep the bits that eager code computes, fused in their provable part or not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

Inputs = Callable[[str], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Spelling:
    """One way to write something, and what must become of it.

    Attributes:
        name: names the spelling in a test's id.
        source: the public repository, the path in it and the function or class whose op sequence this is.
        fn: the code, a function of the inputs.
        inputs: makes the inputs on a device.
        expected: the names of the sites it must fuse into, as ``FusedSite.name`` gives them.
        sums: whether it adds squares whose sum is not exact in f32, so that codes depend on the order of the addition.
        status: ``now``; ``soon`` if the specs can express it but no rule matches it; ``later`` if the specs cannot.
        grad: whether it runs with gradients.
    """

    name: str
    source: str
    fn: Callable[..., Any]
    inputs: Inputs
    expected: tuple[str, ...]
    sums: bool = False
    status: str = "now"
    grad: bool = False


POSITIVES: list[Spelling] = []
NEGATIVES: list[Spelling] = []


def _register(
    into: list[Spelling], fn: Callable[..., Any], then: Callable[..., Any] | None, spelling: Spelling
) -> None:
    name = fn.__name__ if then is None else f"{fn.__name__}+{then.__name__}"
    body = fn if then is None else _composed(fn, then)
    into.append(replace(spelling, name=name, fn=body))


def _composed(value: Callable[..., torch.Tensor], quantizer: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs: quantizer(value(*inputs))


def positive(
    source: str, *expected: str, inputs: Inputs, then: Callable[..., Any] | None = None, **fields: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a spelling that fuses; ``then`` quantizes what it returns."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        _register(POSITIVES, fn, then, Spelling("", source, fn, inputs, expected, **fields))
        return fn

    return register


def negative(
    source: str, *expected: str, inputs: Inputs, then: Callable[..., Any] | None = None, **fields: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a look-alike: a function of which only the sites in ``expected`` fuse."""

    def register(fn: Callable[..., Any]) -> Callable[..., Any]:
        _register(NEGATIVES, fn, then, Spelling("", source, fn, inputs, expected, **fields))
        return fn

    return register


def catalogue() -> tuple[list[Spelling], list[Spelling]]:
    """All positives and all negatives."""
    from . import (  # noqa: F401
        negatives,
        positives_activations,
        positives_compositions,
        positives_layouts,
        positives_norms,
        positives_presets,
        positives_quantizers,
    )

    return POSITIVES, NEGATIVES
