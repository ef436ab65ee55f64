"""Switch the pass on and off in Inductor's config."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

DEVICES = ("cuda", "cpu")

_lock = threading.RLock()
_installed: list[tuple[str, Any, Any]] = []
_launched_statically: list[bool] = []


def register(devices: Sequence[str] = ("cuda",), strict: bool = False) -> None:
    """Fuse quantization sites in everything that ``torch.compile`` compiles with Inductor from now on.

    Passes that are already installed are kept and run first. Calling again with other arguments replaces the options.

    Args:
        devices: device types whose graphs are rewritten: "cuda", "cpu". A CPU graph keeps the fused ops as calls, which
            is useful to test a rewriting, not to run fast.
        strict: raise :class:`fusion_pass.UnfusedSiteError` at compile time if a quantizing cast is left unfused.

    Raises:
        ValueError: ``devices`` is empty or names a device type that is not supported.
    """
    from . import inductor
    from .graph_pass import FusionPass, RoundingGuard

    devices = (devices,) if isinstance(devices, str) else tuple(devices)
    unknown = sorted(set(devices) - set(DEVICES))
    if unknown or not devices:
        raise ValueError(f"devices is {devices!r}; allowed: one or more of {', '.join(map(repr, DEVICES))}")
    with _lock:
        unregister()
        for slot, graph_pass in (
            (inductor.PRE_JOINT, RoundingGuard()),
            (inductor.POST_GRAD, FusionPass(devices, strict)),
        ):
            _installed.append((slot, graph_pass, inductor.add_pass(slot, graph_pass)))
        inductor.realize_kernel_inputs(True)
        _launched_statically.append(inductor.launch_kernels_statically(True))


def unregister() -> None:
    """Take the pass out of Inductor's config, which is then as :func:`register` found it. Does nothing if not registered."""
    with _lock:
        if not _installed:
            return
        from . import inductor

        while _installed:
            inductor.remove_pass(*_installed.pop())
        inductor.realize_kernel_inputs(False)
        inductor.launch_kernels_statically(_launched_statically.pop())


def is_registered() -> bool:
    with _lock:
        return bool(_installed)


@contextlib.contextmanager
def enabled(devices: Sequence[str] = ("cuda",), strict: bool = False) -> Iterator[None]:
    """:func:`register` for the duration of a ``with`` block; an earlier registration is restored after it."""
    with _lock:
        before = [graph_pass for _, graph_pass, _ in _installed]
    register(devices, strict)
    try:
        yield
    finally:
        unregister()
        if before:
            outer = before[-1]
            register(outer.devices, outer.strict)
