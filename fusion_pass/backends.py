"""Backends of torch.compile: Inductor with the pass, and the same rewriting run node by node."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import fx

from . import registration
from .sites import Report


def fusion_pass(gm: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile(model, backend="fusion_pass")``: Inductor with the pass, without registering it.

    Args:
        options: as ``torch.compile``'s for Inductor.
    """
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    # Backward graphs are compiled later, when this has returned.
    inner = registration.enabled(registration.DEVICES)(compile_fx_inner)
    with registration.enabled(registration.DEVICES):
        return compile_fx(gm, inputs, inner, config_patches=options.get("options"))  # type: ignore[no-any-return, return-value]


def fusion_pass_eager(gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """``torch.compile(model, backend="fusion_pass_eager")``: the rewritten graph, run node by node as eager would.

    For debugging and fuzzing: what differs from eager here is the rewriting's doing, not Inductor's.
    """
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
    from . import fake_device, graph_pass, inductor

    def compiler(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        subject = gm if pretend is None else fake_device.relabelled(gm, pretend)
        report.extend(graph_pass.run(subject.graph, devices, strict=strict))
        subject.graph.lint()
        gm.recompile()
        return torch.no_grad()(gm.forward)  # type: ignore[no-any-return]

    return lambda gm, inputs: inductor.compile_without_joint_passes(gm, inputs, compiler)
