"""The page of FUSION_PASS_DEBUG=<folder>: well-formed, self-contained, escaped, and it says what the report says."""

import html.parser
import re

import pytest
import torch

from fusion_pass import fake_device, graph_pass, inductor, page, traffic
from fusion_pass.sites import Miss, Report
from fusion_pass.traffic import Traffic

import spelled

BF16 = torch.bfloat16
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Document(html.parser.HTMLParser):
    """Checks that elements nest, and keeps ids, links, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.text, self.colours = [], [], [], [], [], {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.open += [] if tag in VOID else [tag]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.links += [attributes["href"]] if "href" in attributes else []
        assert not {"src", "onclick", "onload"} & set(attributes)
        if attributes.get("class") == "site":
            self.colours.setdefault(attributes["style"], 0)
            self.colours[attributes["style"]] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def fn(x, w):
    codes, scale = spelled.per_token(spelled.rms_norm(x, w))
    per_column = (x.float() / (x.abs().amax(-2, keepdim=True).float() / 448)).to(spelled.E4M3)
    return codes, scale, *spelled.per_group(spelled.silu_mul(x, x)), per_column


@pytest.fixture
def written(monkeypatch, tmp_path):
    graphs = []

    def compiler(gm, _):
        graphs.append(fake_device.relabelled(gm, torch.device("cuda")))
        return gm.forward

    def backend(gm, inputs):
        return inductor.compile_without_joint_passes(gm, inputs, compiler)

    torch.compile(fn, backend=backend, dynamic=False)(torch.randn(4, 256).to(BF16), torch.ones(256).to(BF16))
    monkeypatch.setenv("FUSION_PASS_DEBUG", str(tmp_path))
    report = graph_pass.run(graphs[0].graph, ("cuda",), to_kernels=True)
    (path,) = tmp_path.glob("*.html")
    return report, path.read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_self_contained(written):
    _, text = written
    document = Document(text)
    assert len(document.ids) == len(set(document.ids))
    assert {link[1:] for link in document.links} <= set(document.ids)
    assert all(link.startswith("#") for link in document.links)
    assert not {"script", "link", "img", "iframe"} & set(document.tags)
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text


def test_the_page_shows_sites_misses_and_what_they_move(written):
    report, text = written
    document = Document(text)
    shown = "".join(document.text)
    assert len(report.fused) == 2
    assert len(document.colours) == 2
    for site in report.fused:
        assert site.name in shown
        assert site.location in shown
    (miss,) = [m for m in report.missed if m.kind == "quantizer"]
    assert miss.reason in shown
    # The user's line itself, of the miss.
    assert "per_column = (x.float() /" in shown
    assert re.search(r"The whole graph moves: [\d.]+ KiB → [\d.]+ KiB, \d+ → \d+ kernels", shown)
    assert "torch.ops.fusion_pass.rms_norm_quant" in shown


def test_every_operation_of_a_site_is_coloured(written):
    """Also those that Inductor would not show: a line each in the graph before, and op and outputs in that after."""
    report, text = written
    document = Document(text)
    for i, site in enumerate(report.fused):
        lines = document.colours[f"--h:{page._hue(i)}"]
        assert lines >= len({n.name for n in site.nodes if n.op == "call_function"}) + 1


def test_text_is_escaped():
    miss = Miss("quantizer", "expected <b>a & b</b>", 'node: "<script>alert(1)</script>"', "/x<y>.py:3 in f")
    text = page.page(Report(missed=[miss]), "<script>1</script>", "a < b & c", {}, {}, "<title>")
    document = Document(text)
    assert "script" not in document.tags
    assert "b" in document.tags  # ours, in the summary
    assert "expected <b>a & b</b>" in "".join(document.text)
    assert "a < b & c" in "".join(document.text)


def test_traffic_counts_what_eager_moves():
    def scaled(x, y):
        return (x.view(8, 64) * y).t()

    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(scaled, tracing_mode="fake")(torch.randn(4, 128), torch.randn(8, 1).expand(8, 64)).graph
    moved = traffic.of_graph(graph)
    # x and the product, and y once: the views are free.
    assert sum(moved.values(), Traffic()) == Traffic(4 * (8 * 64 + 8 * 64 + 8), 1)


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 40, "3072.0 GiB")])
def test_sizes_are_readable(count, text):
    assert page._size(count) == text
