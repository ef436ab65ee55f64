"""Matching, rewriting and lowering of CUDA graphs, pretended: no GPU is needed."""

from types import SimpleNamespace

import pytest
import torch
import triton
from torch import fx
from torch._higher_order_ops import triton_kernel_wrap as wrap
from triton.backends.compiler import GPUTarget

from fusion_pass import graph_pass, inductor
from fusion_pass.fake_device import relabelled
from fusion_pass.specs import Mean

import opaque_ops
import spelled
from lowered import launches, lowered

BF16 = torch.bfloat16
TARGET = GPUTarget("cuda", 90, 32)


def calls_fusion_pass(graph):
    return any(getattr(node.target, "namespace", "") == "fusion_pass" for node in graph.nodes)


def norm(x, w):
    return spelled.per_token(spelled.rms_norm(x, w))


def add_norm(x, r, w):
    return (*spelled.column(*spelled.per_group(spelled.rms_norm(x + r, w))), x + r)


def silu(both):
    return spelled.per_group(spelled.silu_mul(*both.chunk(2, -1)))


@pytest.mark.parametrize(
    ("fn", "shapes", "outputs"),
    [
        (norm, [(8, 256), (256,)], 2),
        (add_norm, [(2, 8, 512), (2, 8, 512), (512,)], 3),
        (silu, [(8, 1024)], 2),
        (spelled.per_token, [(8, 256)], 2),
    ],
)
def test_an_op_becomes_one_kernel_launch(fn, shapes, outputs):
    report, graph = lowered(fn, *shapes)
    (launch,) = launches(graph)
    assert not calls_fusion_pass(graph)
    assert len(launch.kwargs["tensors_to_clone"]) == outputs
    assert len(report.fused) == 1


def test_a_cuda_graph_multiplies_by_reciprocals():
    report, _ = lowered(norm, (8, 256), (256,))
    assert report.fused[0].quantizer.factor.op == "mul"
    assert report.fused[0].prologue.mean is Mean.RECIPROCAL


def test_a_scale_of_the_whole_tensor_takes_two_launches():
    def per_tensor(x, w):
        y = spelled.rms_norm(x, w)
        scale = y.abs().max().float().clamp(min=1e-10) / 448.0
        return (y.float() / scale).clamp(-448.0, 448.0).to(spelled.E4M3), scale

    report, graph = lowered(per_tensor, (8, 256), (256,))
    first, second = launches(graph)
    assert [site.name for site in report.fused] == ["rms_norm_per_tensor"]
    # The first finds the amax that the second reads.
    assert first.kwargs["tensors_to_clone"] == ["amax_ptr"]
    assert second.kwargs["tensors_to_clone"] == ["code_ptr", "scale_ptr"]
    assert second.kwargs["kwargs"]["amax_ptr"].args[0] is first


def test_halves_of_one_projection_are_read_in_place():
    _, graph = lowered(silu, (8, 1024))
    arguments = launches(graph)[0].kwargs["kwargs"]
    assert arguments["x_stride"] == arguments["other_stride"] == 1024
    assert not any(node.target is torch.ops.aten.clone.default for node in graph.nodes)


@pytest.mark.parametrize("dynamic", [(), (0,)], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("parts", "stride"),
    [
        (lambda x: x.float().chunk(2, -1), 1024),
        (lambda x: x.float().split([512, 512], -1), 1024),
        (lambda x: (x.float()[:, 512:], x.float()[:, :512]), 1024),
        (lambda x: x.float().unflatten(-1, (2, 512)).unbind(1), 1024),
        (lambda x: [x.view(-1, 512).float().view(-1, 2, 512).select(1, i) for i in (0, 1)], 1024),
    ],
)
def test_parts_of_a_cast_are_read_as_parts_of_what_was_cast(parts, stride, dynamic):
    """Casting in front of a launch would be a kernel that writes, and twice the bytes for both."""
    report, graph = lowered(lambda x: spelled.per_group(spelled.silu_mul(*parts(x))), (8, 1024), dynamic=dynamic)
    arguments = launches(graph)[0].kwargs["kwargs"]
    assert report.fused[0].prologue.product is torch.float32
    for name in ("x", "other"):
        assert arguments[f"{name}_ptr"].meta["val"].dtype is torch.bfloat16
        assert arguments[f"{name}_stride"] == stride
    assert not any(node.target is torch.ops.prims.convert_element_type.default for node in graph.nodes)


@pytest.mark.parametrize(
    "part",
    [
        # Rounded; computed; of other bits.
        lambda x: x.float().half()[:, :512],
        lambda x: (x.float() + 1)[:, :512],
        lambda x: x.view(torch.float32),
    ],
)
def test_parts_of_what_is_no_exact_cast_are_read_as_they_are(part):
    _, graph = lowered(lambda x: spelled.per_group(part(x)), (8, 1024))
    assert launches(graph)[0].kwargs["kwargs"]["x_ptr"].meta["val"].dtype is part(torch.zeros(8, 1024).to(BF16)).dtype


def test_halves_that_an_op_took_whole_are_read_in_place():
    _, graph = lowered(lambda x: opaque_ops.per_group(opaque_ops.silu_and_mul(x), layout="strided"), (8, 1024))
    (launch,) = launches(graph)
    assert launch.kwargs["kwargs"]["x_stride"] == launch.kwargs["kwargs"]["other_stride"] == 1024
    assert not any("clone" in str(node.target) or "auto_functionalized" in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize("dynamic", [(), (0,)], ids=["static", "dynamic"])
def test_transposed_scales_of_flattened_heads_are_stored_by_the_kernel(dynamic):
    def heads(x):
        return spelled.column(*spelled.per_group(x.flatten(1)))

    _, graph = lowered(heads, (6, 4, 256), dynamic=dynamic)
    (launch,) = launches(graph)
    assert launch.kwargs["kwargs"]["x_stride"] == 1024
    assert not any(node.target is torch.ops.aten.clone.default for node in graph.nodes)


def test_a_buffer_that_an_op_changes_through_a_view():
    def fn(x, r, w):
        stream = x.flatten()
        torch.ops._C.fused_add_rms_norm(stream.view(8, 256), r, w, 1e-6)
        return *opaque_ops.per_token(stream.view(8, 256)), stream

    _, graph = lowered(lambda x, r, w: fn(x * 1, r * 1, w), (8, 256), (8, 256), (256,))
    assert len(launches(graph)) == 1


@pytest.mark.parametrize("mark", [torch._dynamo.mark_dynamic, torch._dynamo.decorators.mark_unbacked])
@pytest.mark.parametrize("shape", [(8, 256), (8, 6, 256)])
def test_the_number_of_rows_stays_symbolic(shape, mark):
    _, graph = lowered(norm, shape, (256,), dynamic=range(len(shape) - 1), mark=mark)
    (launch,) = launches(graph)
    rows = launch.kwargs["kwargs"]["M"]
    assert isinstance(rows, torch.fx.Node)
    assert isinstance(rows.meta["val"], torch.SymInt)


def test_equal_launches_are_traced_once(monkeypatch):
    traced = []
    real = inductor.functional_launch
    monkeypatch.setattr(inductor, "functional_launch", lambda *given: traced.append(1) or real(*given))

    def layers(x, w):
        for _ in range(4):
            codes, scale = norm(x, w)
            x = x + codes.to(BF16) * scale.to(BF16)
        return x

    report, graph = lowered(layers, (8, 256), (256,))
    assert len(launches(graph)) == len(report.fused) == 4
    # The first layer has no residual, the last sum is read by no norm.
    assert len(traced) <= 3


def test_other_devices_are_left_alone():
    def run(gm, _):
        assert not graph_pass.run(gm.graph, ("cuda",)).fused
        return gm.forward

    x, w = torch.randn(8, 256).to(BF16), torch.randn(256).to(BF16)
    torch.compile(norm, backend=lambda gm, i: inductor.compile_without_joint_passes(gm, i, run))(x, w)


def test_branches_are_lowered_like_graphs():
    found = []

    def compiler(gm, _):
        for module in gm.modules():
            if module is not gm and isinstance(module, torch.fx.GraphModule):
                graph = relabelled(module, torch.device("cuda", 0)).graph
                graph_pass.run(graph, ("cuda",), to_kernels=True)
                found.append((len(launches(graph)), calls_fusion_pass(graph)))
        return gm.forward

    def fn(x):
        return torch.cond(x.sum() > 0, spelled.per_token, lambda x: spelled.per_group(x, 64), (x,))

    x = torch.empty(8, 256, dtype=BF16)
    torch.compile(fn, backend=lambda gm, i: inductor.compile_without_joint_passes(gm, i, compiler))(x)
    assert found == [(1, False), (1, False)]


def per_tensor(x):
    scale = x.abs().amax().float().clamp(min=1e-12) / 448.0
    return (x.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


def tma(x):
    codes, scale = spelled.per_group(x)
    return codes, torch.nn.functional.pad(scale.t(), (0, -x.shape[0] % 4)).contiguous()


@pytest.mark.parametrize("fn", [per_tensor, tma, spelled.per_token, silu])
def test_inductor_lowers_what_is_left(fn):
    """No operation that only its decompositions would have taken apart, which run before the pass."""
    from torch._inductor.lowering import lowerings

    report, graph = lowered(fn, (7, 1024))
    assert len(report.fused) == 1
    for node in graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert node.target in lowerings, node


def transposed(x):
    codes = []
    for matrix in (x, x.t().contiguous()):
        blocks = matrix.float().unflatten(-1, (-1, 32))
        biased = torch.clamp((blocks.abs().amax(-1, keepdim=True).view(torch.int32) >> 23) - 8, min=1)
        scaled = (blocks / (biased << 23).view(torch.float32)).clamp(-448.0, 448.0)
        codes += [scaled.to(torch.float8_e4m3fn).flatten(-2), biased.to(torch.uint8).squeeze(-1)]
    return codes


@pytest.mark.parametrize(
    ("dynamic", "mark"),
    [((), None), ((0,), torch._dynamo.mark_dynamic), ((0,), torch._dynamo.decorators.mark_unbacked)],
    ids=["static", "dynamic", "unbacked"],
)
def test_a_matrix_and_its_transpose_are_one_launch(dynamic, mark):
    report, graph = lowered(transposed, (64, 96), dynamic=dynamic, mark=mark)
    assert [site.name for site in report.fused] == ["quant_mxfp8_both_ways"]
    assert len(launches(graph)) == 1
    assert not calls_fusion_pass(graph)
    assert not any(node.target is torch.ops.aten.clone.default for node in graph.nodes)


@pytest.mark.parametrize(
    ("fn", "shapes", "dynamic"),
    [
        (norm, [(8, 256), (256,)], ()),
        (norm, [(8, 256), (256,)], (0,)),
        (norm, [(8192, 4096), (4096,)], ()),
        (add_norm, [(8, 512), (8, 512), (512,)], ()),
        (silu, [(8, 1024)], ()),
        (silu, [(8, 1024)], (0,)),
        (per_tensor, [(7, 1024)], ()),
        (transposed, [(64, 96)], ()),
        (transposed, [(64, 96)], (0,)),
    ],
)
def test_inductor_can_analyse_the_kernel(fn, shapes, dynamic, monkeypatch):
    """It traces a kernel to learn what it writes, and would otherwise take every input for written, with a warning."""
    monkeypatch.setattr(triton.runtime.driver, "_active", SimpleNamespace(get_current_target=lambda: TARGET))
    _, graph = lowered(fn, *shapes, dynamic=dynamic)
    assert launches(graph)
    for launch in launches(graph):
        arguments = fx.node.map_arg(launch.kwargs["kwargs"], lambda node: node.meta["val"])
        written = wrap.get_mutated_tensors(
            launch.kwargs["kernel_idx"], launch.kwargs["constant_args_idx"], arguments, {}
        )
        assert sorted(written) == sorted(launch.kwargs["tensors_to_clone"])
