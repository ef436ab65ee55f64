"""Switch the pass on and off in Inductor's config."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

DEVICES = ("cuda", "cpu")
_STATIC_LAUNCH = "static_launch_user_defined_triton_kernels"


@dataclass(frozen=True, eq=False)
class _Options:
    devices: tuple[str, ...]
    strict: bool


_lock = threading.RLock()
_registered: _Options | None = None
# The blocks of `enabled` that are open, in whatever thread; the latest one's options hold.
_scopes: list[_Options] = []
# One pass for each slot, ever: a thread may keep it in its own config, where it is switched off and on again.
_passes: dict[str, Any] = {}
# What restores what is the same for all threads; empty while the pass is out of the config.
_undo: list[Callable[[], Any]] = []
# What the slots of this thread's config held.
_found: ContextVar[dict[str, Any] | None] = ContextVar("fusion_pass_found", default=None)


def register(devices: Sequence[str] = ("cuda",), strict: bool = False) -> None:
    """Fuse quantization sites in everything that ``torch.compile`` compiles with Inductor from now on, in any thread.

    Passes that are already installed are kept and run first. Calling again with other arguments replaces the options.

    Args:
        devices: device types whose graphs are rewritten: "cuda", "cpu". A CPU graph keeps the fused ops as calls, which
            is useful to test a rewriting, not to run fast.
        strict: raise :class:`fusion_pass.UnfusedSiteError` at compile time if a quantizing cast is left unfused, and
            :class:`fusion_pass.FusionPassError` if the pass itself fails. Without it such a graph is compiled as if the
            pass were off, with a warning.

    Raises:
        ValueError: ``devices`` is empty or names a device type that is not supported.
    """
    global _registered
    options = _options(devices, strict)
    with _lock:
        _registered = options
        _apply()


def unregister() -> None:
    """Take the pass out of Inductor's config, which is then as :func:`register` found it. Does nothing if not registered."""
    global _registered
    with _lock:
        _registered = None
        _apply()


def is_registered() -> bool:
    with _lock:
        return _in_force() is not None


@contextlib.contextmanager
def enabled(devices: Sequence[str] = ("cuda",), strict: bool = False) -> Iterator[None]:
    """:func:`register` for the duration of a ``with`` block; an earlier registration is restored after it."""
    options = _options(devices, strict)
    with _lock:
        _scopes.append(options)
        _apply()
    try:
        yield
    finally:
        with _lock:
            _scopes.remove(options)
            _apply()


def _options(devices: Sequence[str], strict: bool) -> _Options:
    devices = (devices,) if isinstance(devices, str) else tuple(devices)
    unknown = sorted(set(devices) - set(DEVICES))
    if unknown or not devices:
        raise ValueError(f"devices is {devices!r}; allowed: one or more of {', '.join(map(repr, DEVICES))}")
    return _Options(devices, strict)


def _in_force() -> _Options | None:
    return _scopes[-1] if _scopes else _registered


def _apply() -> None:
    options = _in_force()
    if options is not None:
        _install(options)
    elif _undo:
        _remove()


def _install(options: _Options) -> None:
    from . import inductor
    from .graph_pass import FusionPass, RoundingGuard

    if not _passes:
        _passes[inductor.PRE_JOINT] = RoundingGuard()
        _passes[inductor.POST_GRAD] = FusionPass()
    found = dict(_found.get() or {})
    for slot, graph_pass in _passes.items():
        graph_pass.configure(options.devices, options.strict)
        graph_pass.active = True
        if not inductor.has_pass(slot, graph_pass):
            found[slot] = inductor.add_pass(slot, graph_pass)
    _found.set(found)
    if not _undo:
        realized = inductor.realize_kernel_inputs(True)
        launched = inductor.launch_kernels_statically(True)
        _undo.append(lambda: inductor.realize_kernel_inputs(realized))
        _undo.append(lambda: inductor.launch_kernels_statically(launched))
        shared: dict[str, Any] = {**_passes, _STATIC_LAUNCH: True}
        _undo.extend(inductor.share_with_threads(name, value) for name, value in shared.items())


def _remove() -> None:
    from . import inductor

    while _undo:
        _undo.pop()()
    found = _found.get() or {}
    _found.set(None)
    for slot, graph_pass in _passes.items():
        graph_pass.active = False
        inductor.remove_pass(slot, graph_pass, found.get(slot))
