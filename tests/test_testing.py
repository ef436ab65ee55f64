"""The assertion for test suites, and fuzzing of a function's inputs."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from fusion_pass.kernels import reference

from fusion_pass import ops
from fusion_pass.testing import assert_fusion_equivalent, compare, fuzz, inputs

import spelled

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def _plain():
    with ops.plain_on_cpu():
        yield


def norm_quant(x, w):
    return spelled.per_token(spelled.rms_norm(x, w))


def arguments(rows=4):
    return torch.randn(rows, 256).to(BF16), torch.ones(256).to(BF16)


def damage(monkeypatch, harm):
    """The fused ops compute something else where the codes are harmed."""
    monkeypatch.setattr(ops, "reference", lambda spec, x, *rest: harm(x, reference.reference(spec, x, *rest)))
    monkeypatch.setattr(ops, "launch", lambda spec, x, *rest: harm(x, reference.reference(spec, x, *rest)))


def without_nan(x, outputs):
    """NaN codes of a row become zeros."""
    codes = outputs[0].view(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    return outputs


def test_equivalent_functions_pass_and_say_what_fused(device):
    report = assert_fusion_equivalent(norm_quant, *(t.to(device) for t in arguments()), sites=["rms_norm_per_token"])
    assert [site.name for site in report.fused] == ["rms_norm_per_token"]


def test_a_module_and_dynamic_sizes(device):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(256, dtype=BF16))

        def forward(self, x):
            h = x.float()
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            return spelled.per_group(self.weight * h.to(x.dtype), floor=None)

    model, x = Model().to(device), arguments()[0].to(device)
    report = assert_fusion_equivalent(model, x, dynamic=True, sites=["rms_norm_per_group_128"])
    assert isinstance(report.fused[0].shape[0], torch.SymInt)


def test_rows_stay_static_where_sizes_are_symbols(device):
    report = assert_fusion_equivalent(
        norm_quant, *(t.to(device) for t in arguments()), dynamic=True, sites=["rms_norm_per_token"]
    )
    rows, length = report.fused[0].shape
    assert isinstance(rows, torch.SymInt)
    assert length == 256


def test_a_site_that_does_not_fuse_is_named(device):
    with pytest.raises(AssertionError, match=r"the sites are \[\], not \['quant_per_token'\]"):
        assert_fusion_equivalent(F.relu, arguments()[0].to(device), sites=["quant_per_token"])


def test_arguments_are_compared_and_not_changed(device):
    def in_place(x, w):
        codes, scale = norm_quant(x, w)
        x.add_(1)
        return codes, scale

    x, w = (t.to(device) for t in arguments())
    before = x.clone()
    assert_fusion_equivalent(in_place, x, w, sites=["rms_norm_per_token"])
    assert compare(x, before).equal


def test_a_difference_shows_both_graphs(monkeypatch):
    damage(monkeypatch, without_nan)
    x, w = arguments()
    x[1, 7] = torch.nan
    with pytest.raises(AssertionError, match=r"(?s)before the pass:.*aten\.rsqrt.*after the pass:.*rms_norm_quant"):
        assert_fusion_equivalent(norm_quant, x, w)


def test_fuzzing_tries_sizes_and_values():
    said = []
    result = fuzz(norm_quant, arguments(), examples=60, progress=lambda *what: said.append(what))
    assert result.counterexample is None
    assert result.tried == 60
    assert result.sizes == [4, 1, 2, 5, 16, 33]
    assert [site.name for site in result.report.fused] == ["rms_norm_per_token"] * 6
    assert {kind for kind in inputs.KINDS for _, _, what in said if what.endswith(kind)} >= {"integers", "special"}


def test_sizes_that_a_function_refuses_are_left_out():
    def fixed(x, w):
        return norm_quant(x.view(4, 256), w)

    assert fuzz(fixed, arguments(), examples=10).sizes == [4]


def test_a_counterexample_is_shrunk_to_one_value(monkeypatch):
    damage(monkeypatch, without_nan)
    found = fuzz(spelled.per_token, arguments()[:1]).counterexample
    assert found is not None
    (x,) = found.args
    assert x.shape == (1, 256)
    assert x.count_nonzero() == 1
    assert x.isnan().any() or x.isinf().any()
    assert "zeros but for [0, " in str(found)
    assert "after the pass" in str(found)


def test_a_finite_counterexample_is_simple(monkeypatch):
    def harm(x, outputs):
        outputs[1][(x.abs().amax(-1, keepdim=True) > 2.5)] *= 2
        return outputs

    damage(monkeypatch, harm)
    found = fuzz(spelled.per_token, arguments()[:1]).counterexample
    (x,) = found.args
    assert x.shape == (1, 256)
    assert x.count_nonzero() == 1
    assert float(x.abs().max()) == round(float(x.abs().max()))


def test_an_exception_of_the_fused_function_is_a_counterexample(monkeypatch):
    def harm(x, outputs):
        if x.isinf().any():
            raise RuntimeError("cannot be")
        return outputs

    damage(monkeypatch, harm)
    found = fuzz(spelled.per_token, arguments()[:1]).counterexample
    assert "eager does not raise, fused does: RuntimeError: cannot be" in str(found)
    assert found.args[0].count_nonzero() == 1


def test_nothing_to_vary_is_an_error():
    with pytest.raises(ValueError, match="allowed: at least one"):
        fuzz(lambda x: x, (torch.arange(3),))


@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", inputs.KINDS)
def test_values_are_of_their_kind(kind, dtype):
    values = inputs.tensor(kind, (64, 128), dtype, torch.Generator().manual_seed(0)).float()
    info = torch.finfo(dtype)
    seen = {
        "integers": (values == values.round()).all(),
        "spread": values.abs().max() / values.abs().median() > 100,
        "tiny": ((values != 0) & (values.abs() < info.smallest_normal)).any(),
        "huge": values.abs().max() > info.max / 2,
        "zero rows": (values == 0).all(-1).any() and ((values == 0) & values.signbit()).any(),
        "special": values.isnan().any() and values.isinf().any() and ((values == 0) & values.signbit()).any(),
        "ties": (values[..., 0] == 448).all(),
        "constant": (values == values[:, :1]).all(),
    }
    assert seen.get(kind, values.isfinite().all())


def test_an_unknown_kind_is_named():
    with pytest.raises(ValueError, match="kind is 'odd'; allowed: integers"):
        inputs.tensor("odd", (1,), BF16, torch.Generator())
