"""Rows that kernels get wrong first, and where a layout keeps a scale."""

import torch

VALUES = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-38, -1e-40, 3e38, 448.0, 1e-45, 2e-12]
ROWS = len(VALUES) + 3


def rows(length, device, dtype=torch.bfloat16, wholes=False):
    """(ROWS, length): rows with one of VALUES in every 16th place, rows of ±0 alone, and one of magnitudes far apart.

    With ``wholes`` the other values are small integers, whose squares add up exactly.
    """
    x = (
        torch.randint(-15, 16, (ROWS, length), device=device).float()
        if wholes
        else torch.randn(ROWS, length, device=device)
    )
    for row, value in enumerate(VALUES):
        x[row, row::16] = value
    x[-1] = 0
    x[-2] = -0.0
    if not wholes:
        x[-3] *= torch.logspace(-20, 20, length, device=device)
    return x.to(dtype)


def storage(tensor):
    """What lies in memory from a tensor's first element on."""
    flat = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return flat.set_(tensor.untyped_storage())[tensor.storage_offset() :]


def filled(value, like):
    """``value`` as a tensor, by which eager CUDA code divides; it multiplies by the reciprocal of a Python number."""
    return torch.full_like(like, value)
