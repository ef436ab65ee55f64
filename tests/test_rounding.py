"""Roundings survive Inductor's joint-graph passes: by torch's own rule, or hidden by the guard."""

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_pass import graph_pass, inductor, rounding

BF16, F16, F32, F64, I32 = torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int32
# Casts that round, each followed by one that widens.
ROUNDED = [(F32, BF16, F32), (F32, F16, F32), (F16, BF16, F32), (F64, BF16, F32), (F64, F32, F64), (I32, BF16, F32)]
# Casts that hold all that they cast, or are not widened again.
EXACT = [(BF16, F32, F64), (F32, F64, F32), (F32, BF16, BF16), (BF16, F16, BF16)]


def captured(first, *casts):
    """The graph, as Inductor decomposes it, of casting to each dtype in turn."""

    def fn(x):
        x = x + 1
        for dtype in casts:
            x = x.to(dtype)
        return x + 1

    x = torch.ones(4, dtype=first)
    return make_fx(fn, decomposition_table=select_decomp_table(), tracing_mode="fake")(x)


def casts_of(gm):
    """The dtypes that the casts of a graph cast to."""
    return [node.args[1] for node in gm.graph.nodes if node.target is torch.ops.prims.convert_element_type.default]


@pytest.mark.parametrize("dtypes", ROUNDED, ids=str)
def test_roundings_survive_the_joint_graph_passes(dtypes):
    gm = captured(*dtypes)
    graph_pass.RoundingGuard(("cpu",))(gm.graph)
    joint_graph_passes(gm)
    graph_pass.FusionPass(("cpu",))(gm.graph)
    gm.graph.lint()
    assert casts_of(gm) == list(dtypes[1:])


@pytest.mark.parametrize("dtypes", ROUNDED, ids=str)
def test_the_guard_is_there_where_torch_drops_roundings(dtypes):
    gm = captured(*dtypes)
    joint_graph_passes(gm)
    assert (casts_of(gm) == list(dtypes[1:])) == inductor.KEEPS_ROUNDINGS


@pytest.mark.parametrize("dtypes", ROUNDED, ids=str)
def test_what_is_hidden_is_shown_again(dtypes):
    gm = captured(*dtypes)
    rounding.hide(gm.graph)
    assert casts_of(gm) == [dtypes[2]]
    rounding.show(gm.graph)
    gm.graph.lint()
    assert casts_of(gm) == list(dtypes[1:])


@pytest.mark.parametrize("dtypes", EXACT, ids=str)
def test_other_casts_are_left_to_inductor(dtypes):
    gm = captured(*dtypes)
    before = str(gm.graph)
    rounding.hide(gm.graph)
    assert str(gm.graph) == before
