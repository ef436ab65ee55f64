"""Have Inductor's scheduler count a launch as the nodes that it replaced.

Inductor writes by one kernel what several nodes compute of the same inputs, unless they are more than 64 nodes apart in the
graph's order: all those results live from then on. One launch in the place of what q, k and v each quantize brings the layers
nearer to each other, 28 instead of 39 nodes in a Llama of torchao's fp8, and the attention masks of three of its layers, not of
two, were held at once. So the nodes keep the distances they would have without the pass.
"""

from __future__ import annotations

from torch import fx

from .sites import FusedSite
from .specs import RMSNorm

_KEY = "fusion_pass_replaced"


def note(site: FusedSite, allocation: fx.Node) -> None:
    """Record on the allocation of the codes how many fewer nodes the scheduler has for site."""
    allocation.meta[_KEY] = max(0, _nodes_replaced(site) - _nodes_of_launch(site))


def noted(node: fx.Node) -> int:
    """How many fewer nodes the scheduler has for the site whose codes node allocates; 0 for any other node."""
    return node.meta.get(_KEY, 0)  # type: ignore[no-any-return]


def _nodes_replaced(site: FusedSite) -> int:
    """What Inductor makes of the site: each reduction, and each result that is stored, once for every cast it serves."""
    quantizer = (site.scale is not None) + site.quantizer.needs_amax + 1
    return site.shared_by * quantizer + isinstance(site.prologue, RMSNorm) + len(site.extras)


def _nodes_of_launch(site: FusedSite) -> int:
    """The kernel, and each allocation."""
    assert site.op is not None
    return 1 + len(site.op.meta["val"])
