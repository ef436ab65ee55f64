"""Backends of torch.compile: Inductor with the pass, and the same rewriting run node by node."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from . import registration
from .sites import Report


def fusion_pass(
    gm: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """``torch.compile(model, backend="fusion_pass")``: Inductor with the pass, without registering it.

    Args:
        mode, options: as ``torch.compile``'s for Inductor.

    Raises:
        RuntimeError: Inductor has no such mode or option.
    """
    from . import inductor

    with registration.enabled(registration.DEVICES):
        each_graph = registration.enabled(registration.DEVICES)
        return inductor.compile_with_inductor(gm, inputs, mode, options, around=each_graph)


def fusion_pass_eager(gm: fx.GraphModule, inputs: Sequence[Any], **inductor_options: Any) -> Callable[..., Any]:
    """``torch.compile(model, backend="fusion_pass_eager")``: the rewritten graph, run node by node as eager would.

    For debugging and fuzzing: what differs from eager here is the rewriting's doing, not Inductor's.

    Raises:
        ValueError: a mode or options are given, which are Inductor's.
    """
    if inductor_options:
        name, value = next(iter(inductor_options.items()))
        raise ValueError(
            f'{name} is {value!r}; allowed with backend="fusion_pass_eager": none, use backend="fusion_pass"'
        )
    return collecting(Report())(gm, inputs)


def collecting(
    report: Report,
    devices: Collection[str] = registration.DEVICES,
    *,
    strict: bool = False,
    pretend: torch.device | None = None,
) -> Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]:
    """The eager executor as a backend that adds what it finds to ``report``.

    With ``pretend``, graphs are analysed as if they were on that device, and run unfused.
    """
    from . import fake_device, floats, graph_pass, inductor

    def compiler(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        floats.specialize(gm.graph, devices, strict=strict)
        # Its branches and regions are graphs of their own.
        for module in [m for m in gm.modules() if isinstance(m, fx.GraphModule)]:
            subject = module if pretend is None else fake_device.relabelled(module, pretend)
            report.extend(graph_pass.run(subject.graph, devices, strict=strict))
            subject.graph.lint()
            module.recompile()
        return torch.no_grad()(gm.forward)  # type: ignore[no-any-return]

    return lambda gm, inputs: inductor.compile_without_joint_passes(gm, inputs, compiler)
