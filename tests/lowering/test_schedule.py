"""What Inductor's scheduler sees of a pretended CUDA graph, with the pass and without: no GPU is needed."""

from types import SimpleNamespace

import pytest
import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._dynamo.exc import BackendCompilerFailed
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor import compile_fx, config, ir, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from triton.backends.compiler import GPUTarget

import fusion_pass
from fusion_pass import inductor
from fusion_pass.fake_device import relabelled

import cases
import spelled

BF16 = torch.bfloat16
FIND_ACCESSES = next(name for name in inductor._FIND_ACCESSES if hasattr(triton_kernel_wrap, name))
GPU = SimpleNamespace(
    name="pretended",
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
    total_memory=1 << 37,
)


class Scheduled(Exception):  # noqa: N818
    """Raised when the scheduler's nodes are known: no kernel is generated."""


@pytest.fixture
def _pretended_gpu(monkeypatch):
    answers = {
        "get_device_properties": GPU,
        "current_device": 0,
        "device_count": 1,
        "get_compute_capability": 90,
        "is_available": True,
        "is_triton_capable": True,
        "raise_if_triton_unavailable": None,
    }
    for name, answer in answers.items():
        if hasattr(CudaInterface, name):
            monkeypatch.setattr(CudaInterface, name, staticmethod(lambda *_, answer=answer: answer))
    # What an earlier test found is cached.
    monkeypatch.setattr(scheduler, "has_triton", lambda: True, raising=False)
    monkeypatch.setattr(CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: GPU))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))


def scheduled(fn, *tensors):
    """The nodes that Inductor schedules for fn, were its tensors on a GPU, in order, before they are fused."""
    found = []

    def stop(nodes):
        found.extend(nodes)
        raise Scheduled

    def compiler(gm, _):
        on_gpu = relabelled(gm, torch.device("cuda", 0))
        mode = inductor.fake_mode_of(on_gpu.graph)
        inputs = [node.meta["val"] for node in on_gpu.graph.nodes if node.op == "placeholder"]
        with V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
            compile_fx._recursive_post_grad_passes(on_gpu, is_inference=True)
            graph = GraphLowering(on_gpu, example_inputs=inputs, shape_env=mode.shape_env, is_inference=True)
            with V.set_graph_handler(graph):
                graph.run(*inputs)
                graph._update_scheduler()

    before = inductor.add_pass(inductor.SCHEDULE, stop)
    torch._dynamo.reset()
    with config.patch(force_disable_caches=True), pytest.raises(BackendCompilerFailed) as stopped:
        torch.compile(fn, backend=lambda gm, i: inductor.compile_without_joint_passes(gm, i, compiler))(*tensors)
    inductor.remove_pass(inductor.SCHEDULE, stop, before)
    if not isinstance(stopped.value.inner_exception, Scheduled):
        raise stopped.value.inner_exception
    return found


def layers(x, norms, weights, scales):
    """Each quantizes its norm three times over, as torchao's linear layers of one input do, and adds to the residual."""
    for norm in norms:
        y = spelled.rms_norm(x, norm)
        for weight in weights:
            codes, scale = spelled.per_token(y)
            x = x + torch._scaled_mm(codes, weight.t(), scale.reshape(-1, 1), scales, out_dtype=BF16)
    return x


@pytest.mark.usefixtures("_pretended_gpu")
def test_layers_are_as_far_apart_as_without_the_pass():
    width = 64
    x = torch.randn(32, width).to(BF16)
    norms = [torch.ones(width, dtype=BF16) for _ in range(4)]
    weights = [torch.ones(width, width).to(spelled.E4M3) for _ in range(3)]
    given = (x, norms, weights, torch.ones(1, width))
    plain = scheduled(layers, *given)
    with fusion_pass.enabled(strict=True):
        fused = scheduled(layers, *given)
    products = [
        [node.max_order for node in nodes if type(node.node).__name__ == "ExternKernelOut"] for nodes in (plain, fused)
    ]
    assert len(products[0]) == len(products[1]) == 12
    assert len(fused) <= len(plain) - 4 * 5
    spans = [orders[-1] - orders[0] for orders in products]
    assert abs(spans[0] - spans[1]) <= 4, products


@pytest.fixture
def _pretended_triton(_pretended_gpu, monkeypatch):
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


@pytest.mark.usefixtures("_pretended_triton")
@pytest.mark.parametrize("mark", [torch._dynamo.mark_dynamic, torch._dynamo.decorators.mark_unbacked])
@pytest.mark.parametrize(
    "fn",
    [
        cases.per_token,
        cases.per_group_column,
        cases.per_group_tma,
        cases.mxfp8_blocked,
        cases.mxfp8_both,
        cases.mxfp4_both,
    ],
)
def test_launches_of_an_unknown_number_of_rows_take_no_other_kernel(fn, mark):
    """Nothing is computed for them: memory is what they are handed, and their scales lie where they are wanted."""
    x = torch.randn(160, 768).to(BF16)
    mark(x, 0)
    with fusion_pass.enabled(strict=True):
        nodes = [node.node for node in scheduled(lambda x: fn(x, None), x)]
    assert sum(isinstance(node, ir.UserDefinedTritonKernel) for node in nodes) == 1
    computed = [node for node in nodes if isinstance(node, ir.ComputedBuffer)]
    assert len(computed) == len(fn(x, None))
    assert all(set(buffer.data.ranges) == {0} for buffer in computed), computed


def written_names(accesses):
    """By torch's analysis, which tells the arguments that are written, and in newer versions what is read as well."""
    return set(accesses) if isinstance(accesses, list) else {write.name for write in accesses.read_writes.writes}


@pytest.mark.usefixtures("_pretended_triton")
def test_what_a_kernel_writes_is_found_once_for_like_layers(monkeypatch):
    compiled, original = [], triton_kernel_wrap.generate_ttir
    monkeypatch.setattr(triton_kernel_wrap, "generate_ttir", lambda *given: compiled.append(given) or original(*given))
    width = 64
    weights = [torch.ones(width, width).to(spelled.E4M3) for _ in range(3)]
    for depth in (2, 6):
        compiled.clear()
        given = torch.randn(32, width).to(BF16), [torch.ones(width, dtype=BF16)] * depth, weights, torch.ones(1, width)
        with fusion_pass.enabled(strict=True):
            scheduled(layers, *given)
            found = [written_names(accesses) for accesses in getattr(triton_kernel_wrap, FIND_ACCESSES).found.values()]
        # The first norm has no residual.
        assert len(compiled) == 2
        assert found == [{"code_ptr", "scale_ptr"}, {"code_ptr", "scale_ptr", "sum_ptr"}]


def test_torch_finds_accesses_itself_after_registration():
    before = getattr(triton_kernel_wrap, FIND_ACCESSES)
    with fusion_pass.enabled():
        assert getattr(triton_kernel_wrap, FIND_ACCESSES) is not before
    assert getattr(triton_kernel_wrap, FIND_ACCESSES) is before
