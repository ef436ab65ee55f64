"""Every spelling of the survey is recognised as what it is, no look-alike is, and all keep eager's bits."""

import collections

import pytest
import torch
from torch.utils import _pytree as pytree

import fusion_pass
from fusion_pass.backends import collecting
from fusion_pass.testing import compare

import spellings

POSITIVES, NEGATIVES = spellings.catalogue()
XFAIL = {
    "now": (),
    "soon": pytest.mark.xfail(reason="no rule matches it yet", strict=False),
    "later": pytest.mark.xfail(reason="no spec expresses it yet", strict=False),
}


def parameters(entries):
    return [pytest.param(s, id=f"{i}-{s.name}", marks=XFAIL[s.status]) for i, s in enumerate(entries)]


def copies(inputs, grad):
    return [t.clone().requires_grad_(grad and t.is_floating_point()) for t in inputs]


def check(spelling, device):
    inputs = spelling.inputs(device)
    report = fusion_pass.Report()
    with torch.set_grad_enabled(spelling.grad):
        expected = spelling.fn(*copies(inputs, spelling.grad))
        compiled = torch.compile(spelling.fn, backend=collecting(report), dynamic=False, fullgraph=True)
        actual = compiled(*copies(inputs, spelling.grad))
    assert sorted(site.name for site in report.fused) == sorted(spelling.expected), report
    assert_same(actual, expected, spelling.sums)


def assert_same(actual, expected, sums):
    for a, e in zip(pytree.tree_leaves(actual), pytree.tree_leaves(expected), strict=True):
        assert a.stride() == e.stride()
        result = compare(a, e)
        if not sums:
            assert result.equal, result
        elif a.element_size() == 1:
            assert result.different <= 1e-3 * result.elements, result
        else:
            torch.testing.assert_close(a, e, rtol=2 * torch.finfo(e.dtype).eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("spelling", parameters(POSITIVES))
def test_a_spelling_fuses(spelling, device):
    check(spelling, device)


@pytest.mark.parametrize("spelling", parameters(NEGATIVES))
def test_a_look_alike_does_not(spelling, device):
    check(spelling, device)


def test_no_spelling_is_listed_twice():
    entries = collections.Counter((s.name, s.source, s.inputs) for s in (*POSITIVES, *NEGATIVES))
    assert max(entries.values()) == 1


def test_the_survey_is_wide():
    """As wide as the README says."""
    assert len(POSITIVES) > 200
    assert len(NEGATIVES) > 100
    assert all(s.source for s in (*POSITIVES, *NEGATIVES))
