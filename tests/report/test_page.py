"""The page in a browser: nothing is asked of a network, nothing runs, all is there and readable at both widths."""

import re
from html.parser import HTMLParser

import pytest

from ovit_engine.report import gather, render
from ovit_engine.report.page import SECTIONS
from tests.report.chromium import find_chromium, running

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
    return render(gather(whole_run))


def test_equal_folders_give_equal_pages(page, whole_run):
    assert page == render(gather(whole_run))


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
    assert "tiny_<b>bold</b>" in words
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
    run = gather(whole_run)
    words = " ".join("".join(Seen(page).words).split())
    facts = run.files[0].certificate
    assert f"{facts.sha256[:16]}" in words
    assert f"{100 * facts.accuracy.file:.1f}".removesuffix(".0") + " % accuracy" in words
    row = run.benches[0].rows[1]
    assert f"{row.median * 1e3:.3f} {row.ratio.verdict}" in re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", page))
    for layer in run.layers:
        assert f'style="width:{100 * layer.sparsity:.2f}%"' in page


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium or chrome in PATH")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser(page, tmp_path, dark):
    (tmp_path / "report.html").write_text(page)
    address = (tmp_path / "report.html").as_uri()
    with running(CHROMIUM, tmp_path / "profile") as tab:
        for width in (1280, 390):
            tab.open(address, width, 900, dark=dark)
            assert tab.evaluate("innerWidth") == width
            assert tab.evaluate("document.documentElement.scrollWidth") == width, "it scrolls sideways"
            assert tab.evaluate(TOO_WIDE) == []
            assert tab.evaluate(SMALLEST) >= 11
            assert tab.evaluate(HIDDEN) == []
            assert tab.evaluate(LOW_CONTRAST) == []
            shown = tab.evaluate("[...document.querySelectorAll('svg')].filter(s => s.clientWidth).length")
            assert shown == 3  # one of each pair
        assert tab.complaints == []
        assert set(tab.requests) == {address}


# what sticks out of the window, but for what scrolls in a box of its own
TOO_WIDE = """[...document.querySelectorAll('body *')]
  .filter(e => !e.closest('.scroll') && e.getClientRects().length)
  .filter(e => e.getBoundingClientRect().right > innerWidth + 1 || e.getBoundingClientRect().left < -1)
  .map(e => e.outerHTML.slice(0, 80))"""
# the smallest words in pixels, with what drawings are scaled by
SMALLEST = """Math.min(...[...document.querySelectorAll('p,dd,dt,li,td,th,text,small,code')]
  .filter(e => e.getClientRects().length)
  .map(e => parseFloat(getComputedStyle(e).fontSize) * (e.ownerSVGElement ?
    e.ownerSVGElement.getBoundingClientRect().width / e.ownerSVGElement.viewBox.baseVal.width : 1)))"""
HIDDEN = (
    "[...document.querySelectorAll('section, h2')].filter(e => e.getBoundingClientRect().height < 5).map(e => e.id)"
)
# WCAG 2: words need 4.5 times the luminance of their ground, or the other way
LOW_CONTRAST = """(() => {
  const parse = c => c.match(/[\\d.]+/g).map(Number);
  const linear = v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = c => { const [r, g, b] = parse(c).map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b; };
  const ground = e => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (parse(c)[3] !== 0) return c; } return 'rgb(255,255,255)'; };
  const weak = e => { const style = getComputedStyle(e), b = light(ground(e));
    const a = light(e.ownerSVGElement ? style.fill : style.color);
    return (Math.max(a, b) + .05) / (Math.min(a, b) + .05) < 4.5; };
  return [...document.querySelectorAll('h1,h2,h3,p,dd,dt,li,td,th,small,code,a,text,summary')]
    .filter(e => e.getClientRects().length && weak(e)).map(e => e.outerHTML.slice(0, 80));
})()"""
