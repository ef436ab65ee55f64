"""Presets called inside compiled code: one graph, with the shapes and strides that eager calls have."""

import pytest
import torch
from torch.utils import _pytree as pytree

from fusion_pass import presets
from fusion_pass.presets import ScaleFormat
from fusion_pass.testing import compare

CALLS = {
    "flatten": lambda x, w: presets.fused_flatten_fp8_group_quant(x.view(-1, 4, 128), transpose_scale=True),
    "flatten viewed": lambda x, w: presets.fused_flatten_fp8_group_quant(
        x.view(-1, 4, 128), transpose_scale=True, is_x_scale_strided=False
    ),
    "rms": lambda x, w: presets.fused_rms_fp8_group_quant(
        x, w, 1e-6, x, w, 1e-6, res1=x, output_unquantized_inp1=True, transpose_scale=True
    ),
    "rmsnorm": lambda x, w: presets.rmsnorm_quant(x, w, 1e-6, 64, shuffle_scale=True),
    "add rmsnorm": lambda x, w: presets.add_rmsnorm_quant(x, x, w, 1e-6),
    "silu contiguous": lambda x, w: presets.silu_and_mul_contiguous_fp8_post_quant(x),
    "silu packed": lambda x, w: presets.silu_and_mul_contiguous_fp8_post_quant(x, 32, ScaleFormat.UE8M0_WORDS),
    "silu masked": lambda x, w: presets.silu_and_mul_masked_fp8_post_quant(x.unsqueeze(0)),
    "rowwise": lambda x, w: presets.fp8_rowwise_2d_scale_and_cast(x, True),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_preset_compiles_to_one_graph(name, dynamic, device):
    call, weight = CALLS[name], torch.randn(512, device=device).to(torch.bfloat16)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for rows in (5, 9):
        x = torch.randint(-15, 16, (rows, 512), device=device).to(torch.bfloat16)
        if dynamic:
            torch._dynamo.mark_dynamic(x, 0)
        actual, expected = compiled(x, weight), call(x, weight)
        assert compare(actual, expected).equal
        strides = [[t.stride() for t in pytree.tree_leaves(result) if t is not None] for result in (actual, expected)]
        assert strides[0] == strides[1]
