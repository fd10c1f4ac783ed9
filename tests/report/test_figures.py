"""The figures: where values land, and that marks say what was measured."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovit_engine.core.recipe import Recipe
from ovit_engine.core.schedule import Clock
from ovit_engine.report import timeline
from ovit_engine.report.figures import draw_scatter, draw_timeline
from ovit_engine.report.run_folder import Epoch, RunFolder, TrainingRecord
from ovit_engine.report.tradeoff import Scatter, Spot, SpotSeries
from ovit_engine.report.words import megabytes, percent, points


def test_numbers_as_words():
    assert [percent(value) for value in (0.8, 0.805, 1, 0)] == ["80 %", "80.5 %", "100 %", "0 %"]
    assert points(-0.0123) == "1.2 points"
    assert [megabytes(value) for value in (257_000, 1_234_567)] == ["257 kB", "1.23 MB"]


RECIPE = """
modifiers:
  - magnitude_prune: {start: 1ep, end: 2ep, every: 1ep, sparsity: {from: 0.5, to: 0.75}, targets: ["re:.*"]}
  - cyclic_lr: {period: 2ep, max: 1.0e-3, min: 1.0e-5}
  - quantize: {start: 3ep}
"""


def small_run() -> RunFolder:
    history = ((10, "p/sparsity", 0.5), (10, "accuracy", 0.25), (40, "accuracy", 0.5))
    clock = Clock(10, 40)
    training = TrainingRecord(clock=clock, step=40, finished=True, recipe_text=RECIPE, history=history, layers=())
    epochs = tuple(Epoch(epoch=n, loss=2.0 / n, accuracy=0.1 * n, lr=10.0**-n, sparsity=0.5) for n in (1, 2, 3, 4))
    return RunFolder(path=Path("x"), recipe=Recipe.parse(RECIPE), training=training, epochs=epochs)


def test_lanes_follow_the_recipe():
    found = timeline.lanes(Recipe.parse(RECIPE).modifiers, Clock(10, 40))
    assert [(lane.name, lane.start, lane.end) for lane in found] == [
        ("magnitude_prune", 1, 2),
        ("cyclic_lr", 0, 4),
        ("quantize", 3, 4),
    ]
    assert [epoch for epoch, _ in found[1].events] == [0, 2]


def places(drawing: ET.Element) -> dict[str, tuple[float, float]]:
    """Where each mark is drawn, by the words under the pointer."""
    groups = [group for group in drawing.iter("g") if group.find("title") is not None]
    marks = [(group.find("title").text, next(group.iter("use"))) for group in groups]
    return {words: (float(mark.get("x")), float(mark.get("y"))) for words, mark in marks}


@pytest.mark.parametrize("width", [330.0, 1080.0])
def test_a_timeline_shows_each_measured_value_at_its_place(width):
    drawing = ET.fromstring(draw_timeline(timeline.timeline_of(small_run()), width))
    found = places(drawing)
    assert "epoch 3: int8 fake-quantization starts" in found
    assert "epoch 1: p 50 %" in found
    start, end = found["epoch 1: loss 2"], found["epoch 4: loss 0.5"]
    assert found["epoch 2: loss 1"][0] == pytest.approx(start[0] + (end[0] - start[0]) / 3, abs=0.1)
    assert end[0] == pytest.approx(width - 14)
    assert found["epoch 4: accuracy 50 %"][1] < found["epoch 1: accuracy 25 %"][1]  # y grows downwards
    words = [text.text for text in drawing.iter("text")]
    panels = ["accuracy", "training loss", "share of zeros", "learning rate (end of epoch)"]
    assert [text for text in words if text in panels] == panels
    assert {"magnitude_prune", "cyclic_lr", "quantize", "epochs", "100 %", "1e-2"} <= set(words)


def test_a_timeline_without_a_checkpoint_is_that_of_the_metrics():
    run = small_run()
    bare = RunFolder(path=run.path, epochs=run.epochs)
    assert "epoch 2: accuracy 20 %" in places(ET.fromstring(draw_timeline(timeline.timeline_of(bare), 500)))
    assert timeline.timeline_of(RunFolder(path=run.path)) is None


def test_figures_take_the_colors_of_the_page_and_leave_no_names():
    run = timeline.timeline_of(small_run())
    text = draw_timeline(run, 500)
    assert text == draw_timeline(run, 500)
    assert "var(--ink)" in text
    assert "var(--s0)" in text
    assert "#0" not in text.replace('="#', "")
    assert not [word for word in ("url(", "<metadata", "<style", "http:") if word in text]
    names = [set(re.findall(r'\bid="([^"]+)"', draw_timeline(run, width))) for width in (330, 500)]
    assert all(names)
    assert not names[0] & names[1]  # both are on one page


def test_two_pruners_of_one_name_make_the_line_of_all_weights():
    run = small_run()
    recipe = Recipe.parse(
        """
        modifiers:
        - magnitude_prune: {sparsity: 0.75, targets: [a.weight]}
        - magnitude_prune: {pattern: "2:4", targets: [b.weight]}
        """
    )
    history = ((1, "magnitude_prune/sparsity", 0.75), (1, "magnitude_prune/sparsity", 0.5))
    training = replace(run.training, history=history)
    both = replace(run, recipe=recipe, training=training)
    (panel,) = [panel for panel in timeline.panels(both) if panel.title == "share of zeros"]
    assert panel.series == (("sparsity", ((0.0, 0.0), *((float(row.epoch), row.sparsity) for row in run.epochs))),)
    alone = replace(both, recipe=Recipe.parse("modifiers: [{magnitude_prune: {sparsity: 0.75, targets: [a.weight]}}]"))
    (panel,) = [panel for panel in timeline.panels(alone) if panel.title == "share of zeros"]
    assert panel.series[0][0] == "magnitude_prune"


def scatter(*spots: Spot, name: str = "s", level: tuple[str, float] | None = None) -> Scatter:
    series = (SpotSeries(name=name, spots=spots, joined=True),)
    return Scatter(title=name, axis="x", series=series, spell_x=str, spell_y=str, level=level)


def test_words_of_others_are_escaped():
    nasty = "</title><script>alert(1)</script>"
    text = draw_scatter(scatter(Spot(x=1, y=0.5, name=nasty), name=nasty, level=(nasty, 0.4)), 400)
    assert "<script" not in text
    assert "&lt;script&gt;" in text


@settings(max_examples=15, deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(1, 1e6), st.floats(0, 1), st.text("ab", min_size=3, max_size=12)), min_size=1, max_size=9
    ),
    st.sampled_from([330.0, 500.0]),
)
def test_spots_stay_inside_and_names_apart(known, width):
    chart = scatter(*(Spot(x=x, y=y, name=name) for x, y, name in known), level=("level", 0.5))
    drawing = ET.fromstring(draw_scatter(chart, width))
    height = float(drawing.get("height"))
    found = places(drawing)
    assert set(found) == {f"{name}: {y}, {x}" for x, y, name in known}
    assert all(0 <= x <= width and 0 <= y <= height for x, y in found.values())
    names = {"level 0.5", *(name for *_, name in known)}
    written = [text for text in drawing.iter("text") if text.text in names]
    boxes = [(float(text.get("x")), float(text.get("y")), 3.1 * len(text.text)) for text in written]
    assert boxes
    for index, (x, y, half) in enumerate(boxes):
        assert half <= x <= width - half
        for other_x, other_y, other in boxes[:index]:
            assert abs(x - other_x) >= half + other - 0.2 or abs(y - other_y) >= 12.9
