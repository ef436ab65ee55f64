"""Random programs keep eager's bits when fused. FUSION_PASS_FUZZ_EXAMPLES sets how many are drawn, FUSION_PASS_FUZZ_SEED which."""

import collections
import os

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings

from fusion_pass import graph_pass, plan
from fusion_pass.testing import DifferenceError
from fusion_pass.testing.programs import KINDS, Program, Step, _Run, check, programs

EXAMPLES = int(os.environ.get("FUSION_PASS_FUZZ_EXAMPLES", "250"))
SEED = os.environ.get("FUSION_PASS_FUZZ_SEED")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the rewriting is fuzzed on a CPU")


@ON_CPU
def test_random_programs_keep_eagers_bits():
    fused = collections.Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        derandomize=SEED is None,
    )
    @given(programs())
    def fuzz(program):
        report = check(program)
        fused.update(site.name for site in report.fused)
        fused.update({"programs": 1, "programs with a site": bool(report.fused), "misses": len(report.missed)})

    (fuzz if SEED is None else seed(int(SEED))(fuzz))()
    print(dict(fused))
    # Programs that fuse nothing would test nothing.
    assert fused["programs with a site"] > fused["programs"] / 2
    assert len(fused) > min(40, EXAMPLES // 6)


def test_every_kind_of_step_can_be_run():
    assert all(callable(getattr(_Run, kind.replace(" ", "_"))) for kind in KINDS)


@ON_CPU
def test_a_wrong_rewriting_is_noticed(monkeypatch):
    """Codes and scales of the first site are those of its negated input: the program's oracle must see it."""

    def wrong(graph, sites, values):
        rewrite(graph, sites, values)
        op = sites[0].op
        with graph.inserting_before(op):
            negated = graph.call_function(torch.ops.aten.neg.default, (op.args[0],))
        negated.meta = dict(op.args[0].meta)
        op.update_arg(0, negated)

    rewrite = graph_pass.rewrite
    monkeypatch.setattr(graph_pass, "rewrite", wrong)
    with pytest.raises(DifferenceError, match=r"(?s)output 0: .* elements differ.*before the pass.*after the pass"):
        check(Program((Step("quantize", spelling=1),)))


@ON_CPU
def test_other_strides_are_noticed(monkeypatch):
    """Eager's codes of a transposed tensor are not contiguous, a fused op's are."""
    program = Program((Step("view", spelling=11), Step("quantize")))
    assert any("not contiguous" in miss.reason for miss in check(program).missed)
    monkeypatch.setattr(plan, "_contiguous", lambda *nodes: True)
    with pytest.raises(DifferenceError, match="has strides"):
        check(program)


@ON_CPU
def test_a_size_that_only_views_have():
    """Found by fuzzing: the rows of a flattened expansion, twice a symbol, are no tensor's size but a view's."""
    steps = (Step("norm"), Step("view", spelling=22), Step("quantize"))
    report = check(Program(steps, shape=(2, 3, 256), values="integers", dynamic=True))
    assert len(report.fused) == 1


@ON_CPU
def test_a_size_that_tracing_has_fixed_is_not_varied():
    """Found by fuzzing: writing to a (2, s) expansion of s rows makes s 2, so that the graph holds for no other."""
    steps = (Step("view", spelling=10), Step("quantize", spelling=22, flags=11), Step("change value"))
    assert check(Program(steps, shape=(2, 3, 256), dtype=F32, values="special", dynamic=True, seed=1)).fused


@ON_CPU
@pytest.mark.parametrize("steps", [(Step("blocks", other=1, spelling=2),), (Step("blocks", other=2, spelling=6),)])
def test_codes_of_a_transpose_lie_by_rows(steps):
    """Found by fuzzing: plain PyTorch packs the codes of x.t() into a tensor whose strides are those of x.t()."""
    (site,) = check(Program(steps, shape=(64, 96))).fused
    assert site.name.startswith("quant_mxfp4_b")


@ON_CPU
def test_a_matrix_in_rows_of_another_length_is_another():
    """Found by fuzzing: rows of 64 seen as rows of 32 were joined with the transpose of the latter, in one wrong cast."""
    steps = (Step("view", spelling=21), Step("blocks", other=2), Step("norm"))
    report = check(Program(steps, shape=(2, 32, 64), values="integers"))
    assert sorted(site.name for site in report.fused) == ["quant_mxfp8", "quant_mxfp8_by_columns"]


@ON_CPU
def test_blocks_of_a_transpose_with_nan():
    """Found by fuzzing: a CPU's amax over the strides of a transpose gives NaN a sign, and eager code read its copy."""
    steps = (Step("view", source=0, spelling=20), Step("blocks", source=0, other=1))
    assert check(Program(steps, shape=(2, 32, 64), values="special")).fused
