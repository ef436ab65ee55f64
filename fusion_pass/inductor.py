"""Every private API of Inductor and AOTAutograd that the package uses, in one place.

What each needs of a torch version is said here, so that a new release is checked against this file alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
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
    "remove_pass",
    "sort_topologically",
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


@contextlib.contextmanager
def patched(**values: Any) -> Iterator[None]:
    with config.patch(values):
        yield


def compile_without_joint_passes(
    gm: fx.GraphModule, inputs: Sequence[Any], compiler: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
) -> Callable[..., Any]:
    """AOTAutograd with Inductor's decompositions, each resulting graph given to ``compiler``: no codegen."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.compile_fx import select_decomp_table

    def boxed(graph: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        from torch._functorch.aot_autograd import make_boxed_func

        return make_boxed_func(compiler(graph, example_inputs))  # type: ignore[no-any-return]

    backend = aot_autograd(fw_compiler=boxed, bw_compiler=boxed, inference_compiler=boxed, decompositions=select_decomp_table)
    return backend(gm, inputs)  # type: ignore[no-any-return]
