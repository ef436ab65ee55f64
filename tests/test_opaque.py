"""Norms, activations and quantizers that are registered custom ops: what fuses, with which bits, and what is left."""

import itertools

import pytest
import torch
from fusion_pass.patterns import op_table
from torch._inductor import config as inductor_config

import fusion_pass
from fusion_pass import graph_pass, inductor
from fusion_pass.backends import collecting
from fusion_pass.sites import Report
from fusion_pass.specs import Activation, GatedActivation, Mean, Quantizer, RMSNorm, ScaleLayout, ScaleRule, Weight
from fusion_pass.testing import compare

import opaque_ops as ops
import spelled

BF16 = torch.bfloat16


@pytest.fixture(params=[True, False], ids=["v2", "v1"])
def form(request):
    """Both forms in which the compiler makes ops functional; vLLM compiles with the older."""
    with inductor_config.patch(enable_auto_functionalized_v2=request.param):
        yield request.param


@pytest.fixture
def tensors(device):
    x, r = (spelled.exact_rows(8, 256, device=device) for _ in range(2))
    return x, r, torch.randn(256, device=device).to(BF16)


def fuse(fn, *args, dynamic=False):
    """The report on fn and the comparison of the rewritten graph's results, and of what it did to args, with eager's."""
    report, eager = Report(), [a.clone() for a in args]
    torch._dynamo.reset()
    if dynamic:
        torch._dynamo.mark_dynamic(args[0], 0)
    fused = torch.compile(fn, backend=collecting(report), fullgraph=True)(*args)
    expected = fn(*eager)
    for actual, wanted in zip(leaves(fused), leaves(expected), strict=True):
        assert actual.stride() == wanted.stride()
    return report, compare((fused, args), (expected, tuple(eager)))


def leaves(tree):
    return torch.utils._pytree.tree_leaves(tree)


def names(report):
    return sorted(site.name for site in report.fused)


def add_then(quantize):
    def fn(x, r, w):
        y, total = ops.add_rms_norm(x, r, w)
        return quantize(y), total

    return fn


FAMILIES = {
    "rms_norm_per_token": lambda x, r, w: ops.per_token(ops.rms_norm(x, w)),
    "rms_norm_per_group_128": lambda x, r, w: ops.per_group(ops.rms_norm(x, w)),
    "rms_norm_per_group_64_ue8m0": lambda x, r, w: ops.per_group(ops.rms_norm(x, w), 64, ue8m0=True),
    "rms_norm_per_group_128_column": lambda x, r, w: ops.per_group(ops.rms_norm(x, w), layout="column"),
    "add_rms_norm_per_token": add_then(ops.per_token),
    "add_rms_norm_per_group_64_column": add_then(lambda y: ops.per_group(y, 64, "strided")),
    "add_rms_norm_per_group_128_column": add_then(lambda y: ops.per_group(y, layout="sliced")),
    "silu_mul_per_token": lambda x, r, w: ops.per_token(ops.silu_and_mul(torch.cat([x, r], -1))),
    "silu_mul_per_group_128": lambda x, r, w: ops.per_group(ops.silu_and_mul(torch.cat([x, r], -1))),
    "gelu_tanh_mul_per_token": lambda x, r, w: ops.per_token(ops.gelu_tanh_and_mul(torch.cat([x, r], -1))),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_producer_op_fuses_with_a_quantizer_op(name, tensors, form):
    report, result = fuse(FAMILIES[name], *tensors)
    assert names(report) == [name]
    assert not report.missed
    assert report.eligible == 1
    assert result.equal, result


SGL = {
    "rms_norm_per_token": lambda x, r, w: ops.sgl_token(ops.sgl_norm(x, w)),
    "gemma_rms_norm_per_group_128": lambda x, r, w: ops.sgl_group(ops.sgl_norm(x, w, gemma=True)),
    "add_rms_norm_per_group_128_column": lambda x, r, w: ops.sgl_group(ops.sgl_add_norm(x, r, w)[0], layout="column"),
    "silu_mul_per_token": lambda x, r, w: ops.sgl_token(ops.sgl_silu_mul(torch.cat([x, r], -1))),
}


@pytest.mark.parametrize("name", SGL)
def test_sglang(name, tensors):
    report, result = fuse(SGL[name], *tensors)
    assert names(report) == [name]
    assert result.equal, result


def test_the_sum_of_sglang_is_read_unrounded_and_stored_rounded(tensors):
    def fn(x, r, w):
        y, total = ops.sgl_add_norm(x, r, w)
        return ops.sgl_token(y), total

    x, r, w = tensors
    report, result = fuse(fn, x + 0.37, r, w)
    (site,) = report.fused
    assert (site.prologue.residual_sum, site.spec.sum_output) == (torch.float32, BF16)
    # The order of summation is the kernel's: here sums of squares are not exact.
    assert result.different <= 0.01 * result.elements, result


IR = {
    "rms_norm_per_token": lambda x, r, w: ops.per_token(torch.ops.vllm_ir.rms_norm(x, w, 1e-6)),
    "rms_norm_per_group_128": lambda x, r, w: spelled.per_group(torch.ops.vllm_ir.rms_norm(x, None, 1e-6), 128),
    "add_rms_norm_per_token": lambda x, r, w: (lambda y, total: (spelled.per_token(y), ops.per_token(y), total))(
        *torch.ops.vllm_ir.fused_add_rms_norm(x, r, w, 1e-6)
    ),
}


@pytest.mark.parametrize("name", IR)
def test_norms_of_vllms_ir(name, tensors):
    report, result = fuse(IR[name], *tensors)
    assert names(report) == [name]
    assert not report.missed
    assert result.equal, result


def test_the_sum_of_vllms_ir_is_read_unrounded(tensors):
    def fn(x, r, w):
        y, total = torch.ops.vllm_ir.fused_add_rms_norm(x, r, w, 1e-6)
        return ops.per_token(y), total

    x, r, w = tensors
    report, result = fuse(fn, x + 0.37, r, w)
    assert report.fused[0].prologue.residual_sum is torch.float32
    # The order of summation is the kernel's: here sums of squares are not exact.
    assert result.different <= 0.01 * result.elements, result


@pytest.mark.parametrize(("kind", "mean"), [("cpu", Mean.DIVIDE), ("cuda", Mean.RECIPROCAL)])
def test_the_mean_of_vllms_ir_is_that_of_pytorch_on_the_device(kind, mean):
    tensors = torch.randn(4, 256, dtype=BF16), torch.randn(4, 256, dtype=BF16), torch.randn(256, dtype=BF16)
    (site,) = fusion_pass.explain(IR["rms_norm_per_token"], *tensors, device=kind).fused
    assert site.prologue.mean is mean


def test_a_norm_of_vllms_ir_over_a_part_of_its_rows_is_left_alone(tensors):
    report, result = fuse(lambda x, r, w: ops.per_token(torch.ops.vllm_ir.rms_norm(x, w, 1e-6, 128)), *tensors)
    assert not report.fused
    assert any("first 128 values" in miss.reason for miss in report.missed)
    assert result.equal, result


MIXED = {
    "rms_norm_per_token": lambda x, r, w: spelled.per_token(ops.rms_norm(x, w)),
    "silu_mul_per_group_128": lambda x, r, w: ops.per_group(spelled.silu_mul(x, r)),
    "add_rms_norm_per_token": lambda x, r, w: (ops.per_token(spelled.rms_norm(x + r, w)), x + r),
    "add_rms_norm_per_group_128": lambda x, r, w: ops.per_group(ops.rms_norm(x + r, w)),
    "silu_mul_per_token": lambda x, r, w: spelled.per_token(ops.silu_and_mul(torch.cat([x, r], -1)).view(-1, 256)),
    "rms_norm_per_group_128_column": lambda x, r, w: spelled.column(*ops.per_group(ops.rms_norm(x, w))),
}


@pytest.mark.parametrize("name", MIXED)
def test_ops_and_aten_code_fuse_with_each_other(name, tensors):
    report, result = fuse(MIXED[name], *tensors)
    assert names(report) == [name]
    assert not report.missed
    assert result.equal, result


def test_up_before_gate(device):
    def fn(x):
        out = torch.empty((x.shape[0], 128), dtype=x.dtype, device=x.device)
        torch.ops._C.mul_and_silu(out, x)
        return ops.per_token(out)

    report, result = fuse(fn, torch.randn(8, 256, device=device).to(BF16))
    assert names(report) == ["silu_mul_per_token"]
    assert result.equal, result


def test_tensors_changed_in_place_get_the_new_sum(tensors, form):
    """As vLLM's layers: the residual stream is one buffer, which the graph was given."""

    def fn(x, r, w):
        torch.ops._C.fused_add_rms_norm(x, r, w, 1e-6)
        codes = ops.per_token(x)
        torch.ops._C.fused_add_rms_norm(x, r, w, 1e-6)
        return codes, ops.per_group(x)

    report, result = fuse(fn, *tensors)
    assert names(report) == ["add_rms_norm_per_group_128", "add_rms_norm_per_token"]
    assert [site.extras for site in report.fused] == [("sum", "value")] * 2
    assert result.equal, result


def test_a_value_quantized_for_several_projections_is_quantized_once(tensors, form):
    def qkv(x, r, w):
        y, total = ops.add_rms_norm(x, r, w)
        return ops.per_token(y), ops.per_token(y), ops.per_token(y), total

    report, result = fuse(qkv, *tensors)
    assert [(s.name, s.shared_by) for s in report.fused] == [("add_rms_norm_per_token", 3)]
    assert report.eligible == 3
    assert result.equal


def test_one_norm_two_quantizers_and_a_router(tensors):
    def fn(x, r, w):
        y = ops.rms_norm(x, w)
        return ops.per_token(y), ops.per_group(y, 64), spelled.per_group(y, 32), y.sum(-1)

    report, result = fuse(fn, *tensors)
    # The second op would quantize the value in one kernel anyway, and stays.
    assert names(report) == ["quant_per_group_32", "rms_norm_per_token"]
    assert report.fused[0].extras == ("value",)
    assert report.eligible == 2
    assert result.equal


def test_no_op_of_a_fused_site_is_left(tensors, form):
    graphs = []

    def fn(x, r, w):
        y, total = ops.add_rms_norm(x, r, w)
        return ops.per_token(y), ops.per_group(ops.silu_and_mul(total)), total

    def compiler(gm, _):
        graph_pass.run(gm.graph, ("cpu", "cuda"))
        graphs.append(gm.graph)
        return gm.forward

    torch.compile(fn, backend=lambda gm, i: inductor.compile_without_joint_passes(gm, i, compiler))(*tensors)
    called = {str(n.target) for n in graphs[0].nodes if n.op == "call_function"}
    assert not [name for name in called if "auto_functionalized" in name or "empty" in name], called


@pytest.mark.parametrize("layout", ["row", "column"])
def test_dynamic_rows(layout, tensors):
    def fn(x, w):
        y, total = ops.add_rms_norm(x, x * 2, w)
        return ops.per_group(y, layout=layout), ops.per_token(ops.silu_and_mul(total)), total

    report, result = fuse(fn, tensors[0], tensors[2], dynamic=True)
    column = "_column" if layout == "column" else ""
    assert names(report) == [f"add_rms_norm_per_group_128{column}", "silu_mul_per_token"]
    assert result.equal, result


@pytest.mark.parametrize("layout", ["row", "column"])
def test_three_dimensions(layout, tensors):
    def fn(x, r, w):
        y, total = ops.add_rms_norm(x.view(2, 4, 256), r.view(2, 4, 256), w)
        return ops.per_group(y, layout=layout), ops.per_group(ops.rms_norm(total, w).view(-1, 256), 64, layout)

    report, result = fuse(fn, *tensors)
    assert len(report.fused) == 2
    assert {site.scale_layout is ScaleLayout.COLUMN for site in report.fused} == {layout == "column"}
    assert result.equal, result


def test_buffers_that_are_views(tensors, form):
    """A buffer flattened or reshaped before the call is the whole buffer still."""

    def fn(x, r, w):
        out = torch.empty(8 * 256, dtype=x.dtype, device=x.device)
        torch.ops._C.rms_norm(out.view(8, 256), x, w, 1e-6)
        codes = torch.empty((4, 2, 256), dtype=ops.E4M3, device=x.device)
        scale = torch.empty(8, dtype=torch.float32, device=x.device)
        y = out.view(8, 256)
        torch.ops._C.dynamic_per_token_scaled_fp8_quant(codes.view(8, 256), y, scale.view(8, 1), None)
        return codes, scale

    report, result = fuse(fn, *tensors)
    assert names(report) == ["rms_norm_per_token"]
    assert result.equal, result


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_buffer_that_is_changed_through_a_view(dynamic, tensors):
    def fn(x, w):
        stream, total = (x * 1).flatten(), x * 2
        torch.ops._C.fused_add_rms_norm(stream.view(x.shape), total, w, 1e-6)
        return ops.per_token(stream.view(x.shape)), total, stream.float()

    report, result = fuse(fn, tensors[0], tensors[2], dynamic=dynamic)
    assert names(report) == ["add_rms_norm_per_token"]
    assert report.fused[0].extras == ("sum", "value")
    assert result.equal, result


def test_a_report_for_a_device_that_is_not_there(tensors):
    report = fusion_pass.explain(FAMILIES["add_rms_norm_per_token"], *tensors, device="cuda")
    assert names(report) == ["add_rms_norm_per_token"]


def test_random_data_and_zero_rows(device):
    x, r = (torch.randn(16, 512, device=device).to(BF16) for _ in range(2))
    x[3], r[3] = 0, 0
    w = torch.randn(512, device=device).to(BF16)
    report, result = fuse(FAMILIES["silu_mul_per_group_128"], x, r, w)
    assert result.equal, result
    report, result = fuse(FAMILIES["add_rms_norm_per_token"], x, r, w)
    assert names(report) == ["add_rms_norm_per_token"]
    assert result.different <= 1e-3 * result.elements, result


def into_a_slice(x, r, w):
    out = x.new_zeros(2, 8, 256)
    torch.ops._C.rms_norm(out[0], x, w, 1e-6)
    return ops.per_token(out[0]), out


def into_a_part(x, r, w):
    out = r.clone()
    torch.ops._C.rms_norm(out[:4], x[:4], w, 1e-6)
    return ops.per_token(out)


def into_columns(x, r, w):
    out = torch.empty(8, 512, dtype=x.dtype, device=x.device)
    torch.ops._C.rms_norm(out[:, :256], x, w, 1e-6)
    return ops.per_token(out[:, :256].contiguous()), out[:, :256]


def padded_scales(x, r, w):
    return ops.per_group(ops.rms_norm(x[:7], w), layout="sliced")


def strided_padded_scales(x, r, w):
    return ops.per_group(ops.rms_norm(x[:7], w), layout="strided")


def scale_ub(x, r, w):
    return ops.per_token(ops.rms_norm(x, w), torch.ones(1, device=x.device))


LOOK_ALIKES = {
    "a norm that nobody quantizes": (lambda x, r, w: ops.rms_norm(x, w) * 2, None),
    "an unknown producer": (lambda x, r, w: ops.per_token(x * r), None),
    "a graph input": (lambda x, r, w: ops.per_group(x), None),
    "an operation in between": (lambda x, r, w: ops.per_token(ops.rms_norm(x, w) + r), None),
    "rows of heads under tokens": (lambda x, r, w: ops.per_token(ops.rms_norm(x, w).view(4, 512)), "do not divide"),
    "a bound on the scales": (scale_ub, "scale_ub"),
    "another clamp": (lambda x, r, w: ops.per_group(ops.rms_norm(x, w), bound=240.0), "clamps to"),
    "a weight of another dtype": (lambda x, r, w: ops.per_token(ops.rms_norm(x, w.float())), "not of one float dtype"),
    "a slice of a buffer": (into_a_slice, None),
    "columns of a buffer": (into_columns, None),
    "the whole of a buffer of which the norm wrote a slice": (into_a_part, "part of a larger buffer"),
    "scales of padded columns": (padded_scales, "part of a larger buffer"),
    "scales with padded strides": (strided_padded_scales, "neither in rows nor in columns"),
}


@pytest.mark.parametrize("name", LOOK_ALIKES)
def test_a_look_alike_is_left_alone(name, tensors):
    fn, reason = LOOK_ALIKES[name]
    report = Report()
    torch.compile(fn, backend=collecting(report, strict=True), dynamic=False)(*tensors)
    assert not report.fused
    assert report.eligible == 0
    assert reason is None or reason in report.missed[0].reason, report
    assert reason is not None or not report.missed


def test_an_installed_op_of_another_schema_is_left_with_a_reason(tensors):
    def fn(x, r, w):
        y = ops.rms_norm(x, w)
        codes, scale = torch.empty_like(y, dtype=ops.E4M3), ops.group_scales(y, 128, "row")
        torch.ops.sgl_kernel.sgl_per_token_group_quant_8bit(y, codes, scale, 128, 1e-10, -448, 448, False, True)
        return codes, scale

    report = Report()
    torch.compile(fn, backend=collecting(report))(*tensors)
    assert not report.fused
    assert "bool more" in report.missed[0].reason


@pytest.fixture
def table():
    """The table, as it was after the test."""
    before = dict(op_table._TABLE)
    yield op_table._TABLE
    op_table._TABLE.clear()
    op_table._TABLE.update(before)


_counter = itertools.count()


def library(schema, implementation, fake):
    """An op of a user's library, under a name that no other test has."""
    full = f"fusion_pass_tests::{schema.replace('(', f'_{next(_counter)}(', 1)}"
    ops.define(full, implementation, fake)
    return full, getattr(torch.ops.fusion_pass_tests, full.split("::")[1].split("(")[0])


def functional_norm():
    return library(
        "norm(Tensor x, Tensor weight, float eps=1e-6) -> Tensor",
        lambda x, w, eps=1e-6: ops.normalized(x, w, eps, twice=False),
        lambda x, w, eps=1e-6: torch.empty_like(x),
    )


def functional_quant():
    def quantize(x, group):
        return tuple(t.contiguous() for t in spelled.per_group(x, group))

    def fake(x, group):
        return torch.empty_like(x, dtype=ops.E4M3), x.new_empty(
            (*x.shape[:-1], x.shape[-1] // group), dtype=torch.float32
        )

    return library("quant(Tensor x, int group) -> (Tensor, Tensor)", quantize, fake)


def test_a_user_adds_an_op_with_one_call(tensors, table):
    schema, norm = functional_norm()
    report, _ = fuse(lambda x, r, w: spelled.per_token(norm(x, w)), *tensors)
    assert names(report) == ["quant_per_token"]

    fusion_pass.register_op(
        schema, lambda x, weight, eps: RMSNorm(eps, product=x.dtype), x="x", weight="weight", value=0
    )
    report, result = fuse(lambda x, r, w: spelled.per_token(norm(x, w)), *tensors)
    assert names(report) == ["rms_norm_per_token"]
    assert report.fused[0].prologue.eps == 1e-6
    assert result.equal

    fusion_pass.unregister_op(schema.split("(")[0])
    report, _ = fuse(lambda x, r, w: spelled.per_token(norm(x, w)), *tensors)
    assert names(report) == ["quant_per_token"]


def test_a_functional_quantizer(tensors, table, device):
    schema, quant = functional_quant()
    # Eager code divides amax by a Python number: on a GPU that multiplies by its reciprocal.
    rule = ScaleRule.RECIPROCAL if device == "cuda" else ScaleRule.DIVIDE
    fusion_pass.register_op(
        schema,
        lambda x, group: Quantizer.dynamic(group=group, amax_floor=1e-10, scale_rule=rule),
        x="x",
        codes=0,
        scale=1,
    )
    report, result = fuse(lambda x, r, w: (quant(spelled.rms_norm(x, w), 64), quant(r, 64)), *tensors)
    assert names(report) == ["rms_norm_per_group_64"]
    assert result.equal


def test_buffers_of_more_rows_than_the_op_writes(tensors, table):
    """Padded to a number of tokens: the rest must keep what it held."""

    def norm(out, x, weight):
        out[: x.shape[0]].copy_(ops.normalized(x, weight, 1e-6, twice=False))

    def quant(codes, scale, x):
        q, s = spelled.per_token(x)
        codes[: x.shape[0]].copy_(q)
        scale[: x.shape[0]].copy_(s)

    norm_schema, norm_op = library("norm(Tensor! out, Tensor x, Tensor weight) -> ()", norm, None)
    quant_schema, quant_op = library("quant(Tensor! codes, Tensor! scale, Tensor x) -> ()", quant, None)
    spec = RMSNorm(1e-6, product=BF16)
    fusion_pass.register_op(norm_schema, lambda x, weight: spec, x="x", weight="weight", value="out")
    fusion_pass.register_op(quant_schema, lambda x: Quantizer.dynamic(), x="x", codes="codes", scale="scale")

    def padded_norm(x, r, w):
        out = r.clone()
        norm_op(out, x[:5], w)
        return spelled.per_token(out)

    def padded_codes(x, r, w):
        codes, scale = torch.zeros(8, 256, device=x.device).to(ops.E4M3), torch.ones(8, 1, device=x.device)
        quant_op(codes, scale, ops.rms_norm(x[:5], w))
        return codes, scale

    for fn, fused in ((padded_norm, ["quant_per_token"]), (padded_codes, [])):
        report, result = fuse(fn, *tensors)
        assert names(report) == fused
        assert len(report.missed) == 1
        assert result.equal


def test_a_spec_can_refuse(tensors, table):
    schema, norm = functional_norm()
    fusion_pass.register_op(
        schema,
        lambda x, weight, eps: "only large eps" if eps < 1 else RMSNorm(eps, product=x.dtype),
        x="x",
        weight="weight",
        value=0,
    )
    report, result = fuse(lambda x, r, w: spelled.per_token(norm(x, w)), *tensors)
    assert names(report) == ["quant_per_token"]
    assert "only large eps" in report.missed[0].reason
    assert result.equal


@pytest.mark.parametrize(
    ("describe", "reason"),
    [
        (lambda x, weight, eps: None, "its spec function returned None"),
        (lambda x, weight, eps: 1 / 0, "its spec function raised ZeroDivisionError"),
        (lambda x, weight, eps: RMSNorm(eps, product=x.dtype, gate=Activation.SILU), "multiplies by a gate"),
    ],
)
def test_a_spec_that_is_wrong_leaves_its_call_alone(describe, reason, tensors, table):
    schema, norm = functional_norm()
    fusion_pass.register_op(schema, describe, x="x", weight="weight", value=0)
    report, result = fuse(lambda x, r, w: spelled.per_token(norm(x, w)), *tensors)
    assert names(report) == ["quant_per_token"]
    assert reason in report.missed[0].reason
    assert result.equal


@pytest.mark.parametrize(
    ("schema", "parts", "message"),
    [
        ("mylib::f(", {"x": "x", "value": 0}, "schema"),
        ("mylib::f(Tensor x) -> Tensor", {"x": "y", "value": 0}, "x is 'y'"),
        ("mylib::f(Tensor x) -> Tensor", {"x": "x", "value": 1}, "value is 1"),
        ("mylib::f(Tensor x, Tensor out) -> ()", {"x": "x", "value": "out"}, "value is 'out'"),
        ("mylib::f(Tensor x) -> Tensor", {"x": "x"}, "the parts are x"),
        ("mylib::f(Tensor x) -> Tensor", {"gate": "x", "value": 0}, "the parts are gate, value"),
        ("mylib::f(Tensor x, Tensor! r) -> Tensor", {"x": "x", "value": 0}, "no part names r"),
        ("mylib::f(Tensor x, int flag) -> Tensor", {"x": "x", "value": 0}, "does not take"),
    ],
)
def test_what_cannot_be_registered(schema, parts, message, table):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        fusion_pass.register_op(schema, lambda x: GatedActivation(), **parts)
    with pytest.raises(ValueError, match="mylib::f"):
        fusion_pass.unregister_op("mylib::f")


def entry(name, *words):
    (found,) = (e for e in op_table._TABLE[name] if all(word in str(e.schema) for word in words))
    return found


def test_an_optional_weight():
    """vLLM's newer schema: one rounding, and a norm without a weight."""
    norm = entry("_C::rms_norm", "Tensor? weight")
    x, w = torch.empty(2, 256, dtype=BF16), torch.empty(256, dtype=BF16)
    spec = norm.describe(input=x, weight=w, epsilon=1e-6)
    assert (spec.weight, spec.normalized, spec.product) == (Weight.PLAIN, torch.float32, BF16)
    assert norm.describe(input=x, weight=None, epsilon=1e-6).weight is Weight.NONE
    assert entry("_C::rms_norm", "Tensor weight").describe(input=x, weight=w, epsilon=1e-6).normalized is BF16


def test_a_schema_as_torch_prints_it(tensors, table):
    """torch prints Tensor! as no parser reads it."""
    name = "_C::rms_norm"
    fusion_pass.unregister_op(name)
    fusion_pass.register_op(
        str(torch.ops._C.rms_norm.default._schema),
        lambda input, weight, epsilon: RMSNorm(epsilon, normalized=BF16, product=BF16),
        x="input",
        weight="weight",
        value="result",
    )
    report, result = fuse(FAMILIES["rms_norm_per_token"], *tensors)
    assert names(report) == ["rms_norm_per_token"]
    assert result.equal


def test_the_table_is_part_of_the_cache_key(table):
    registered = graph_pass.FusionPass(("cpu",), strict=False)
    before = registered.uuid()
    for eps in (1e-6, 1e-5):
        fusion_pass.register_op(
            "mylib::f(Tensor x) -> Tensor", lambda x, eps=eps: RMSNorm(eps, product=x.dtype), x="x", value=0
        )
        assert registered.uuid() not in (None, before)
        assert registered.uuid() == registered.uuid()
        before = registered.uuid()
    # What has no source file could change without notice: then Inductor's cache is bypassed.
    fusion_pass.register_op("mylib::f(Tensor x) -> Tensor", eval("lambda x: None"), x="x", value=0)
    assert registered.uuid() is None


def test_inductor(tensors, form):
    """Ops that fuse, ops that stay, and a residual stream that is changed where it is."""

    def fn(x, r, w):
        torch.ops._C.fused_add_rms_norm(x, r, w, 1e-6)
        codes, scale = ops.per_group(x, layout="column")
        return codes, scale, ops.per_token(ops.silu_and_mul(r)), ops.rms_norm(r, w) * 2, ops.per_token(r * 2)

    eager = [t.clone() for t in tensors]
    torch._dynamo.utils.counters.clear()
    with fusion_pass.enabled(("cpu", "cuda")), inductor_config.patch(force_disable_caches=True):
        actual = torch.compile(fn, dynamic=False)(*tensors)
    counted = torch._dynamo.utils.counters["fusion_pass"]
    assert counted["add_rms_norm_per_group_128_column"] == counted["silu_mul_per_token"] == 1
    assert counted["fused"] == 2
    result = compare((actual, tensors), (fn(*eager), tuple(eager)))
    assert result.equal, result
