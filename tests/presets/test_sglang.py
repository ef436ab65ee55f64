"""sglang's norm kernels, per row and per group: against their arithmetic in plain PyTorch."""

import pytest
import torch

from fusion_pass.presets import add_rmsnorm_quant, rmsnorm_quant
from fusion_pass.testing import compare

import awkward

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz


def expected_quant(h, weight, eps, group=0, dtype=E4M3, gemma=False):
    """Float32 rows h: the norm is not rounded, amax is multiplied by f32(1 / MAX), values by 1 / scale."""
    bound = torch.finfo(dtype).max
    squares = (h * h).sum(-1, keepdim=True)
    root = torch.rsqrt(squares / awkward.filled(h.shape[-1], squares) + eps)
    n = h * root * ((1 + weight.float()) if gemma else weight.float())
    blocks = n.view(h.shape[0], -1, group) if group else n.unsqueeze(1)
    amax = blocks.abs().amax(-1)
    amax = torch.where(amax < 1e-10, 1e-10, amax)
    scale = amax * (awkward.filled(1.0, amax) / awkward.filled(bound, amax))
    codes = blocks * (awkward.filled(1.0, scale) / scale).unsqueeze(-1)
    return codes.clamp(-bound, bound).to(dtype).view(h.shape), scale


def wholes(*shape, device, dtype=BF16):
    return torch.randint(-15, 16, shape, device=device).to(dtype)


@pytest.mark.parametrize("shape", [(0, 256), (1, 128), (7, 640), (13, 1000), (3, 3584)], ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_per_token(shape, dtype, device):
    x, weight = wholes(*shape, device=device, dtype=dtype), torch.randn(shape[1], device=device).to(dtype)
    if shape[0] == 0:
        quantized = rmsnorm_quant(x, weight, 1e-6)
        assert quantized.codes.shape == shape and quantized.scale.shape == (0, 1)
        return
    quantized = rmsnorm_quant(x, weight, 1e-6)
    assert quantized.scale.shape == (shape[0], 1)
    assert compare(tuple(quantized), expected_quant(x.float(), weight, 1e-6)).equal


@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("gemma", [False, True], ids=["plain", "gemma"])
@pytest.mark.parametrize("dtype", [E4M3, FNUZ], ids=str)
def test_residual(group, gemma, dtype, device):
    x, residual = (wholes(5, 896, device=device) for _ in range(2))
    # Some sums have nine bits, more than bfloat16, which the norm must see; all their squares still add up exactly.
    residual[:, ::64] *= 32
    before = residual.clone()
    weight = torch.randn(896, device=device).to(BF16)
    h = x.float() + residual.float()
    assert not torch.equal(h, h.to(BF16).float())
    quantized, total = add_rmsnorm_quant(x, residual, weight, 1e-5, group, dtype, gemma_norm=gemma)
    assert compare(tuple(quantized), expected_quant(h, weight, 1e-5, group, dtype, gemma)).equal
    assert compare(total, h.to(BF16)).equal
    assert torch.equal(residual, before) and total.data_ptr() != residual.data_ptr()


@pytest.mark.parametrize("rows", [0, 1, 2, 11])
@pytest.mark.parametrize("group", [0, 32, 128])
def test_shuffled_scales_are_transposed(rows, group, device):
    x, weight = wholes(rows, 384, device=device), torch.randn(384, device=device).to(BF16)
    plain = rmsnorm_quant(x, weight, 1e-6, group)
    codes, scale = rmsnorm_quant(x, weight, 1e-6, group, shuffle_scale=True)
    assert compare((codes, scale), tuple(plain)).equal
    groups = 384 // group if group else 1
    assert scale.shape == (rows, groups)
    assert scale.stride() == (1, rows) or rows < 2 or groups == 1
    if rows:
        m, j = torch.arange(rows)[:, None], torch.arange(groups)
        assert compare(awkward.storage(scale)[(j * rows + m).to(device)], plain.scale).equal


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_awkward_values(group, dtype, device):
    x, weight = awkward.rows(640, device, dtype, wholes=True), torch.randn(640, device=device).to(dtype)
    quantized = rmsnorm_quant(x, weight, 1e-6, group)
    assert compare(tuple(quantized), expected_quant(x.float(), weight, 1e-6, group)).equal
    # A row of zeros has the scale of the floor.
    floor = torch.tensor(1e-10, device=device) * (torch.tensor(1.0, device=device) / torch.tensor(448.0, device=device))
    assert (quantized.scale[-1] == floor).all()


def test_random_rows_stay_in_budget(device):
    """The order of the sum of squares may differ: at most 0.1 % of the codes."""
    x, weight = torch.randn(16, 1024, device=device).to(BF16), torch.randn(1024, device=device).to(BF16)
    codes, scale = rmsnorm_quant(x, weight, 1e-6)
    expected, expected_scale = expected_quant(x.float(), weight, 1e-6)
    assert compare(codes, expected).different <= 1e-3 * codes.numel()
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x, w: rmsnorm_quant(x, w, 1e-6, 48), r"group_size is 48; allowed: 0, 32, 64, 128"),
        (lambda x, w: rmsnorm_quant(x[:, :200], w[:200], 1e-6, 128), r"rows of 200 values.* length 128"),
        (lambda x, w: rmsnorm_quant(x[0], w, 1e-6), r"shape of x is \(384,\); allowed: 2 dimensions \(M, N\)"),
        (lambda x, w: add_rmsnorm_quant(x, x[:2], w, 1e-6), r"residual has shape \(2, 384\); allowed: \(4, 384\)"),
        (lambda x, w: rmsnorm_quant(x, w.long(), 1e-6), r"weight is torch.int64; allowed"),
        (lambda x, w: rmsnorm_quant(x, w, float("nan")), r"eps is nan; allowed: a finite number"),
    ],
)
def test_bad_input_is_named(call, named, device):
    with pytest.raises(ValueError, match=named):
        call(torch.randn(4, 384, device=device), torch.randn(384, device=device))
