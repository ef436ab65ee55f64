"""Make constants of the floats that a kernel needs as numbers, where Dynamo has made them inputs of the graph.

Under ``torch.compile(dynamic=True)``, or where layers that share their code differ in it, a norm's eps is such an input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import fx

from .failures import contained, during
from .inductor import FloatInput, float_inputs, request_constants
from .plan import plan
from .sites import FusedSite


def specialize(graph: fx.Graph, devices: Collection[str], *, strict: bool) -> None:
    """Have Dynamo capture the graph anew if more of it fuses with some of its floats as constants.

    Called before Inductor compiles the graph. Other values of these floats are then other graphs, told by Dynamo's guards.
    """
    restart = None
    with contained(graph, strict=strict), during("make constants"):
        inputs = float_inputs(graph)
        if inputs and (needed := list(_needed(graph, devices, inputs))):
            restart = request_constants(needed)
    if restart is not None:
        raise restart


def _needed(graph: fx.Graph, devices: Collection[str], inputs: dict[fx.Node, FloatInput]) -> Iterator[FloatInput]:
    """The floats that sites read which there are only if all floats are constants."""
    without, _ = plan(graph, devices)
    known = set(map(_identity, without.fused))
    sites, _ = plan(graph, devices, {node: number.value for node, number in inputs.items()})
    gained = {node for site in sites.fused if _identity(site) not in known for node in site.nodes}
    return (number for node, number in inputs.items() if any(reader in gained for reader in _readers(node)))


def _identity(site: FusedSite) -> tuple[str, frozenset[fx.Node]]:
    return site.name, frozenset(site.nodes)


def _readers(number: fx.Node) -> Iterator[fx.Node]:
    """What computes with a number, or with numbers made of it."""
    for user in number.users:
        yield user
        value = user.meta.get("val")
        if getattr(value, "ndim", None) == 0:
            yield from _readers(user)
