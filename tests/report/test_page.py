"""The page in a browser: nothing is asked of a network, nothing runs, all is there and readable at both widths."""

import re
from html.parser import HTMLParser

import pytest

from ovit_engine.report import read_run, render_page
from ovit_engine.report.page import SECTIONS
from tests.report.chromium import assert_readable, find_chromium, running

CHROMIUM = find_chromium()


class Seen(HTMLParser):
    """Tags with their attributes, and the words between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def page(whole_run):
    return render_page(read_run(whole_run))


def test_equal_folders_give_equal_pages(page, whole_run):
    assert page == render_page(read_run(whole_run))


def test_it_is_one_file_without_scripts(page):
    seen = Seen(page)
    assert not [tag for tag, _ in seen.tags if tag in ("script", "link", "iframe", "img", "object", "base", "form")]
    for _, attributes in seen.tags:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "action", "srcset"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "url(" not in page
    assert "@import" not in page


def test_what_a_recipe_says_is_shown_and_not_obeyed(page):
    seen = Seen(page)
    words = "".join(seen.words)
    assert "tiny_<b>bold" in words
    assert "half of the zeros & <script>alert('no')</script>" in words
    assert not [tag for tag, _ in seen.tags if tag == "b"]


def test_all_sections_are_there_and_linked(page):
    seen = Seen(page)
    found = [attributes["id"] for tag, attributes in seen.tags if tag == "section"]
    assert found == [name for name, _ in SECTIONS]
    assert [attributes["href"] for tag, attributes in seen.tags if tag == "a"] == [f"#{name}" for name in found]
    words = "".join(seen.words)
    for phrase in (
        "blocks.0.attn.qkv.weight",
        "sweep/0.75.onnx",
        "accuracy over latency",
        "magnitude_prune",
        "against 0.75.onnx",
    ):
        assert phrase in words


def test_figures_are_those_of_the_folder(page, whole_run):
    run = read_run(whole_run)
    words = " ".join("".join(Seen(page).words).split())
    facts = run.files[0].certificate
    assert f"{facts.sha256[:16]}" in words
    assert f"{100 * facts.accuracy.file:.1f}".removesuffix(".0") + " % accuracy" in words
    row = run.benches[0].rows[1]
    assert f"{row.median * 1e3:.3f} {row.ratio.describe()}" in re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", page))
    for layer in run.layers:
        assert f'style="width:{100 * layer.sparsity:.2f}%"' in page


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome in PATH")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(page, tmp_path, dark):
    (tmp_path / "report.html").write_text(page)
    with running(CHROMIUM, tmp_path / "profile") as tab:
        for width in assert_readable(tab, (tmp_path / "report.html").as_uri(), dark=dark):
            shown = tab.evaluate("[...document.querySelectorAll('svg')].filter(s => s.clientWidth).length")
            assert shown == 3, width  # one of each pair
