"""The certificate as a page and as a table."""

import html.parser
import logging

import pytest
import torch
from torch import nn

from ovit_engine.certificate import Promise
from ovit_engine.certificate.html import to_html
from ovit_engine.certificate.model import page_path
from ovit_engine.certificate.notes import Note
from ovit_engine.export.exporter import export_model
from tests.exported_files import table_of
from tests.report.chromium import assert_readable, find_chromium, running

CHROMIUM = find_chromium()


class Reader(html.parser.HTMLParser):
    """Collects texts, and everything that could be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "!doctype"):
            self.open.append(tag)
        self.loads += [value for name, value in attributes if name in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def read(text):
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    return reader


def test_the_page_holds_the_facts_and_loads_nothing(vit):
    text = page_path(vit.path).read_text()
    assert text == to_html(vit.certificate)
    page = read(text)
    words = "\n".join(page.texts)
    assert page.loads == []
    assert not [word for word in ("<script", "http:", "https:", "@import", "url(") if word in text]
    for fact in (vit.certificate.sha256, vit.certificate.recipe_sha256, "MatMulIntegerToFloat", "95 % interval"):
        assert fact in words
    for layer in vit.certificate.layers:
        assert layer.name in page.texts


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome in PATH")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(vit, tmp_path, dark):
    with running(CHROMIUM, tmp_path / "profile") as tab:
        for _ in assert_readable(tab, page_path(vit.path).as_uri(), dark=dark):
            assert tab.evaluate("document.querySelectorAll('tbody tr').length") > len(vit.certificate.layers)


def test_a_file_without_the_text_of_a_recipe_says_so(vit, convnet):
    assert f"tiny sha256 {vit.certificate.recipe_sha256[:16]}" in table_of(vit.certificate)
    assert "without the text of a recipe" in table_of(convnet.certificate)


def test_names_from_a_model_are_no_markup(vit):
    layers = tuple(layer.model_copy(update={"name": f"<b>{layer.name}&"}) for layer in vit.certificate.layers)
    note = Note(code="macs_unknown", reason="<script>alert(1)</script>")
    certificate = vit.certificate.model_copy(update={"layers": layers, "notes": (note,)})
    text = to_html(certificate)
    assert not [tag for tag in ("<b>", "<script>") if tag in text]
    assert layers[0].name in read(text).texts


def test_kernels_and_totals(vit, convnet):
    certificate = vit.certificate
    assert {certificate.kernels[layer.name] for layer in certificate.quantized} == {"MatMulIntegerToFloat"}
    assert set(convnet.certificate.kernels.values()) == {"QLinearConv", "MatMulIntegerToFloat"}
    assert 0 < certificate.total_sparsity < certificate.sparsity
    assert certificate.total_sparsity * sum(layer.numel for layer in certificate.layers) == sum(
        layer.zeros for layer in certificate.layers
    )


def test_operands_of_the_quantized_layers(vit):
    for layer in vit.certificate.quantized:
        assert (layer.symmetric, layer.activation, layer.activation_symmetric) == (True, "UINT8", False)
        assert layer.broken_2_4 == 0
    (head,) = [layer for layer in vit.certificate.layers if layer.name == "head.weight"]
    assert (head.symmetric, head.activation, head.activation_symmetric) == (None, None, None)
    assert head.broken_2_4 == 10 * 64 // 4


def test_the_terminal_hears_that_there_was_no_data(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "ovit_engine"):
        export_model(nn.Linear(8, 4), tmp_path / "m.onnx", torch.randn(2, 8), promise=Promise())
        export_model(
            nn.Linear(8, 4), tmp_path / "n.onnx", torch.randn(2, 8), promise=Promise(), data=[torch.randn(64, 8)]
        )
    assert caplog.messages == ["m.onnx: parity was measured on random inputs, since no data was given"]
