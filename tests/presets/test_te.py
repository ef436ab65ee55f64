"""TransformerEngine pull request 422: MXFP4 of a matrix and its transpose, against the arithmetic written out."""

import pytest
import torch

from fusion_pass import layouts, presets
from fusion_pass.cast_transpose import BlockScales


def written_out(x):
    """Data and scales of the rows of a matrix, one step at a time."""
    blocks = x.float().unflatten(-1, (-1, 32))
    amax = blocks.abs().amax(-1, keepdim=True)
    rounded = ((amax.view(torch.int32) + 0x200000) & 0x7F800000).view(torch.float32)
    exponent = torch.floor(torch.log2(rounded.clamp(min=1e-45))).clamp(max=1e4).to(torch.int32) - 2
    exponent = torch.where(amax == 0, 0, exponent.clamp(-127, 127))
    # 2^-exponent by its bits: pow is not exact on every device.
    scaled = blocks.double() * ((1023 - exponent.to(torch.int64)) << 52).view(torch.float64)
    code = sum((scaled.abs() >= m).to(torch.uint8) for m in (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0))
    code = (code | (scaled < 0).to(torch.uint8) << 3).flatten(-2)
    return code[:, ::2] | code[:, 1::2] << 4, (exponent + 127).to(torch.uint8).squeeze(-1)


def values(rows, columns, device, dtype=torch.bfloat16):
    x = torch.randn(rows, columns) * torch.logspace(-4, 4, columns)
    x[:, 5], x[3], x[7, :4] = 0, 0, torch.tensor([0.25, -0.25, -0.0, 4.0])
    return x.to(dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(32, 32), (96, 160), (64, 256)], ids=str)
def test_both_directions(shape, dtype, device):
    x = values(*shape, device, dtype)
    result = presets.te_cast_transpose_mxfp4(x, scale_layout=BlockScales.LINEAR)
    for (data, scale), source in zip((result[:2], result[2:]), (x, x.t().contiguous()), strict=True):
        wanted, byte = written_out(source)
        assert torch.equal(scale, byte)
        assert torch.equal(data, wanted)


def test_layouts(device):
    x = values(96, 192, device)
    linear = presets.te_cast_transpose_mxfp4(x, scale_layout=BlockScales.LINEAR)
    padded = presets.te_cast_transpose_mxfp4(x)
    shuffled = presets.te_cast_transpose_mxfp4(x, scale_layout=BlockScales.SHUFFLED, shuffle_rowwise_data=True)
    assert padded.rowwise_scale.shape == padded.columnwise_scale.shape == (256, 8)
    assert torch.equal(padded.rowwise_scale[:96, :6], linear.rowwise_scale)
    assert padded.rowwise_scale[96:].eq(0).all()
    assert padded.rowwise_scale[:, 6:].eq(0).all()
    assert torch.equal(layouts.unpack_mx_shuffled(shuffled.rowwise_scale, 96, 6), linear.rowwise_scale)
    assert torch.equal(layouts.unpack_mx_shuffled(shuffled.columnwise_scale, 192, 3), linear.columnwise_scale)
    packed = layouts.pack_mfma_shuffled(linear.rowwise)
    assert torch.equal(shuffled.rowwise.flatten(), packed.flatten())
    assert torch.equal(shuffled.columnwise, linear.columnwise)


def test_one_direction(device):
    x = values(64, 64, device)
    both = presets.te_cast_transpose_mxfp4(x)
    rows, columns = (presets.te_cast_transpose_mxfp4(x, **{name: False}) for name in ("columnwise", "rowwise"))
    assert rows.columnwise is None
    assert columns.rowwise_scale is None
    assert torch.equal(rows.rowwise, both.rowwise)
    assert torch.equal(columns.columnwise, both.columnwise)


def test_leading_dimensions_are_rows(device):
    x = values(64, 64, device)
    assert torch.equal(
        presets.te_cast_transpose_mxfp4(x.view(2, 32, 64)).columnwise, presets.te_cast_transpose_mxfp4(x).columnwise
    )


def test_rows_that_are_no_blocks_are_refused(device):
    with pytest.raises(ValueError, match="M, of x with shape"):
        presets.te_cast_transpose_mxfp4(torch.zeros(33, 64, device=device))
