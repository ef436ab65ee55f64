"""What the pass costs: its time by stage and its share of the compile time, over Llama graphs of growing depth.

    python benchmarks/compile_time.py --layers 1 8 32 80 [--inductor]

Without ``--inductor`` nothing is generated: the whole is tracing and decomposing alone (Dynamo and AOTAutograd), which makes the
share an upper bound, and graphs are read as if they were on a GPU. With it, ``torch.compile`` runs whole, caches off.
"""

from __future__ import annotations

import argparse
import time
import unittest.mock
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torchao.quantization import quant_api

import fusion_pass
from fusion_pass import fake_device, graph_pass, inductor

STAGES = ("plan", "rewrite", "lower")


def llama(layers: int, hidden: int) -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    model = transformers.LlamaModel(config).bfloat16().eval().requires_grad_(False)
    quantization = quant_api.Float8DynamicActivationFloat8WeightConfig(granularity=quant_api.PerRow())
    with (
        unittest.mock.patch.object(quant_api, "_check_hardware_support"),
        unittest.mock.patch.object(quant_api, "is_sm_at_least_89", lambda: True),
    ):
        quant_api.quantize_(model, quantization)
    return model


class Stopwatch:
    """Adds up the time spent in the stages of the pass."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys(STAGES, 0.0)
        self.sites = 0
        self.nodes = 0

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(graph: Any, *args: Any) -> Any:
            if name == "plan":
                self.nodes += len(graph.nodes)
            start = time.perf_counter()
            result = function(graph, *args)
            self.spent[name] += time.perf_counter() - start
            self.sites += len(result[0].fused) if name == "plan" else 0
            return result

        return wrapper

    def __enter__(self) -> Stopwatch:
        self.patches = [
            unittest.mock.patch.object(graph_pass, name, self.timed(name, getattr(graph_pass, name))) for name in STAGES
        ]
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        for patch in self.patches:
            patch.stop()


def traced_only(gm: Any, inputs: Any) -> Any:
    def compiler(gm: Any, _: Any) -> Any:
        graph_pass.run(fake_device.relabelled(gm, torch.device("cuda")).graph, ("cuda",), to_kernels=True)
        return gm.forward

    return inductor.compile_without_joint_passes(gm, inputs, compiler)


def measure(layers: int, hidden: int, whole: bool) -> tuple[float, Stopwatch]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = llama(layers, hidden).to(device)
    ids = torch.randint(1, 100, (1, 32), device=device)

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return model(ids, use_cache=False).last_hidden_state  # type: ignore[no-any-return]

    torch._dynamo.reset()
    torch.compiler.reset()
    with Stopwatch() as watch, torch.no_grad(), torch._inductor.config.patch(force_disable_caches=True):
        start = time.perf_counter()
        if whole:
            with fusion_pass.enabled():
                torch.compile(forward)(ids)
        else:
            torch.compile(forward, backend=traced_only)(ids)
        total = time.perf_counter() - start
    return total, watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 8, 32, 80])
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--inductor", action="store_true", help="compile to code, not only to graphs")
    arguments = parser.parse_args()
    measure(1, arguments.hidden, arguments.inductor)
    print(
        f"{'layers':>6} {'nodes':>7} {'sites':>6} {'plan':>8} {'rewrite':>8} {'lower':>8} {'pass':>8} {'compile':>9} {'share':>7}"
    )
    for layers in arguments.layers:
        total, watch = measure(layers, arguments.hidden, arguments.inductor)
        spent = sum(watch.spent.values())
        stages = " ".join(f"{1e3 * watch.spent[name]:6.1f}ms" for name in STAGES)
        print(
            f"{layers:6} {watch.nodes:7} {watch.sites:6} {stages} {1e3 * spent:6.1f}ms {total:8.2f}s {spent / total:7.2%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
