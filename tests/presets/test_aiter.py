"""aiter's flatten and norm kernels: against their arithmetic in plain PyTorch, scales looked up where they are stored."""

import pytest
import torch

from fusion_pass import layouts
from fusion_pass.presets import fused_flatten_fp8_group_quant, fused_rms_fp8_group_quant
from fusion_pass.testing import compare

import awkward

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
E4M3, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz

# Triton's interpreter takes milliseconds for each program.
SHAPES = [(0, 3, 128), (1, 16, 128), (13, 3, 384)]
if torch.cuda.is_available():
    SHAPES += [(32, 16, 128), (256, 16, 128), (16, 1, 7168)]


def group_quant(y, group, dtype=E4M3):
    """Codes and (M, G) scales of float32 rows: s = max(amax, 1e-10) / MAX, divided once, multiplied by 1 / s."""
    bound = torch.finfo(dtype).max
    blocks = y.float().view(y.shape[0], y.shape[1] // group, group)
    amax = blocks.abs().amax(-1)
    amax = torch.where(amax < 1e-10, 1e-10, amax)
    scale = amax / awkward.filled(bound, amax)
    codes = blocks * (awkward.filled(1.0, scale) / scale).unsqueeze(-1)
    return codes.clamp(-bound, bound).to(dtype).view(y.shape), scale


def norm(x, weight, eps):
    squares = (x * x).sum(-1, keepdim=True)
    return x * torch.rsqrt(squares / awkward.filled(x.shape[-1], squares) + eps) * weight.float()


def wholes(*shape, device, dtype=BF16):
    return torch.randint(-15, 16, shape, device=device).to(dtype)


def check_stored(scale, logical):
    """The scale of row m, group j lies at j*M + m, whatever shape and strides present it."""
    rows, groups = logical.shape
    assert scale.shape == logical.shape
    if logical.numel():
        stored = awkward.storage(scale)
        m, j = torch.meshgrid(torch.arange(rows), torch.arange(groups), indexing="ij")
        at = (j * rows + m).to(scale.device)
        assert compare(stored[at], logical).equal


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize(("rows", "segments", "length"), SHAPES)
def test_flatten(rows, segments, length, dtype, device):
    x = torch.randn(rows, segments, length, device=device).to(dtype)
    codes, scale = fused_flatten_fp8_group_quant(x)
    expected, logical = group_quant(x.reshape(rows, segments * length), 128)
    assert codes.is_contiguous() and scale.is_contiguous()
    assert compare((codes, scale), (expected, logical)).equal

    transposed, strided = fused_flatten_fp8_group_quant(x, transpose_scale=True)
    assert compare((transposed, strided), (expected, logical)).equal
    # Where one dim has a single element, both orders are the same.
    assert rows < 2 or strided.stride() == (1, rows)
    check_stored(strided, logical)

    _, viewed = fused_flatten_fp8_group_quant(x, transpose_scale=True, is_x_scale_strided=False)
    assert viewed.is_contiguous()
    check_stored(viewed, logical)
    restored = layouts.unpack_transposed_view(viewed)
    assert compare(restored, logical).equal
    assert restored.data_ptr() == viewed.data_ptr()


def test_the_view_is_scrambled_where_it_is_not_transposed_back(device):
    x = torch.randn(6, 2, 256, device=device).to(BF16)
    _, logical = fused_flatten_fp8_group_quant(x)
    _, viewed = fused_flatten_fp8_group_quant(x, transpose_scale=True, is_x_scale_strided=False)
    assert not torch.equal(viewed, logical)


@pytest.mark.parametrize("group", [32, 96, 128])
@pytest.mark.parametrize("dtype", [E4M3, FNUZ], ids=str)
def test_flatten_awkward_values(group, dtype, device):
    x = awkward.rows(2 * 384, device).view(-1, 2, 384)
    for source in (x, x.float()):
        actual = fused_flatten_fp8_group_quant(source, group, dtype)
        assert compare(tuple(actual), group_quant(source.flatten(1), group, dtype)).equal


def test_a_group_of_zeros_has_the_scale_of_the_floor(device):
    codes, scale = fused_flatten_fp8_group_quant(torch.zeros(2, 1, 256, device=device))
    assert not codes.float().any()
    floor = torch.tensor(1e-10, device=device) / torch.tensor(448.0, device=device)
    assert torch.equal(scale, floor.expand(2, 2))


STRIDED = {
    "heads transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "values transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "all reversed": lambda x: x.permute(2, 1, 0).contiguous().permute(2, 1, 0),
    "a slice of longer segments": lambda x: torch.cat([x, x + 1], -1)[..., : x.shape[-1]],
    "a slice of more segments": lambda x: torch.cat([x, x + 1], 1)[:, : x.shape[1]],
    "every second row": lambda x: x.repeat_interleave(2, 0)[::2],
    "one row, expanded": lambda x: x[:1].expand(x.shape),
    "every second value": lambda x: x.repeat_interleave(2, 2)[..., ::2],
}


@pytest.mark.parametrize("strided", STRIDED)
@pytest.mark.parametrize("transpose_scale", [False, True])
def test_flatten_of_any_strides(strided, transpose_scale, device):
    x = STRIDED[strided](torch.randn(7, 3, 128, device=device).to(BF16))
    actual = fused_flatten_fp8_group_quant(x, transpose_scale=transpose_scale)
    assert actual.codes.is_contiguous()
    assert compare(tuple(actual), group_quant(x.reshape(7, 384), 128)).equal


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: fused_flatten_fp8_group_quant(x[..., :96]), r"group_size is 128; allowed: a divisor of .* 96 of x"),
        (lambda x: fused_flatten_fp8_group_quant(x, 0), r"group_size is 0; allowed"),
        (
            lambda x: fused_flatten_fp8_group_quant(x[0]),
            r"shape of x is \(4, 128\); allowed: 3 dimensions \(M, N1, N2\)",
        ),
        (lambda x: fused_flatten_fp8_group_quant(x.double()), r"x is torch.float64; allowed"),
        # Groups of a ragged row: the last one would be shorter.
        (lambda x: fused_rms_fp8_group_quant(x[0, :, :100], x[0, 0, :100], 1e-6), r"rows of 100 values.* length 128"),
        (lambda x: fused_rms_fp8_group_quant(x, x[0, 0], 1e-6), r"shape of inp1 is \(2, 4, 128\)"),
        (lambda x: fused_rms_fp8_group_quant(x[0], x[0, 0], 1e-6, x[0]), r"inp2_weight is None; allowed"),
        (lambda x: fused_rms_fp8_group_quant(x[0], x[0, 0], 1e-6, inp2_epsilon=1.0), r"inp2_epsilon is given; allowed"),
        (lambda x: fused_rms_fp8_group_quant(x[0], x[0, 0, :64], 1e-6), r"weight has shape \(64,\); allowed: \(128,\)"),
        (lambda x: fused_rms_fp8_group_quant(x[0], x[0, 0], 1e-6, res1=x[0, :2]), r"residual has shape \(2, 128\)"),
    ],
)
def test_bad_input_is_named(call, named, device):
    with pytest.raises(ValueError, match=named):
        call(torch.randn(2, 4, 128, device=device))


@pytest.mark.parametrize("shape", [(0, 256), (1, 128), (5, 896), (32, 1536)], ids=str)
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_rms(shape, residual, device):
    x, added, other = (wholes(*shape, device=device) for _ in range(3))
    # Some sums have nine bits, more than bfloat16, which the norm must see; all their squares still add up exactly.
    added[:, ::64] *= 32
    weight, second = torch.randn(shape[1], device=device).to(BF16), torch.randn(shape[1], device=device)
    h = x.float() + added.float() if residual else x.float()
    n = norm(h, weight, 1e-6)
    expected, logical = group_quant(n, 128)
    (codes, scale), value, normed, total = fused_rms_fp8_group_quant(
        x, weight, 1e-6, other, second, 1e-5, res1=added if residual else None, output_unquantized_inp1=True
    )
    assert compare((codes, scale, value), (expected, logical, n.to(BF16))).equal
    assert compare(normed, norm(other.float(), second, 1e-5).to(BF16)).equal
    assert compare(total, h.to(BF16)).equal if residual else total is None


def test_rms_returns_nothing_that_is_not_asked_for(device):
    quantized, value, normed, total = fused_rms_fp8_group_quant(
        wholes(3, 256, device=device), torch.ones(256, device=device), 1e-6
    )
    assert quantized.codes.shape == (3, 256)
    assert value is None and normed is None and total is None


@pytest.mark.parametrize("rows", [1, 7])
def test_transposed_scales_of_rms(rows, device):
    x, weight = wholes(rows, 640, device=device), torch.randn(640, device=device)
    expected, logical = group_quant(norm(x.float(), weight, 1e-6), 128)
    (codes, viewed), *_ = fused_rms_fp8_group_quant(x, weight, 1e-6, transpose_scale=True)
    assert compare(codes, expected).equal
    assert viewed.is_contiguous()
    check_stored(viewed, logical)
    (_, strided), *_ = fused_rms_fp8_group_quant(x, weight, 1e-6, transpose_scale=True, is_x_scale_strided=True)
    assert compare(strided, logical).equal
    check_stored(strided, logical)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_rms_awkward_values(dtype, device):
    x, weight = awkward.rows(640, device, dtype, wholes=True), torch.randn(640, device=device)
    quantized, *_ = fused_rms_fp8_group_quant(x, weight, 1e-6, group_size=64)
    assert compare(tuple(quantized), group_quant(norm(x.float(), weight, 1e-6), 64)).equal
