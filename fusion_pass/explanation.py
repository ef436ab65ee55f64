"""Say what the pass would do to a function or module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .backends import collecting
from .checks import require
from .fake_device import without_data
from .inductor import FakeTensorMode, without_recompile_limit
from .registration import DEVICE_NAMES, names_device
from .sites import Report


def explain(fn: Callable[..., Any], *args: Any, device: str | None = None, **kwargs: Any) -> Report:
    """What the pass fuses and misses in ``fn(*args, **kwargs)``.

    The function is compiled with an eager executor and run once. With ``device="cuda"`` nothing is computed and no GPU is
    needed: it is traced on fake tensors, and its graphs are read as if they were on that device.

    Args:
        fn: a function or module.
        device: None for the devices the tensors are on, or a device type to pretend they are on.

    Returns:
        A report: ``.fused`` the sites, ``.missed`` the near misses with their reasons.

    Raises:
        ValueError: ``device`` is none that the pass knows.
    """
    report = Report()
    if device is not None:
        require(names_device(str(device)), "device", device, f"None, or {DEVICE_NAMES}")
    with without_recompile_limit():
        if device is None:
            torch.compile(fn, backend=collecting(report))(*args, **kwargs)
        else:
            _explain_fake(fn, args, kwargs, torch.device(device), report)
    return report


def _explain_fake(fn: Callable[..., Any], args: Any, kwargs: Any, device: torch.device, report: Report) -> None:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not isinstance(fn, torch.nn.Module):
            return fn(*args, **kwargs)
        return torch.func.functional_call(fn, state, args, kwargs)

    with FakeTensorMode(allow_non_fake_inputs=True):
        state = {}
        if isinstance(fn, torch.nn.Module):
            named = (*fn.named_parameters(remove_duplicate=False), *fn.named_buffers(remove_duplicate=False))
            state = {name: without_data(tensor) for name, tensor in named}
        args, kwargs = pytree.tree_map(without_data, (args, kwargs))
        torch.compile(call, backend=collecting(report, pretend=device))(*args, **kwargs)
