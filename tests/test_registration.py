"""Switching the pass on and off, beside other passes; what the compile caches see of it."""

import re

import pytest
import torch
import triton
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass

import fusion_pass
from fusion_pass import graph_pass, inductor
from fusion_pass.backends import collecting
from fusion_pass.graph_pass import FusionPass
from fusion_pass.testing import compare

import spelled

SLOTS = (inductor.PRE_JOINT, inductor.POST_GRAD, inductor.SCHEDULE)


class OtherPass(CustomGraphPass):
    def __init__(self):
        self.calls = 0

    def __call__(self, graph):
        self.calls += 1

    def uuid(self):
        return "other"


def installed():
    return [getattr(config, slot) for slot in SLOTS]


@pytest.fixture(autouse=True)
def _unregistered():
    yield
    fusion_pass.unregister()
    assert installed() == [None, None, None]


def test_register_is_idempotent_and_unregister_restores():
    fusion_pass.unregister()
    fusion_pass.register()
    fusion_pass.register()
    assert isinstance(getattr(config, inductor.POST_GRAD), graph_pass.FusionPass)
    fusion_pass.unregister()
    assert installed() == [None, None, None]


def test_unregister_restores_every_setting():
    before = config.shallow_copy_dict()
    fusion_pass.register()
    assert config.shallow_copy_dict() != before
    fusion_pass.unregister()
    assert config.shallow_copy_dict() == before


@pytest.mark.parametrize("wrapped", [lambda p: p, lambda p: [p], lambda p: (p,)], ids=["one", "list", "tuple"])
def test_a_pass_installed_before_is_kept_and_restored(wrapped):
    before = wrapped(OtherPass())
    with config.patch(inductor.POST_GRAD, before):
        fusion_pass.register()
        assert getattr(config, inductor.POST_GRAD) is not before
        fusion_pass.unregister()
        assert getattr(config, inductor.POST_GRAD) is before


def test_a_pass_installed_after_is_kept():
    fusion_pass.register()
    other = OtherPass()
    before = inductor.add_pass(inductor.POST_GRAD, other)
    fusion_pass.unregister()
    assert getattr(config, inductor.POST_GRAD) in (other, [other])
    inductor.remove_pass(inductor.POST_GRAD, other, before)


def test_enabled_restores_an_outer_registration():
    fusion_pass.register(("cpu",))
    with fusion_pass.enabled(("cuda",), strict=True):
        assert getattr(config, inductor.POST_GRAD).devices == ("cuda",)
    outer = getattr(config, inductor.POST_GRAD)
    assert (outer.devices, outer.strict) == (("cpu",), False)


@pytest.mark.parametrize("devices", [(), ("tpu",), ("cuda", "gpu")])
def test_unknown_devices_are_named(devices):
    for takes_devices in (fusion_pass.register, fusion_pass.FusionPass):
        with pytest.raises(ValueError, match="devices is"):
            takes_devices(devices)


def test_the_pass_takes_one_device_as_register_does():
    assert fusion_pass.FusionPass().devices == fusion_pass.FusionPass("cuda").devices == ("cuda",)


def test_the_cache_key_covers_options_and_sources(monkeypatch):
    same = graph_pass.FusionPass(("cuda",), False).uuid()
    assert same == graph_pass.FusionPass(["cuda"], False).uuid()
    assert same != graph_pass.FusionPass(("cpu", "cuda"), False).uuid()
    assert same != graph_pass.FusionPass(("cuda",), True).uuid()
    with monkeypatch.context() as patch:
        patch.setenv("FUSION_PASS_ALWAYS", "0")
        assert same != graph_pass.FusionPass(("cuda",), False).uuid()
    monkeypatch.setattr(graph_pass, "source_hash", lambda: "other sources")
    assert same != graph_pass.FusionPass(("cuda",), False).uuid()


@pytest.mark.parametrize("module", [torch, triton])
def test_the_hash_of_sources_covers_the_versions_of_torch_and_triton(module, monkeypatch):
    same = graph_pass.source_hash()
    monkeypatch.setattr(module, "__version__", "0.0")
    assert graph_pass.source_hash.__wrapped__() != same


def test_a_limit_bypasses_the_cache(monkeypatch):
    monkeypatch.setenv("FUSION_PASS_LIMIT", "3")
    assert graph_pass.FusionPass(("cuda",), False).uuid() is None
    monkeypatch.setenv("FUSION_PASS_LIMIT", "three")
    with pytest.raises(ValueError, match="FUSION_PASS_LIMIT is 'three'; allowed"):
        graph_pass.FusionPass(("cuda",), False).uuid()


@pytest.mark.parametrize("limit", range(4))
def test_a_limit_fuses_the_first_sites_of_the_process(limit, monkeypatch, device):
    """A site quantizes the sum that the one before returns, over two graphs."""

    def two(x, r, w):
        h = x + r
        return spelled.per_token(spelled.rms_norm(h, w)), spelled.per_group(spelled.rms_norm(h, w)), h

    monkeypatch.setenv("FUSION_PASS_LIMIT", str(limit))
    monkeypatch.setattr(graph_pass, "_applied", 0)
    tensors = arguments(device)
    reports = [fusion_pass.Report(), fusion_pass.Report()]
    for function, report in zip((two, fn), reports, strict=True):
        assert compare(torch.compile(function, backend=collecting(report))(*tensors), function(*tensors)).equal
    counts = [len(report.fused) for report in reports]
    assert counts == [min(limit, 2), min(limit, 3) - min(limit, 2)]
    left = [m for report in reports for m in report.missed if m.kind == "limit"]
    assert len(left) == 3 - limit
    assert all(f"beyond FUSION_PASS_LIMIT={limit}" in m.reason for m in left)


def test_a_chain_has_a_uuid_if_all_its_passes_have():
    assert inductor.PassChain([OtherPass(), OtherPass()]).uuid() == ("other", "other")
    assert inductor.PassChain([lambda graph: None, OtherPass()]).uuid() is None


def fn(x, r, w):
    h = x + r
    return (*spelled.per_token(spelled.rms_norm(h, w)), h)


def arguments(device):
    x, r = (spelled.exact_rows(6, 256, device=device) for _ in range(2))
    return x, r, torch.randn(256, device=device).to(torch.bfloat16)


def test_registered_inductor_equals_eager_and_counts(device):
    """The one true compile of this file: Inductor's code around the fused op."""
    counters.clear()
    other = OtherPass()
    # A graph that Inductor has cached is not passed over again.
    with config.patch({inductor.POST_GRAD: other, "force_disable_caches": True}):
        fusion_pass.register((device,))
        tensors = arguments(device)
        result = compare(torch.compile(fn)(*tensors), fn(*tensors))
        fusion_pass.unregister()
    assert result.equal, result
    assert counters["fusion_pass"]["add_rms_norm_per_token"] == 1
    assert counters["fusion_pass"]["fused"] == 1
    assert other.calls == 1


class QuantizedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        codes, scale = spelled.per_token(gradient)
        return codes.float() * scale


def test_the_backend_fuses_backward_graphs_too(device):
    """They are compiled when the backend has long returned."""

    def gradient(of, x, w):
        return torch.autograd.grad((of(x) * w).sum(), x)

    x, w = torch.randn(6, 256, device=device, requires_grad=True), torch.randn(6, 256, device=device)
    before = installed()
    with torch.enable_grad(), config.patch(force_disable_caches=True):
        compiled = torch.compile(QuantizedGradient.apply, backend="fusion_pass")
        counters.clear()
        assert compare(gradient(compiled, x, w), gradient(QuantizedGradient.apply, x, w)).equal
    assert counters["fusion_pass"]["quant_per_token"] == 1
    assert installed() == before


@pytest.fixture
def compiled_with(monkeypatch):
    """What Inductor's config was as each graph was compiled."""
    seen = []
    monkeypatch.setattr(FusionPass, "__call__", lambda self, graph: seen.append(config.get_config_copy()))
    return seen


TUNED = {"max_autotune": True, "coordinate_descent_tuning": True}


@pytest.mark.parametrize(
    ("asked", "switched"),
    [
        ({"mode": "reduce-overhead"}, {"triton.cudagraphs": True}),
        ({"mode": "max-autotune"}, {**TUNED, "triton.cudagraphs": True}),
        ({"mode": "max-autotune-no-cudagraphs"}, TUNED),
        ({"options": {"max_autotune": True, "shape-padding": False}}, {"max_autotune": True, "shape_padding": False}),
    ],
)
def test_the_backend_takes_the_modes_and_options_of_inductor(asked, switched, compiled_with):
    switches = ("triton.cudagraphs", "max_autotune", "coordinate_descent_tuning", "shape_padding")
    usual = {name: config.get_config_copy()[name] for name in switches}
    with config.patch(force_disable_caches=True):
        torch.compile(lambda x: x + 1, backend="fusion_pass", **asked)(torch.ones(4))
    (seen,) = compiled_with
    assert {name: seen[name] for name in switches} == {**usual, **switched}


def test_a_pass_among_the_options_runs_before_ours(device):
    seen = []
    tensors = arguments(device)
    counters.clear()
    other = {"options": {inductor.POST_GRAD: seen.append}}
    assert compare(torch.compile(fn, backend="fusion_pass", **other)(*tensors), fn(*tensors)).equal
    assert len(seen) == 1
    assert counters["fusion_pass"]["fused"] == 1


@pytest.mark.parametrize(
    ("backend", "asked", "message"),
    [
        ("fusion_pass", {"mode": "fastest"}, "Unrecognized mode=fastest, should be one of: default"),
        ("fusion_pass", {"options": {"fastest": True}}, "Unexpected optimization option fastest"),
        ("fusion_pass_eager", {"mode": "reduce-overhead"}, "mode is 'reduce-overhead'; allowed with"),
        ("fusion_pass_eager", {"options": {"max_autotune": True}}, "options is {'max_autotune': True}; allowed with"),
    ],
)
def test_a_backend_refuses_what_it_does_not_know(backend, asked, message):
    with pytest.raises(BackendCompilerFailed, match=re.escape(message)):
        torch.compile(lambda x: x + 1, backend=backend, **asked)(torch.ones(4))


@pytest.mark.parametrize("backend", ["fusion_pass_eager"])
def test_backends_are_found_by_name(backend, device):
    tensors = arguments(device)
    assert compare(torch.compile(fn, backend=backend)(*tensors), fn(*tensors)).equal


def test_strict_raises_on_an_unfused_cast(device):
    def per_column(x):
        return (x.float() / (x.abs().amax(-2, keepdim=True).float() / 448)).to(spelled.E4M3)

    fusion_pass.register((device,), strict=True)
    with pytest.raises(Exception, match="left unfused"):
        torch.compile(per_column)(arguments(device)[0])


def test_debug_prints_sites_misses_and_the_rewritten_graph(monkeypatch, capsys, tmp_path, device):
    monkeypatch.setenv("FUSION_PASS_DEBUG", "1")
    torch.compile(fn, backend="fusion_pass_eager")(*arguments(device))
    printed = capsys.readouterr().err
    assert "add_rms_norm_per_token [6x256] -> e4m3fn" in printed
    assert "torch.ops.fusion_pass.rms_norm_quant" in printed
    monkeypatch.setenv("FUSION_PASS_DEBUG", str(tmp_path / "graphs"))
    torch._dynamo.reset()
    torch.compile(fn, backend="fusion_pass_eager")(*arguments(device))
    assert len(list((tmp_path / "graphs").iterdir())) == 4


def test_explain_pretends_to_be_on_a_gpu():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(256, dtype=torch.bfloat16))

        def forward(self, x):
            return spelled.per_token(spelled.rms_norm(x, self.weight))

    report = fusion_pass.explain(Model(), torch.randn(4, 256).bfloat16(), device="cuda")
    assert [site.name for site in report.fused] == ["rms_norm_per_token"]
    assert report.fused[0].quantizer.factor.op == "mul"  # by the reciprocal, as eager CUDA code
    assert report.fused[0].op is not None
    assert report.fused[0].nodes
