"""The models that are timed whole: an fp8 Llama, block-scaled fp8 layers as DeepSeek-V3 has them, a step that trains a MoE."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

_EXAMPLES = Path(__file__).parent.parent / "examples"
E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Workload:
    """Something to compile and to run.

    Attributes:
        subject: the function or module that is compiled.
        step: runs what was compiled, once, and returns its results.
        layers: among how many layers its kernels are counted.
        note: what the reader must know of it.
        trains: whether a step takes gradients.
    """

    subject: Callable[..., Any]
    step: Callable[[Callable[..., Any]], Any]
    layers: int
    note: str = ""
    trains: bool = False


def _example(name: str) -> Any:
    if str(_EXAMPLES) not in sys.path:
        sys.path.append(str(_EXAMPLES))
    return importlib.import_module(name)


@functools.cache
def _llama_model(device: str, layers: int) -> torch.nn.Module:
    # Random weights of billions of bytes are drawn where they stay.
    with torch.device(device):
        return _example("llama_fp8").build(device, layers)


def llama(device: str, layers: int, batch: int, length: int) -> Workload:
    """transformers' Llama with the shape of Llama-3-8B and random weights, quantized by torchao per row.

    A decoding step is one token per sequence without a cache: attention over cached keys, which the pass leaves as it is
    and which would take the same time with and without, is left out.
    """
    model = _llama_model(device, layers)
    ids = torch.randint(0, model.config.vocab_size, (batch, length), device=device)
    return Workload(model, lambda forward: forward(ids, use_cache=False).last_hidden_state, layers)


class BlockScaledLinear(torch.nn.Module):
    """A linear layer whose weight has a scale per 128 x 128 block, and whose input one per row and 128 values.

    Scales of the input lie column by column, as cuBLAS reads them.
    """

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        weight = torch.randn(outputs, features) / features**0.5
        blocks = weight.view(outputs // 128, 128, features // 128, 128)
        scale = blocks.abs().amax((1, 3)).clamp(min=1e-10) / 448.0
        codes = (blocks / scale[:, None, :, None]).clamp(-448, 448).to(E4M3).view(outputs, features)
        self.register_buffer("weight", codes)
        self.register_buffer("scale", scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(M, features) bfloat16 to (M, outputs) bfloat16."""
        grouped = x.unflatten(-1, (-1, 128)).float()
        scale = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
        codes = (grouped / scale).clamp(-448, 448).to(E4M3).flatten(-2)
        columns = scale.squeeze(-1).t().contiguous().t()
        return block_scaled_product(codes, columns, self.weight, self.scale)


# An op of its own, as engines have them: Dynamo of torch 2.11 cannot trace the block-scaled scaled_mm, and would break the graph.
@torch.library.custom_op("fusion_pass_benchmarks::block_scaled_product", mutates_args=())
def block_scaled_product(
    codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor
) -> torch.Tensor:
    """(M, K) codes with (M, K / 128) scales, times (N, K) codes with (N / 128, K / 128) scales: (M, N) bfloat16."""
    if has_block_scaled_mm(codes.device.type):
        kind = F.ScalingType
        return F.scaled_mm(codes, weight.t(), scale, kind.BlockWise1x128, weight_scale.t(), kind.BlockWise128x128)
    values = codes.unflatten(-1, (-1, 128)).bfloat16() * scale.bfloat16().unsqueeze(-1)
    blocks = weight.unflatten(0, (-1, 128)).unflatten(-1, (-1, 128)).bfloat16()
    others = blocks * weight_scale.bfloat16()[:, None, :, None]
    return values.flatten(-2) @ others.flatten(2).flatten(0, 1).t()


@block_scaled_product.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, weight_scale: torch.Tensor) -> torch.Tensor:
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=torch.bfloat16)


@functools.cache
def has_block_scaled_mm(device: str) -> bool:
    """Whether this device multiplies block-scaled fp8 matrices: sm_90 with the cuBLAS of CUDA 12.9 or later."""
    if device != "cuda" or not hasattr(F, "scaled_mm"):
        return False
    codes, scale = torch.ones(512, 512, device=device).to(E4M3), torch.ones(4, 512, device=device).t()
    kind = F.ScalingType
    try:
        blocks = torch.ones(4, 4, device=device)
        F.scaled_mm(codes, codes.t(), scale, kind.BlockWise1x128, blocks.t(), kind.BlockWise128x128)
    except (RuntimeError, NotImplementedError, ValueError):
        return False
    return True


class BlockScaledLayer(torch.nn.Module):
    """The projections of attention, and the MLP, with their norms and residuals."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norms = torch.nn.ParameterList(torch.ones(width) for _ in range(2))
        self.query, self.output = BlockScaledLinear(width, width), BlockScaledLinear(width, width)
        self.gate, self.up = BlockScaledLinear(width, hidden), BlockScaledLinear(width, hidden)
        self.down = BlockScaledLinear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.output(self.query(_rms_norm(x, self.norms[0])))
        y = _rms_norm(x, self.norms[1])
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@functools.cache
def _block_scaled_layers(device: str, layers: int) -> torch.nn.Module:
    width, hidden = (7168, 18432) if device == "cuda" else (256, 512)
    torch.manual_seed(0)
    with torch.device(device):
        stack = torch.nn.Sequential(*(BlockScaledLayer(width, hidden) for _ in range(layers)))
    for layer in stack:
        # The scales stay float32.
        layer.norms.bfloat16()
    return stack.requires_grad_(False)


def block_scaled(device: str, layers: int, tokens: int) -> Workload:
    """Layers of the width of DeepSeek-V3's, scaled by 1 x 128 and 128 x 128 blocks; attention itself is left out."""
    model = _block_scaled_layers(device, layers)
    width = model[0].norms[0].numel()
    x = torch.randn(tokens, width, device=device).bfloat16()
    note = "" if has_block_scaled_mm(device) else "products of dequantized values: no block-scaled scaled_mm here"
    return Workload(model, lambda forward: forward(x), layers, note)


def moe_training(device: str, layers: int) -> Workload:
    """Loss and gradients of one mixture of experts whose products quantize by rows, forward and backward.

    Raises:
        ModuleNotFoundError: there is no examples/moe_training.py.
    """
    example = _example("moe_training")
    with torch.device(device):
        moe, x, target = example.build(device, **(example.LARGE if device == "cuda" else example.SMALL))
    return Workload(moe, lambda forward: example.loss_and_gradients(moe, forward, x, target), 1, trains=True)


def workloads(device: str) -> dict[str, Callable[[str, int], Workload]]:
    """Every workload by name: what makes it, given the device and the number of layers."""
    prefill, sequences, few, many = (8192, 8, 32, 256) if device == "cuda" else (4, 2, 2, 3)
    return {
        f"llama prefill {prefill}": lambda d, n: llama(d, n, 1, prefill),
        # As many tokens, but attention over fewer: what serves many short requests.
        f"llama prefill {sequences} x {prefill // sequences}": lambda d, n: llama(
            d, n, sequences, prefill // sequences
        ),
        "llama decode 1": lambda d, n: llama(d, n, 1, 1),
        f"llama decode {few}": lambda d, n: llama(d, n, few, 1),
        f"llama decode {many}": lambda d, n: llama(d, n, many, 1),
        f"block-scaled {few}": lambda d, n: block_scaled(d, n, few),
        f"block-scaled {many}": lambda d, n: block_scaled(d, n, many),
        f"block-scaled {prefill}": lambda d, n: block_scaled(d, n, prefill),
        "moe training": moe_training,
    }
