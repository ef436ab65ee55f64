"""Sites whose input Inductor would have computed in the same kernel are left to it, on GPUs."""

import pytest
import torch

from fusion_pass import graph_pass, inductor, settings
from fusion_pass.fake_device import relabelled

import cases
import opaque_ops
import spelled
from lowered import lowered

BF16 = torch.bfloat16


def gated(both, w):
    return spelled.per_group(spelled.silu_mul(*(both + 1).chunk(2, -1)))


def residual(x, w, r):
    total = x * 0.25 + r
    return *spelled.per_token(spelled.rms_norm(total, w)), total


def read_twice(x, w):
    y = torch.relu(x)
    return *spelled.per_token(spelled.rms_norm(y, w)), y


def per_tensor(x):
    scale = x.float().abs().amax().clamp(min=1e-10) / 448.0
    return (x.float() / scale).clamp(-448.0, 448.0).to(spelled.E4M3), scale


def report_on(fn, device="cuda", inputs=2):
    """The report on fn, were its tensors on that device."""
    reports = []

    def compiler(gm, _):
        graph = relabelled(gm, torch.device(device, 0)).graph if device == "cuda" else gm.graph
        reports.append(graph_pass.run(graph, (device,)))
        return gm.forward

    tensors = [torch.empty(8, 256, dtype=BF16), torch.empty(256, dtype=BF16), torch.empty(8, 256, dtype=BF16)]
    torch.compile(fn, backend=lambda gm, i: inductor.compile_without_joint_passes(gm, i, compiler))(*tensors[:inputs])
    return reports[0]


@pytest.fixture
def _by_cost(monkeypatch):
    monkeypatch.delenv("FUSION_PASS_ALWAYS")


@pytest.mark.usefixtures("_by_cost")
@pytest.mark.parametrize(
    ("fn", "inputs", "producer"),
    [
        (lambda x, w: spelled.per_token(spelled.rms_norm(x * 2, w)), 2, "mul"),
        (lambda x, w: spelled.per_token(torch.relu(x).view(2, 4, 256)), 2, "relu"),
        (gated, 2, "add"),
        (residual, 3, "mul"),
        # Heads that are merged are a copy; so are tokens that are chosen or padded.
        (lambda x, w: spelled.per_token(x.view(8, 4, 64).transpose(0, 1).reshape(8, 256)), 2, "clone"),
        (lambda x, w: spelled.per_token(x[torch.arange(7, -1, -1, device=x.device)]), 2, "index"),
        (lambda x, w: spelled.per_group(torch.nn.functional.pad(x, (0, 128))), 2, "constant_pad_nd"),
    ],
)
def test_what_one_site_reads_alone_is_left_to_inductor(fn, inputs, producer):
    report = report_on(fn, inputs=inputs)
    assert not report.fused
    (miss,) = report.missed
    assert miss.kind == "cost"
    assert f"reads {producer}" in miss.reason


@pytest.mark.usefixtures("_by_cost")
@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: spelled.per_group(x.view(4, 2, 256).transpose(0, 1).flatten(1)),
        lambda x, w: spelled.per_group(spelled.silu_mul(x[:, ::2], x[:, 1::2])),
    ],
)
def test_rows_that_an_op_would_copy_are_left_to_inductor(fn):
    report = report_on(fn)
    assert not report.fused
    (miss,) = report.missed
    assert miss.kind == "cost"
    assert "not evenly spaced and dense" in miss.reason


@pytest.mark.usefixtures("_by_cost")
@pytest.mark.parametrize(
    "fn",
    [
        lambda x, w: spelled.per_token(spelled.rms_norm(x, w)),
        # Copied, but for others, too; rows of a part; and a copy of what is dense.
        lambda x, w: (y := x.view(8, 4, 64).transpose(0, 1).reshape(8, 256), *spelled.per_token(y)),
        lambda x, w: spelled.per_group(x[:, 128:]),
        lambda x, w: spelled.per_group(spelled.silu_mul(*x.float().chunk(2, -1))),
        lambda x, w: spelled.per_token(x.clone().view(4, 2, 256)),
        lambda x, w: spelled.per_token(spelled.rms_norm(torch.mm(x, x.t()) @ x, w)),
        lambda x, w: spelled.per_token(x.view(4, 2, 256).float()),
        read_twice,
        # Inductor reads a transpose twice.
        lambda x, w: spelled.per_token(x.t().contiguous()),
        lambda x, w: spelled.per_group(x.view(2, 128, 8).transpose(1, 2).float().contiguous().flatten(1)),
        # It computes the producer of a transpose, or of an amax of all values, twice.
        lambda x, w: spelled.per_group((x * 2).view(64, 32).t().contiguous(), 32),
        lambda x, w: per_tensor(x * 2),
        # FP4 codes take Inductor longer than writing and reading what they are of.
        lambda x, w: cases.mxfp4(torch.relu(x), None),
        lambda x, w: cases.mxfp4(x[torch.arange(7, -1, -1, device=x.device)], None),
        # What is an op reads memory without the pass, too.
        lambda x, w: opaque_ops.per_token(opaque_ops.rms_norm(torch.relu(x), w)),
    ],
)
def test_inputs_that_are_in_memory_are_fused(fn):
    assert report_on(fn).fused


@pytest.mark.usefixtures("_by_cost")
def test_costs_were_measured_on_gpus():
    assert report_on(lambda x, w: spelled.per_token(x * 2), device="cpu").fused


def test_always_fuses_and_is_part_of_the_cache_key(monkeypatch):
    assert report_on(lambda x, w: spelled.per_token(x * 2)).fused
    key = graph_pass.FusionPass(("cuda",)).uuid()
    monkeypatch.setenv("FUSION_PASS_ALWAYS", "0")
    assert graph_pass.FusionPass(("cuda",)).uuid() != key
    monkeypatch.setenv("FUSION_PASS_ALWAYS", "yes")
    with pytest.raises(ValueError, match="FUSION_PASS_ALWAYS is 'yes'; allowed: 0 or 1"):
        settings.always()


@pytest.mark.usefixtures("_by_cost")
def test_costs_of_rows_of_any_number():
    """Strides of the heads are functions of the rows, and not compared with a number that these may be."""

    def fn(x):
        return spelled.per_token(x.view(2, -1, 4, 64).transpose(0, 1).flatten(1))

    report, _ = lowered(fn, (8, 256), dynamic=(0,), mark=torch._dynamo.decorators.mark_unbacked)
    assert [miss.kind for miss in report.missed] == ["cost"]
    assert not report.fused
