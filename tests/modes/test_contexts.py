"""Grad modes, autocast, graph breaks, nested and regional compilation, control flow."""

import pytest
import torch

from fusion_pass.testing import compare

import layers
import spelled

TWO_LAYERS = {"rms_norm_per_token": 1, "add_rms_norm_per_token": 1, "silu_mul_per_token": 2}
EACH_LAYER = {"rms_norm_per_token": 1, "silu_mul_per_token": 1}


@pytest.fixture
def model(device):
    return layers.model(2, device=device)


@pytest.fixture
def x(device):
    return spelled.exact_rows(5, layers.WIDTH, device=device)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients(mode, model, x, backend, fused):
    with mode():
        layers.assert_same([torch.compile(model, backend=backend, fullgraph=True)(x)], [model(x)])
    assert fused() == TWO_LAYERS


def test_autocast(x, device, backend, fused):
    """What autocast inserts is part of the graph: here bf16 products of f32 weights, and their rounding."""
    first, second = (torch.nn.Linear(layers.WIDTH, layers.WIDTH, device=device) for _ in range(2))

    def fn(x):
        with torch.autocast(device, torch.bfloat16):
            codes, scale = spelled.per_token(first(x))
            return codes, scale, second(codes.float() * scale)

    assert compare(torch.compile(fn, backend=backend, fullgraph=True)(x.float()), fn(x.float())).equal
    assert fused() == {"quant_per_token": 1}


def test_autocast_outside_the_compiled_function(x, device, backend, fused):
    layer = torch.nn.Linear(layers.WIDTH, layers.WIDTH, device=device)

    def fn(x):
        return spelled.per_token(layer(x))

    with torch.autocast(device, torch.bfloat16):
        assert compare(torch.compile(fn, backend=backend)(x.float()), fn(x.float())).equal
    assert fused() == {"quant_per_token": 1}


def test_a_graph_break_between_sites(model, x, backend, fused, graphs):
    def fn(x):
        x = model[0](x)
        torch._dynamo.graph_break()
        return model[1](x)

    layers.assert_same([torch.compile(fn, backend=backend)(x)], [fn(x)])
    assert graphs() == 2
    assert fused() == {"rms_norm_per_token": 2, "silu_mul_per_token": 2}


def test_a_compiled_function_calls_another(model, x, backend, fused, graphs):
    inner = torch.compile(model[0], backend=backend)

    def fn(x):
        return model[1](inner(x))

    layers.assert_same([torch.compile(fn, backend=backend)(x)], [model(x)])
    assert graphs() == 1
    assert fused() == TWO_LAYERS


def test_layers_compiled_one_by_one(x, device, backend, fused, graphs):
    """Regional compilation: repeated layers share one graph."""
    model = layers.model(4, device=device)
    expected = model(x)
    for layer in model:
        layer.compile(backend=backend, fullgraph=True)
    layers.assert_same([model(x)], [expected])
    assert graphs() == 1
    assert fused() == EACH_LAYER


def test_a_nested_compile_region(x, device, backend, fused):
    """Regions that repeat are compiled once, as a graph that the outer one calls."""
    weight = torch.randn(layers.WIDTH, device=device).to(torch.bfloat16)

    @torch.compiler.nested_compile_region
    def region(x, weight):
        codes, scale = spelled.per_token(spelled.rms_norm(x, weight))
        return (codes.float() * scale).to(x.dtype)

    def fn(x):
        for _ in range(3):
            x = region(x, weight)
        return x

    assert compare(torch.compile(fn, backend=backend, fullgraph=True)(x), fn(x)).equal
    assert fused() == {"rms_norm_per_token": 1}


def test_both_branches_of_a_condition(x, device, backend, fused):
    def fn(x):
        return torch.cond(x.sum() > 0, spelled.per_token, lambda x: spelled.per_token(spelled.silu_mul(x, x)), (x,))

    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    for operand in (x.abs(), -x.abs()):
        assert compare(compiled(operand), fn(operand)).equal
    assert fused() == {"quant_per_token": 1, "silu_mul_per_token": 1}


def test_the_body_of_a_loop(x, device, backend, fused):
    def body(count, x):
        codes, scale = spelled.per_token(x)
        return count + 1, (codes.float() * scale).to(x.dtype)

    def fn(x):
        return torch.while_loop(
            lambda count, x: count < 3, body, (torch.zeros((), dtype=torch.int64, device=device), x)
        )

    assert compare(torch.compile(fn, backend=backend, fullgraph=True)(x), fn(x)).equal
    assert fused() == {"quant_per_token": 1}
