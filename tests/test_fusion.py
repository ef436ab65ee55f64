"""Unmodified code, compiled: what fuses, that it equals eager bit for bit, and what is refused."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusion_pass.backends import collecting
from fusion_pass.sites import Report
from fusion_pass.specs import NoPrologue, ScaleLayout
from fusion_pass.testing import compare

import spelled

BF16 = torch.bfloat16


def fuse(fn, *args):
    """The report on fn and the comparison of the rewritten graph's results with eager's."""
    report = Report()
    torch._dynamo.reset()
    fused = torch.compile(fn, backend=collecting(report), dynamic=False)(*args)
    return report, compare(fused, fn(*args))


def names(report):
    return sorted(site.name for site in report.fused)


@pytest.fixture
def tensors(device):
    x, r = (spelled.exact_rows(2, 6, 256, device=device) for _ in range(2))
    return x, r, torch.randn(256, device=device).to(BF16)


FAMILIES = {
    "rms_norm_per_token": lambda x, r, w: spelled.per_token(spelled.rms_norm(x, w)),
    "rms_norm_per_group_128": lambda x, r, w: spelled.per_group(spelled.rms_norm(x, w)),
    "add_rms_norm_per_token": lambda x, r, w: (*spelled.per_token(spelled.rms_norm(x + r, w)), x + r),
    "add_rms_norm_per_group_128_column": lambda x, r, w: spelled.column(*spelled.per_group(spelled.rms_norm(x + r, w))),
    "silu_mul_per_token": lambda x, r, w: spelled.per_token(spelled.silu_mul(x, r)),
    "silu_mul_per_group_128": lambda x, r, w: spelled.per_group(spelled.silu_mul(x, r)),
    "silu_mul_per_group_64_column": lambda x, r, w: spelled.column(*spelled.per_group(spelled.silu_mul(x, r), 64)),
    "quant_per_token": lambda x, r, w: spelled.per_token(x),
    "quant_per_group_32": lambda x, r, w: spelled.per_group(x, 32),
    "quant_per_group_128_column": lambda x, r, w: spelled.column(*spelled.per_group(x)),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("flat", [False, True], ids=["3-D", "2-D"])
def test_families(name, flat, tensors):
    x, r, w = tensors
    if flat:
        x, r = x.flatten(0, 1), r.flatten(0, 1)
    report, result = fuse(FAMILIES[name], x, r, w)
    assert names(report) == [name]
    assert not report.missed
    assert result.equal, result


def test_a_value_quantized_for_several_projections_is_quantized_once(tensors):
    def qkv(x, w):
        y = spelled.rms_norm(x, w)
        return spelled.per_token(y), spelled.per_token(y), spelled.per_token(y)

    report, result = fuse(qkv, tensors[0], tensors[2])
    assert [(s.name, s.shared_by) for s in report.fused] == [("rms_norm_per_token", 3)]
    assert report.eligible == 3
    assert result.equal


def test_two_quantizers_and_a_router_on_one_norm(tensors):
    def fn(x, r, w):
        y = spelled.rms_norm(x + r, w)
        return spelled.per_token(y), spelled.per_group(y, 64), y.sum(-1), x + r

    report, result = fuse(fn, *tensors)
    assert names(report) == ["add_rms_norm_per_token", "quant_per_group_64"]
    assert report.fused[0].extras == ("sum", "value")
    assert result.equal


def test_a_sum_that_one_site_returns_is_not_added_again(tensors):
    def fn(x, r, w):
        h = x + r
        return spelled.per_token(spelled.rms_norm(h, w)), spelled.per_token(spelled.rms_norm(h, w, 1e-3)), h

    report, result = fuse(fn, *tensors)
    assert names(report) == ["add_rms_norm_per_token", "rms_norm_per_token"]
    assert result.equal


def test_column_scales_of_other_rows_than_the_norm_has(tensors):
    """Batches flattened, or made, between the norm and the transposition of its scales."""
    x, _, w = tensors

    def flattened(x, w):
        return spelled.column(*spelled.per_group(spelled.rms_norm(x, w).reshape(-1, 256)))

    def batched(x, w):
        codes, scale = spelled.per_group(spelled.rms_norm(x.reshape(-1, 256), w))
        return spelled.column(codes, scale.reshape(2, 6, 2))

    for fn in (flattened, batched):
        report, result = fuse(fn, x, w)
        assert names(report) == ["rms_norm_per_group_128_column"]
        assert result.equal, result


def test_a_rounded_sum_that_is_only_read_in_another_dtype(tensors):
    """x + r rounds to bf16 before it rounds to f16."""
    x, r, w = tensors
    report, result = fuse(
        lambda x, r, w: (*spelled.per_token(spelled.rms_norm(x + r, w)), (x + r).to(torch.float16)), x * 2.03125, r, w
    )
    assert names(report) == ["add_rms_norm_per_token"]
    assert result.equal, result


def test_residual_summed_in_float32_and_stored_rounded(tensors):
    def fn(x, r, w):
        h = x.float() + r.float()
        y = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
        return spelled.per_token((y * w.float()).to(x.dtype)), h.to(x.dtype)

    report, result = fuse(fn, *tensors)
    site = report.fused[0]
    assert site.prologue.residual_sum is torch.float32
    assert site.spec.sum_output is BF16
    assert result.equal


def test_a_transposed_residual_stream(tensors):
    """Sequence-first tensors: what is only read by the site may have any strides, what others read keeps its own."""

    def fn(x, w):
        y = spelled.rms_norm(x.transpose(0, 1), w)
        return spelled.per_token(y.reshape(-1, 256))

    def also_read(x, r, w):
        h = x.transpose(0, 1) + r.transpose(0, 1)
        return *spelled.per_token(spelled.rms_norm(h, w).reshape(-1, 256)), h

    x, r, w = tensors
    report, result = fuse(fn, x, w)
    assert names(report) == ["rms_norm_per_token"]
    assert result.equal
    report, result = fuse(also_read, x, r, w)
    assert names(report) == ["quant_per_token"]
    assert "not contiguous" in report.missed[0].reason
    assert result.equal


def test_halves_of_one_projection(tensors):
    report, result = fuse(lambda gu: spelled.per_group(spelled.silu_mul(*gu.chunk(2, -1)), 64), tensors[0])
    assert names(report) == ["silu_mul_per_group_64"]
    assert result.equal


def test_scales_computed_in_bf16(tensors):
    def float8_tensor(x):
        scale = (x.abs().amax(-1, keepdim=True) / 448.0).float()
        return (x.float() / scale).clamp(-448, 448).to(spelled.E4M3), scale

    report, result = fuse(float8_tensor, tensors[0])
    assert report.fused[0].quantizer.factor.op == "bf16"
    assert result.equal


def gemma(x, w):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + w.float())).to(x.dtype)


def root_divided(x, w):
    h = x.float()
    return w * (h / torch.sqrt((h * h).sum(-1, keepdim=True) / h.shape[-1] + 1e-6)).to(x.dtype)


def root_inverted(x, w):
    h = x.float()
    return w * (h * (1.0 / torch.sqrt(1e-6 + (h**2).mean(-1, keepdim=True)))).to(x.dtype)


def root_powered(x, w):
    h = x.float()
    return w * (h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).pow(-0.5)).to(x.dtype)


def int8_absmax(x):
    scale = x.float().abs().max(dim=-1, keepdim=True).values.clamp(min=1e-5) / 127
    return (x.float() / scale).round().clamp(-128, 127).to(torch.int8), scale


def ue8m0(x):
    grouped = x.float().unflatten(-1, (-1, 128))
    scale = torch.exp2(torch.ceil(torch.log2(grouped.abs().amax(-1).clamp(1e-4) / 448.0)))
    return (grouped * (1.0 / scale.unsqueeze(-1))).to(spelled.E4M3).flatten(-2), scale


READ_ON_THE_WAY = {
    "an exponent as int32": lambda amax, biased, scale: biased,
    "float64": lambda amax, biased, scale: scale.double() * 3,
    "a mask": lambda amax, biased, scale: amax > 1.0,
    "an exponent as a byte": lambda amax, biased, scale: biased.to(torch.uint8),
    "the scale in bf16": lambda amax, biased, scale: scale.to(BF16),
    "the amax": lambda amax, biased, scale: amax,
}


@pytest.mark.parametrize("also", [None, "scale"])
@pytest.mark.parametrize("read", READ_ON_THE_WAY)
def test_what_else_is_read_between_amax_and_scale(read, also, tensors):
    """An op returns floats and bytes; of anything else the graph computes what it reads from what an op can return."""

    def fn(x, r, w):
        y = spelled.rms_norm(x, w).float()
        amax = y.abs().amax(-1, keepdim=True).clamp(min=1e-10)
        biased = (amax.view(torch.int32) >> 23) & 0xFF
        scale = (biased << 23).view(torch.float32) / 256.0
        codes = (y / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
        return codes, READ_ON_THE_WAY[read](amax, biased, scale), scale if also else 0

    report, equal = fuse(fn, *tensors)
    assert len(report.fused) == 1
    assert not any(miss.kind == "failure" for miss in report.missed), report
    assert equal.equal, equal


@pytest.mark.parametrize("rows", [6, 3])
def test_scales_are_transposed_as_one_matrix_or_several(rows, device):
    """x and its scales need not be matrices of the same rows."""

    def fn(x):
        codes, scale = spelled.per_group(x, 64)
        return codes, scale.view(-1, rows, 4).transpose(-1, -2).contiguous()

    for shape in ((2, 3, 256), (6, 256)):
        report, result = fuse(fn, torch.randn(shape, device=device).to(BF16))
        assert result.equal, result
        assert len(report.fused) == 1


SPELLINGS = {
    "gemma_rms_norm_per_token": lambda x, r, w: spelled.per_token(gemma(x, w)),
    "add_gemma_rms_norm_per_group_128": lambda x, r, w: (*spelled.per_group(gemma(x + r, w)), x + r),
    "rms_norm_per_token": lambda x, r, w: spelled.per_token(root_divided(x, w)),
    "rms_norm_per_group_64": lambda x, r, w: spelled.per_group(root_inverted(x, w), 64),
    "rms_norm_per_group_32": lambda x, r, w: spelled.per_group(root_powered(x, w), 32),
    "rms_norm_int8_per_token": lambda x, r, w: int8_absmax(spelled.rms_norm(x, w)),
    "silu_mul_per_group_128_ue8m0": lambda x, r, w: ue8m0(spelled.silu_mul(x, r)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(name, tensors):
    report, result = fuse(SPELLINGS[name], *tensors)
    assert names(report) == [name], report
    assert result.equal, result


def layer_norm(x, r, w):
    return spelled.per_token(F.layer_norm(x, (256,), w))


def amax_of_columns(x, r, w):
    scale = x.abs().amax(-2, keepdim=True).float() / 448
    return (x.float() / scale).clamp(-448, 448).to(spelled.E4M3)


def unsaturated(x, r, w):
    scale = x.abs().amax(-1, keepdim=True).float() / 300
    return (x.float() / scale).round().to(torch.int8)


def scale_of_another_tensor(x, r, w):
    scale = r.abs().amax(-1, keepdim=True).float() / 448
    return (x.float() / scale).clamp(-448, 448).to(spelled.E4M3)


def norm_of_half_a_row(x, r, w):
    y = x.float() * torch.rsqrt(x[..., :128].float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return spelled.per_token(y.to(x.dtype) * w)


def eps_beside_the_root(x, r, w):
    y = x.float() * (torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True)) + 1e-6)
    return spelled.per_token(y.to(x.dtype) * w)


def scaled(x, scale):
    return (x.float() / scale).clamp(-448.0, 448.0).to(spelled.E4M3)


def amax_of(x):
    return x.abs().amax(-1, keepdim=True).float()


def scale_of_finite_numbers(x, r, w):
    return scaled(x, (amax_of(x) / 448.0).nan_to_num())


def limit_without_an_end(x, r, w):
    limit = float("inf")
    return spelled.per_token(F.silu(x.clamp(max=limit)) * r.clamp(-limit, limit))


def gate_of_negative_numbers(x, r, w):
    return spelled.per_token(F.silu(x.clamp(max=0.0)))


def one_value(x, r, w):
    return scaled(x.flatten()[3].reshape(()), r.flatten()[:1].abs().float().reshape(()))


def a_tensor_as_a_row(x, r, w):
    return spelled.per_token(torch.cat([x.flatten()] * 32).reshape(1, -1))


def bound_by_all_amaxes(x, r, w):
    amax = amax_of(x)
    scale = torch.maximum(amax, amax.max() * 1e-3) / 448.0
    return scaled(x, scale), scale


def scales_of_each_other(x, r, w):
    first, second = spelled.rms_norm(x, w), spelled.rms_norm(r, w)
    return scaled(first, second.abs().max().float() / 448.0), scaled(second, first.abs().max().float() / 448.0)


def streams_that_scale_each_other(x, r, w):
    first, second = x + r, x * 2 + r
    norms = spelled.rms_norm(first, w * second[0, 0]), spelled.rms_norm(second, w * first[0, 0])
    return *map(spelled.per_token, norms), first, second


def random_numbers_of_the_sum(x, r, w):
    h = x + r
    drawn = torch.multinomial(h[0].float().softmax(-1), 4)
    return spelled.per_token(spelled.rms_norm(h, w + torch.rand_like(w))), drawn, h


@pytest.mark.parametrize(
    ("fn", "fused", "reason"),
    [
        (scale_of_finite_numbers, [], "not finite"),
        (limit_without_an_end, ["quant_per_token"], "not finite"),
        (gate_of_negative_numbers, ["quant_per_token"], "limit is 0.0"),
        (one_value, [], "no row"),
        (a_tensor_as_a_row, [], "rows of 98304 values"),
        (bound_by_all_amaxes, [], "computed from what"),
        (scales_of_each_other, ["rms_norm_static"], "computed from what"),
        (streams_that_scale_each_other, ["add_rms_norm_per_token"], "computed from what"),
        (random_numbers_of_the_sum, [], "random"),
    ],
)
def test_a_site_that_no_op_can_stand_for_is_a_miss_of_its_own(fn, fused, reason, tensors):
    """Not a failure of the graph: the site beside it fuses."""

    def with_another(x, r, w):
        return fn(x, r, w), spelled.per_group(r * 2)

    report = Report()
    torch.manual_seed(0)
    results = torch.compile(with_another, backend=collecting(report), dynamic=False)(*tensors)
    torch.manual_seed(0)
    expected = with_another(*tensors)
    assert names(report) == sorted([*fused, "quant_per_group_128"])
    assert any(reason in miss.reason for miss in report.missed), report
    assert all(miss.kind != "failure" for miss in report.missed), report
    assert compare(results, expected).equal


@pytest.mark.parametrize(
    ("fn", "fused", "reason"),
    [
        (layer_norm, ["quant_per_token"], "mean"),
        (amax_of_columns, [], "one per group"),
        (unsaturated, [], "clamp"),
        (scale_of_another_tensor, [], "the same x"),
        (norm_of_half_a_row, ["quant_per_token"], "the same x"),
        (eps_beside_the_root, ["quant_per_token"], "rsqrt"),
    ],
)
def test_look_alikes_are_refused_with_a_reason(fn, fused, reason, tensors):
    report, result = fuse(fn, *tensors)
    assert names(report) == fused
    assert any(reason in miss.reason for miss in report.missed), report
    assert __file__ in report.missed[0].location
    assert result.equal


def quantized_twice(x, r, w):
    return spelled.per_token(x), spelled.per_token(x)


def summed_twice(x, r, w):
    first, second = x + r, x + r
    return spelled.per_token(spelled.rms_norm(first, w)), first, second.flatten(), second[:, 1]


def scales_widened_twice(x, r, w):
    s = x.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448.0
    return (x / s).clamp(-448.0, 448.0).to(spelled.E4M3), s.float(), s.float()


@pytest.mark.parametrize("fn", [quantized_twice, summed_twice, scales_widened_twice])
def test_results_share_memory_only_where_those_of_eager_do(fn, tensors):
    def sharing(results):
        storages = [r.untyped_storage().data_ptr() for r in torch.utils._pytree.tree_leaves(results)]
        return [storages.index(s) for s in storages]

    report = Report()
    results = torch.compile(fn, backend=collecting(report), dynamic=False)(*tensors)
    assert len(report.fused) == 1
    assert compare(results, fn(*tensors)).equal
    assert sharing(results) == sharing(fn(*tensors))


def test_an_input_computed_from_the_sum_keeps_the_norm_apart(device):
    def fn(x, r):
        h = x + r
        return spelled.per_token(spelled.rms_norm(h, h[0, 0])), h

    x, r = (spelled.exact_rows(2, 6, 256, device=device) for _ in range(2))
    report, result = fuse(fn, x, r)
    assert names(report) == ["quant_per_token"]
    assert result.equal


@st.composite
def drawn_sites(draw):
    """A site: family, quantizer, layout, shape, dtype, eps, and who else reads what."""
    group = draw(st.sampled_from([None, 32, 64, 128]))
    column = group is not None and draw(st.booleans())
    lead = draw(st.sampled_from([(1,), (5,), (2, 3), (3, 1)]))
    row = draw(st.integers(1, 3)) * (group or 96)
    options = {
        "family": draw(st.sampled_from(["none", "norm", "add norm", "silu"])),
        "group": group,
        "column": column,
        "dtype": draw(st.sampled_from([BF16, torch.float16, torch.float32])),
        "eps": draw(st.sampled_from([1e-6, 1e-5, 1e-3])),
        "floor": draw(st.sampled_from([None, 1e-10, 1e-4])),
        "read value": draw(st.booleans()),
        "read sum": draw(st.booleans()),
    }
    return (*lead, row), options


def drawn_function(options):
    def fn(x, r, w):
        total, value = x + r, x
        if options["family"] == "norm":
            value = spelled.rms_norm(x, w, options["eps"])
        elif options["family"] == "add norm":
            value = spelled.rms_norm(total, w, options["eps"])
        elif options["family"] == "silu":
            value = spelled.silu_mul(x, r)
        if options["group"] is None:
            quantized = spelled.per_token(value, floor=options["floor"])
        else:
            quantized = spelled.per_group(value, options["group"], floor=options["floor"])
        if options["column"]:
            quantized = spelled.column(*quantized)
        extras = [total] if options["read sum"] else []
        return (*quantized, *extras, *([value + 1] if options["read value"] else []))

    return fn


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn_sites())
def test_a_drawn_site_fuses_and_equals_eager(device, site):
    shape, options = site
    x, r = (spelled.exact_rows(*shape, device=device, dtype=options["dtype"]) for _ in range(2))
    w = torch.randn(shape[-1], device=device).to(options["dtype"])
    report, result = fuse(drawn_function(options), x, r, w)
    assert len(report.fused) == 1, report
    assert isinstance(report.fused[0].prologue, NoPrologue) == (options["family"] == "none")
    # Where there is one row or one group, the transpose is contiguous already and nothing is copied.
    copied = options["column"] and shape[-1] > options["group"] and shape[-2] > 1
    assert (report.fused[0].scale_layout is ScaleLayout.COLUMN) == copied
    assert result.equal, result
