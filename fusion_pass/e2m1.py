"""E2M1, the FP4 format: which code stands for a value."""

from __future__ import annotations

import torch

from .specs import E2M1, Sign, Ties

# Between the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4 and 6.
MIDPOINTS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def e2m1_codes(rule: E2M1, value: torch.Tensor) -> torch.Tensor:
    """The FP4 codes of f32 values, one per byte, by comparison with the seven midpoints."""
    midpoints = torch.tensor(MIDPOINTS, device=value.device)
    magnitude = value.abs().contiguous()
    # A midpoint itself counts as reached, or as not reached.
    reached, passed = (torch.bucketize(magnitude, midpoints, right=right) for right in (True, False))
    to_even = torch.where(reached % 2 == 0, reached, passed)
    code = {Ties.AWAY: reached, Ties.TOWARD_ZERO: passed, Ties.EVEN: to_even}[rule.ties]
    signed = {
        Sign.KEPT: value.signbit(),
        Sign.NEGATIVE: value < 0,
        Sign.NONZERO: (value < 0) & (code != 0),
    }[rule.sign]
    return torch.where(value.isnan(), rule.nan_code, code | signed.to(code.dtype) << 3).to(torch.uint8)
