"""Axes and marks: where values land, and that drawings say what was measured."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovit_engine.core.recipe import Recipe
from ovit_engine.core.schedule import Clock
from ovit_engine.report import svg, timeline, tradeoff
from ovit_engine.report.gather import Epoch, RunFolder, Training
from ovit_engine.report.svg import Axis, log_ticks, nice_ticks, padded, steps
from ovit_engine.report.tradeoff import Scatter, Series, Spot
from ovit_engine.report.words import megabytes, percent, points


@given(st.floats(-1e3, 1e3), st.floats(1e-6, 1e6), st.integers(2, 12))
def test_ticks_are_few_round_and_inside(start, width, most):
    low = start * width
    high = low + width
    found = nice_ticks(low, high, most)
    assert len(found) <= most
    gap = max(width * 1e-6, abs(low) * 1e-9)
    assert all(low - gap <= value <= high + gap for value in found)
    for first, second in pairwise(found):
        mantissa = (second - first) / 10 ** math.floor(math.log10((second - first) * (1 + 1e-6)))
        assert min(abs(mantissa - nice) for nice in (1, 2, 5)) < 1e-3


def test_ticks_by_hand():
    assert nice_ticks(0, 16, 12) == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert nice_ticks(0.53, 0.56, 4) == [0.53, 0.54, 0.55, 0.56]
    assert nice_ticks(3, 3, 5) == [3]
    assert log_ticks(1e-6, 1e-3, 4) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3])
    assert log_ticks(1e-6, 1e-1, 3) == pytest.approx([1e-5, 1e-3, 1e-1])
    assert log_ticks(2.0, 5.0, 3) == [2.0, 5.0]


def test_axes_place_values_and_staircases_hold_them():
    assert [Axis(low=0, high=4, start=100, end=0).at(value) for value in (0, 1, 4)] == [100, 75, 0]
    assert Axis(low=1, high=100, start=0, end=10, log=True).at(10) == pytest.approx(5)
    assert Axis(low=2, high=2, start=0, end=10).at(2) == 5
    assert steps([(0, 5), (2, 3)], 9) == [(0, 5), (2, 5), (2, 3), (9, 3)]
    assert padded([1.0, 2.0], 0.1) == pytest.approx((0.9, 2.1))
    assert padded([0.0]) == (-1.0, 1.0)


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
    training = Training(clock=Clock(10, 40), step=40, finished=True, recipe_text=RECIPE, history=history, layers=())
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


@pytest.mark.parametrize("width", [330.0, 1080.0])
def test_a_timeline_shows_each_measured_value_at_its_place(width):
    drawing = timeline.draw(small_run(), width)
    titles = [title.text for title in drawing.iter("title")]
    for words in ("epoch 1: accuracy 25 %", "epoch 4: accuracy 50 %", "epoch 2: loss 1", "p: 50 % zeros"):
        assert words in titles
    assert "epoch 3: int8 fake-quantization starts" in titles
    left = {dot.find("title").text: float(dot.get("cx")) for dot in drawing.iter("circle")}
    start, end = left["epoch 1: loss 2"], left["epoch 4: loss 0.5"]
    assert left["epoch 2: loss 1"] == pytest.approx(start + (end - start) / 3, abs=0.1)
    assert end == width - 14
    high = {dot.find("title").text: float(dot.get("cy")) for dot in drawing.iter("circle")}
    assert high["epoch 4: accuracy 50 %"] < high["epoch 1: accuracy 25 %"]  # y grows downwards
    assert [text.text for text in drawing.iter("text") if text.get("class") == "title"] == [
        "accuracy",
        "training loss",
        "share of zeros",
        "learning rate (end of epoch)",
    ]


def test_a_timeline_without_a_checkpoint_is_that_of_the_metrics():
    run = small_run()
    bare = RunFolder(path=run.path, epochs=run.epochs)
    titles = [title.text for title in timeline.draw(bare, 500).iter("title")]
    assert "epoch 2: accuracy 20 %" in titles
    assert timeline.draw(RunFolder(path=run.path), 500) is None


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


def test_words_of_others_are_escaped():
    nasty = "</title><script>alert(1)</script>"
    series = (Series(name=nasty, spots=(Spot(x=1, y=0.5, name=nasty),)),)
    chart = Scatter(title=nasty, axis="x", series=series, spell_x=str, spell_y=str, level=(nasty, 0.4))
    text = svg.markup(tradeoff.draw(chart, 400))
    assert "<script" not in text
    assert "&lt;script&gt;" in text


@given(
    st.lists(
        st.tuples(st.floats(1, 1e6), st.floats(0, 1), st.text("ab", min_size=1, max_size=12)), min_size=1, max_size=9
    ),
    st.sampled_from([330.0, 500.0]),
)
def test_spots_stay_inside_and_names_apart(known, width):
    spots = tuple(Spot(x=x, y=y, name=name) for x, y, name in known)
    chart = Scatter(title="t", axis="x", series=(Series(name="s", spots=spots),), spell_x=str, spell_y=str)
    drawing = tradeoff.draw(chart, width)
    height = float(drawing.get("height"))
    dots = [dot for dot in drawing.iter("circle") if dot.find("title") is not None]
    assert len(dots) == len(spots)
    assert all(0 <= float(dot.get("cx")) <= width and 0 <= float(dot.get("cy")) <= height for dot in dots)
    names = {name for *_, name in known}
    written = [text for text in drawing.iter("text") if text.get("text-anchor") == "middle" and text.text in names]
    boxes = [(float(text.get("x")), float(text.get("y")), 3.1 * len(text.text)) for text in written]
    for index, (x, y, half) in enumerate(boxes):
        for other_x, other_y, other in boxes[:index]:
            assert abs(x - other_x) >= half + other - 0.2 or abs(y - other_y) >= 10.8
