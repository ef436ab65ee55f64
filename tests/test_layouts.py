"""Layouts address by address: every logical element is looked up in raw storage at the offset of its formula."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion_pass import layouts

# One row, primes, rows that are no multiple of 4, rows that equal the groups, groups that fill no word.
SIZES = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13, 31, 32, 33, 61, 128, 131, 257])
GROUPS = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 13, 16])
few = settings(max_examples=25, deadline=None, derandomize=True)


def raw(packed):
    """The whole storage of a tensor, its padding included."""
    return torch.empty(0, dtype=packed.dtype).set_(packed.untyped_storage())


def index(*shape):
    return torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")


def floats(*shape):
    return torch.randn(shape)


def exponents(*shape):
    return torch.randint(0, 256, shape).to(torch.uint8)


def ceil(size, multiple):
    return (size + multiple - 1) // multiple * multiple


def check_addresses(logical, packed, offsets, padding):
    """``logical`` lies at ``offsets`` of the storage, and the rest of the storage is ``padding``, or None: there is none."""
    storage = raw(packed)
    assert offsets.unique().numel() == logical.numel()
    assert torch.equal(storage[offsets], logical)
    free = torch.ones(storage.numel(), dtype=torch.bool)
    free[offsets.flatten()] = False
    assert not free.any() if padding is None else (storage[free] == padding).all()


@few
@given(SIZES, GROUPS)
def test_column_major(rows, groups):
    scale = floats(rows, groups)
    packed = layouts.pack_column_major(scale)
    m, j = index(rows, groups)
    assert packed.stride() == (1, rows)
    assert torch.equal(packed, scale)
    check_addresses(scale, packed, j * rows + m, None)
    unpacked = layouts.unpack_column_major(packed)
    assert torch.equal(unpacked, scale)
    assert unpacked.stride() == (groups, 1)


@few
@given(SIZES, GROUPS)
def test_tma_aligned(rows, groups):
    scale = floats(rows, groups)
    packed = layouts.pack_tma_aligned(scale)
    m, j = index(rows, groups)
    assert packed.stride() == (1, ceil(rows, 4))
    assert raw(packed).numel() == groups * ceil(rows, 4)
    assert torch.equal(packed, scale)
    check_addresses(scale, packed, j * ceil(rows, 4) + m, 0)
    assert torch.equal(layouts.unpack_tma_aligned(packed), scale)


@few
@given(st.integers(1, 4), st.sampled_from([1, 4, 7, 52]), GROUPS)
def test_masked_batch(experts, rows, groups):
    scale = floats(experts, rows, groups)
    packed = layouts.pack_masked_batch(scale)
    e, t, j = index(experts, rows, groups)
    assert packed.stride() == (rows * groups, 1, rows)
    check_addresses(scale, packed, e * rows * groups + j * rows + t, None)
    assert torch.equal(layouts.unpack_masked_batch(packed), scale)


@few
@given(SIZES, GROUPS)
def test_ue8m0_words(rows, groups):
    scale = exponents(rows, groups)
    packed = layouts.pack_ue8m0_words(scale)
    m, j = index(rows, groups)
    assert packed.dtype is torch.int32
    assert packed.shape == (rows, -(-groups // 4))
    assert packed.stride() == (1, ceil(rows, 4))
    check_addresses(scale, raw(packed).view(torch.uint8), (j // 4 * ceil(rows, 4) + m) * 4 + j % 4, 0)
    assert torch.equal(layouts.unpack_ue8m0_words(packed, groups, torch.uint8), scale)
    values = layouts.unpack_ue8m0_words(packed, groups)
    assert torch.equal(layouts.pack_ue8m0_words(values), packed)


def test_every_ue8m0_byte_is_its_power_of_two():
    every = torch.arange(256).to(torch.uint8)
    values = layouts.ue8m0_values(every)
    assert torch.equal(values[:255].double(), 2.0 ** (torch.arange(255).double() - 127))
    assert values[255].isnan()
    assert torch.equal(layouts.ue8m0_bytes(values), every)
    assert torch.equal(values[:255], every.view(torch.float8_e8m0fnu).float()[:255])


@few
@given(SIZES, GROUPS)
def test_transposed_view(rows, groups):
    scale = floats(rows, groups)
    packed = layouts.pack_transposed_view(scale)
    m, j = index(rows, groups)
    assert packed.is_contiguous()
    check_addresses(scale, packed, j * rows + m, None)
    unpacked = layouts.unpack_transposed_view(packed)
    assert torch.equal(unpacked, scale)
    assert unpacked.data_ptr() == packed.data_ptr()


@pytest.mark.parametrize("shape", [(2, 3), (6, 4), (256, 16)])
def test_the_transposed_view_is_no_inverse_of_itself(shape):
    scale = torch.arange(float(shape[0] * shape[1])).view(shape)
    twice = layouts.pack_transposed_view(layouts.pack_transposed_view(scale))
    assert not torch.equal(twice, scale)


@few
@given(SIZES, GROUPS)
def test_mx_shuffled(rows, groups):
    scale = exponents(rows, groups)
    packed = layouts.pack_mx_shuffled(scale)
    r, c = index(rows, groups)
    width = ceil(groups, 8)
    offsets = r // 32 * 32 * width + c // 8 * 256 + c % 4 * 64 + r % 16 * 4 + c % 8 // 4 * 2 + r % 32 // 16
    assert packed.shape == (ceil(rows, 256), width)
    check_addresses(scale, packed, offsets, 127)
    assert torch.equal(layouts.unpack_mx_shuffled(packed, rows, groups), scale)


@few
@given(SIZES, GROUPS)
def test_blocked(rows, groups):
    scale = exponents(rows, groups)
    packed = layouts.pack_blocked(scale)
    r, c = index(rows, groups)
    offsets = (r // 128 * -(-groups // 4) + c // 4) * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4
    assert packed.shape == (ceil(rows, 128), ceil(groups, 4))
    check_addresses(scale, packed, offsets, 0)
    assert torch.equal(layouts.unpack_blocked(packed, rows, groups), scale)


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (131, 7), (257, 33)])
def test_blocked_is_torchao_s(shape):
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scale = exponents(*shape)
    packed = layouts.pack_blocked(scale)
    assert torch.equal(packed.flatten(), utils.to_blocked(scale))
    assert torch.equal(utils.from_blocked(packed, *shape), scale)


@few
@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([torch.uint8, torch.int16, torch.float32]))
def test_mfma_shuffled(row_blocks, byte_blocks, dtype):
    rows, row_bytes = 16 * row_blocks, 32 * byte_blocks
    data = torch.randint(0, 256, (rows, row_bytes)).to(torch.uint8)
    typed = data.view(dtype) if dtype is not torch.float32 else data.view(torch.int32).to(dtype)
    packed = layouts.pack_mfma_shuffled(typed)
    n, k = index(rows, row_bytes)
    offsets = n // 16 * 16 * row_bytes + k // 32 * 512 + k % 32 // 16 * 256 + n % 16 * 16 + k % 16
    check_addresses(typed.view(torch.uint8), packed.view(torch.uint8), offsets, None)
    assert packed.shape == typed.shape
    assert torch.equal(layouts.unpack_mfma_shuffled(packed), typed)


@pytest.mark.parametrize(
    "pack",
    [
        layouts.pack_column_major,
        layouts.pack_tma_aligned,
        layouts.pack_transposed_view,
        lambda scale: layouts.pack_ue8m0_words(torch.exp2(scale.round())),
        lambda scale: layouts.pack_mx_shuffled(scale.view(torch.uint8)),
        lambda scale: layouts.pack_blocked(scale.view(torch.uint8)),
        lambda scale: layouts.pack_mfma_shuffled(scale[:16, :8]),
    ],
)
def test_strides_of_the_scales_do_not_matter(pack):
    scale = floats(20, 8)
    assert torch.equal(raw(pack(scale)), raw(pack(scale.t().contiguous().t().contiguous())))
    wide = torch.cat([scale, scale], 1)[:, :8]
    assert torch.equal(raw(pack(wide)), raw(pack(scale)))


def test_matrices_without_rows():
    assert layouts.pack_tma_aligned(floats(0, 3)).shape == (0, 3)
    assert layouts.pack_ue8m0_words(floats(0, 3)).shape == (0, 1)
    assert layouts.pack_mx_shuffled(exponents(0, 3)).shape == (0, 8)
    assert layouts.unpack_blocked(layouts.pack_blocked(exponents(0, 3)), 0, 3).shape == (0, 3)


@pytest.mark.parametrize("value", [0.0, -1.0, 3.0, 1.9999999, float("inf"), 1e-40, -0.0])
def test_scales_that_are_no_powers_of_two_are_refused(value):
    scale = torch.ones(3, 5)
    scale[1, 2] = value
    with pytest.raises(ValueError, match=r"scale is .* in places; allowed: powers of two"):
        layouts.pack_ue8m0_words(scale)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: layouts.pack_column_major(floats(4)), r"shape of scale is \(4,\)"),
        (lambda: layouts.unpack_column_major(floats(4, 3)), r"strides of packed is \(3, 1\); allowed: \(1, 4\)"),
        (lambda: layouts.pack_tma_aligned(exponents(4, 3)), r"dtype of scale is torch.uint8"),
        (lambda: layouts.unpack_tma_aligned(layouts.pack_column_major(floats(5, 3))), r"allowed: \(1, 8\)"),
        (lambda: layouts.pack_masked_batch(floats(5, 3)), r"shape of scale is \(5, 3\); allowed: 3 dimensions"),
        (lambda: layouts.unpack_masked_batch(floats(2, 8, 3)), r"strides of packed is \(24, 3, 1\)"),
        (lambda: layouts.pack_ue8m0_words(floats(4, 3).bfloat16()), r"dtype of scale is torch.bfloat16"),
        (
            lambda: layouts.unpack_ue8m0_words(layouts.pack_ue8m0_words(exponents(4, 5)), 4),
            r"shape of packed is \(4, 2\); allowed: 1 words",
        ),
        (
            lambda: layouts.unpack_ue8m0_words(layouts.pack_ue8m0_words(exponents(4, 5)), 5, torch.int8),
            r"dtype is torch.int8",
        ),
        (lambda: layouts.unpack_transposed_view(floats(4, 3).t()), r"strides of packed is \(1, 3\)"),
        (lambda: layouts.pack_mx_shuffled(floats(4, 3)), r"dtype of scale is torch.float32"),
        (lambda: layouts.unpack_mx_shuffled(exponents(96, 3), 96, 3), r"shape of packed is \(96, 3\); allowed: \(256"),
        (lambda: layouts.unpack_blocked(exponents(128, 8), 128, 4), r"shape of packed is \(128, 8\)"),
        (lambda: layouts.pack_mfma_shuffled(exponents(8, 32)), r"shape of data is \(8, 32\)"),
        (lambda: layouts.pack_mfma_shuffled(exponents(16, 48)), r"shape of data is \(16, 48\)"),
    ],
)
def test_bad_input_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()
