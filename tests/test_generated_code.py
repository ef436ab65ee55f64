"""On a GPU: Inductor's generated code launches the fused kernels itself."""

import pytest
import torch
from torch._inductor.utils import run_and_get_code

import fusion_pass
from fusion_pass.testing import compare

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
