"""Quantizers of a matrix and of its transpose: read in place, and once where both are wanted."""

import pytest
import torch

from fusion_pass.backends import collecting
from fusion_pass.sites import Report
from fusion_pass.testing import compare

import spelled


def mxfp8(x, offset=8):
    blocks = x.float().unflatten(-1, (-1, 32))
    biased = torch.clamp((blocks.abs().amax(-1, keepdim=True).view(torch.int32) >> 23) - offset, min=1)
    scaled = blocks / (biased << 23).view(torch.float32)
    return scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).flatten(-2), biased.to(torch.uint8).squeeze(-1)


def both(x):
    return (*mxfp8(x), *mxfp8(x.t().contiguous()))


def after_a_norm(x, w):
    y = spelled.rms_norm(x, w)
    return (*mxfp8(y), *mxfp8(y.t().contiguous()))


def compiled(fn, *tensors, dynamic=False):
    torch._dynamo.reset()
    report = Report()
    result = torch.compile(fn, backend=collecting(report), dynamic=dynamic)(*tensors)
    assert compare(tuple(result), tuple(fn(*tensors))).equal
    return report


@pytest.mark.parametrize(
    ("fn", "names"),
    [
        (both, ["quant_mxfp8_both_ways"]),
        (lambda x: (*mxfp8(x.t().contiguous()), *mxfp8(x)), ["quant_mxfp8_both_ways"]),
        (lambda x: mxfp8(x.transpose(-2, -1).contiguous()), ["quant_mxfp8_by_columns"]),
        (lambda x: mxfp8((x * 2).mT.contiguous()), ["quant_mxfp8_by_columns"]),
        (lambda x: spelled.per_group(x.t().contiguous(), 32), ["quant_per_group_32_by_columns"]),
        # Other quantizers, whole rows, and rows that are no whole blocks keep a read each.
        (lambda x: (*mxfp8(x), *mxfp8(x.t().contiguous(), 7)), ["quant_mxfp8", "quant_mxfp8_by_columns"]),
        (lambda x: (*mxfp8(x), *spelled.per_token(x.t().contiguous())), ["quant_mxfp8", "quant_per_token"]),
        (lambda x: mxfp8(x[:, :80].t().contiguous()), ["quant_mxfp8"]),
        (lambda x: mxfp8(x.unsqueeze(0).mT.contiguous()), ["quant_mxfp8"]),
        # The same values in rows of another length are another matrix.
        (lambda x: both(x.view(-1, 32)), ["quant_mxfp8", "quant_mxfp8_by_columns"]),
        (lambda x: both(x.view(32, -1)), ["quant_mxfp8", "quant_per_token_ue8m0_bytes"]),
        (lambda x: (*mxfp8(x), *mxfp8(x.view(-1, 64).t().contiguous())), ["quant_mxfp8", "quant_mxfp8_by_columns"]),
        # Without a copy eager code's own codes are column-major.
        (lambda x: mxfp8(x.permute(1, 0)), []),
    ],
)
def test_transposes(fn, names, device):
    report = compiled(fn, torch.randn(64, 96, device=device).to(torch.bfloat16))
    assert sorted(site.name for site in report.fused) == sorted(names)


def test_one_op_serves_both_casts(device):
    (site,) = compiled(both, torch.randn(64, 64, device=device).to(torch.bfloat16)).fused
    assert site.shared_by == 2


@pytest.mark.parametrize("sizes", [(32, 96), (96, 32), (32, 32)])
def test_sides_of_one_block(sizes, device):
    """One direction's rows are a block each."""
    (site,) = compiled(both, torch.randn(sizes, device=device).to(torch.bfloat16)).fused
    assert site.name == "quant_mxfp8_both_ways"


def test_whole_rows_of_the_transpose_alone(device):
    x = torch.randn(64, 128, device=device).to(torch.bfloat16)
    (site,) = compiled(lambda x: spelled.per_token(x.t().contiguous()), x).fused
    assert site.name == "quant_per_token"


def test_what_a_norm_computes_is_read_by_columns(device):
    x, w = spelled.exact_rows(64, 64, device=device), torch.randn(64, device=device).to(torch.bfloat16)
    names = [site.name for site in compiled(after_a_norm, x, w).fused]
    assert names == ["rms_norm_mxfp8", "quant_mxfp8_by_columns"]


@pytest.mark.parametrize(
    ("fn", "names"),
    [
        (both, ["quant_mxfp8_both_ways"]),
        (lambda x: mxfp8(x.t().contiguous()), ["quant_mxfp8_by_columns"]),
        (lambda x: spelled.per_group(x.t().contiguous(), 32), ["quant_per_group_32_by_columns"]),
        # Blocks that are no parts of the transpose's rows, or not seen to be.
        (lambda x: mxfp8(x.t().contiguous().view(48, -1)), ["quant_per_token_ue8m0_bytes"]),
        (lambda x: mxfp8(x.t().contiguous().view(-1, 32)), ["quant_per_token_ue8m0_bytes"]),
        (lambda x: mxfp8(x.t().contiguous().view(-1, 64)), ["quant_mxfp8"]),
    ],
)
def test_a_number_of_rows_that_is_not_known(fn, names, device):
    torch._dynamo.reset()
    report = Report()
    fused = torch.compile(fn, backend=collecting(report))
    for rows in (128, 192):
        x = torch.randn(rows, 96, device=device).to(torch.bfloat16)
        torch._dynamo.mark_dynamic(x, 0)
        assert compare(tuple(fused(x)), tuple(fn(x))).equal
    # Both numbers are one graph's.
    assert sorted(site.name for site in report.fused) == sorted(names)
