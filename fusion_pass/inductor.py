"""Every private API of Inductor and AOTAutograd that the package uses, in one place.

What each needs of a torch version is said here, so that a new release is checked against this file alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.pattern_matcher import stable_topological_sort
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = [
    "POST_GRAD",
    "PRE_JOINT",
    "CustomGraphPass",
    "PassChain",
    "add_pass",
    "compile_without_joint_passes",
    "fake_mode_of",
    "functional_launch",
    "has_pass",
    "launch_kernels_statically",
    "real_tensors",
    "realize_kernel_inputs",
    "remove_pass",
    "share_with_threads",
    "sort_topologically",
    "stored_number",
]

POST_GRAD = "post_grad_custom_post_pass"
PRE_JOINT = "joint_custom_pre_pass"


class PassChain(CustomGraphPass):  # type: ignore[misc]
    """Several passes in the one slot of the config; before torch 2.13 it takes no list.

    Its uuid combines those of its passes, and is None (Inductor then bypasses its cache) if any has none.
    """

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: fx.Graph) -> None:
        for graph_pass in self.passes:
            graph_pass(graph)

    def uuid(self) -> Any | None:
        uuids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return None if None in uuids else tuple(uuids)


def add_pass(slot: str, graph_pass: CustomGraphPass) -> Any:
    """Append a pass to a config slot, keeping those installed, and return what the slot held."""
    before = getattr(config, slot)
    if before is None:
        after: Any = graph_pass
    elif isinstance(before, (list, tuple)):
        after = [*before, graph_pass]
    else:
        after = PassChain([before, graph_pass])
    setattr(config, slot, after)
    return before


def has_pass(slot: str, graph_pass: CustomGraphPass) -> bool:
    current = getattr(config, slot)
    passes = current.passes if isinstance(current, PassChain) else current
    return graph_pass is current or (isinstance(passes, (list, tuple)) and graph_pass in passes)


def share_with_threads(name: str, value: Any) -> Callable[[], None]:
    """Have threads with no setting of their own see ``value``; returns what undoes that.

    From torch 2.12 on, setting a field of the config reaches the thread that does it alone. A default that someone else
    has put there is left.
    """
    entry = getattr(config, "_config", {}).get(name)
    if entry is None or not isinstance(getattr(entry, "user_override", None), ContextVar):
        return lambda: None
    before = entry.default
    if before is not None and not isinstance(before, bool):
        return lambda: None
    entry.default = value

    def undo() -> None:
        if entry.default is value:
            entry.default = before

    return undo


def remove_pass(slot: str, graph_pass: CustomGraphPass, before: Any) -> None:
    """Undo :func:`add_pass`: restore ``before``, unless others have changed the slot since; then take out ours alone."""
    current = getattr(config, slot)
    setattr(config, slot, _without(current, graph_pass, before))


def _without(current: Any, graph_pass: CustomGraphPass, before: Any) -> Any:
    if current is graph_pass:
        return before
    if isinstance(current, PassChain) and graph_pass in current.passes:
        rest = [p for p in current.passes if p is not graph_pass]
        return rest[0] if len(rest) == 1 else PassChain(rest)
    if isinstance(current, (list, tuple)) and graph_pass in current:
        rest = [p for p in current if p is not graph_pass]
        return before if isinstance(before, (list, tuple)) and rest == list(before) else type(current)(rest)
    return current


def realize_kernel_inputs(wanted: bool) -> bool:
    """Whether Inductor computes what a Triton kernel reads once, not anew for each that reads it; returns what was."""
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
    from torch._inductor.lowering import needs_realized_inputs

    kernels: Any = needs_realized_inputs
    before = triton_kernel_wrapper_mutation in kernels
    (kernels.add if wanted else kernels.discard)(triton_kernel_wrapper_mutation)
    return before


def launch_kernels_statically(wanted: bool) -> bool:
    """Whether Inductor's own fast launcher also launches users' Triton kernels; returns what the setting was.

    Without it a fused kernel costs about 5 µs more of host time than a kernel of Inductor's.
    """
    before = bool(config.static_launch_user_defined_triton_kernels)
    config.static_launch_user_defined_triton_kernels = wanted
    return before


def sort_topologically(graph: fx.Graph) -> None:
    stable_topological_sort(graph)


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | contextlib.AbstractContextManager[None]:
    """The fake mode that the graph's values belong to."""
    for node in graph.nodes:
        values = node.meta.get("val")
        for value in values if isinstance(values, (tuple, list)) else (values,):
            if isinstance(value, FakeTensor):
                return value.fake_mode
    return contextlib.nullcontext()


def real_tensors() -> contextlib.AbstractContextManager[Any]:
    """A context in which tensors are computed, even while a graph of fake ones is compiled."""
    from torch.utils._python_dispatch import _disable_current_modes

    return _disable_current_modes()  # type: ignore[no-any-return]


def stored_number(node: fx.Node) -> float | None:
    """The number in a tensor that tracing lifted out of the code, such as ``torch.tensor(1.0)``; None if it is not one."""
    stored = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(stored, torch.Tensor) or isinstance(stored, FakeTensor) or stored.numel() != 1:
        return None
    with real_tensors():
        return float(stored)


def compile_without_joint_passes(
    gm: fx.GraphModule, inputs: Sequence[Any], compiler: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
) -> Callable[..., Any]:
    """AOTAutograd with Inductor's decompositions, each resulting graph given to ``compiler``: no codegen."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    def boxed(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._functorch._aot_autograd.utils import make_boxed_func

        return make_boxed_func(compiler(graph, example_inputs))  # type: ignore[no-any-return]

    backend = aot_autograd(
        fw_compiler=boxed, bw_compiler=boxed, inference_compiler=boxed, decompositions=select_decomp_table
    )
    return backend(gm, inputs)  # type: ignore[no-any-return]


class _Recorder:
    """Stands for a Triton kernel while a launch is traced: keeps the grid, the options and the arguments."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, Any, dict[str, Any]]]) -> None:
        self.kernel = kernel
        self.launches = launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda **arguments: self.launches.append((self.kernel, grid, arguments))


def functional_launch(
    launch: Callable[[Callable[[Any], Any]], list[torch.Tensor]], written: Callable[[dict[str, Any]], list[str]]
) -> list[torch.Tensor]:
    """Run ``launch(wrap)`` under make_fx, so that its kernels become functional nodes; the outputs are those nodes'.

    ``launch`` allocates what its kernels write, and returns the outputs; ``written`` names the arguments that a launch
    writes. ``torch.library.wrap_triton`` would have Inductor compile the kernel once more to find out.
    """
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional

    launches: list[tuple[Any, Any, dict[str, Any]]] = []
    outputs = launch(lambda kernel: _Recorder(kernel, launches))
    # What a buffer has become: each functional node returns new ones.
    latest: dict[int, torch.Tensor] = {}
    for kernel, grid, arguments in launches:
        options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
        buffers = {name: id(arguments[name]) for name in written(arguments)}
        arguments = {name: latest.get(id(value), value) for name, value in arguments.items()}
        results = triton_kernel_wrapper_functional(
            kernel_idx=kernel_side_table.add_kernel(_with_options(kernel, **options)),
            constant_args_idx=kernel_side_table.add_constant_args({}),
            grid=[tuple(grid)],
            tma_descriptor_metadata={},
            kwargs=arguments,
            tensors_to_clone=list(buffers),
        )
        latest |= {buffer: results[name] for name, buffer in buffers.items()}
    return [latest[id(output)] for output in outputs]


@cache
def _with_options(kernel: Any, **options: int) -> Any:
    """The kernel in the form in which Inductor takes launch options: autotuned over a single configuration."""
    import triton

    return triton.autotune(configs=[triton.Config({}, **options)], key=[])(kernel)
