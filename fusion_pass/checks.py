"""Refusals of arguments: the error names the argument, its value and what is allowed."""

from __future__ import annotations

import torch


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name} is {value}; allowed: {allowed}")


def require_dims(name: str, tensor: torch.Tensor, dims: str) -> None:
    """Raise ValueError unless ``tensor`` has as many dimensions as ``dims``, such as "(M, N)", names."""
    count = dims.count(",") + 1
    require(tensor.dim() == count, f"shape of {name}", tuple(tensor.shape), f"{count} dimensions {dims}")
