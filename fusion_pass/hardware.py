"""Which GPUs the kernels run on. What they lack would fail when Inductor compiles a kernel, which nobody could contain."""

from __future__ import annotations

from functools import cache

import torch

from .patterns.values import tensor
from .sites import FusedSite, Miss, Report
from .specs import DTYPE_NAMES

_ANY = (8, 6)  # max.NaN.xorsign.abs.bf16x2
_FP8 = (8, 9)  # cvt.rn.satfinite.e4m3x2.f32
_CONVERTED = (torch.float8_e4m3fn, torch.float8_e5m2)


def decline(report: Report) -> None:
    """Turn the sites of ``report`` whose kernels the GPU cannot run into misses of kind ``device``."""
    report.decline(_objection)


def _objection(site: FusedSite) -> Miss | None:
    reason = _lacking(site)
    return None if reason is None else Miss("device", reason, site.name, site.location)


def _lacking(site: FusedSite) -> str | None:
    x = tensor(site.x)
    if x is None or x.device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return "kernels are written for NVIDIA GPUs"
    needed = _FP8 if site.quantizer.code in _CONVERTED else _ANY
    found = _capability(x.device)
    if found is None or found >= needed:
        return None
    code = DTYPE_NAMES[site.quantizer.code]
    return f"codes of {code} need compute capability {needed[0]}.{needed[1]}, the GPU has {found[0]}.{found[1]}"


@cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    """None if there is no GPU: graphs are analysed as if there were one."""
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None
