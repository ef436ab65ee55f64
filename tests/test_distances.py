"""Scheduler nodes keep the distances that they would have without the pass; passes of others in the same slot keep running."""

from types import SimpleNamespace

import pytest
from torch import fx
from torch._inductor import config

import fusion_pass
from fusion_pass import graph_pass, inductor


@pytest.fixture(autouse=True)
def _unregistered():
    yield
    fusion_pass.unregister()
    assert getattr(config, inductor.SCHEDULE) is None


class Scheduled:
    """A node of the scheduler, in the place ``order``, that comes of one graph node."""

    def __init__(self, order, origin):
        self.min_order = self.max_order = order
        self.node = SimpleNamespace(origins=[origin])

    def get_nodes(self):
        return [self]


class Group(SimpleNamespace):
    def get_nodes(self):
        return self.members


def scheduled(*replaced):
    """Nodes of the scheduler in order, each of one graph node that stands for so many more."""
    graph = fx.Graph()
    nodes = []
    for order, more in enumerate(replaced):
        origin = graph.placeholder(f"n{order}")
        origin.meta["fusion_pass_replaced"] = more
        nodes.append(Scheduled(order, origin))
    return nodes


def orders(nodes):
    return [(node.min_order, node.max_order) for node in nodes]


def test_nodes_behind_a_launch_move_on():
    nodes = scheduled(0, 3, 0, 2, 0)
    assert graph_pass.DistanceKeeper()(nodes) is nodes
    assert orders(nodes) == [(0, 0), (1, 1), (5, 5), (6, 6), (9, 9)]


def test_a_group_spans_what_is_between_its_members():
    first, launch, last = scheduled(0, 3, 0)
    group = Group(members=[first, last], min_order=0, max_order=2, node=None)
    graph_pass.DistanceKeeper()([group, launch])
    assert orders([group, first, launch, last]) == [(0, 5), (0, 0), (1, 1), (5, 5)]


def test_a_graph_node_of_several_scheduler_nodes_counts_once():
    nodes = scheduled(3, 0, 0)
    nodes[1].node.origins = nodes[0].node.origins
    graph_pass.DistanceKeeper()(nodes)
    assert orders(nodes) == [(0, 0), (4, 4), (5, 5)]


def test_a_scheduler_without_orders_is_left_alone():
    nodes = [SimpleNamespace(node=None)]
    with pytest.warns(fusion_pass.FusionPassWarning, match="keep distances"):
        assert graph_pass.DistanceKeeper()(nodes) is nodes
    with pytest.raises(fusion_pass.FusionPassError, match="keep distances"):
        graph_pass.DistanceKeeper(strict=True)(nodes)


class Reversing(inductor.SchedulePass):
    def __call__(self, nodes):
        return nodes[::-1]

    def uuid(self):
        return "reversing"


@pytest.mark.parametrize("cached", [True, False])
def test_a_pass_of_the_scheduler_is_kept_and_restored(cached):
    other = Reversing() if cached else lambda nodes: nodes[::-1]
    with config.patch(inductor.SCHEDULE, other):
        fusion_pass.register()
        chain, nodes = getattr(config, inductor.SCHEDULE), scheduled(3, 0)
        assert chain(nodes) == nodes[::-1]
        assert orders(nodes) == [(0, 0), (4, 4)]
        # Inductor caches what passes of its own class do, and only that.
        assert isinstance(chain, inductor.SchedulePass) == cached
        assert not cached or chain.uuid()[0] == "reversing"
        fusion_pass.unregister()
        assert getattr(config, inductor.SCHEDULE) is other


def test_a_pass_installed_after_ours_is_kept():
    fusion_pass.register()
    other = Reversing()
    before = inductor.add_pass(inductor.SCHEDULE, other)
    fusion_pass.unregister()
    assert getattr(config, inductor.SCHEDULE) is other
    inductor.remove_pass(inductor.SCHEDULE, other, before)
