"""On a GPU: Inductor's modes, with the fused kernels replayed in CUDA graphs."""

import pytest
import torch
from torch._dynamo.utils import counters

import fusion_pass
from fusion_pass.testing import compare

import layers
import spelled

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs and autotuning need a GPU")

WIDTH = 1024
TWO_LAYERS = {"rms_norm_per_token": 1, "add_rms_norm_per_token": 1, "silu_mul_per_token": 2}


@pytest.fixture(autouse=True)
def _registered():
    fusion_pass.register(strict=True)
    yield
    fusion_pass.unregister()


def block(x, r, w):
    h = x + r
    return (*spelled.per_token(spelled.rms_norm(h, w)), *spelled.column(*spelled.per_group(spelled.silu_mul(x, r))), h)


SITES = {"add_rms_norm_per_token": 1, "silu_mul_per_group_128_column": 1}


def operands(rows):
    x, r = (spelled.exact_rows(rows, WIDTH, device="cuda") for _ in range(2))
    return x, r, torch.randn(WIDTH, device="cuda").to(torch.bfloat16)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_modes_equal_eager_in_every_run(mode, fullgraph, fused):
    compiled = torch.compile(block, mode=mode, fullgraph=fullgraph)
    # The first runs warm up and record, later ones replay with new inputs.
    for _ in range(5):
        given = operands(64)
        torch.compiler.cudagraph_mark_step_begin()
        result = compare([output.clone() for output in compiled(*given)], list(block(*given)))
        assert result.equal, result
    assert fused() == SITES
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_the_backend_takes_a_mode(fused):
    fusion_pass.unregister()
    compiled = torch.compile(block, backend="fusion_pass", mode="reduce-overhead")
    for _ in range(4):
        given = operands(64)
        torch.compiler.cudagraph_mark_step_begin()
        assert compare([output.clone() for output in compiled(*given)], list(block(*given))).equal
    assert fused() == SITES
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_replays_of_several_sizes(fused, graphs):
    compiled = torch.compile(block, mode="reduce-overhead")
    for _ in range(3):
        for rows in (2, 17, 64, 1000):
            given = operands(rows)
            for tensor in given[:2]:
                torch._dynamo.mark_dynamic(tensor, 0)
            torch.compiler.cudagraph_mark_step_begin()
            result = compare([output.clone() for output in compiled(*given)], list(block(*given)))
            assert result.equal, (rows, result)
    assert graphs() == 1
    assert counters["inductor"]["cudagraph_skips"] == 0


def test_training_replays(fused):
    model = layers.model(2, device="cuda")
    compiled = torch.compile(model, mode="reduce-overhead")
    with torch.enable_grad():
        for _ in range(4):
            gradients = []
            x = spelled.exact_rows(16, layers.WIDTH, device="cuda")
            for fn in (compiled, model):
                model.zero_grad()
                torch.compiler.cudagraph_mark_step_begin()
                fn(x).float().sum().backward()
                gradients.append([parameter.grad.clone() for parameter in model.parameters()])
            layers.assert_same(*gradients)
    assert fused() == {**TWO_LAYERS, "quant_per_token": 4}


def test_kernels_compiled_by_worker_processes(fused):
    """Inductor hands Triton kernels, the fused ones too, to a pool of processes."""
    given = operands(64)
    with torch._inductor.config.patch(compile_threads=4):
        assert compare(torch.compile(block)(*given), block(*given)).equal
    assert fused() == SITES
