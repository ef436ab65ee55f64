"""Managers that take Inductor's slot for themselves in every compilation, as vLLM's and sglang's do."""

import hashlib
import json
import pickle
from copy import deepcopy

import pytest
import torch
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import fusion_pass
from fusion_pass import inductor
from fusion_pass.testing import compare

import spelled


class EnginePass(CustomGraphPass):
    """The base class that an engine requires of the passes it is given."""

    def uuid(self):
        return type(self).__qualname__

    def is_applicable_for_range(self, compile_range):
        return True


class CountCasts(EnginePass):
    """A pass of the engine's own: notes how many quantizing casts the graph has."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph):
        self.seen.append(sum(node.op == "call_function" and spelled.E4M3 in node.args for node in graph.nodes))


class Manager(CustomGraphPass):
    """Runs passes in order, cleans up after them, and makes a cache key of theirs in JSON."""

    def __init__(self, *passes):
        self.passes = []
        for graph_pass in passes:
            assert isinstance(graph_pass, EnginePass)
            self.passes.append(graph_pass)

    def __call__(self, graph):
        for graph_pass in self.passes:
            if graph_pass.is_applicable_for_range((1, 8192)):
                graph_pass(graph)
        inductor.sort_topologically(graph)
        graph.eliminate_dead_code()

    def uuid(self):
        return hashlib.sha256(json.dumps([p.uuid() for p in self.passes]).encode()).hexdigest()


class Fuse(fusion_pass.FusionPass, EnginePass):
    """What docs/serving.md tells users of vLLM to write."""


@pytest.fixture(autouse=True)
def _unregistered():
    yield
    fusion_pass.unregister()


def norm(x, w):
    return spelled.per_token(spelled.rms_norm(x, w))


def assert_eager_bits(device, **options):
    x, w = spelled.exact_rows(5, 64, device=device), torch.randn(64, device=device).to(torch.bfloat16)
    # Options hold for one compilation and hide what the config says.
    assert compare(torch.compile(norm, options=options)(x, w), norm(x, w)).equal


def test_the_pass_in_a_manager(device, fused):
    first, last = CountCasts(), CountCasts()
    fusion_pass.register((device,))
    assert_eager_bits(device, post_grad_custom_post_pass=Manager(first, Fuse((device,)), last))
    assert fused() == {"rms_norm_per_token": 1}
    assert (first.seen, last.seen) == ([1], [0])


def test_a_backend_that_compiles_each_graph_by_itself(device, fused, tmp_path):
    """As vLLM: what Dynamo captured is compiled with a config of its own, stored, and loaded again."""
    fusion_pass.register((device,))
    engine = CountCasts()
    patches = {"post_grad_custom_post_pass": Manager(engine, Fuse((device,))), "enable_auto_functionalized_v2": False}

    def backend(gm, inputs):
        options = {"config_patches": patches}
        artifact = torch._inductor.standalone_compile(gm, inputs, dynamic_shapes="from_graph", options=options)
        artifact.save(path=str(tmp_path / "artifact"), format="binary")
        return torch._inductor.CompiledArtifact.load(path=str(tmp_path / "artifact"), format="binary")

    x, w = spelled.exact_rows(5, 64, device=device), torch.randn(64, device=device).to(torch.bfloat16)
    results = torch.compile(norm, backend=backend, fullgraph=True)(x, w)
    assert compare(tuple(results), norm(x, w)).equal
    assert fused() == {"rms_norm_per_token": 1}
    assert engine.seen == [1]


def rounded(x):
    """With a cast that, before torch 2.13, the pass hides from joint-graph passes and must find again after them."""
    return (x * 2).to(torch.bfloat16).float() + 1


def test_a_manager_that_does_not_know_the_pass_replaces_it(device, fused):
    """The engine's graphs are compiled without the pass, by Inductor's rules; others fuse as before."""
    engine, x = CountCasts(), torch.randn(8, 8, device=device)
    fusion_pass.register((device,))
    with config.patch(force_disable_caches=True):
        compiled = torch.compile(rounded, options={"post_grad_custom_post_pass": Manager(engine)})
        torch.testing.assert_close(compiled(x), rounded(x), rtol=2**-7, atol=2**-7)
    assert engine.seen == [0]
    assert_eager_bits(device)
    assert fused() == {"rms_norm_per_token": 1}


@pytest.mark.parametrize("manager_first", [True, False])
def test_a_manager_in_the_process_wide_slot(manager_first, device, fused):
    """Installed before ours it keeps its place before it; assigned after ours it has the slot to itself."""
    engine = CountCasts()
    manager = Manager(engine)
    if manager_first:
        with config.patch(post_grad_custom_post_pass=manager):
            fusion_pass.register((device,))
            assert_eager_bits(device)
            fusion_pass.unregister()
            assert config.post_grad_custom_post_pass is manager
    else:
        fusion_pass.register((device,))
        with config.patch(post_grad_custom_post_pass=Manager(engine, Fuse((device,)))):
            assert_eager_bits(device)
        assert isinstance(config.post_grad_custom_post_pass, fusion_pass.FusionPass)
    assert fused() == {"rms_norm_per_token": 1}
    assert engine.seen == [1]


def test_the_pass_travels_to_worker_processes():
    """Engines copy it with their config and send it to workers; its key must survive and fit into JSON."""
    fuse = Fuse(("cuda",))
    copies = [deepcopy(fuse), pickle.loads(pickle.dumps(fuse))]
    assert [json.dumps(copy.uuid()) for copy in copies] == [json.dumps(fuse.uuid())] * 2
    assert isinstance(fuse, EnginePass)
    assert Manager(fuse).uuid() != Manager(Fuse(("cpu",))).uuid()
