"""One compilation serves any number of rows."""

import pytest
import torch

from fusion_pass.backends import collecting
from fusion_pass.sites import Report
from fusion_pass.testing import compare

import spelled

WIDTH = 32
SITES = {
    "add_rms_norm_per_token": lambda x, r, w: (*spelled.per_token(spelled.rms_norm(x + r, w)), x + r),
    "rms_norm_per_group_16": lambda x, r, w: spelled.per_group(spelled.rms_norm(x, w), 16),
    "silu_mul_per_group_16_column": lambda x, r, w: spelled.column(*spelled.per_group(spelled.silu_mul(x, r), 16)),
    "quant_per_tensor": lambda x, r, w: per_tensor(x),
}


def per_tensor(x):
    scale = x.abs().max().float().clamp(min=1e-10) / 448.0
    return (x.float() / scale).clamp(-448.0, 448.0).to(spelled.E4M3), scale


def tensors(rows, device):
    x, r = (spelled.exact_rows(rows, WIDTH, device=device) for _ in range(2))
    return x, r, torch.randn(WIDTH, device=device).to(torch.bfloat16)


def row_counts(device):
    """More than one row; as many as a GPU is given at most, or as many as the interpreter can run."""
    return (64, 2, 3, 17, 128, 1000, 16384) if device == "cuda" else (24, 2, 3, 17)


def check(compiled, fn, rows, device, mark=lambda tensor: None):
    given = tensors(rows, device)
    for tensor in given[:2]:
        mark(tensor)
    result = compare(compiled(*given), fn(*given))
    assert result.equal, (rows, result)


@pytest.mark.parametrize("site", SITES)
def test_marked_rows_take_one_graph(site, device, backend, fused, graphs):
    fn = SITES[site]
    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    for rows in row_counts(device):
        check(compiled, fn, rows, device, lambda tensor: torch._dynamo.mark_dynamic(tensor, 0))
    assert graphs() == 1
    assert fused() == {site: 1}
    # A size of one is Dynamo's own special case.
    check(compiled, fn, 1, device)
    assert graphs() == 2


@pytest.mark.parametrize("site", SITES)
def test_unbacked_rows_take_one_graph_from_one_row_on(site, device, backend, fused, graphs):
    fn = SITES[site]
    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    for rows in (*row_counts(device), 1):
        check(compiled, fn, rows, device, lambda tensor: torch._dynamo.decorators.mark_unbacked(tensor, 0))
    assert graphs() == 1
    assert fused() == {site: 1}


@pytest.mark.parametrize("mark", [torch._dynamo.mark_dynamic, torch._dynamo.decorators.mark_unbacked])
def test_a_matrix_and_its_transpose_take_one_graph(mark, device, backend, fused, graphs):
    def fn(x):
        return (*spelled.per_group(x, 32), *spelled.per_group(x.t().contiguous(), 32))

    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    for rows in (64, 96, 256):
        x = spelled.exact_rows(rows, 2 * WIDTH, device=device)
        mark(x, 0)
        result = compare(compiled(x), fn(x))
        assert result.equal, (rows, result)
    assert graphs() == 1
    assert fused() == {"quant_per_group_32_both_ways": 1}


def by_mean(x):
    return (x.float() / x.float().abs().mean(-1, keepdim=True)).clamp(-448.0, 448.0).to(spelled.E4M3)


def by_given_rows(x):
    return (x.float() / (x[:, :1].float().abs() + 1)).clamp(-448.0, 448.0).to(spelled.E4M3)


def transposed(x):
    return spelled.per_token(x.t().contiguous().t())


@pytest.mark.parametrize("fn", [by_mean, by_given_rows, transposed])
def test_what_is_asked_of_unbacked_rows_is_a_miss(fn, device):
    """Whether a scale is one value, or rows follow each other, is data: asking would fail the graph."""
    report = Report()
    x = spelled.exact_rows(5, WIDTH, device=device)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    compiled = torch.compile(fn, backend=collecting(report), fullgraph=True)
    assert compare(compiled(x), fn(x)).equal
    assert {miss.kind for miss in report.missed} <= {"quantizer", "prologue"}


HEADS = {
    "one told": lambda x, w, heads, rows: spelled.per_token(x.view(-1, heads, WIDTH)),
    "both told": lambda x, w, heads, rows: spelled.per_token(x.view(rows, heads, WIDTH)),
    "computed": lambda x, w, heads, rows: spelled.per_token(x.view(rows * 2 // 2, heads * 1, WIDTH)),
    "of a norm": lambda x, w, heads, rows: spelled.per_token(spelled.rms_norm(x, w).view(-1, heads, WIDTH)),
}


@pytest.mark.parametrize("view", HEADS)
def test_sizes_that_no_tensor_has(view, device, backend, fused, graphs):
    """A number of heads that is an argument: what the graph tells its views is told those of the op's results."""
    fn = HEADS[view]
    compiled = torch.compile(fn, backend=backend, dynamic=True, fullgraph=True)
    for rows, heads in ((6, 4), (5, 3), (2, 7)):
        x, _, w = tensors(rows * heads, device)
        assert compare(compiled(x, w, heads, rows), fn(x, w, heads, rows)).equal
    assert graphs() == 1
    assert fused() == {"rms_norm_per_token" if view == "of a norm" else "quant_per_token": 1}


@pytest.mark.parametrize("fullgraph", [True, False])
def test_unmarked_rows_become_dynamic_once(fullgraph, device, backend, graphs):
    fn = SITES["add_rms_norm_per_token"]
    compiled = torch.compile(fn, backend=backend, fullgraph=fullgraph)
    for rows in row_counts(device):
        check(compiled, fn, rows, device)
    assert graphs() == 2


def test_rows_of_dynamic_length_do_not_fuse(device, backend, fused, graphs):
    """Kernels are built for a row length: the cast is left, and reported."""
    compiled = torch.compile(lambda x: spelled.per_token(x), backend=backend, fullgraph=True)
    for width in (WIDTH, 48):
        x = spelled.exact_rows(5, width, device=device)
        torch._dynamo.mark_dynamic(x, 1)
        codes, scale = compiled(x)
        # A GPU's Inductor compiles what is left, and rounds elsewhere than eager.
        assert codes.shape == x.shape
        assert device == "cuda" or compare((codes, scale), spelled.per_token(x)).equal
    assert graphs() == 1
    assert fused() == {"missed_quantizer": 1}


def test_many_rows(device, backend, graphs):
    fn = SITES["rms_norm_per_group_16"]
    compiled = torch.compile(fn, backend=backend)
    for rows in (2, 16384):
        check(compiled, fn, rows, device, lambda tensor: torch._dynamo.mark_dynamic(tensor, 0))
    assert graphs() == 1


class Norm(torch.nn.Module):
    """A norm whose eps is an attribute, and a factor that varies from call to call."""

    def __init__(self, device, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, device=device).to(torch.bfloat16))

    def forward(self, x, factor=None):
        x = x if factor is None else x * factor
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return spelled.per_token(self.weight * h.to(x.dtype))


INDUCTOR_OR_EAGER = pytest.mark.parametrize("executor", ["fusion_pass", "fusion_pass_eager"])


@INDUCTOR_OR_EAGER
@pytest.mark.parametrize("grad", [False, True])
def test_an_eps_that_dynamo_makes_an_input_becomes_a_constant(executor, grad, device, fused, graphs):
    """With dynamic=True, in graphs of inference and of training; each eps has a graph of its own."""
    module = Norm(device)
    compiled = torch.compile(module, backend=executor, dynamic=True)
    with torch.set_grad_enabled(grad):
        for eps, captured in ((1e-6, 1), (1e2, 2), (1e-6, 2)):
            module.eps = eps
            for rows in (5, 9):
                x = spelled.exact_rows(rows, WIDTH, device=device)
                (codes, scale), expected = compiled(x), module(x)
                assert compare((codes, scale.detach()), (expected[0], expected[1].detach())).equal
            assert graphs() == captured
    assert fused() == {"rms_norm_per_token": 2}


@INDUCTOR_OR_EAGER
def test_an_eps_beside_a_float_that_stays_an_input(executor, device, fused, graphs):
    module, x = Norm(device), spelled.exact_rows(5, WIDTH, device=device)
    compiled = torch.compile(module, backend=executor, dynamic=True)
    for factor in (2.0, 4.0, 0.5, 8.0):
        assert compare(compiled(x, factor), module(x, factor)).equal
    assert graphs() == 1
    assert fused() == {"rms_norm_per_token": 1}


def test_layers_of_one_code_and_several_eps(device, backend, fused, graphs):
    """At its second eps Dynamo makes an input of it, without being asked to."""
    x = spelled.exact_rows(5, WIDTH, device=device)
    for eps in (1e-6, 1e-5, 1e-2):
        module = Norm(device, eps)
        module.compile(backend=backend)
        assert compare(module(x), module.forward(x)).equal
    assert graphs() == 3
    assert fused() == {"rms_norm_per_token": 3}


def test_a_float_without_a_site_stays_an_input(device, backend, graphs):
    compiled = torch.compile(lambda x, factor: (x * factor, spelled.per_token(x)), backend=backend, dynamic=True)
    for factor in (2.0, 3.0, 4.0):
        compiled(spelled.exact_rows(5, WIDTH, device=device), factor)
    assert graphs() == 1
