"""One compilation serves any number of rows."""

import pytest
import torch

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


@pytest.mark.parametrize("fullgraph", [True, False])
def test_unmarked_rows_become_dynamic_once(fullgraph, device, backend, graphs):
    fn = SITES["add_rms_norm_per_token"]
    compiled = torch.compile(fn, backend=backend, fullgraph=fullgraph)
    for rows in row_counts(device):
        check(compiled, fn, rows, device)
    assert graphs() == 2


def test_many_rows(device, backend, graphs):
    fn = SITES["rms_norm_per_group_16"]
    compiled = torch.compile(fn, backend=backend)
    for rows in (2, 16384):
        check(compiled, fn, rows, device, lambda tensor: torch._dynamo.mark_dynamic(tensor, 0))
    assert graphs() == 1


class Norm(torch.nn.Module):
    def __init__(self, device):
        super().__init__()
        self.eps = 1e-6
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, device=device).to(torch.bfloat16), requires_grad=False)

    def forward(self, x):
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.eps)
        return spelled.per_token(self.weight * h.to(x.dtype))


@pytest.mark.parametrize("specialized", [False, True])
def test_an_eps_that_dynamo_makes_an_input_is_no_constant(specialized, device, backend, fused):
    module, x = Norm(device), spelled.exact_rows(5, WIDTH, device=device)
    with torch._dynamo.config.patch(specialize_float=specialized):
        torch.compile(module, backend=backend, dynamic=True)(x)
    assert ("rms_norm_per_token" in fused()) is specialized
