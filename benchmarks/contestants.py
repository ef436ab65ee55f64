"""What is timed for each cell: the pass, ``torch.compile`` without it, eager code, bare traffic, others' kernels."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import config

import fusion_pass

from cases import Case

OURS, DEFAULT, TUNED, EAGER, BARE = "ours", "compile", "compile-tuned", "eager", "bare"
COMPILED = (OURS, DEFAULT, TUNED)

Inputs = tuple[torch.Tensor, ...]


def compiled(name: str, case: Case, inputs: Inputs, any_rows: bool = False) -> Callable[..., Any]:
    """The case compiled for the inputs as contestant ``name`` of COMPILED has it, ready to be called.

    With ``any_rows`` it is compiled for the inputs' number of rows and for any other.

    What it returns lasts until the next call of this function: the compiler's caches are emptied first, for one function
    compiled in two ways is one entry there.

    On a CPU nothing is generated: the pass's rewritten graph is run node by node, and so is the plain one.
    """
    torch._dynamo.reset()
    dynamic = None if any_rows else False
    if any_rows:
        for matrix in (t for t in inputs if t.dim() == 2):
            torch._dynamo.mark_dynamic(matrix, 0)
    if inputs[0].device.type != "cuda":
        fn = torch.compile(case.run, backend="fusion_pass_eager" if name == OURS else "aot_eager", dynamic=dynamic)
        fn(*inputs)
        return fn
    fn = torch.compile(case.run, dynamic=dynamic)

    def run(*arguments: torch.Tensor) -> Any:
        # Code for any number of rows is compiled anew for one.
        with _compiling(name):
            return fn(*arguments)

    run(*inputs)
    return run


def _compiling(name: str) -> contextlib.AbstractContextManager[Any]:
    """What a contestant of COMPILED is compiled under."""
    if name == OURS:
        return fusion_pass.enabled(strict=True)
    # Found anew in each process: what another process found while the GPU was shared is not to be trusted. By default,
    # too, Inductor times a few configurations of some kernels.
    return config.patch(coordinate_descent_tuning=name == TUNED, autotune_local_cache=False)


def _torchao_rows() -> Callable[..., Any]:
    quantize = importlib.import_module("torchao.kernel.blockwise_quantization").fp8_blockwise_act_quant
    return lambda x, *_: quantize(x, 128)


def _torchao_columns() -> Callable[..., Any]:
    kernels = importlib.import_module("torchao.prototype.blockwise_fp8_training.kernels")
    return lambda x, *_: kernels.triton_fp8_blockwise_act_quant_lhs(x, 128)


def _torchao_mx() -> Callable[..., Any]:
    kernels = importlib.import_module("torchao.prototype.mx_formats.kernels")
    return lambda x, *_: kernels.triton_to_mxfp8_dim0(x, 32, "rceil")


def _torchao_mx_both() -> Callable[..., Any]:
    kernels = importlib.import_module("torchao.prototype.mx_formats.kernels")
    return lambda x, *_: (kernels.triton_to_mxfp8_dim0(x, 32, "rceil"), kernels.triton_to_mxfp8_dim1(x, 32, "rceil"))


def _sglang_rows() -> Callable[..., Any]:
    kernels = importlib.import_module("sglang.srt.layers.quantization.fp8_kernel")
    return lambda x, *_: kernels.per_token_group_quant_fp8(x, 128)


def _sglang_columns() -> Callable[..., Any]:
    kernels = importlib.import_module("sglang.srt.layers.quantization.fp8_kernel")
    return lambda x, *_: kernels.per_token_group_quant_fp8(x, 128, column_major_scales=True)


# By site: kernels of other libraries for the same inputs and outputs. Their arithmetic may differ from the eager code's.
_RIVALS: dict[str, dict[str, Callable[[], Callable[..., Any]]]] = {
    "none -> group": {"torchao": _torchao_rows, "sglang": _sglang_rows},
    "none -> group-column": {"torchao": _torchao_columns, "sglang": _sglang_columns},
    "none -> mxfp8": {"torchao": _torchao_mx},
    "none -> mxfp8-both": {"torchao": _torchao_mx_both},
}


def rivals(case: Case, inputs: Inputs) -> dict[str, Callable[..., Any]]:
    """The kernels of installed libraries that compute this site here, by library."""
    found = {}
    for library, load in _RIVALS.get(case.name, {}).items():
        try:
            kernel = load()
            kernel(*inputs)
        except Exception:  # Not installed, or no kernel for this GPU: each library raises what it likes.
            continue
        found[library] = kernel
    return found
