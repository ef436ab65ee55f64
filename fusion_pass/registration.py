"""Switch the pass on and off in Inductor's config."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

DEVICES = ("cuda", "cpu")

_lock = threading.RLock()


@dataclass(eq=False)
class _Options:
    devices: tuple[str, ...]
    strict: bool


# What `register` was given, if anything, and each open `enabled`, in whatever threads; the last one's options hold.
_registered: list[_Options] = []
_scopes: list[_Options] = []
_undo = contextlib.ExitStack()


def register(devices: Sequence[str] = ("cuda",), strict: bool = False) -> None:
    """Fuse quantization sites in everything that ``torch.compile`` compiles with Inductor from now on.

    It holds for every thread. Passes that are already installed are kept and run first. Calling again with other
    arguments replaces the options.

    Args:
        devices: device types whose graphs are rewritten: "cuda", "cpu". A CPU graph keeps the fused ops as calls, which
            is useful to test a rewriting, not to run fast.
        strict: raise :class:`fusion_pass.UnfusedSiteError` at compile time if a quantizing cast is left unfused, and
            :class:`fusion_pass.FusionPassError` if the pass itself fails. Without it such a graph is compiled as if the
            pass were off, with a warning.

    Raises:
        ValueError: ``devices`` is empty or names a device type that is not supported.
    """
    options = _Options(checked(devices), strict)
    with _lock:
        before = _registered[:]
        _registered[:] = [options]
        try:
            _install()
        except BaseException:
            _registered[:] = before
            _install()
            raise


# What names one of DEVICES, with or without its index.
DEVICE_NAMES = f"{' or '.join(DEVICES)} with or without an index"


def names_device(name: str) -> bool:
    return name.partition(":")[0] in DEVICES


def checked(devices: Sequence[str]) -> tuple[str, ...]:
    """The device types as :func:`register` takes them; also one as a string.

    Raises:
        ValueError: there is none, or one is not supported.
    """
    devices = (devices,) if isinstance(devices, str) else tuple(devices)
    unknown = sorted(set(devices) - set(DEVICES))
    if unknown or not devices:
        raise ValueError(f"devices is {devices!r}; allowed: one or more of {', '.join(map(repr, DEVICES))}")
    return devices


def _install() -> None:
    """Have Inductor's config hold the passes of the last options, or none; none also if that fails."""
    from . import inductor

    _undo.close()
    if not (wanted := [*_registered, *_scopes]):
        return
    with contextlib.ExitStack() as undo:
        for slot, graph_pass in _passes(wanted[-1].devices, wanted[-1].strict):
            undo.callback(inductor.remove_pass, slot, graph_pass, inductor.add_pass(slot, graph_pass))
        undo.callback(inductor.realize_kernel_inputs, inductor.realize_kernel_inputs(True))
        undo.callback(inductor.remember_accesses, inductor.remember_accesses(True))
        undo.callback(inductor.lower_copies, inductor.lower_copies(True))
        undo.callback(inductor.restore_launches, inductor.launch_kernels_statically())
        _undo.push(undo.pop_all())


@functools.cache
def _passes(devices: tuple[str, ...], strict: bool) -> tuple[tuple[str, Any], ...]:
    """The slots and what stands in them.

    The same objects each time: leaving a ``config.patch`` that began while they were installed brings them back, and they
    must be known then as ours.
    """
    from . import inductor
    from .graph_pass import CastGuard, DistanceKeeper, FusionPass

    return (
        (inductor.PRE_JOINT, CastGuard(devices, strict)),
        (inductor.POST_GRAD, FusionPass(devices, strict)),
        (inductor.SCHEDULE, DistanceKeeper(strict)),
    )


def unregister() -> None:
    """Take the pass out of Inductor's config, which is then as :func:`register` found it. Does nothing if not registered."""
    with _lock:
        if _registered:
            _registered.clear()
            _install()


def is_registered() -> bool:
    with _lock:
        return bool(_registered or _scopes)


@contextlib.contextmanager
def enabled(devices: Sequence[str] = ("cuda",), strict: bool = False) -> Iterator[None]:
    """:func:`register` for the duration of a ``with`` block; an earlier registration is restored after it."""
    options = _Options(checked(devices), strict)
    try:
        with _lock:
            _scopes.append(options)
            _install()
        yield
    finally:
        with _lock:
            _scopes.remove(options)
            _install()
