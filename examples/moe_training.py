"""A training step of a mixture of experts in fp8, compiled: what fuses in its forward and in its backward graph.

Each expert's linear layer quantizes both operands of its three matrix products, by rows along the dimension that is summed
over, to e4m3fn with power-of-two multipliers: the recipe of torchao's fp8 rowwise grouped matrix multiplication (pull request
3973), in plain PyTorch. Experts choose their tokens (Zhou et al., arXiv 2202.09368), so that all have the same number. On a
GPU of sm_90 or later, ``torch._scaled_grouped_mm`` multiplies the codes; elsewhere their values are multiplied.

    python examples/moe_training.py [--steps 3]
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
warnings.filterwarnings("ignore")

from fusion_pass.backends import collecting
from fusion_pass.sites import Report
from fusion_pass.testing import compare

E4M3 = torch.float8_e4m3fn
# Numbers of tokens, of their features and the experts' own, of experts and of the tokens that each takes.
SMALL = {"tokens": 32, "dim": 64, "hidden": 128, "experts": 2, "capacity": 16}
LARGE = {"tokens": 8192, "dim": 2048, "hidden": 4096, "experts": 8, "capacity": 2048}


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """e4m3fn codes of the rows of x, and the float32 scales that give values back."""
    amax = x.abs().amax(-1, keepdim=True).to(torch.float64)
    multiplier = (448.0 / amax.clamp(min=1e-12)).to(torch.float32)
    multiplier = torch.exp2(torch.floor(torch.log2(multiplier)))
    codes = (x.to(torch.float32) * multiplier).clamp(-448.0, 448.0).to(E4M3)
    return codes, multiplier.reciprocal().squeeze(-1)


def quantized_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """(E, R, K) and (E, C, K) to (E, R, C): one product per expert, both operands quantized along K."""
    left_codes, left_scale = quantize_rows(left)
    right_codes, right_scale = quantize_rows(right)
    if left.is_cuda:
        return torch._scaled_grouped_mm(
            left_codes, right_codes.transpose(-2, -1), left_scale, right_scale, out_dtype=left.dtype
        )
    values = left_codes.float() * left_scale.unsqueeze(-1)
    others = right_codes.float() * right_scale.unsqueeze(-1)
    return torch.bmm(values, others.transpose(-2, -1)).to(left.dtype)


class ExpertLinear(torch.autograd.Function):
    """x (E, C, K) times the transposed weight (E, N, K) of each expert."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return quantized_product(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        by_column = grad.transpose(1, 2).contiguous()
        return (
            quantized_product(grad.contiguous(), weight.transpose(1, 2).contiguous()),
            quantized_product(by_column, x.transpose(1, 2).contiguous()),
        )


class MixtureOfExperts(torch.nn.Module):
    """Gated experts, each of which takes the ``capacity`` tokens that its router scores highest."""

    def __init__(self, dim: int, hidden: int, experts: int, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.router = torch.nn.Linear(dim, experts, bias=False)
        self.gate, self.up = (torch.nn.Parameter(torch.randn(experts, hidden, dim) / dim**0.5) for _ in range(2))
        self.down = torch.nn.Parameter(torch.randn(experts, dim, hidden) / hidden**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, dim) tokens to (T, dim)."""
        weights, chosen = self.router(x).softmax(-1).t().topk(self.capacity)
        taken = x[chosen]
        hidden = F.silu(ExpertLinear.apply(taken, self.gate)) * ExpertLinear.apply(taken, self.up)
        result = ExpertLinear.apply(hidden, self.down) * weights.unsqueeze(-1)
        return torch.zeros_like(x).index_put((chosen,), result, accumulate=True)


def build(device: str, tokens: int, **sizes: int) -> tuple[MixtureOfExperts, torch.Tensor, torch.Tensor]:
    """A mixture in bfloat16 with random weights, tokens, and what they should become."""
    torch.manual_seed(0)
    moe = MixtureOfExperts(**sizes).to(device, torch.bfloat16)
    x, target = (torch.randn(tokens, sizes["dim"], device=device).bfloat16() for _ in range(2))
    return moe, x.requires_grad_(), target


def loss_of(forward: Callable[..., torch.Tensor], x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(forward(x).float(), target.float())


def loss_and_gradients(
    moe: MixtureOfExperts, forward: Callable[..., torch.Tensor], x: torch.Tensor, target: torch.Tensor
) -> list[torch.Tensor]:
    """The loss of one step, and the gradients of x and of every parameter."""
    loss = loss_of(forward, x, target)
    return [loss.detach(), *torch.autograd.grad(loss, [x, *moe.parameters()])]


def fused_step(
    moe: MixtureOfExperts, x: torch.Tensor, target: torch.Tensor
) -> tuple[list[torch.Tensor], Report, Report]:
    """The loss and gradients of the fused mixture; what the pass finds in its forward and in its backward graph."""
    graphs: list[Report] = []

    class PerGraph(Report):
        def extend(self, other: Report) -> None:
            graphs.append(other)

    compiled = torch.compile(moe, backend=collecting(PerGraph()), dynamic=False, fullgraph=True)
    results = loss_and_gradients(moe, compiled, x, target)
    forward, backward = graphs
    return results, forward, backward


def unfused_step(moe: MixtureOfExperts, x: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
    """The loss and gradients of the same graphs without the pass: what a compiler decomposes differs from eager's."""
    compiled = torch.compile(moe, backend=collecting(Report(), devices=()), dynamic=False, fullgraph=True)
    return loss_and_gradients(moe, compiled, x, target)


def train(moe: MixtureOfExperts, x: torch.Tensor, target: torch.Tensor, steps: int) -> list[float]:
    """The losses of some steps of gradient descent on the compiled, fused mixture."""
    compiled = torch.compile(moe, backend="fusion_pass_eager", dynamic=False)
    optimizer = torch.optim.SGD(moe.parameters(), lr=1.0)
    losses = []
    for _ in range(steps):
        loss = loss_of(compiled, x, target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def milliseconds(step: Callable[[], Any], runs: int = 20) -> float:
    """The median time of a step on the GPU."""

    def once() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    for _ in range(3):
        once()
    return statistics.median(once() for _ in range(runs))


def show_times() -> None:
    """Time a training step compiled by Inductor, with and without the pass."""
    moe, x, target = build("cuda", **LARGE)
    for name, backend in (("torch.compile", "inductor"), ("with the pass", "fusion_pass")):
        torch._dynamo.reset()
        compiled = torch.compile(moe, backend=backend, dynamic=False)
        elapsed = milliseconds(lambda forward=compiled: loss_and_gradients(moe, forward, x, target))
        print(f"{name:14}: {elapsed:7.3f} ms a step of {LARGE['tokens']} tokens", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="training steps")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    moe, x, target = build(device, **SMALL)
    fused, forward, backward = fused_step(moe, x, target)
    print(f"forward:\n{forward}\n\nbackward:\n{backward}\n")
    torch._dynamo.reset()
    result = compare(fused, unfused_step(moe, x, target))
    print(f"loss and gradients, fused against unfused graphs: {result}")
    print(f"loss and gradients, fused against eager code: {compare(fused, loss_and_gradients(moe, moe, x, target))}")
    torch._dynamo.reset()
    print("losses:", *(f"{loss:.4f}" for loss in train(moe, x, target, arguments.steps)))
    if device == "cuda":
        show_times()
    missed = any(m.kind == "quantizer" for report in (forward, backward) for m in report.missed)
    return 0 if result.equal and forward.fused and backward.fused and not missed else 1


if __name__ == "__main__":
    sys.exit(main())
