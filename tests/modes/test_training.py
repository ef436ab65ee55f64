"""Forward and backward passes: sites fuse in both, and the gradients are eager's."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import layers
import spelled

FORWARD = {"rms_norm_per_token": 1, "add_rms_norm_per_token": 1, "silu_mul_per_token": 2}
BACKWARD = {"quant_per_token": 4}


@pytest.fixture(autouse=True)
def _with_gradients():
    with torch.enable_grad():
        yield


@pytest.fixture
def model(device):
    return layers.model(2, device=device)


def step(fn, model, device):
    """The output, the gradients of the input and of the parameters."""
    torch.manual_seed(1)
    x = spelled.exact_rows(5, layers.WIDTH, device=device).requires_grad_()
    model.zero_grad()
    y = fn(x)
    y.float().sum().backward()
    return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


def test_forward_and_backward_fuse(model, device, backend, fused):
    layers.assert_same(
        step(torch.compile(model, backend=backend, fullgraph=True), model, device), step(model, model, device)
    )
    assert fused() == {**FORWARD, **BACKWARD}


def test_a_checkpointed_layer_fuses(model, device, backend, fused):
    def fn(x):
        return model[1](checkpoint(model[0], x, use_reentrant=False))

    layers.assert_same(step(torch.compile(fn, backend=backend, fullgraph=True), model, device), step(fn, model, device))
    counted = fused()
    # Since torch 2.12 the backward pass recomputes the norm and its quantization, before that what follows them.
    assert counted.pop("rms_norm_per_token") in (1, 2)
    assert counted == {"add_rms_norm_per_token": 1, "silu_mul_per_token": 2, **BACKWARD}


def test_layers_compiled_one_by_one(model, device, backend, fused, graphs):
    compiled = [torch.compile(layer, backend=backend, fullgraph=True) for layer in model]
    layers.assert_same(step(lambda x: compiled[1](compiled[0](x)), model, device), step(model, model, device))
    assert fused() == {"rms_norm_per_token": 1, "silu_mul_per_token": 1, "quant_per_token": 2}


def test_rows_of_any_number(model, device, backend, graphs):
    compiled = torch.compile(model, backend=backend)
    for rows in (5, 9, 33):
        x = spelled.exact_rows(rows, layers.WIDTH, device=device)
        torch._dynamo.mark_dynamic(x, 0)
        results = []
        for fn in (compiled, model):
            y = fn(x.requires_grad_())
            results.append([y.detach(), *torch.autograd.grad(y.float().sum(), x)])
        layers.assert_same(*results)
    assert graphs() == 1
