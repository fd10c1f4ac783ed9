"""`sweep:` of a pruner: which pruning step reaches which sparsity."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ovit_engine import Clock, Engine, Recipe, RecipeError
from ovit_engine.bases.amounts import place_targets
from tests.loops import PRUNE, mlp, recipe

CLOCK = Clock(steps_per_epoch=10, total_steps=100)
LINEAR = "start: 2ep, end: 6ep, every: 1ep, sparsity: {from: 0.4, to: 0.6}"  # 0.4 0.45 0.5 0.55 0.6


def pruner(options: str) -> Any:
    return recipe(f"magnitude_prune: {{targets: [a], {options}}}").modifiers[0]


@pytest.mark.parametrize(
    ("options", "events", "points"),
    [
        (f"{LINEAR}, sweep: [0.6]", [0.4, 0.45, 0.5, 0.55, 0.6], {60: 0.6}),
        (f"{LINEAR}, sweep: [0.6, 0.4]", [0.4, 0.45, 0.5, 0.55, 0.6], {20: 0.4, 60: 0.6}),
        (f"{LINEAR}, sweep: [0.44, 0.54]", [0.4, 0.44, 0.5, 0.54, 0.6], {30: 0.44, 50: 0.54}),
        (f"{LINEAR}, sweep: [0.4, 0.425]", [0.4, 0.425, 0.5, 0.55, 0.6], {20: 0.4, 30: 0.425}),  # half-way, one taken
        (f"{LINEAR}, sweep: {{sparsity: [0.5], onnx: true}}", [0.4, 0.45, 0.5, 0.55, 0.6], {40: 0.5}),
        ("sparsity: 0.5, start: 1ep, sweep: [0.5]", [0.5], {10: 0.5}),
        ("sparsity: {1ep: 0.3, 2ep: 0.6, 3ep: 0.9}, sweep: [0.9, 0.3]", [0.3, 0.6, 0.9], {10: 0.3, 30: 0.9}),
    ],
)
def test_the_nearest_pruning_step_reaches_a_sparsity_exactly(
    options: str, events: list[float], points: dict[int, float]
) -> None:
    made = pruner(options)
    assert list(made.events(CLOCK).values()) == pytest.approx(events)
    assert made.sweep_plan(CLOCK).points == points
    assert all(made.events(CLOCK)[step] == sparsity for step, sparsity in points.items())
    kept = [step for step, _, value in made.timeline(CLOCK) if value.endswith("(magnitude_prune), sweep point")]
    assert kept == list(points)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (f"{LINEAR}, sweep: [0.3]", "sweep: 0.3 is out of reach; the pruning steps are to 0.4, 0.45, 0.5, 0.55, 0.6"),
        (f"{LINEAR}, sweep: [0.4, 0.65]", "sweep: 0.65 is out of reach; the pruning steps are to 0.4, 0.45"),
        (
            f"{LINEAR}, sweep: [0.49, 0.51]",
            "sweep: 0.49 and 0.51 fall on one pruning step, at step 40: prune more often, or leave one out; the",
        ),
        (f"{LINEAR}, sweep: [0.5, 0.5]", "sweep: 0.5 and 0.5 fall on one pruning step"),
        ("sparsity: {1ep: 0.3, 2ep: 0.6}, sweep: [0.5]", "sweep: no pruning step is to 0.5; the .* are to 0.3, 0.6"),
        ("sparsity: 0.5, sweep: [0.5, 0.6]", "sweep: no pruning step is to 0.6; the pruning steps are to 0.5"),
        ("pattern: '2:4', sweep: [0.5]", "sweep: a sweep goes over sparsities, and pattern 2:4 has but one"),
    ],
)
def test_sparsities_that_no_step_reaches(options: str, words: str) -> None:
    with pytest.raises(RecipeError, match=rf"^r.yaml:2:\d+: magnitude_prune\.{words}"):
        pruner(options).events(CLOCK)


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        ("[0.5, 75]", r"magnitude_prune\.sweep.*: sparsity 75 is not in \[0, 1\): did you mean 0\.75\?"),
        ("0.5", r"magnitude_prune\.sweep: 0\.5 is no sweep: write a list of sparsities such as \[0\.5, 0\.75\]"),
        ("[]", r"magnitude_prune\.sweep.*: list should have at least 1 item"),
        ("{metric: loss}", r"magnitude_prune\.sweep.sparsity is missing"),
        ("{sparsity: [0.5], bset: min}", r"magnitude_prune\.sweep has no option 'bset'"),
        ("{sparsity: [0.5], best: low}", r"magnitude_prune\.sweep\.best: input should be 'max' or 'min': 'low'"),
    ],
)
def test_what_is_no_sweep(sweep: str, words: str) -> None:
    with pytest.raises(RecipeError, match=rf"^r.yaml:2:\d+: {words}"):
        pruner(f"sparsity: 0.5, sweep: {sweep}")


@pytest.mark.parametrize("sweep", ["[0.25, 0.5]", "{sparsity: [0.5], metric: loss, best: min, onnx: true}"])
def test_a_sweep_survives_the_dump(sweep: str) -> None:
    before = recipe(f"{PRUNE[:-1]}, sweep: {sweep}}}")
    assert Recipe.parse(before.dump()).modifiers == before.modifiers
    assert Recipe.parse(before.dump()).dump() == before.dump()


def test_one_pruner_of_a_recipe_sweeps(tmp_path: Path) -> None:
    second = PRUNE.replace("0.weight", "2.weight")
    two = recipe(f"{PRUNE[:-1]}, sweep: [0.5]}}", f"{second[:-1]}, sweep: [0.5]}}")
    with pytest.raises(
        RecipeError, match=r"^r.yaml:3:\d+: magnitude_prune.sweep: magnitude_prune \(r.yaml:2:5\) sweeps"
    ):
        Engine(mlp(), two, steps_per_epoch=10, epochs=4, output=tmp_path)


SOME = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 0.9]) | st.floats(0, 0.99)  # equal ones and halves are the hard ones


@given(
    st.lists(SOME, min_size=1, max_size=12).map(sorted),
    st.lists(SOME, min_size=1, max_size=5, unique=True),
)
@example([0.0, 0.0, 0.5], [0.25])
@example([0.0, 0.0, 0.5], [0.1, 0.2])
@example([0.1, 0.1, 0.1, 0.5], [0.1, 0.25])
def test_schedules_with_a_sweep_never_fall(sparsities: list[float], targets: list[float]) -> None:
    scheduled = {10 * index: sparsity for index, sparsity in enumerate(sparsities)}
    try:
        placed = place_targets(scheduled, targets, movable=True)
    except ValueError:
        return
    assert sorted(placed.values()) == sorted(targets)
    moved = list({**scheduled, **placed}.values())
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(moved))
    assert len(moved) == len(scheduled)
    for step, target in placed.items():
        assert abs(scheduled[step] - target) <= min(abs(value - target) for value in sparsities) + 1e-9
