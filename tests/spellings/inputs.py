"""Small inputs, on which sums of squares of a row are exact in float32 unless said otherwise."""

import torch

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def _integers(shape, dtype, device):
    return torch.randint(-15, 16, shape, device=device).to(dtype)


def _weight(size, dtype, device):
    return (1 + torch.randn(size, device=device) / 8).to(dtype)


def normed(dtype=BF16, weight=None, shape=(2, 3, 256), tensors=1):
    """``tensors`` tensors of small integers, whose squares add up exactly, and a weight for their rows."""

    def inputs(device):
        rows = (_integers(shape, dtype, device) for _ in range(tensors))
        return (*rows, _weight(shape[-1], weight or dtype, device))

    return inputs


def weightless(dtype=BF16, shape=(2, 3, 256), tensors=1):
    return lambda device: tuple(_integers(shape, dtype, device) for _ in range(tensors))


def spread(dtype=BF16, shape=(6, 256), tensors=1, zero_row=False):
    """Normally distributed rows of very different magnitudes; optionally the first row is zero."""

    def inputs(device):
        magnitudes = torch.logspace(-3, 3, shape[0], device=device).reshape(-1, *[1] * (len(shape) - 1))
        rows = [torch.randn(shape, device=device) * magnitudes for _ in range(tensors)]
        if zero_row:
            for row in rows:
                row[0] = 0
        return tuple(row.to(dtype) for row in rows)

    return inputs


def halves(dtype=BF16, shape=(6, 512)):
    """One projection that holds a gate and an up value for each column."""
    return lambda device: ((torch.randn(shape, device=device) * 3).to(dtype),)


def pair(dtype=BF16, shape=(6, 256)):
    """A gate and an up tensor."""
    return lambda device: tuple((torch.randn(shape, device=device) * 3).to(dtype) for _ in range(2))


def with_scale(inputs, value=0.0625):
    """The inputs, and a calibrated scale of one value."""
    return lambda device: (*inputs(device), torch.tensor([value], device=device))


def with_weights(inputs, *shapes, dtype=BF16):
    """The inputs, and random matrices."""
    return lambda device: (*inputs(device), *(torch.randn(s, device=device).to(dtype) / 8 for s in shapes))
