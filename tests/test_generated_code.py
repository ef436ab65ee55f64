"""On a GPU: Inductor's generated code launches the fused kernels itself."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import fusion_pass
from fusion_pass.testing import compare

import cases
import spelled

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="generated code launches kernels on a GPU only")

BF16 = torch.bfloat16


def block(x, r, w, gate_up):
    h = x + r
    q, s = spelled.per_token(spelled.rms_norm(h, w))
    g, t = spelled.column(*spelled.per_group(spelled.silu_mul(*gate_up.chunk(2, -1))))
    return q, s, g, t, h, *spelled.per_token(h)


@pytest.mark.parametrize("rows", [1, 64])
@pytest.mark.parametrize("dynamic", [False, None])
def test_kernels_are_launched_by_generated_code(rows, dynamic):
    x, r = (spelled.exact_rows(rows, 1024, device="cuda") for _ in range(2))
    w = torch.randn(1024, device="cuda").to(BF16)
    gate_up = torch.randn(rows, 2048, device="cuda").to(BF16)
    if dynamic is None and rows > 1:
        for tensor in (x, r, gate_up):
            torch._dynamo.mark_dynamic(tensor, 0)
    with fusion_pass.enabled(strict=True):
        fused, (code, *_) = run_and_get_code(torch.compile(block, dynamic=dynamic), x, r, w, gate_up)
    assert compare(fused, block(x, r, w, gate_up)).equal
    called = code[code.index("def call(") :]
    assert called.count("fused_quant_kernel") == 3
    assert "torch.ops.fusion_pass" not in called


def mxfp8(x):
    blocks = x.float().unflatten(-1, (-1, 32))
    biased = torch.clamp((blocks.abs().amax(-1, keepdim=True).view(torch.int32) >> 23) - 8, min=1)
    scaled = blocks / (biased << 23).view(torch.float32)
    return scaled.clamp(-448.0, 448.0).to(torch.float8_e4m3fn).flatten(-2), biased.to(torch.uint8).squeeze(-1)


def both_ways(x):
    return (*mxfp8(x * 2), *mxfp8((x * 2).t().contiguous()))


def by_columns(x):
    return mxfp8(x.t().contiguous())


@pytest.mark.parametrize("fn", [both_ways, by_columns])
def test_a_matrix_and_its_transpose_are_one_launch(fn):
    x = torch.randn(96, 320, device="cuda").to(BF16)
    with fusion_pass.enabled(strict=True):
        fused, (code, *_) = run_and_get_code(torch.compile(fn, dynamic=False), x)
    assert compare(tuple(fused), tuple(fn(x))).equal
    called = code[code.index("def call(") :]
    assert called.count("cast_transpose_kernel") == 1
    assert "torch.ops.fusion_pass" not in called


@pytest.mark.parametrize("fn", [cases.per_group_tma, cases.per_group_packed, cases.mxfp8_blocked, cases.mxfp8_both])
def test_padded_scales_of_any_number_of_rows(fn):
    compiled = torch.compile(lambda x: fn(x, None))
    for rows in (320, 640, 32, 8224):
        x = torch.randn(rows + (fn is not cases.mxfp8_both), 768, device="cuda").to(BF16)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        with fusion_pass.enabled(strict=True):
            fused, codes = run_and_get_code(compiled, x)
        assert compare(tuple(fused), tuple(fn(x, None))).equal, rows
        for code in codes:
            called = code[code.index("def call(") :]
            assert called.count("fused_quant_kernel") + called.count("cast_transpose_kernel") == 1
            assert "triton_poi" not in called


def test_bytes_of_subnormal_scales_are_those_of_their_logarithms():
    """Inductor has a rule for these bytes, of CUDA alone, that gives subnormal scales others."""
    x = (torch.randn(128, 320, device="cuda") * 2.0 ** torch.arange(-130, -114, 0.125, device="cuda")[:, None]).to(BF16)
    with fusion_pass.enabled(strict=True):
        fused, (code, *_) = run_and_get_code(torch.compile(cases.mxfp8_both, dynamic=False), x, None)
    assert compare(tuple(fused), cases.mxfp8_both(x, None)).equal
    assert "packed_cast_transpose_kernel" in code[code.index("def call(") :]
