"""Refusals of arguments: the error names the argument, its value and what is allowed."""

from __future__ import annotations

import torch


def require(condition: bool, name: str, value: object, allowed: str) -> None:
    """Raise ValueError unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{name} is {value}; allowed: {allowed}")


def require_float8(dtype: torch.dtype) -> torch.dtype:
    """``dtype``, or ValueError if it is none of float8 codes."""
    allowed = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2)
    require(dtype in allowed, "dtype", dtype, ", ".join(map(str, allowed)))
    return dtype


def require_dims(name: str, tensor: torch.Tensor, dims: str) -> None:
    """Raise ValueError unless ``tensor`` has as many dimensions as ``dims``, such as "(M, N)", names."""
    count = dims.count(",") + 1
    require(tensor.dim() == count, f"shape of {name}", tuple(tensor.shape), f"{count} dimensions {dims}")
