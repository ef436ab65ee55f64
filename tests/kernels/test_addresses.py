"""Where kernels read and write: offsets beyond 2^31, and scales at the addresses that :mod:`fusion_pass.layouts` gives."""

import pytest
import torch
from fusion_pass.kernels import cast_transpose
from fusion_pass.kernels.launch import launch
from fusion_pass.kernels.reference import reference

from fusion_pass import layouts
from fusion_pass.cast_transpose import CastTransposeSpec
from fusion_pass.mx_specs import mx_quantizer
from fusion_pass.specs import FusedSpec, GatedActivation, NoPrologue, Quantizer, RMSNorm, ScaleLayout, Weight
from fusion_pass.testing import compare

BF16 = torch.bfloat16
GROUP = Quantizer.dynamic(group=128, amax_floor=1e-10)
FAR = {
    "token": FusedSpec(NoPrologue(), Quantizer.dynamic(amax_floor=1e-10)),
    "group": FusedSpec(NoPrologue(), GROUP),
    "add norm": FusedSpec(RMSNorm(1e-6, weight=Weight.NONE, residual_sum=BF16), GROUP, sum_output=BF16),
    "silu": FusedSpec(GatedActivation(activated=BF16, product=BF16), GROUP, value_output=BF16),
}


@pytest.mark.parametrize("name", FAR)
def test_rows_beyond_two_to_the_31(name, device):
    """Few rows that lie 2^30 values apart: of the memory between them a system commits no page."""
    spec, stride = FAR[name], 2**30 + 64
    storage = torch.empty(4 * stride + 256, dtype=BF16, device=device)
    far = storage.as_strided((5, 256), (stride, 1))
    near = torch.randint(-15, 16, (5, 256), device=device).to(BF16)
    far.copy_(near)
    other = None if isinstance(spec.prologue, NoPrologue) else near + 1
    assert compare(launch(spec, far, other), launch(spec, near, other)).equal
    if other is not None:
        assert compare(launch(spec, near, far), launch(spec, near, near)).equal


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it takes 12 GiB, and hours in the interpreter")
@pytest.mark.parametrize("name", FAR)
def test_more_values_than_two_to_the_31(name):
    """rtp-llm's overflow test: 699051 rows of 3072 values are 2^31 and 2048 more."""
    spec, rows, row = FAR[name], 699051, 3072
    x = torch.randint(-15, 16, (rows, row), device="cuda", dtype=torch.int8).to(BF16)
    other = None if isinstance(spec.prologue, NoPrologue) else x
    whole = launch(spec, x, other)
    for part in (slice(0, 64), slice(rows - 64, rows)):
        few = launch(spec, x[part].clone(), None if other is None else x[part].clone())
        assert compare([w[part].clone() for w in whole], few).equal


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it takes 8 GiB, and hours in the interpreter")
def test_a_transpose_of_more_values_than_two_to_the_31():
    rows, row = 699072, 3072
    x = torch.randint(-15, 16, (rows, row), device="cuda", dtype=torch.int8).to(BF16)
    data, scale, columns, column_scale = cast_transpose.launch(CastTransposeSpec(mx_quantizer()), x)
    few = cast_transpose.launch(CastTransposeSpec(mx_quantizer()), x[-64:].clone())
    last = [data[-64:].clone(), scale[-64:].clone(), columns[:, -64:].clone(), column_scale[:, -2:].clone()]
    assert compare(last, few).equal


PACKED = {
    ScaleLayout.COLUMN: lambda scale: layouts.pack_column_major(scale).t(),
    ScaleLayout.TMA: lambda scale: layouts.pack_tma_aligned(scale).t(),
    ScaleLayout.BLOCKED: layouts.pack_blocked,
    ScaleLayout.SHUFFLED: layouts.pack_mx_shuffled,
}


@pytest.mark.parametrize("layout", PACKED)
def test_scales_lie_where_layouts_has_them(layout, device):
    """Whole tiles, so that there is no padding, on which systems differ."""
    x = (torch.randn(256, 512) * torch.logspace(-3, 3, 256)[:, None]).to(BF16).to(device)
    as_floats = layout in (ScaleLayout.COLUMN, ScaleLayout.TMA)
    quantizer = Quantizer.dynamic(group=64) if as_floats else mx_quantizer()
    logical = launch(FusedSpec(NoPrologue(), quantizer), x)[1]
    stored = launch(FusedSpec(NoPrologue(), quantizer, layout), x)[1]
    assert torch.equal(stored.flatten(), PACKED[layout](logical).contiguous().flatten())


def test_packed_exponents_are_words(device):
    x = torch.randn(7, 320, device=device).to(BF16)
    byte = launch(FusedSpec(NoPrologue(), mx_quantizer()), x)[1]
    stored = launch(FusedSpec(NoPrologue(), mx_quantizer(), ScaleLayout.PACKED), x)[1]
    words = stored.view(torch.int32).squeeze(-1).t()[:7]
    assert torch.equal(layouts.unpack_ue8m0_words(words, 10, torch.uint8), byte)


@pytest.fixture
def memory_with_traces():
    """Uninitialised memory has large numbers or NaN in it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("memory_with_traces")
@pytest.mark.parametrize(
    "shape", [(1, 384), (5, 640), (8, 896), (130, 128), (3, 2560), (1, 6, 384), (2, 6, 384)], ids=str
)
@pytest.mark.parametrize(
    "prologue", [NoPrologue(), RMSNorm(1e-6), GatedActivation(product=BF16)], ids=["none", "norm", "gate"]
)
@pytest.mark.parametrize(
    "layout",
    [ScaleLayout.TMA, ScaleLayout.PACKED, ScaleLayout.BLOCKED, ScaleLayout.SHUFFLED],
    ids=lambda layout: layout.value,
)
def test_padding_is_zeros(layout, prologue, shape, device):
    quantizer = GROUP if layout is ScaleLayout.TMA else mx_quantizer(block=128)
    spec = FusedSpec(prologue, quantizer, layout)
    x = torch.randint(-15, 16, shape, device=device).to(BF16)
    other = x.flip(0) if isinstance(prologue, GatedActivation) else None
    weight = torch.ones(shape[-1], dtype=BF16, device=device) if isinstance(prologue, RMSNorm) else None
    result = compare(launch(spec, x, other, weight), reference(spec, x, other, weight))
    assert result.equal, result
