"""Fused Triton kernels for the quantization in unmodified PyTorch models, found by a pass over torch.compile's graphs.

    import fusion_pass
    fusion_pass.register()          # once, before torch.compile
    model = torch.compile(model)

See :func:`register`, :func:`unregister`, :func:`enabled`, :func:`explain`, :func:`register_op`,
:mod:`fusion_pass.ops` and :mod:`fusion_pass.presets`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .registration import enabled, register, unregister

if TYPE_CHECKING:
    from . import layouts, ops, presets, specs, testing
    from .explanation import explain
    from .failures import FusionPassError, FusionPassWarning
    from .graph_pass import FusionPass, UnfusedSiteError
    from .lockfile import LostSiteError, check, lock
    from .patterns.opaque import register_op, unregister_op
    from .sites import FusedSite, Miss, Report

__version__ = "0.1.0"

__all__ = [
    "FusedSite",
    "FusionPass",
    "FusionPassError",
    "FusionPassWarning",
    "LostSiteError",
    "Miss",
    "Report",
    "UnfusedSiteError",
    "check",
    "enabled",
    "explain",
    "layouts",
    "lock",
    "ops",
    "presets",
    "register",
    "register_op",
    "specs",
    "testing",
    "unregister",
    "unregister_op",
]

# Importing Inductor takes seconds: a program that never compiles should not pay for it.
_LAZY = {
    "FusedSite": "sites",
    "FusionPass": "graph_pass",
    "FusionPassError": "failures",
    "FusionPassWarning": "failures",
    "LostSiteError": "lockfile",
    "Miss": "sites",
    "Report": "sites",
    "UnfusedSiteError": "graph_pass",
    "check": "lockfile",
    "explain": "explanation",
    "lock": "lockfile",
    "register_op": "patterns.opaque",
    "unregister_op": "patterns.opaque",
}


_MODULES = ("layouts", "ops", "presets", "specs", "testing")


def __dir__() -> list[str]:
    return list(__all__)


def __getattr__(name: str) -> Any:
    import importlib

    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name in _LAZY:
        value = getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
