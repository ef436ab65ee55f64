"""What eager PyTorch computes, measured: the facts that specs are filled from."""

import pytest
import torch

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="states what CUDA kernels compute")


@pytest.mark.parametrize("divisor", [448.0, 57344.0, 127.0, 6.0, 5120.0])
def test_a_tensor_divided_by_a_python_scalar(divisor, device):
    """CUDA multiplies by the reciprocal rounded to float32; a CPU divides."""
    x = torch.rand(1 << 20, device=device) * 100
    quotient = x / divisor
    divided = x / torch.full_like(x, divisor)
    multiplied = x * torch.tensor(1.0, device=device).div(torch.full((), divisor, device=device))
    assert torch.equal(quotient, multiplied if device == "cuda" else divided)
    share = (quotient == divided).float().mean().item()
    print(f"{device}: x / {divisor:g} is the correctly rounded quotient for {share:.1%} of the values")


@on_gpu
@pytest.mark.parametrize("shape", [(7, 5120), (4096, 7168), (333, 640)])
def test_the_mean_on_cuda_multiplies_by_a_rounded_quotient_of_counts(shape):
    x = torch.randint(0, 16, shape, device="cuda").float()
    outputs = torch.tensor(float(shape[0]), device="cuda")
    factor = outputs / torch.tensor(float(shape[0] * shape[1]), device="cuda")
    assert torch.equal(x.mean(-1), x.sum(-1) * factor)


@on_gpu
def test_a_tensor_divided_by_a_tensor_is_correctly_rounded():
    x, y = (torch.rand(1 << 20, device="cuda") + 0.1 for _ in range(2))
    assert torch.equal(x / y, (x.double() / y.double()).float())
