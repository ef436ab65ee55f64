"""A Llama from transformers, quantized by torchao to fp8, compiled unmodified: what fuses, and that the outputs are the same.

Without a GPU the model is tiny and the real Triton kernels run in Triton's interpreter; with one, it has the shape of
Llama-3-8B's layers, and forwards are timed with and without the pass.

    python examples/llama_fp8.py [--layers 2] [--tokens 16]
"""

from __future__ import annotations

import argparse
import functools
import os
import re
import statistics
import sys
import time
import unittest.mock
import warnings
from collections.abc import Callable
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported
warnings.filterwarnings("ignore")

import torchao.quantization.quant_api as quant_api
import transformers
from torch._inductor.utils import run_and_get_code
from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow, quantize_

import fusion_pass
from fusion_pass.testing import compare

SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}


def build(device: str, layers: int) -> transformers.LlamaModel:
    """A Llama with random weights whose linear layers quantize their inputs per row at run time."""
    shape = LLAMA_8B if device == "cuda" else SMALL
    config = transformers.LlamaConfig(num_hidden_layers=layers, vocab_size=1024, **shape)
    torch.manual_seed(0)
    model = transformers.LlamaModel(config).to(device, torch.bfloat16).eval().requires_grad_(False)
    # torchao refuses fp8 on a CPU, though every operation it needs runs there.
    with (
        unittest.mock.patch.object(quant_api, "_check_hardware_support"),
        unittest.mock.patch.object(quant_api, "is_sm_at_least_89", lambda: True),
    ):
        quantize_(model, Float8DynamicActivationFloat8WeightConfig(granularity=PerRow()))
    return model


def hidden_states(model: Callable[..., Any], ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).last_hidden_state


def milliseconds(models: list[Callable[..., Any]], ids: torch.Tensor, runs: int = 30) -> list[float]:
    """The median time of one forward of each model, taken in turns."""

    def once(model: Callable[..., Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(ids)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    for model in models * 3:
        once(model)
    return [statistics.median(times) for times in zip(*([once(m) for m in models] for _ in range(runs)), strict=True)]


def graphed(model: Callable[..., Any], ids: torch.Tensor) -> Callable[..., Any]:
    """The compiled forward as a CUDA graph: what the GPU takes, without the time to launch kernels."""
    graph = torch.cuda.CUDAGraph()
    for _ in range(3):
        model(ids)
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        model(ids)
    return lambda _: graph.replay()


def show_fusions(model: torch.nn.Module, ids: torch.Tensor) -> bool:
    """Explain the model, run it fused and unfused on the eager executor, and say whether they agree."""
    report = fusion_pass.explain(hidden_states, model, ids)
    print(report)
    expected = hidden_states(model, ids)
    torch._dynamo.reset()
    fused = hidden_states(torch.compile(model, backend="fusion_pass_eager"), ids)
    result = compare(fused, expected)
    print(f"\nfused against unfused model, eager: {result}", flush=True)
    return bool(report.fused) and not any(m.kind == "quantizer" for m in report.missed) and result.equal


def launches(model: Callable[..., Any], ids: torch.Tensor) -> str:
    """What Inductor's generated code launches: Triton kernels, ours among them, and calls of other ops."""
    _, codes = run_and_get_code(model, ids)
    body = "\n".join(code[code.index("def call(") :] for code in codes)
    ours = len(re.findall(r"fused_quant_(?:split_)?kernel\w*\.run\(", body))
    return (
        f"{len(re.findall(r'[.]run[(]', body))} Triton kernels, {ours} of them fused_quant kernels, "
        f"{len(re.findall(r'extern_kernels[.]', body))} extern kernels, "
        f"{body.count('torch.ops.fusion_pass')} calls of torch.ops.fusion_pass"
    )


def show_times(model: torch.nn.Module, vocabulary: int) -> bool:
    """Time Inductor's forward with and without the pass, launched and as a CUDA graph."""
    torch._dynamo.reset()
    plain = functools.partial(hidden_states, torch.compile(model, dynamic=False))
    fused = functools.partial(hidden_states, torch.compile(model, dynamic=False, backend="fusion_pass"))
    ids = torch.randint(0, vocabulary, (1, 16), device="cuda")
    print(f"generated code without the pass: {launches(plain, ids)}")
    print(f"generated code with the pass:    {launches(fused, ids)}")
    slower = False
    for batch, length in ((1, 1), (64, 1), (2, 2048)):
        ids = torch.randint(0, vocabulary, (batch, length), device="cuda")
        launched = milliseconds([plain, fused], ids)
        replayed = milliseconds([graphed(plain, ids), graphed(fused, ids)], ids)
        for how, (before, after) in (("launched", launched), ("CUDA graph", replayed)):
            slower |= after > 1.02 * before
            print(
                f"{batch:3} x {length:4} tokens, {how:10}: {before:7.3f} ms without, {after:7.3f} ms with the pass, "
                f"{before / after:.2f}x; {after * 1e3 / (batch * length):8.2f} µs/token",
                flush=True,
            )
    return not slower


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2, help="transformer layers")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of the sequence that is compared")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build(device, arguments.layers)
    ids = torch.randint(0, model.config.vocab_size, (1, arguments.tokens), device=device)
    print(f"{arguments.layers}-layer Llama, torchao fp8 per row, on {device}\n")
    with torch.no_grad():
        good = show_fusions(model, ids)
        if device == "cuda":
            good &= show_times(model, model.config.vocab_size)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
