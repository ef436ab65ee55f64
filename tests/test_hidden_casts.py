"""Casts survive what Inductor does before the pass: by torch's own rule, or hidden by the guard."""

import pytest
import torch
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import joint_graph_passes
from torch._inductor.pattern_matcher import PatternMatcherPass, fwd_only, register_replacement
from torch.fx.experimental.proxy_tensor import make_fx

from fusion_pass import graph_pass, hidden_casts, inductor

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

    return decomposed(fn, torch.ones(4, dtype=first))


def decomposed(fn, x):
    return make_fx(fn, decomposition_table=select_decomp_table(), tracing_mode="fake")(x)


def casts_of(gm):
    """The dtypes that the casts of a graph cast to."""
    return [node.args[1] for node in gm.graph.nodes if node.target is torch.ops.prims.convert_element_type.default]


@pytest.mark.parametrize("dtypes", ROUNDED, ids=str)
def test_roundings_survive_the_joint_graph_passes(dtypes):
    gm = captured(*dtypes)
    graph_pass.CastGuard(("cpu",))(gm.graph)
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
    hidden_casts.hide(gm.graph, hidden_casts.roundings(gm.graph))
    assert casts_of(gm) == [dtypes[2]]
    hidden_casts.show(hidden_casts.hidden(gm.graph))
    gm.graph.lint()
    assert casts_of(gm) == list(dtypes[1:])


@pytest.mark.parametrize("dtypes", EXACT, ids=str)
def test_other_casts_are_left_to_inductor(dtypes):
    gm = captured(*dtypes)
    before = str(gm.graph)
    hidden_casts.hide(gm.graph, hidden_casts.roundings(gm.graph))
    assert str(gm.graph) == before


def by_logarithm(scale):
    return (torch.clamp(torch.ceil(torch.log2(scale)), min=-127, max=127) + 127).to(torch.uint8)


def by_bits(scale):
    bits = scale.view(I32)
    exponent = ((bits >> 23) & 0xFF) + ((bits & 0x7FFFFF) != 0).to(I32)
    return torch.clamp(exponent, 0, 254).to(torch.uint8)


@pytest.fixture(scope="module")
def rule():
    """Inductor's rule for the bytes of MX scales, which it has on CUDA alone."""
    rules = PatternMatcherPass()
    register_replacement(by_logarithm, by_bits, [torch.rand(32)], fwd_only, [rules])
    return rules


def mx_byte(x):
    return by_logarithm(x.float().abs().amax(-1, keepdim=True) / 448.0)


@pytest.mark.parametrize("guarded", [True, False])
def test_bytes_of_scales_survive_the_rule_that_replaces_logarithms(guarded, rule):
    gm = decomposed(mx_byte, torch.ones(4, 32, dtype=BF16))
    before = [node.target for node in gm.graph.nodes]
    if guarded:
        graph_pass.CastGuard(("cpu",))(gm.graph)
    assert rule.apply(gm.graph) == (0 if guarded else 1)
    graph_pass.FusionPass(("cpu",))(gm.graph)
    assert ([node.target for node in gm.graph.nodes] == before) == guarded
    # Of a subnormal scale bits give another byte.
    gm.recompile()
    x = torch.full((1, 32), 2.0**-122, dtype=BF16)
    assert torch.equal(gm(x), mx_byte(x)) == guarded


@pytest.mark.parametrize("name", ["shift", "logarithm of no amax", "a mean's byte", "another device"])
def test_which_casts_to_bytes_are_hidden(name):
    fn = {
        "shift": lambda x: by_bits(x.float().abs().amax(-1)),
        "logarithm of no amax": by_logarithm,
        "a mean's byte": lambda x: x.mean(-1).to(torch.uint8),
        "another device": mx_byte,
    }[name]
    gm = decomposed(fn, torch.ones(4, 32))
    found = hidden_casts.exponents(gm.graph, ("cuda",) if name == "another device" else ("cpu",))
    assert len(found) == (1 if name == "shift" else 0)
