"""Other custom passes beside ours: all run, in the order of their installation."""

import pytest
import torch
from torch._inductor import custom_graph_pass

import fusion_pass
from fusion_pass import inductor
from fusion_pass.testing import compare

import spelled


def quantizing_casts(graph):
    return [node for node in graph.nodes if node.op == "call_function" and spelled.E4M3 in node.args]


class Recording(custom_graph_pass.CustomGraphPass):
    """Notes how many quantizing casts it sees."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph):
        self.seen.append(len(quantizing_casts(graph)))

    def uuid(self):
        return "recording"


@pytest.fixture(autouse=True)
def _unregistered():
    yield
    fusion_pass.unregister()


def norm(x, w):
    return spelled.per_token(spelled.rms_norm(x, w))


def compile_and_compare(device):
    x, w = spelled.exact_rows(5, 64, device=device), torch.randn(64, device=device).to(torch.bfloat16)
    assert compare(torch.compile(norm)(x, w), norm(x, w)).equal


@pytest.mark.parametrize("slot", [inductor.POST_GRAD, "post_grad_custom_pre_pass"])
def test_passes_before_and_after_ours(slot, device, fused):
    first, last = Recording(), Recording()
    installed = inductor.add_pass(slot, first)
    fusion_pass.register((device,), strict=True)
    after = inductor.add_pass(inductor.POST_GRAD, last)
    compile_and_compare(device)
    inductor.remove_pass(inductor.POST_GRAD, last, after)
    fusion_pass.unregister()
    inductor.remove_pass(slot, first, installed)
    assert (first.seen, last.seen) == ([1], [0])
    assert fused() == {"rms_norm_per_token": 1}
    assert getattr(torch._inductor.config, slot) is None


def test_a_pass_of_the_joint_graph_runs_before_ours(device, fused):
    joint = Recording()
    installed = inductor.add_pass(inductor.PRE_JOINT, joint)
    fusion_pass.register((device,), strict=True)
    compile_and_compare(device)
    fusion_pass.unregister()
    inductor.remove_pass(inductor.PRE_JOINT, joint, installed)
    assert joint.seen == [1]
    assert fused() == {"rms_norm_per_token": 1}


def test_a_pass_without_a_uuid_only_bypasses_the_cache(device, fused):
    calls = []
    with torch._inductor.config.patch(inductor.POST_GRAD, calls.append):
        fusion_pass.register((device,), strict=True)
        compile_and_compare(device)
        torch._dynamo.reset()
        compile_and_compare(device)
        fusion_pass.unregister()
    assert len(calls) == 2
    assert fused() == {"rms_norm_per_token": 2}


@pytest.mark.skipif(
    not hasattr(custom_graph_pass, "CustomInferenceAwareGraphPass"), reason="torch 2.12 and later have such passes"
)
def test_a_pass_that_is_told_of_inference(device, fused):
    told = []

    class InferenceAware(custom_graph_pass.CustomInferenceAwareGraphPass):
        def __call__(self, graph, is_inference):
            told.append(is_inference)

        def uuid(self):
            return "inference aware"

    with torch._inductor.config.patch(inductor.POST_GRAD, InferenceAware()):
        fusion_pass.register((device,), strict=True)
        compile_and_compare(device)
        fusion_pass.unregister()
    assert told == [True]
    assert fused() == {"rms_norm_per_token": 1}
