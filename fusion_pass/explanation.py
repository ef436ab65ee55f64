"""Say what the pass would do to a function or module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .backends import collecting
from .sites import Report


def explain(fn: Callable[..., Any], *args: Any, device: str | None = None, **kwargs: Any) -> Report:
    """What the pass fuses and misses in ``fn(*args, **kwargs)``.

    The function is compiled with an eager executor and run once. With ``device="cuda"``, its tensors, and its parameters
    if it is a module, are replaced by fake CUDA tensors: nothing is computed and no GPU is needed.

    Args:
        fn: a function or module.
        device: None for the devices the tensors are on, or a device type to pretend they are on.

    Returns:
        A report: ``.fused`` the sites, ``.missed`` the near misses with their reasons.
    """
    report = Report()
    with torch._dynamo.config.patch(error_on_recompile=False):
        if device is None:
            torch.compile(fn, backend=collecting(report))(*args, **kwargs)
        else:
            _explain_fake(fn, args, kwargs, torch.device(device), report)
    return report


def _explain_fake(
    fn: Callable[..., Any], args: Any, kwargs: Any, device: torch.device, report: Report
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        with mode:
            result = mode.from_tensor(value).to(device)
        return torch.nn.Parameter(result, value.requires_grad) if isinstance(value, torch.nn.Parameter) else result

    tensors = {}
    if isinstance(fn, torch.nn.Module):
        tensors = {name: fake(t) for name, t in (*fn.named_parameters(remove_duplicate=False), *fn.named_buffers())}

    def call(*args: Any, **kwargs: Any) -> Any:
        if tensors:
            assert isinstance(fn, torch.nn.Module)
            return torch.func.functional_call(fn, tensors, args, kwargs)
        return fn(*args, **kwargs)

    with mode:
        args, kwargs = pytree.tree_map(fake, (args, kwargs))
        torch.compile(call, backend=collecting(report))(*args, **kwargs)
