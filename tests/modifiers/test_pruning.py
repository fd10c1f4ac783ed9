"""What every pruner shares: steps, counts, scopes and patterns, through magnitude_prune."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from ovit_engine import Clock, Engine, Modifier, Recipe, RecipeError
from tests.loops import mlp, plain, recipe, zeros

CLOCK = Clock(steps_per_epoch=10, total_steps=100)
BOTH = "targets: [0.weight, 2.weight]"  # 128 and 16 weights


def events(options: str) -> dict[int, float | None]:
    pruner: Any = recipe(f"magnitude_prune: {{targets: [a], {options}}}").modifiers[0]
    found: dict[int, float | None] = pruner.events(CLOCK)
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("sparsity: 0.5", {0: 0.5}),
        ("sparsity: 0.5, start: 2.5ep", {25: 0.5}),
        ("sparsity: 0.5, start: 100%", {100: 0.5}),
        ("pattern: '2:4', start: 1ep", {10: None}),
        ("sparsity: {1ep: 0.4, 25st: 0.4, 50%: 0.75}", {10: 0.4, 25: 0.4, 50: 0.75}),
        (
            "sparsity: {from: 0.4, to: 0.6}, start: 2ep, end: 6ep, every: 1ep",
            {20: 0.4, 30: 0.45, 40: 0.5, 50: 0.55, 60: 0.6},
        ),
        # the last interval is what is left
        ("sparsity: {from: 0.4, to: 0.6}, end: 25st, every: 1ep", {0: 0.4, 10: 0.48, 20: 0.56, 25: 0.6}),
        ("sparsity: {from: 0.4, to: 0.6}, end: 5st, every: 1ep", {0: 0.4, 5: 0.6}),
        ("sparsity: {from: 0.4, to: 0.6}, start: 5st, end: 5st, every: 1ep", {5: 0.6}),
        (
            "sparsity: {from: 0.0, to: 0.8, curve: cubic}, end: 4st, every: 2st",
            {0: 0.0, 2: 0.8 * (1 - 0.5**3), 4: 0.8},
        ),
        ("sparsity: {from: 0.0, to: 0.8, curve: constant}, end: 4st, every: 2st", {0: 0.8, 2: 0.8, 4: 0.8}),
    ],
)
def test_pruning_steps(options: str, expected: dict[int, float | None]) -> None:
    found = events(options)
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("sparsity: {2ep: 0.4, 1ep: 0.5}", "magnitude_prune.sparsity: '1ep' does not come after '2ep'"),
        ("sparsity: {1ep: 0.4, 10st: 0.5}", "magnitude_prune.sparsity: '10st' does not come after '1ep'"),
        ("sparsity: {1ep: 0.4, 2ep: 0.3}", "magnitude_prune.sparsity: sparsity falls from 0.4 at 1ep to 0.3 at 2ep"),
        ("sparsity: {1ep: 0.4, 11ep: 0.5}", "magnitude_prune.sparsity: '11ep' is past the end of training at step 100"),
        (
            "sparsity: 0.5, start: 11ep",
            "magnitude_prune.start: '11ep' is step 110, past the end of training at step 100",
        ),
        (
            "sparsity: {from: 0.4, to: 0.6}, start: 3ep, end: 2ep, every: 1ep",
            "magnitude_prune.end: '2ep' comes before the start at '3ep'",
        ),
        (
            "sparsity: {from: 0.4, to: 0.6}, end: 2ep, every: 0.01ep",
            "magnitude_prune.every: '0.01ep' is less than a step",
        ),
    ],
)
def test_times_that_make_no_schedule(options: str, words: str) -> None:
    with pytest.raises(RecipeError, match=rf"^r.yaml:2:\d+: {words}"):
        events(options)


def pruned(options: str, model: nn.Module | None = None) -> Any:
    model = model or mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = Engine(model, recipe(f"magnitude_prune: {{{options}}}"), steps_per_epoch=1, epochs=1)
    engine.attach(optimizer)
    return model


def test_global_scope_takes_the_smallest_of_all() -> None:
    model = pruned(f"sparsity: 0.3, {BOTH}")
    dense = torch.cat([mlp()[i].weight.detach().flatten() for i in (0, 2)])
    found = torch.cat([model[i].weight.detach().flatten() for i in (0, 2)])
    smallest = dense.abs().argsort(stable=True)[: round(0.3 * 144)]
    assert sorted((found == 0).nonzero().flatten().tolist()) == sorted(smallest.tolist())


def test_layer_scope_takes_as_many_of_each() -> None:
    model = pruned(f"sparsity: 0.3, scope: layer, {BOTH}")
    assert (zeros(model[0]), zeros(model[2])) == (round(0.3 * 128), round(0.3 * 16))


def test_keep_two_of_four() -> None:
    model = pruned(f"pattern: '2:4', {BOTH}")
    for index in (0, 2):
        groups = model[index].weight.detach().unflatten(1, (-1, 4))
        assert bool(((groups != 0).sum(-1) == 2).all())


def test_blocks_go_as_a_whole() -> None:
    model = pruned("pattern: {block: [1, 4]}, sparsity: 0.5, targets: [0.weight]")
    blocks = (model[0].weight.detach() == 0).unflatten(1, (-1, 4))
    assert bool((blocks.all(-1) == blocks.any(-1)).all())
    assert zeros(model[0]) == 64


def test_a_shape_that_cannot_follow_the_pattern_is_named() -> None:
    with pytest.raises(RecipeError, match=r"r.yaml:2:\d+: magnitude_prune.pattern: weight: .*\(3, 6\)"):
        pruned("pattern: '2:4', targets: [weight]", nn.Linear(6, 3))


def test_one_dimensional_tensors_by_a_greedy_pattern() -> None:
    with pytest.raises(
        RecipeError, match=r"r.yaml:2:\d+: magnitude_prune.targets: target 're:.*' also takes 2 one-dim"
    ):
        pruned("sparsity: 0.5, targets: ['re:.*']")


def test_a_bias_named_in_full_is_pruned() -> None:
    model = pruned("sparsity: 0.5, targets: [0.bias]")
    assert int((model[0].bias == 0).sum()) == 8


def test_what_was_pruned_stays_pruned() -> None:
    model = mlp()
    text = "magnitude_prune: {sparsity: {0st: 0.25, 10st: 0.5, 20st: 0.75}, targets: [0.weight]}"
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    engine = Engine(model, recipe(text), steps_per_epoch=20, epochs=1).attach(optimizer)
    before = model[0].weight == 0
    for count in range(1, 21):
        plain(model, optimizer)
        now = model[0].weight == 0
        assert bool((now | ~before).all())
        assert int(now.sum()) == (32 if count < 10 else 64 if count < 20 else 96)
        before = now
    engine.detach()
    assert [value for _, _, value in engine.run.history] == [0.25, 0.5, 0.75]


def test_the_timeline_tells_the_sparsity() -> None:
    (pruner,) = recipe("magnitude_prune: {pattern: '1:4', start: 1ep, targets: [a]}").modifiers
    assert isinstance(pruner, Modifier)
    assert list(pruner.timeline(CLOCK)) == [(10, "sparsity", "75.00% 1:4 (magnitude_prune)")]


class FailsOnce:
    """A `solve` that is interrupted the first time, as by Ctrl-C in a notebook."""

    def __init__(self, solve: Any) -> None:
        self._solve, self._failed = solve, False

    def __call__(self, *arguments: Any) -> Any:
        if not self._failed:
            self._failed = True
            raise KeyboardInterrupt
        return self._solve(*arguments)


@pytest.mark.parametrize("last", [False, True], ids=["made up for at the next step", "or noticed at detach"])
def test_an_interrupted_pruning_step_is_not_lost(last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    start = 10 if last else 5
    text = f"modifiers: [{{magnitude_prune: {{start: {start}st, sparsity: 0.5, targets: ['0.weight']}}}}]"
    engine = Engine(model, Recipe.parse(text), steps_per_epoch=10, epochs=1)
    (pruner,) = engine.modifiers
    monkeypatch.setattr(type(pruner), "solve", FailsOnce(pruner.solve))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    for step in range(1, 11):
        with pytest.raises(KeyboardInterrupt) if step == start else nullcontext():
            plain(model, optimizer)
    with pytest.warns(UserWarning, match="pruning at step 10 is done now") if last else nullcontext():
        engine.detach()
    assert engine.run.masks.sparsity() == 0.5


@pytest.mark.parametrize("modifier", ["magnitude_prune: {", "svite: {every: 1st, "])
def test_the_literature_s_word_for_a_scope_is_explained(modifier: str) -> None:
    with pytest.raises(RecipeError, match=r"^r.yaml:2:\d+: \w+.scope: 'uniform' is called 'layer' here"):
        recipe(f"{modifier}scope: uniform, sparsity: 0.5, targets: [0.weight]}}")


def test_a_pattern_in_a_transposed_convolution_is_refused() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(8, 8, 3))
    text = "modifiers: [{magnitude_prune: {pattern: '2:4', targets: ['0.weight']}}]"
    with pytest.raises(RecipeError, match=r"0\.weight: 2:4 in a ConvTranspose2d, whose axes no sparse kernel reads"):
        Engine(model, Recipe.parse(text), steps_per_epoch=10, epochs=1).prepare()
