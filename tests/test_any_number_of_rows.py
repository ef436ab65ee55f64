"""Scales whose padding depends on a number of rows that is not known: one graph stores them, for every number."""

import pytest
import torch
from fusion_pass.patterns import row_counts
from fusion_pass.patterns.placed_scales import Parts
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from fusion_pass.addresses import ceil_to
from fusion_pass.backends import collecting
from fusion_pass.sites import Report
from fusion_pass.testing import compare

import cases
import spelled
from lowered import Launched, launches, lowered

BF16 = torch.bfloat16


def tma(scale, multiple=4, before=0, value=0.0, last=0):
    rows = scale.shape[0]
    if last:
        # The last row is cut off, and padded again.
        scale = torch.nn.functional.pad(scale, (0, 0, 0, last))
    padded = torch.nn.functional.pad(scale, (0, 0, before, -rows % multiple - last), value=value)
    return padded.t().contiguous().t()[:rows]


def with_scales(placed):
    def fn(x):
        codes, scale = spelled.per_group(x)
        return codes, placed(scale)

    return fn


def blocked(rows_first, tile=128):
    """torchao's ``to_blocked`` of exponents, or one that has rows and words of a tile in another order."""

    def fn(x):
        codes, exponent = cases.mxfp8(x, None)
        rows, groups = exponent.shape
        padded = torch.nn.functional.pad(exponent, (0, -groups % 4, 0, -rows % tile))
        tiles = padded.view(padded.shape[0] // tile, tile, padded.shape[1] // 4, 4).permute(0, 2, 1, 3)
        inner = tiles.reshape(-1, 4, 32, 4) if rows_first else tiles.reshape(-1, 32, 4, 4)
        return codes, inner.transpose(1, 2).reshape(-1, 32, 16).flatten()

    return fn


@pytest.mark.parametrize("mark", [torch._dynamo.mark_dynamic, torch._dynamo.decorators.mark_unbacked])
@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (with_scales(tma), "quant_per_group_128_tma"),
        (lambda x: cases.per_group_packed(x, None), "quant_per_group_128_ue8m0_bytes_packed"),
        (blocked(True), "quant_mxfp8_blocked"),
        # Padding to another multiple, in front, or of another value; another order in tiles.
        (with_scales(lambda s: tma(s, multiple=8)), "quant_per_group_128"),
        (with_scales(lambda s: tma(s, before=4)), "quant_per_group_128"),
        (with_scales(lambda s: tma(s, value=1.0)), "quant_per_group_128"),
        (with_scales(lambda s: torch.nn.functional.pad(s, (0, 0, 0, 3)).t().contiguous()), "quant_per_group_128"),
        (with_scales(lambda s: tma(s, last=-1)), "quant_per_group_128"),
        (blocked(False), "quant_mxfp8"),
        (blocked(True, tile=64), "quant_mxfp8"),
    ],
)
def test_padded_scales(fn, name, mark, device):
    torch._dynamo.reset()
    report = Report()
    fused = torch.compile(fn, backend=collecting(report))
    # More than one tile of blocked scales, and groups that are no whole word.
    for rows, row in ((150, 160), (290, 160)) if "mxfp8" in name else ((22, 640), (41, 640)):
        x = torch.randn(rows, row, device=device).to(BF16)
        mark(x, 0)
        assert compare(tuple(fused(x)), tuple(fn(x))).equal
    assert [site.name for site in report.fused] == [name]


@pytest.mark.parametrize("mark", [None, torch._dynamo.mark_dynamic, torch._dynamo.decorators.mark_unbacked])
@pytest.mark.parametrize("row", [256, 512])
def test_four_groups_are_packed_as_they_are_padded(row, mark, device):
    """Columns of one word are words by rows: nothing is transposed, but rows, or groups, are padded, if only by none."""
    torch._dynamo.reset()
    report = Report()
    fused = torch.compile(
        lambda x: cases.per_group_packed(x, None), backend=collecting(report), dynamic=None if mark else False
    )
    for rows in (22, 24):
        x = torch.randn(rows, row, device=device).to(BF16)
        if mark is not None:
            mark(x, 0)
        assert compare(tuple(fused(x)), cases.per_group_packed(x, None)).equal
    assert {site.name for site in report.fused} == {"quant_per_group_128_ue8m0_bytes_packed"}


def test_guards_that_there_is_one_tile(device):
    """Its size is a function of the rows that guards make 1: a view of tiles by columns is of memory as it is, and no copy."""
    torch._dynamo.reset()
    report = Report()
    fn = blocked(True)
    fused = torch.compile(fn, backend=collecting(report))
    for rows in (50, 101, 128):
        x = torch.randn(rows, 160, device=device).to(BF16)
        torch._dynamo.mark_dynamic(x, 0)
        assert compare(tuple(fused(x)), tuple(fn(x))).equal
    assert [site.name for site in report.fused] == ["quant_mxfp8_blocked"]


@pytest.mark.parametrize("mark", [torch._dynamo.mark_dynamic, torch._dynamo.decorators.mark_unbacked])
@pytest.mark.parametrize("fn", [cases.per_group_tma, cases.mxfp8_blocked, cases.mxfp8_both, cases.mxfp4_both])
def test_one_launch_serves_any_number(fn, mark, device):
    """What is launched with a number of rows that is known only then."""
    _, graph = lowered(lambda x: fn(x, None), (160, 384), dynamic=(0,), mark=mark)
    assert len(launches(graph)) == 1
    both = "both" in fn.__name__
    for rows in (32, 160, 288) if both else (5, 128, 131):
        x = torch.randn(rows, 384, device=device).to(BF16)
        tensors = [n.meta["val"] for n in graph.nodes if n.op == "placeholder"]
        result = Launched(graph, device).run(*(x if isinstance(t, torch.Tensor) else rows for t in tensors))
        expected = fn(x, None)
        assert [t.stride() for t in result] == [t.stride() for t in expected]
        if fn is cases.per_group_tma and device == "cpu":
            # CUDA multiplies by the reciprocal where a CPU divides.
            assert torch.allclose(result[1], expected[1])
        else:
            assert compare(tuple(result), expected).equal, rows


def test_heads_of_an_unknown_number_of_rows(device):
    """Rows that are several dims of x, of which one is not known."""

    def fn(x):
        codes, scale = spelled.per_group(x.flatten(0, 1))
        return codes, tma(scale)

    torch._dynamo.reset()
    report = Report()
    x = torch.randn(5, 3, 256, device=device).to(BF16)
    torch._dynamo.mark_dynamic(x, 0)
    assert compare(torch.compile(fn, backend=collecting(report))(x), fn(x)).equal
    assert len(report.fused) == 1


@pytest.fixture
def rows():
    symbol = ShapeEnv().create_unbacked_symint()
    torch._check(symbol >= 0)
    return symbol


@pytest.mark.parametrize("multiple", [4, 32, 128, 256])
def test_padding_is_up_to_a_multiple(rows, multiple):
    padded = row_counts.of_rows(rows + -rows % multiple, rows)
    assert padded.equals(row_counts.of_rows(ceil_to(rows, multiple), rows))
    assert padded.is_multiple_of(multiple)
    assert not padded.is_multiple_of(2 * multiple)
    assert not padded.equals(row_counts.of_rows(ceil_to(rows, 2 * multiple), rows))
    assert not padded.equals(row_counts.of_rows(rows + multiple, rows))


def test_sizes_are_of_as_many_scales(rows):
    assert Parts.of((rows, 6), rows, 6) is not None
    assert Parts.of((rows, 2, 3), rows, 6) is not None
    for sizes in ((rows, 3), (rows, 12), (rows + 1, 6), (rows * rows, 6)):
        assert Parts.of(sizes, rows, 6) is None


def test_numbers_that_rows_make_no_difference_to(rows):
    padded = rows + -rows % 128
    tiles = padded // 128
    assert row_counts.of_rows(padded // tiles, rows).number() == 128
    assert row_counts.of_rows(padded - 128 * tiles + 7, rows).number() == 7
    assert row_counts.of_rows(rows // 2 - rows // 2, rows).number() == 0
    assert row_counts.of_rows((rows + 1) // 2 - rows // 2, rows).number() is None


def test_sizes_that_are_no_linear_functions(rows):
    other = ShapeEnv().create_unbacked_symint()
    for size in (rows * rows, rows // 3, rows % 1024, rows // (rows + 1)):
        assert row_counts.of_rows(size, rows) is None
    assert row_counts.of_rows(other, rows) is None or str(other.node.expr) == str(rows.node.expr)


def test_what_they_are_for_each_number_of_rows(rows):
    """Evaluated beside Python's own arithmetic, over two periods and more."""
    sizes = {
        "padded": lambda m: m + -m % 128,
        "tiles": lambda m: (m + -m % 128) // 128 * 6,
        "rest": lambda m: m % 64,
        "half": lambda m: (m + 1) // 2 + 3,
    }
    for name, size in sizes.items():
        linear = row_counts.of_rows(size(rows), rows)
        for m in (1, 2, 63, 64, 127, 128, 129, 511, 512, 513, 1000, 1024, 1300):
            q, r = divmod(m, row_counts.PERIOD)
            assert int(linear.slope[r]) * q + int(linear.start[r]) == size(m), (name, m)
