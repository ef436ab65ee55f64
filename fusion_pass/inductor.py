"""Every private API of torch that the package uses, in one place: Inductor's, AOTAutograd's, Dynamo's and the tracer's.

What each needs of a torch version is said here, so that a new release is checked against this file alone. What a version
lacks is named by :class:`UnsupportedTorchError`.
"""

from __future__ import annotations

import bisect
import contextlib
import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx


class UnsupportedTorchError(RuntimeError):
    """The installed torch lacks something private that the package uses."""

    def __init__(self, lacking: object) -> None:
        super().__init__(
            f"fusion_pass is tested with torch 2.11 to 2.15; the installed torch {torch.__version__} lacks what it uses: {lacking}"
        )


try:
    from torch._C import parse_schema
    from torch._dispatch.python import enable_python_dispatcher
    from torch._dynamo import mark_static
    from torch._dynamo.utils import counters
    from torch._inductor import config, custom_graph_pass
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from torch._inductor.pattern_matcher import stable_topological_sort
    from torch._logging._internal import trace_log, trace_structured
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        GuardOnDataDependentSymNode,
        ShapeEnv,
        StatelessSymbolicContext,
        is_concrete_int,
        statically_known_true,
    )
    from torch.fx.experimental.symbolic_shapes import guard_or_false as known
    from torch.utils._config_module import _UNSET_SENTINEL as _UNSET
    from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass
    from torch.utils._sympy.symbol import SymT, symbol_is_type
except ImportError as error:
    raise UnsupportedTorchError(error) from error

__all__ = [
    "KEEPS_ROUNDINGS",
    "POST_GRAD",
    "PRE_JOINT",
    "SCHEDULE",
    "CustomGraphPass",
    "FakeTensorMode",
    "FloatInput",
    "PassChain",
    "Previous",
    "SchedulePass",
    "UnsupportedTorchError",
    "add_pass",
    "compile_with_inductor",
    "compile_without_joint_passes",
    "counters",
    "fake_mode_of",
    "fixed_size",
    "float_inputs",
    "functional_launch",
    "is_concrete_int",
    "is_traceable_wrapper_subclass",
    "known",
    "launch_kernels_statically",
    "lies_contiguous",
    "lower_copies",
    "make_fx",
    "mark_static",
    "parse_schema",
    "real_tensors",
    "realize_kernel_inputs",
    "remember_accesses",
    "remove_pass",
    "request_constants",
    "restore_launches",
    "sort_topologically",
    "spread_schedule",
    "stored_number",
    "stored_tensor",
    "trace",
    "trace_log",
    "trace_structured",
    "without_recompile_limit",
]

POST_GRAD = "post_grad_custom_post_pass"
PRE_JOINT = "joint_custom_pre_pass"
SCHEDULE = "_pre_fusion_custom_pass"
_LOWERING = "torch._inductor.lowering"
_UNLIMITED = 10**9
_COPY = torch.ops.aten._to_copy.default
_TRITON_NODES = "torch._higher_order_ops.triton_kernel_wrap"
# By the names it has had, the newest first.
_FIND_ACCESSES = ("identify_accessed_tensors", "identify_mutated_tensors")
_KERNELS = f"{__package__}.kernels."
_STATIC_LAUNCH = "static_launch_user_defined_triton_kernels"
_STATIC_LAUNCH_VARIABLE = "TORCHINDUCTOR_STATIC_LAUNCH_USER_DEFINED_TRITON_KERNELS"


# Whether a pass slot of the config takes several passes: since torch 2.13.
_TAKES_LISTS = hasattr(custom_graph_pass, "get_custom_graph_passes")
# Whether the joint-graph passes leave a cast alone that another cast widens again: since torch 2.13.
KEEPS_ROUNDINGS: bool = torch.torch_version.TorchVersion(torch.__version__) >= "2.13"
# Passes that are told whether the graph is one of inference: since torch 2.12.
_INFERENCE_AWARE = getattr(custom_graph_pass, "CustomInferenceAwareGraphPass", None)


class PassChain(CustomGraphPass):  # type: ignore[misc]
    """Several passes in a slot of the config that takes one.

    Its uuid combines those of its passes, and is None (Inductor then bypasses its cache) if any has none.
    """

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = tuple(passes)

    def __call__(self, graph: fx.Graph, **told: bool) -> None:
        for graph_pass in self.passes:
            graph_pass(graph, **(told if _is_inference_aware(graph_pass) else {}))

    def uuid(self) -> Any | None:
        uuids = [p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes]
        return None if None in uuids else tuple(uuids)


# What may stand in the slot of the scheduler: passes of a class of their own in newer versions, of graph passes' in older.
_SCHEDULE_PASS_BASES = {getattr(custom_graph_pass, "CustomSchedulerPass", CustomGraphPass): None, CustomGraphPass: None}


class SchedulePass(*_SCHEDULE_PASS_BASES):  # type: ignore[misc]
    """A pass that takes and returns the list of the scheduler's nodes."""


class _ScheduleChain:
    """Several passes in the slot of the scheduler; a bare callable, for which Inductor bypasses its cache."""

    def __init__(self, passes: Sequence[Any]) -> None:
        self.passes = tuple(passes)

    def __call__(self, nodes: list[Any]) -> list[Any]:
        for schedule_pass in self.passes:
            nodes = schedule_pass(nodes)
        return nodes


class _CachedScheduleChain(_ScheduleChain, SchedulePass):
    """Several passes that each have a uuid."""

    def uuid(self) -> Any:
        return tuple(p.uuid() for p in self.passes)


def _together(slot: str, passes: Sequence[Any]) -> Any:
    """Several passes as an entry of the config."""
    if slot == SCHEDULE:
        cached = all(isinstance(p, SchedulePass) for p in passes)
        return (_CachedScheduleChain if cached else _ScheduleChain)(passes)
    return list(passes) if _TAKES_LISTS else _chained(passes)


def _is_inference_aware(graph_pass: Any) -> bool:
    return _INFERENCE_AWARE is not None and isinstance(graph_pass, _INFERENCE_AWARE)


def _chained(passes: Sequence[Any]) -> PassChain:
    """A chain that is told what any of its passes must be told."""
    if _INFERENCE_AWARE is None or not any(map(_is_inference_aware, passes)):
        return PassChain(passes)
    return type("InferenceAwarePassChain", (PassChain, _INFERENCE_AWARE), {})(passes)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Previous:
    """What an entry of the config was: for every thread, and as this thread had assigned it."""

    everywhere: Any
    here: Any


def _private(module: str, name: str) -> Any:
    """What torch has by that name in a module that takes long to import."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UnsupportedTorchError(f"{module}.{name}") from error


def add_pass(slot: str, graph_pass: CustomGraphPass) -> Previous:
    """Append a pass to a config slot for all threads, keeping those installed, and return what the slot held."""

    def appended(passes: Any) -> Any:
        together = [*_listed(passes), graph_pass]
        return graph_pass if len(together) == 1 else _together(slot, together)

    return _change(slot, appended)


def remove_pass(slot: str, graph_pass: CustomGraphPass, before: Previous) -> None:
    """Undo :func:`add_pass`: restore ``before``, unless others have changed the slot since; then take out ours alone."""
    entry = _entry(slot)
    everywhere = _without(slot, entry.env_value_default, graph_pass, before.everywhere)
    _write(slot, Previous(everywhere, _without(slot, _assigned(entry), graph_pass, before.here)))


def _without(slot: str, current: Any, graph_pass: CustomGraphPass, before: Any) -> Any:
    passes = _listed(current)
    if graph_pass not in passes:
        return current
    rest = [p for p in passes if p is not graph_pass]
    if rest == _listed(before):
        return before
    if isinstance(current, (list, tuple)):
        return type(current)(rest) if rest else None
    return _together(slot, rest) if len(rest) > 1 else rest[0] if rest else None


def _listed(passes: Any) -> list[Any]:
    if passes is None or passes is _UNSET:
        return []
    if isinstance(passes, (PassChain, _ScheduleChain)):
        return list(passes.passes)
    return list(passes) if isinstance(passes, (list, tuple)) else [passes]


def _change(name: str, changed: Callable[[Any], Any]) -> Previous:
    """Change an entry of Inductor's config for all threads, and return what it was.

    Since torch 2.12 an assignment is seen by its own thread alone; but worker threads compile too, and autograd's
    threads compile backward graphs. What an environment variable says is seen by all, where nothing is assigned.
    """
    entry = _entry(name)
    before = Previous(entry.env_value_default, _assigned(entry))
    # Leaving `config.patch` assigns what was there before, mostly None: that must not hide what other threads see.
    here = _UNSET if before.here is _UNSET or before.here is None else changed(before.here)
    _write(name, Previous(changed(before.everywhere), here))
    return before


def _write(name: str, value: Previous) -> None:
    _entry(name).env_value_default = value.everywhere
    # Assigned even if it is nothing: the config then knows that what it has cached is stale.
    setattr(config, name, value.here)


def _assigned(entry: Any) -> Any:
    override = entry.user_override
    return override.get() if isinstance(override, ContextVar) else override


def _entry(name: str) -> Any:
    """An entry of Inductor's config; torch 2.11 to 2.15 have all that is used of it."""
    entry = config._config.get(name)  # type: ignore[attr-defined]
    for attribute in ("user_override", "env_value_default"):
        if not hasattr(entry, attribute):
            raise UnsupportedTorchError(f"torch._inductor.config.{name} with a field {attribute}")
    return entry


def realize_kernel_inputs(wanted: bool) -> bool:
    """Whether Inductor computes what a Triton kernel reads once, not anew for each that reads it; returns what was."""
    kernels = _private(_LOWERING, "needs_realized_inputs")
    mutation = _private(_TRITON_NODES, "triton_kernel_wrapper_mutation")
    before = mutation in kernels
    (kernels.add if wanted else kernels.discard)(mutation)
    return before


def lower_copies(wanted: bool) -> bool:
    """Whether Inductor knows ``aten._to_copy`` with a dtype alone as the cast that it is; returns what was.

    It has only a decomposition, which applies before the joint graph. :mod:`fusion_pass.hidden_casts` writes that op there, and
    where another pass has taken the slot of ours, nothing rewrites it before Inductor generates code.
    """
    lowerings = _private(_LOWERING, "lowerings")
    before = _COPY in lowerings
    if wanted and not before:
        to_dtype = _private(_LOWERING, "to_dtype")
        lowerings[_COPY] = lambda x, *, dtype: to_dtype(x, dtype)
    elif not wanted:
        lowerings.pop(_COPY, None)
    return before


def remember_accesses(wanted: bool) -> bool:
    """Whether it is found once for like launches of our kernels what they read and write; returns what was.

    To find out, Inductor compiles a kernel to Triton's first representation for each launch, twice: 40 ms each time. A torch
    that has another name for that goes on doing so.
    """
    module = importlib.import_module(_TRITON_NODES)
    name = next((name for name in _FIND_ACCESSES if hasattr(module, name)), None)
    if name is None:
        return False
    current = getattr(module, name)
    before = isinstance(current, _Accesses)
    if wanted and not before:
        setattr(module, name, _Accesses(current))
    elif before and not wanted:
        setattr(module, name, current.find)
    return before


class _Accesses:
    """``find(kernel, arguments, descriptors)``, with the results for our kernels kept: they depend on no value at run time."""

    def __init__(self, find: Callable[..., Any]) -> None:
        self.find = find
        self.found: dict[Any, Any] = {}

    def __call__(self, kernel: Any, arguments: dict[str, Any], descriptors: Any) -> Any:
        # A kernel has its function as `fn`, and the autotuner around one has the kernel.
        function = getattr(kernel.fn, "fn", kernel.fn)
        if descriptors or not (getattr(function, "__module__", None) or "").startswith(_KERNELS):
            return self.find(kernel, arguments, descriptors)
        key = (function, frozenset((name, _kind(value)) for name, value in arguments.items()))
        if key not in self.found:
            self.found[key] = self.find(kernel, arguments, descriptors)
        return self.found[key]


def _kind(value: Any) -> Any:
    """What of a kernel's argument Triton compiles in: a tensor's dtype, Inductor's or torch's, or any other value."""
    if isinstance(value, torch.Tensor):
        return value.dtype
    return value.get_dtype() if hasattr(value, "get_dtype") else (type(value), str(value))


def launch_kernels_statically() -> tuple[Previous, str | None]:
    """Have Inductor's own fast launcher also launch users' Triton kernels; returns what the setting was.

    Without it a fused kernel costs about 5 µs more of host time than a kernel of Inductor's. The processes that compile decide
    how their kernels are launched, and know this process's environment when they start, not its configuration.
    """
    variable = os.environ.get(_STATIC_LAUNCH_VARIABLE)
    os.environ[_STATIC_LAUNCH_VARIABLE] = "1"
    return _change(_STATIC_LAUNCH, lambda _: True), variable


def restore_launches(before: tuple[Previous, str | None]) -> None:
    """Undo :func:`launch_kernels_statically`."""
    setting, variable = before
    _write(_STATIC_LAUNCH, setting)
    if variable is None:
        os.environ.pop(_STATIC_LAUNCH_VARIABLE, None)
    else:
        os.environ[_STATIC_LAUNCH_VARIABLE] = variable


def sort_topologically(graph: fx.Graph) -> None:
    stable_topological_sort(graph)


def spread_schedule(nodes: Sequence[Any], more: Callable[[fx.Node], int]) -> None:
    """Number the scheduler's nodes as if ``more(n)`` others followed the first that comes of the graph's node n.

    The numbers, ``min_order`` and ``max_order``, say where in the graph's order a node stood, and so how far two are apart.
    """
    # Some are groups already; a group's numbers are those of its members.
    members = sorted((member for node in nodes for member in node.get_nodes()), key=lambda member: member.min_order)
    orders = [member.min_order for member in members]
    seen: set[fx.Node] = set()
    shifts, shift = [], 0
    for member in members:
        shifts.append(shift)
        origins = set(getattr(member.node, "origins", ())) - seen
        seen |= origins
        shift += sum(map(more, origins))
    for node in {id(node): node for node in (*nodes, *members)}.values():
        for name in ("min_order", "max_order"):
            order = getattr(node, name)
            setattr(node, name, order + shifts[bisect.bisect_right(orders, order) - 1])


def fixed_size(size: Any) -> Any:
    """The number that a size is by what was checked while it was traced, without another check; else the size."""
    if not isinstance(size, torch.SymInt) or size.node.expr.is_Symbol:
        return size
    hint = size.node.hint
    return int(hint) if hint is not None and statically_known_true(size == hint) else size


def lies_contiguous(value: torch.Tensor) -> bool:
    """Whether a tensor is contiguous; what depends on sizes that are data is taken for no."""
    try:
        return value.is_contiguous()
    except GuardOnDataDependentSymNode:
        return False


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
    return _disable_current_modes()  # type: ignore[no-any-return]


def stored_tensor(node: fx.Node) -> torch.Tensor | None:
    """The tensor that tracing lifted out of the code, on a CPU; None if it is not known."""
    stored = getattr(node.graph.owning_module, str(node.target), None)
    if not isinstance(stored, torch.Tensor) or isinstance(stored, FakeTensor):
        return None
    with real_tensors():
        return stored.detach().cpu()


def stored_number(node: fx.Node) -> float | None:
    """The number in a tensor that tracing lifted out of the code, such as ``torch.tensor(1.0)``; None if it is not one.

    An exported module's buffers are in its graph, too, where the module may write to them: then they are no numbers.
    """
    stored = getattr(node.graph.owning_module, str(node.target), None)
    if any(user.target is torch.ops.aten.copy_.default and user.args[0] is node for user in node.users):
        return None
    if not isinstance(stored, torch.Tensor) or isinstance(stored, FakeTensor) or stored.numel() != 1:
        return None
    with real_tensors():
        return float(stored)


@dataclass(frozen=True)
class FloatInput:
    """A Python float that Dynamo made an input of the graph: a 0-d float64 tensor on the CPU."""

    symbol: str
    value: float


def float_inputs(graph: fx.Graph) -> dict[fx.Node, FloatInput]:
    """The floats among the inputs of a graph that Dynamo captured; none where they cannot be told from tensors.

    A graph does not say which float an input is, but Dynamo adds inputs in the order in which it names floats.
    """
    inputs = [n for n in graph.nodes if n.op == "placeholder" and _is_number(n.meta.get("val"))]
    if not inputs:
        return {}
    context = torch._guards.TracingContext.try_get()
    shape_env = getattr(getattr(context, "fake_mode", None), "shape_env", None)
    if shape_env is None:
        return {}
    is_constant = _private("torch._dynamo.symbolic_convert", "TensorifyState").should_specialize
    floats = [
        FloatInput(str(symbol), float(value))
        for symbol, value in shape_env.backed_var_to_val.items()
        if symbol_is_type(symbol, SymT.FLOAT) and not is_constant(str(symbol))
    ]
    return dict(zip(inputs, floats, strict=True)) if len(inputs) == len(floats) else {}


def _is_number(value: Any) -> bool:
    is_tensor = isinstance(value, torch.Tensor) and value.device.type == "cpu"
    return is_tensor and value.dim() == 0 and value.dtype is torch.float64


def request_constants(floats: Iterable[FloatInput]) -> Exception:
    """What to raise to have Dynamo capture the graph anew with these floats as constants, which its guards then compare.

    As for floats that become no tensors, such as sizes. It works until Inductor compiles the graph, whose own
    errors would hide the request; and no cache has stored the graph by then.
    """
    restart = _private("torch._dynamo.exc", "TensorifyScalarRestartAnalysis")()
    for needed in floats:
        _private("torch._dynamo.symbolic_convert", "TensorifyState").specialize(needed.symbol)
    return restart  # type: ignore[no-any-return]


def trace(
    fn: Callable[..., Any], args: Sequence[torch.Tensor], kept: Iterable[Any] = (), dynamic: bool = False
) -> fx.GraphModule:
    """A functional graph of ``fn``, traced without Dynamo; Inductor's decompositions apply but to the ops ``kept``.

    With ``dynamic``, sizes are symbols but for each tensor's last, since kernels take rows of a static length.
    """
    table = dict(_private("torch._inductor.decomposition", "select_decomp_table")())
    for op in kept:
        table.pop(op, None)
    functional = torch.func.functionalize(lambda *a: fn(*a))
    if dynamic:
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        with enable_python_dispatcher(), mode:
            traced = make_fx(functional, decomposition_table=table)(*(_symbolic(mode, a) for a in args))
    else:
        traced = make_fx(functional, decomposition_table=table, tracing_mode="fake")(*args)
    traced.graph.eliminate_dead_code()
    return traced  # type: ignore[no-any-return]


def _symbolic(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    sizes = [*[DimDynamic.DUCK] * (tensor.dim() - 1), DimDynamic.STATIC]
    return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))


def without_recompile_limit() -> contextlib.AbstractContextManager[Any]:
    """Dynamo traces however often a function was compiled before: beyond its limit it runs code as it is, and says nothing."""
    dynamo: Any = torch._dynamo.config  # type: ignore[attr-defined]
    return dynamo.patch(recompile_limit=_UNLIMITED, accumulated_recompile_limit=_UNLIMITED)  # type: ignore[no-any-return]


def compile_without_joint_passes(
    gm: fx.GraphModule, inputs: Sequence[Any], compiler: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
) -> Callable[..., Any]:
    """AOTAutograd with Inductor's decompositions, each resulting graph given to ``compiler``: no codegen."""
    aot_autograd = _private("torch._dynamo.backends.common", "aot_autograd")
    decompositions = _private("torch._inductor.decomposition", "select_decomp_table")
    make_boxed = _private("torch._functorch._aot_autograd.utils", "make_boxed_func")

    def boxed(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return make_boxed(compiler(graph, example_inputs))  # type: ignore[no-any-return]

    backend = aot_autograd(
        fw_compiler=boxed, bw_compiler=boxed, inference_compiler=boxed, decompositions=decompositions
    )
    return backend(gm, inputs)  # type: ignore[no-any-return]


def compile_with_inductor(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    mode: str | None,
    options: dict[str, Any] | None,
    around: contextlib.ContextDecorator,
) -> Callable[..., Any]:
    """Inductor as a backend of torch.compile with its mode and options, each graph compiled within ``around``.

    A backward graph is compiled when it first runs, long after this has returned.
    """
    compile_fx = _private("torch._inductor.compile_fx", "compile_fx")
    each_graph = around(_private("torch._inductor.compile_fx", "compile_fx_inner"))
    patches = _private("torch", "_TorchCompileInductorWrapper")(mode, options, None).config
    return compile_fx(gm, inputs, inner_compile=each_graph, config_patches=patches)  # type: ignore[no-any-return]


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
    side_table = _private(_TRITON_NODES, "kernel_side_table")
    functional = _private(_TRITON_NODES, "triton_kernel_wrapper_functional")
    launches: list[tuple[Any, Any, dict[str, Any]]] = []
    outputs = launch(lambda kernel: _Recorder(kernel, launches))
    # What a buffer has become: each functional node returns new ones.
    latest: dict[int, torch.Tensor] = {}
    for kernel, grid, arguments in launches:
        options = {name: arguments.pop(name) for name in ("num_warps", "num_stages") if name in arguments}
        buffers = {name: id(arguments[name]) for name in written(arguments)}
        arguments = {name: latest.get(id(value), value) for name, value in arguments.items()}
        results = functional(
            kernel_idx=side_table.add_kernel(_with_options(kernel, **options)),
            constant_args_idx=side_table.add_constant_args({}),
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
