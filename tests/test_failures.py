"""The pass may fail anywhere: the graph is as it was, compiling goes on, and a warning says where; strict raises."""

import itertools
import os
import re
import threading

import pytest
import torch
from fusion_pass.patterns import op_table
from torch._dynamo.utils import counters
from torch._inductor import config

import fusion_pass
from fusion_pass import (
    backends,
    cost,
    debug,
    distances,
    failures,
    fake_device,
    floats,
    graph_pass,
    hardware,
    hidden_casts,
    inductor,
    lower,
    order,
    plan,
    registration,
    rewrite,
    sites,
    transposes,
)
from fusion_pass.testing import compare

import spelled

BF16 = torch.bfloat16


class InjectedError(Exception):
    pass


def failing(function, successes=0):
    """``function``, raising after so many calls."""
    calls = 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls > successes:
            raise InjectedError("injected")
        return function(*args, **kwargs)

    return wrapper


def fn(x, r, w):
    h = x + r
    codes, scale = spelled.per_token(spelled.rms_norm(h, w))
    again, _ = spelled.per_token(spelled.rms_norm(h, w))
    grouped = spelled.column(*spelled.per_group(spelled.silu_mul(h, r)))
    return codes, again, scale, *grouped, h


def arguments():
    x, r = (spelled.exact_rows(6, 256, device="cpu") for _ in range(2))
    return x, r, torch.randn(256).to(BF16)


def captured(function=fn):
    """Post-grad-like graphs of fn as they are on a GPU."""
    graphs = []

    def compiler(gm, _):
        graphs.append(fake_device.relabelled(gm, torch.device("cuda")))
        return gm.forward

    backend = lambda gm, inputs: inductor.compile_without_joint_passes(gm, inputs, compiler)  # noqa: E731
    torch.compile(function, backend=backend, dynamic=False)(*arguments())
    return graphs[0]


def picture(graph):
    """Everything a graph is: its nodes in order, by name."""
    as_names = lambda value: torch.fx.node.map_arg(value, str)  # noqa: E731
    return [
        (
            n.name,
            n.op,
            n.target,
            str(as_names(n.args)),
            str(as_names(n.kwargs)),
            [str(u) for u in n.users],
            id(n.meta),
            n.type,
        )
        for n in graph.nodes
    ]


# Each stage, and the function that raises in it, after so many successful calls.
FAULTS = [
    ("plan", graph_pass, "plan", 0),
    ("plan", plan, "recognise_quantizer", 1),
    ("plan", plan, "recognise_norm", 1),
    ("plan", plan._Planner, "_with_layout", 1),
    ("plan", transposes, "_is_plain", 1),
    ("plan", hardware, "_lacking", 1),
    ("plan", cost, "_saves_less", 1),
    ("plan", order, "_first", 1),
    ("run", graph_pass, "_limit", 0),
    ("rewrite", graph_pass, "rewrite", 0),
    ("rewrite", rewrite._Editor, "insert", 1),
    ("rewrite", rewrite._Editor, "_call", 7),
    ("rewrite", rewrite._Editor, "_replace", 3),
    ("rewrite", rewrite, "_erase_dead", 0),
    ("rewrite", rewrite, "_has_effect", 9),
    ("rewrite", inductor, "sort_topologically", 0),
    ("record", debug, "picture", 0),
    ("record", debug, "picture", 1),
    ("record", debug, "record", 0),
    ("record", debug, "trace_structured", 0),
    ("run", graph_pass, "_count", 0),
    ("lower", graph_pass, "lower", 0),
    ("lower", lower, "_trace", 1),
    ("lower", lower, "_splice", 1),
    ("lower", distances, "note", 1),
    ("lower", lower, "launch_into_buffers", 1),
]


@pytest.fixture
def every_stage(monkeypatch):
    """Stages that settings leave out run as well: what costs more is declined, and so is what is beyond the limit."""
    monkeypatch.setenv("FUSION_PASS_ALWAYS", "0")
    monkeypatch.setenv("FUSION_PASS_LIMIT", "1000000")


@pytest.mark.usefixtures("every_stage")
@pytest.mark.parametrize(("stage", "owner", "name", "successes"), FAULTS, ids=lambda p: getattr(p, "__name__", p))
def test_a_fault_leaves_the_graph_as_it_was(stage, owner, name, successes, monkeypatch):
    gm = captured()
    graph = gm.graph
    before, nodes = picture(graph), {n.name: n for n in graph.nodes if n.op != "call_function"}
    counters.clear()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), successes))
        with pytest.warns(fusion_pass.FusionPassWarning, match=f"stage '{stage}'.*InjectedError: injected") as caught:
            report = graph_pass.run(graph, ("cuda",), to_kernels=True)
    assert "To report it" in str(caught[0].message)
    assert picture(graph) == before
    # Inputs and the output are the very same nodes: AOTAutograd and Inductor hold them.
    assert all(nodes[n.name] is n for n in graph.nodes if n.op != "call_function")
    graph.lint()
    assert not report.fused
    assert [m.kind for m in report.missed] == ["failure"]
    assert dict(counters["fusion_pass"]) == {"failed": 1}
    # The restored graph is whole: without the fault it fuses as if nothing had been.
    report = graph_pass.run(graph, ("cuda",), to_kernels=True)
    assert sorted(s.name for s in report.fused) == ["add_rms_norm_per_token", "silu_mul_per_group_128_column"]
    graph.lint()


@pytest.mark.usefixtures("every_stage")
@pytest.mark.parametrize(("stage", "owner", "name", "successes"), FAULTS, ids=lambda p: getattr(p, "__name__", p))
def test_strict_raises_what_failed(stage, owner, name, successes, monkeypatch):
    graph = captured().graph
    before = picture(graph)
    monkeypatch.setattr(owner, name, failing(getattr(owner, name), successes))
    with pytest.raises(fusion_pass.FusionPassError, match=stage) as raised:
        graph_pass.run(graph, ("cuda",), strict=True, to_kernels=True)
    assert raised.value.stage == stage
    cause = raised.value
    while cause.__cause__ is not None:
        cause = cause.__cause__
    assert isinstance(cause, InjectedError)
    assert picture(graph) == before


def test_the_warning_names_the_site_and_the_users_line(monkeypatch):
    monkeypatch.setattr(rewrite._Editor, "_replace", failing(rewrite._Editor._replace))
    line = r"add_rms_norm_per_token \[6x256\].*" + re.escape(spelled.__file__) + r":\d+ in per_token"
    with pytest.warns(fusion_pass.FusionPassWarning, match=line):
        graph_pass.run(captured().graph, ("cuda",))


def test_what_is_restored_computes_the_same(monkeypatch):
    monkeypatch.setattr(rewrite, "_erase_dead", failing(rewrite._erase_dead))
    tensors = arguments()
    with pytest.warns(fusion_pass.FusionPassWarning):
        fused = torch.compile(fn, backend="fusion_pass_eager", dynamic=False)(*tensors)
    assert compare(fused, fn(*tensors)).equal


def test_erased_nodes_come_back():
    """Restoring after the whole pass: every erased node returns, every new one goes."""
    graph = captured().graph
    before = picture(graph)
    undo = failures.Undo(graph)
    undo.remember()
    graph_pass.run(graph, ("cuda",), to_kernels=True)
    assert picture(graph) != before
    undo.restore()
    assert picture(graph) == before
    graph.lint()


def test_an_interrupt_is_not_swallowed(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(rewrite, "_erase_dead", interrupted)
    graph = captured().graph
    before = picture(graph)
    with pytest.raises(KeyboardInterrupt):
        graph_pass.run(graph, ("cuda",))
    assert picture(graph) == before


@pytest.mark.parametrize("name", ["hide", "show"])
def test_the_guard_of_casts_may_fail(name, monkeypatch):
    guard = {"hide": graph_pass.CastGuard, "show": graph_pass.FusionPass}[name](("cuda",))
    graph = captured(lambda x, *_: (x.float() * 2).to(torch.bfloat16).float() + 1).graph
    if name == "show":
        hidden_casts.hide(graph, hidden_casts.roundings(graph))
    before = picture(graph)

    original = getattr(hidden_casts, name)

    def midway(*given):
        original(*given)
        assert picture(graph) != before
        raise InjectedError("injected")

    monkeypatch.setattr(inductor, "KEEPS_ROUNDINGS", False)
    monkeypatch.setattr(hidden_casts, name, midway)
    monkeypatch.setattr(graph_pass, "run", lambda *_, **__: None)
    with pytest.warns(fusion_pass.FusionPassWarning, match=f"{name} casts"):
        guard(graph)
    assert picture(graph) == before


@pytest.mark.parametrize("name", ["float_inputs", "_needed", "request_constants"])
def test_making_constants_may_fail(name, monkeypatch):
    def per_token(x, w, eps):
        return spelled.per_token(spelled.rms_norm(x, w, eps))

    monkeypatch.setattr(floats, name, failing(getattr(floats, name)))
    x, _, w = arguments()
    for tensor in (x, w):
        torch._dynamo.mark_static(tensor, tensor.dim() - 1)
    with pytest.warns(fusion_pass.FusionPassWarning, match="make constants"):
        compiled = torch.compile(per_token, backend="fusion_pass_eager", dynamic=True)(x, w, 1e-5)
    assert compare(compiled, per_token(x, w, 1e-5)).equal
    torch._dynamo.reset()
    strict = backends.collecting(sites.Report(), strict=True)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"FusionPassError.*make constants"):
        torch.compile(per_token, backend=strict, dynamic=True)(x, w, 1e-5)


@pytest.mark.parametrize(
    "installed",
    [graph_pass.FusionPass, graph_pass.CastGuard, lambda devices, strict=False: graph_pass.DistanceKeeper(strict)],
)
def test_sources_that_cannot_be_read_bypass_the_cache(installed, monkeypatch):
    monkeypatch.setattr(graph_pass, "source_hash", failing(graph_pass.source_hash))
    with pytest.warns(fusion_pass.FusionPassWarning, match="cache key"):
        assert installed(("cuda",)).uuid() is None
    with pytest.raises(fusion_pass.FusionPassError, match="cache key"):
        installed(("cuda",), strict=True).uuid()


def test_a_description_of_a_registered_op_may_fail(monkeypatch):
    monkeypatch.setattr(op_table, "fingerprint", failing(op_table.fingerprint))
    with pytest.warns(fusion_pass.FusionPassWarning, match="cache key"):
        assert graph_pass.FusionPass(("cuda",)).uuid() is None
    with pytest.raises(fusion_pass.FusionPassError, match="cache key"):
        graph_pass.FusionPass(("cuda",), strict=True).uuid()


def test_a_failure_is_written_to_the_debug_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("FUSION_PASS_DEBUG", str(tmp_path))
    monkeypatch.setattr(lower, "_trace", failing(lower._trace))
    with pytest.warns(fusion_pass.FusionPassWarning):
        graph_pass.run(captured().graph, ("cuda",), to_kernels=True)
    (written,) = tmp_path.glob("*.failed.txt")
    assert "InjectedError: injected" in written.read_text()
    assert "in _trace" in written.read_text() or "wrapper" in written.read_text()


@pytest.mark.filterwarnings("ignore::fusion_pass.failures.FusionPassWarning")
def test_a_debug_folder_is_shared(monkeypatch, tmp_path):
    """Nothing of another process, whose numbers are the same, is written over."""
    monkeypatch.setenv("FUSION_PASS_DEBUG", str(tmp_path))
    for faulty in (False, True, False):
        monkeypatch.setattr(debug, "_numbers", itertools.count())
        with monkeypatch.context() as patch:
            if faulty:
                patch.setattr(lower, "_trace", failing(lower._trace))
            graph_pass.run(captured().graph, ("cuda",), to_kernels=True)
    kinds = (".after.py", ".before.py", ".html", ".txt")
    whole = [f"graph_{number}{kind}" for number in (0, 1, 3) for kind in kinds]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*whole, "graph_2.failed.txt"])


def test_a_folder_that_cannot_be_written_to_stops_no_one(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FUSION_PASS_DEBUG", str(tmp_path / "file"))
    with pytest.warns(fusion_pass.FusionPassWarning, match="FileExistsError"):
        graph_pass.run(captured().graph, ("cuda",), to_kernels=True)


def test_inductor_compiles_what_the_pass_fails_on(monkeypatch, device):
    """The one true compile of this file."""
    monkeypatch.setattr(rewrite._Editor, "_replace", failing(rewrite._Editor._replace, 3))
    tensors = [t.to(device) for t in arguments()]
    uncached, warned = config.patch(force_disable_caches=True), pytest.warns(fusion_pass.FusionPassWarning)
    with uncached, warned, fusion_pass.enabled(("cpu", "cuda")):
        compiled = torch.compile(fn, dynamic=False)(*tensors)
    torch.testing.assert_close(compiled[-1], fn(*tensors)[-1])


# Registration.

SETTINGS = (inductor.PRE_JOINT, inductor.POST_GRAD, inductor.SCHEDULE, inductor._STATIC_LAUNCH)


def state():
    from torch._higher_order_ops.triton_kernel_wrap import triton_kernel_wrapper_mutation
    from torch._inductor.lowering import lowerings, needs_realized_inputs

    defaults = [config._config[name].env_value_default for name in SETTINGS]
    return (
        [getattr(config, name) for name in SETTINGS],
        defaults,
        triton_kernel_wrapper_mutation in needs_realized_inputs,
        torch.ops.aten._to_copy.default in lowerings,
        os.environ.get(inductor._STATIC_LAUNCH_VARIABLE),
    )


@pytest.mark.parametrize("realized", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_unregister_restores_every_setting(realized, static):
    was = inductor.realize_kernel_inputs(realized)
    with config.patch({inductor._STATIC_LAUNCH: static}):
        before = state()
        fusion_pass.register()
        fusion_pass.register(("cpu",), strict=True)
        with fusion_pass.enabled():
            assert state() != before
        fusion_pass.unregister()
        assert state() == before
    inductor.realize_kernel_inputs(was)


STEPS = [
    ("add_pass", 0),
    ("add_pass", 2),
    ("realize_kernel_inputs", 0),
    ("remember_accesses", 0),
    ("launch_kernels_statically", 0),
]


@pytest.mark.parametrize(("name", "successes"), STEPS)
def test_a_registration_that_fails_changes_nothing(name, successes, monkeypatch):
    before = state()
    with monkeypatch.context() as patch:
        patch.setattr(inductor, name, failing(getattr(inductor, name), successes))
        with pytest.raises(InjectedError):
            fusion_pass.register()
        assert state() == before
        assert not registration.is_registered()
        with pytest.raises(InjectedError), fusion_pass.enabled():
            pass
        assert state() == before
        assert not registration.is_registered()
    fusion_pass.register()
    assert state() != before
    fusion_pass.unregister()
    assert state() == before


def seen_by_a_thread():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(getattr(config, inductor.POST_GRAD)))
    thread.start()
    thread.join()
    return seen[0]


def test_a_registration_holds_in_every_thread():
    fusion_pass.register()
    seen = seen_by_a_thread()
    assert seen is getattr(config, inductor.POST_GRAD)
    fusion_pass.unregister()
    assert seen_by_a_thread() is None


def test_threads_register_at_once():
    before, errors = state(), []
    start = threading.Barrier(8)

    def worker(i):
        try:
            start.wait(10)
            for _ in range(50):
                with fusion_pass.enabled(("cpu",) if i % 2 else ("cuda",), strict=bool(i % 3)):
                    assert isinstance(getattr(config, inductor.POST_GRAD), graph_pass.FusionPass)
                fusion_pass.register() if i % 2 else fusion_pass.unregister()
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=worker, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    fusion_pass.unregister()
    assert not errors
    assert state() == before
