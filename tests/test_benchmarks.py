"""The benchmarks' logic on a CPU: tiny shapes, the interpreter, the wall clock."""

import contextlib
import math
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from unittest import mock

import pytest
import torch

import fusion_pass

import bare
import contestants
import end_to_end
import profiling
import results
import sites
import tune
import warming
import workloads
from cases import CASES, case_named
from results import Cell, Result

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal for machines without a GPU")


def rehearse(*options):
    return sites.main(["--grid", "rehearsal", "--jobs", "0", *map(str, options)])


def test_a_run_measures_every_contestant_and_can_be_resumed(tmp_path, capsys):
    record, drawing, document = tmp_path / "r.jsonl", tmp_path / "r.svg", tmp_path / "r.md"
    document.write_text("before\n<!-- sites rehearsal -->\nold\n<!-- /sites rehearsal -->\nafter\n")
    kept = ["--json", record, "--resume", "--plot", drawing, "--markdown", document]
    assert rehearse(*kept, "--minutes", 0) == 0
    assert "0 of 3 cells: go on with --resume" in capsys.readouterr().out
    assert rehearse(*kept) == 0
    assert "3 of 3 cells: complete" in capsys.readouterr().out
    measured = results.read(record)
    assert len(measured) == 3
    for result in measured:
        assert result.errors == {}
        assert set(result.times) == set(results.COLUMNS)
        assert all(result.differ[name] == 0 for name in contestants.COMPILED)
        assert result.elements > 3 * 256
    assert "before" in document.read_text() and "| add+rms -> group-column | 3x256 |" in document.read_text()
    assert "old" not in document.read_text()
    assert ElementTree.parse(drawing).getroot().tag.endswith("svg")
    before, table = record.read_text(), document.read_text()
    assert rehearse(*kept) == 0
    assert record.read_text() == before
    document.write_text("<!-- sites rehearsal -->\n<!-- /sites rehearsal -->\n")
    assert rehearse("--report", "--json", record, "--markdown", document) == 0
    assert document.read_text() in table


def test_an_error_is_recorded_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("out of paper")

    monkeypatch.setattr(contestants, "compiled", fails)
    record = tmp_path / "r.jsonl"
    assert rehearse("--json", record, "--contestants", "ours", "eager") == 0
    for result in results.read(record):
        assert result.errors == {"ours": "RuntimeError: out of paper"}
        assert set(result.times) == {"eager"}
    assert "out of paper" in capsys.readouterr().out


def test_bare_traffic_has_the_outputs_of_the_site(device):
    for name in ("add+rms -> mxfp8", "silu*mul -> group", "none -> int8", "gelu*mul -> static"):
        case = case_named(name)
        inputs = case.inputs(3, 384, torch.bfloat16, device)
        expected = case.run(*inputs)
        codes, scales, total = bare.bare(case, 512, 1)(*inputs)
        assert codes.shape == expected[0].shape and codes.dtype == expected[0].dtype
        if case.prologue.wide:
            value = inputs[0][:, :384].float() + inputs[0][:, 384:].float()
        else:
            value = inputs[0].float() + (inputs[1].float() if case.prologue.residual else 0)
        within = value.abs() < 100
        assert torch.equal(codes.float()[within], value.to(codes.dtype).float()[within])
        assert (scales is None) == (not case.quantization.scale_bytes)
        if scales is not None:
            assert scales.numel() == expected[1].numel() and scales.element_size() == case.quantization.scale_bytes
            assert (scales == 1).all()
        assert (total is None) == (not case.prologue.residual)
        if total is not None:
            assert torch.equal(total, expected[-1])


def test_what_is_compiled_for_any_number_of_rows_is_measured(tmp_path):
    record = tmp_path / "r.jsonl"
    with mock.patch.object(contestants, "compiled", side_effect=contestants.compiled) as compiled:
        assert rehearse("--json", record, "--traced-rows", 8, "--rows", 3, "--contestants", "ours", "compile") == 0
    assert {(call.args[2][0].shape[0], call.args[3]) for call in compiled.call_args_list} == {(8, True)}
    for result in results.read(record):
        assert result.errors == {} and result.cell.rows == 3 and set(result.times) == {"ours", "compile"}
        assert result.differ == {"ours": 0, "compile": 0}


def test_cells_compiled_for_any_number_of_rows_are_others(tmp_path, capsys):
    record = tmp_path / "r.jsonl"
    options = ["--json", record, "--resume", "--contestants", "compile"]
    assert rehearse(*options) == rehearse(*options, "--traced-rows", 8) == 0
    assert sorted({result.cell.size for result in results.read(record)}) == ["3x256", "3x256 by 8"]
    assert len(results.read(record)) == 6


def test_bare_traffic_in_both_directions(device):
    """At tiles that fill the matrix and at tiles that do not: each value's codes where the site has them."""
    case = case_named("none -> mxfp8-both")
    for tile in ((32, 64), (64, 128)):
        inputs = case.inputs(96, 192, torch.bfloat16, device)
        expected = case.run(*inputs)
        found = bare.bare_both(case, tile, 4)(*inputs)
        assert [t.dtype for t in found] == [t.dtype for t in expected]
        assert torch.equal(found[0].float(), inputs[0].to(torch.float8_e4m3fn).float())
        assert torch.equal(found[2].float(), inputs[0].t().to(torch.float8_e4m3fn).float())
        for made, wanted in zip(found[1::2], expected[1::2], strict=True):
            assert made.numel() == wanted.numel() and (made == 1).all()


@pytest.mark.parametrize("site", ["none -> mxfp4", "silu*mul -> mxfp4"])
def test_bare_bytes_of_pairs(site, device):
    """Each byte has bits of both values whose codes are there: what changes one changes it, and no other."""
    case = case_named(site)
    inputs = case.inputs(3, 192, torch.bfloat16, device)
    for block in (64, 512):
        run = bare.bare(case, block, 1)
        before = run(*inputs)
        assert before[0].shape == (3, 96) and before[0].dtype == case.run(*inputs)[0].dtype
        for row, column in ((0, 0), (1, 130), (2, 191)):
            x = inputs[0].clone()
            x.view(torch.int16)[row, column] ^= -1
            assert (run(x, *inputs[1:])[0] != before[0]).nonzero().tolist() == [[row, column // 2]]


def test_bare_bytes_of_pairs_in_both_directions(device):
    """Each byte has bits of both values whose codes are there: what changes one changes it, and no other."""
    case = case_named("none -> mxfp4-both")
    for tile in ((32, 64), (64, 128)):
        run = bare.bare_both(case, tile, 4)
        inputs = case.inputs(96, 192, torch.bfloat16, device)
        before = run(*inputs)
        assert [(t.dtype, t.numel()) for t in before] == [(t.dtype, t.numel()) for t in case.run(*inputs)]
        assert before[0].shape == (96, 96) and before[2].shape == (192, 48)
        for row, column in ((0, 0), (65, 130), (94, 191)):
            x = inputs[0].clone()
            x.view(torch.int16)[row, column] ^= -1
            after = run(x, *inputs[1:])
            assert (after[0] != before[0]).nonzero().tolist() == [[row, column // 2]]
            assert (after[2] != before[2]).nonzero().tolist() == [[column, row // 2]]


def test_a_matrix_and_its_transpose_are_measured(tmp_path):
    record = tmp_path / "r.jsonl"
    assert (
        rehearse("--json", record, "--rows", 16, 32, "--prologue", "none", "--quantizer", "mxfp8-both", "mxfp4-both")
        == 0
    )
    measured = results.read(record)
    assert [str(result.cell) for result in measured] == [
        "none -> mxfp8-both  32x256 bfloat16",
        "none -> mxfp4-both  32x256 bfloat16",
    ]
    for result, elements in zip(measured, (2 * 32 * 256, 32 * 256), strict=True):
        assert result.errors == {}
        assert set(result.times) == set(results.COLUMNS)
        assert result.differ == dict.fromkeys(contestants.COMPILED, 0)
        assert result.elements == elements + 2 * 32 * 8


@pytest.mark.parametrize("direction", ["mxfp8-both", "mxfp4-both"])
def test_one_op_serves_both_directions(direction):
    case = case_named(f"none -> {direction}")
    torch._dynamo.reset()
    report = fusion_pass.explain(case.run, *case.inputs(64, 96, torch.bfloat16, "cpu"), device="cuda")
    assert [site.name for site in report.fused] == [f"quant_{direction.removesuffix('-both')}_both_ways"]


def test_bytes_are_those_of_the_tensors(device):
    for case in (c for c in CASES if c.prologue.name == "none" or c.quantization.name == "token"):
        inputs = case.inputs(128, 512, torch.bfloat16, device)
        read = {id(t): t for t in inputs[:2]}
        written = case.run(*inputs)
        moved = sum(t.numel() * t.element_size() for t in (*read.values(), *written))
        assert case.bytes(128, 512, 2) == moved, case.name


def result(site="rms -> token", rows=1, row=4096, **times):
    return Result(Cell(site, rows, row, "bfloat16"), 1.0, times, {"ours": 0}, 10)


def test_the_summary_lists_what_misses_a_goal():
    found = [
        result(rows=8, ours=2.0, bare=1.0, compile=4.0),
        result(rows=32, ours=1.2, bare=1.0, compile=1.0),
        result(rows=8192, ours=10.0, bare=9.0, compile=40.0),
        result(rows=16384, ours=10.0, bare=9.5, compile=40.0),
    ]
    text = results.summary(found)
    mean = math.exp(sum(map(math.log, (2.0, 1 / 1.2, 4.0, 4.0))) / 4)
    assert f"compile / ours: geometric mean {mean:.3f}, least 0.833, of 4 cells" in text
    assert "slower than torch.compile: 1 of 4 cells" in text
    assert "    0.833  rms -> token  32x4096 bfloat16" in text
    assert "bare / ours under 0.92 from 32 Mi values on: 1 of 2 cells" in text
    assert "    0.900  rms -> token  8192x4096 bfloat16" in text
    assert "ours / bare over 1.3 up to 32 rows: 1 of 2 cells" in text
    assert "    2.000  rms -> token  8x4096 bfloat16" in text
    assert "transpose" not in text


def test_a_matrix_and_its_transpose_have_a_goal_of_their_own():
    found = [
        result(rows=8192, ours=10.0, bare=9.5),
        result("none -> mxfp8-both", rows=8192, ours=10.0, bare=8.6),
        result("none -> mxfp4-both", rows=8192, ours=10.0, bare=8.4),
    ]
    text = results.summary(found)
    assert "bare / ours under 0.92 from 32 Mi values on: 0 of 1 cells" in text
    assert "bare / ours of a matrix and its transpose under 0.85 from 32 Mi values on: 1 of 2 cells" in text
    assert "    0.840  none -> mxfp4-both  8192x4096 bfloat16" in text


def test_the_faster_of_two_compiled_times_counts():
    tuned = Result(Cell("none -> token", 1, 1024, "float16"), times={"ours": 2.0, "compile": 5.0, "compile-tuned": 1.0})
    assert tuned.compiled == 1.0
    assert "slower than torch.compile: 1 of 1 cells" in results.summary([tuned])


def test_a_line_cut_off_is_measured_again(tmp_path):
    record = tmp_path / "r.jsonl"
    results.append(record, result(ours=1.0))
    results.append(record, result(rows=2, ours=1.0))
    record.write_text(record.read_text()[:-20])
    assert [r.cell.rows for r in results.read(record)] == [1]
    results.append(record, result(rows=3, ours=1.0))
    assert [r.cell.rows for r in results.read(record)] == [1, 3]


def test_cells_that_do_not_divide_or_fit_are_left_out():
    grid = {**sites.GRIDS["full"], "quantizer": ("group", "mxfp8"), "prologue": ("none",)}
    found = list(sites.cells(grid, memory=1 << 30))
    assert not [c for c in found if c.row == 2880 and c.site == "none -> group"]
    assert [c for c in found if c.row == 2880 and c.site == "none -> mxfp8"]
    assert not [c for c in found if c.rows * c.row >= 1 << 27]
    both = list(sites.cells({**grid, "quantizer": ("mxfp8-both",), "prologue": ("none", "rms")}, memory=1 << 30))
    assert {c.rows for c in both} >= {32, 128, 512} and not {c.rows for c in both} & {1, 8}
    assert {c.site for c in both} == {"none -> mxfp8-both"}


def test_a_sweep_compares_the_chosen_configuration_with_others(tmp_path, capsys):
    record = tmp_path / "t.jsonl"
    options = ["--rehearse", "--jobs", "0", "--rows", "2", "--row", "256", "--most", "2", "--json", str(record)]
    sites_ = ["--site", "add+rms -> group-column", "silu*mul -> static"]
    assert tune.main([*options, *sites_]) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 sweeps: complete" in shown and "few (M ≤ 32)" in shown
    sweeps = tune.read(record)
    assert [len(sweep.times) for sweep in sweeps.values()] == [2, 2]
    before = record.read_text()
    assert tune.main([*options, *sites_, "--resume"]) == 0
    assert record.read_text() == before


def test_every_configuration_computes_the_same(device):
    site = "rms -> group"
    case = case_named(site)
    inputs = case.inputs(5, 384, torch.bfloat16, device)
    chosen, *others = tune.configurations((site, 5, 384, "bfloat16"))
    expected = tune.launch(site, "bfloat16", chosen, inputs)
    assert len(others) > 5
    for config in others[::4]:
        for actual, wanted in zip(tune.launch(site, "bfloat16", config, inputs), expected, strict=True):
            assert torch.equal(actual.float(), wanted.float()), config


def test_a_class_takes_the_configuration_that_is_fastest_over_it():
    a, b = (("rows", 1), ("warps", 4)), (("rows", 2), ("warps", 8))
    sweeps = [
        tune.Sweep("none -> token", 1, 4096, "bfloat16", [(a, 2.0), (b, 1.0)]),
        tune.Sweep("none -> token", 32, 4096, "bfloat16", [(a, 1.1), (b, 1.0)]),
        tune.Sweep("none -> token", 8192, 4096, "bfloat16", [(a, 8.0), (b, 9.0)]),
    ]
    few, many = tune.by_class(sweeps)
    assert "few" in few and "rows=2 warps=8" in few and "1.000" in few and few.endswith("rows=1 warps=4 1.483")
    assert "many" in many and many.endswith("rows=1 warps=4 1.000")


class WarmerInThisProcess(warming.Warmer):
    """Runs at once what processes would."""

    tasks = ()

    def submit(self, compile_one, tasks):
        type(self).tasks += tuple(tasks)
        for task in tasks:
            with contextlib.suppress(RuntimeError):
                compile_one(*task)
        return []


def test_whole_models_are_timed_and_what_fails_is_told(tmp_path, monkeypatch, capsys):
    def broken(device, layers):
        raise RuntimeError("no such model")

    known = end_to_end.workloads
    monkeypatch.setattr(end_to_end, "workloads", lambda device: {**known(device), "broken": broken})
    monkeypatch.setattr(end_to_end, "Warmer", WarmerInThisProcess)
    monkeypatch.setattr(end_to_end, "_COMPILE_TURNS", 1)
    record, document = tmp_path / "e.jsonl", tmp_path / "e.md"
    document.write_text("<!-- end to end -->\n<!-- /end to end -->\n")
    options = ["--rehearse", "--layers", "1", "--runs", "1", "--mode", "default", "--only", "block-scaled 2", "broken"]
    options += ["--json", str(record), "--markdown", str(document), "--resume", "--jobs", "2", "--compile-time"]
    assert end_to_end.main(options) == 0
    shown = capsys.readouterr().out
    assert "2 of 2: complete" in shown and shown.count("block-scaled 2  default") == 1 + 1 + 1
    pairs = [("block-scaled 2", "default", 1), ("broken", "default", 1)]
    assert WarmerInThisProcess.tasks == tuple((*pair, name, "cpu") for pair in pairs for name in ("without", "with"))
    layer, failed = end_to_end.read(record).values()
    assert layer.error == "" and layer.differ == {"without": 0, "with": 0} and layer.elements == 2 * 256
    both = {"without", "with"}
    for measured in (layer.step_ms, layer.host_us, layer.gpu_ms, layer.site_ms, layer.longest, layer.compile_s):
        assert set(measured) == both
    assert layer.floor_ms > 0 and set(layer.bound) == {"free", "floor"}
    assert failed.error == "RuntimeError: no such model"
    assert "| block-scaled 2 | default |" in document.read_text() and "no such model" in document.read_text()
    before = record.read_text()
    assert end_to_end.main(options[:-1]) == 0
    assert record.read_text() == before


def test_the_important_is_measured_first():
    keys = [(name, mode, 4) for name in workloads.workloads("cuda") for mode in end_to_end.MODES]
    first = [
        *((f"llama prefill {tokens}", "default", 4) for tokens in ("8192", "8 x 1024")),
        *((f"llama decode {rows}", "reduce-overhead", 4) for rows in (1, 32, 256)),
        *((f"llama prefill {tokens}", "reduce-overhead", 4) for tokens in ("8192", "8 x 1024")),
        ("block-scaled 8192", "default", 4),
        ("moe training", "default", 4),
    ]
    found = end_to_end.ordered(keys)
    assert found[: len(first)] == first and sorted(found) == sorted(keys)


def test_sites_are_the_compiled_kernels_that_one_of_both_lacks():
    without = {
        "gemm": profiling.Launches(8, 8.0),
        "triton_poi_fused_rope_0": profiling.Launches(2, 0.5),
        "triton_red_fused_norm_1": profiling.Launches(4, 2.0),
        "triton_red_fused_norm_2": profiling.Launches(4, 2.0),
    }
    fused = {
        "another gemm": profiling.Launches(8, 8.0),
        "fused_quant_kernel": profiling.Launches(4, 0.7),
        "fused_quant_split_kernel": profiling.Launches(2, 0.3),
        "triton_poi_fused_rope_3": profiling.Launches(3, 0.75),
        "triton_red_fused_norm_0": profiling.Launches(2, 0.9),
    }
    assert profiling.only_in(without, fused) == pytest.approx(6 * 0.5)
    assert profiling.only_in(fused, without) == pytest.approx(1.0 + 0.25)
    assert profiling.whole(without) == (18, 12.5)
    assert profiling.longest(without, 1) == [("gemm", 8, 8.0)]
    assert end_to_end.bound(13.0, 3.0, 0.5) == pytest.approx({"free": 1.3, "floor": 13 / 10.5})
    assert end_to_end.bound(13.0, 3.0, None) == pytest.approx({"free": 1.3})


def test_other_processes_compile_and_are_stopped_when_they_take_too_long(tmp_path):
    warmer = warming.Warmer(1)
    try:
        warmer.wait(warmer.submit(time.sleep, [(600.0,)]), seconds=0.5)
        warmer.warm(Path.touch, [(tmp_path / "compiled",)])
        assert (tmp_path / "compiled").exists()
    finally:
        warmer.close()


def test_a_block_scaled_linear_is_near_the_product_it_stands_for(device):
    linear = workloads.BlockScaledLinear(256, 128).to(device)
    x = torch.randn(4, 256, device=device).bfloat16()
    blocks = linear.weight.float().view(1, 128, 2, 128) * linear.scale.view(1, 1, 2, 1)
    expected = x.float() @ blocks.view(128, 256).t()
    assert (linear(x).float() - expected).norm() < 0.05 * expected.norm()
