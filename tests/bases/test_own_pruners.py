"""Pruners as a plugin writes them, with public names alone."""

from collections.abc import Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

from ovit_engine import (
    Calibration,
    Engine,
    GradientPruner,
    Masks,
    Modifier,
    Pruner,
    Recipe,
    RecipeError,
    Run,
    Slot,
    find_slots,
    load_point,
    register,
)
from ovit_engine.core import registry
from ovit_engine.post_training.oneshot import oneshot
from ovit_engine.post_training.pruners import pruner_names
from tests.loops import X, Y, loss_of, mlp, plain, recipe

RANGE = "{start: 1st, end: 5st, every: 2st, sparsity: {from: 0.25, to: 0.75}, targets: ['re:.*weight']%s}"


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.modifiers()
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@pytest.fixture
def largest() -> type[Pruner]:
    @register("largest_first")
    class LargestFirst(Pruner):
        """Prunes the largest weights, which nobody else does."""

        power: float = Field(1.0, gt=0, description="exponent of the score")

        def scores(self, run: Run, slots: Sequence[Slot]) -> list[Tensor]:
            return [-(slot.gather().abs() ** self.power) for slot in slots]

    return LargestFirst


@pytest.fixture
def own_obd() -> type[Pruner]:
    @register("own_obd")
    class OwnObd(GradientPruner):
        """Optimal brain damage in two lines."""

        def scores(self, run: Run, slots: Sequence[Slot]) -> list[Tensor]:
            fisher = self.mean_over_gradients(run, slots, torch.square)
            return [slot.gather().double() ** 2 * each for slot, each in zip(slots, fisher, strict=True)]

    return OwnObd


def trained(line: str, steps: int = 6, calibration: Calibration | None = None, **options: Any) -> Engine:
    torch.manual_seed(0)
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    engine = Engine(model, recipe(line), steps_per_epoch=steps, epochs=1, **options)
    engine.attach(optimizer, calibration=calibration)
    for _ in range(steps):
        plain(model, optimizer)
    engine.detach()
    return engine


def zeros(masks: Masks) -> int:
    found = [masks.get(name) for name in masks.names()]
    return sum(int((~mask).sum()) for mask in found if mask is not None)


def calibration() -> Calibration:
    return Calibration(torch.utils.data.TensorDataset(X, Y), nn.functional.mse_loss)


def both(name: str, options: str, **more: Any) -> Iterator[dict[str, Any]]:
    for each in (name, "obd_prune"):
        yield trained(f"{each}: {{{options}}}", **more).run.masks.state_dict()


@pytest.mark.usefixtures("largest")
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
def test_a_score_has_the_schedule_and_exact_counts_of_every_pruner(scope: str) -> None:
    engine = trained(f"largest_first: {RANGE % f', scope: {scope}'}")
    total = sum(p.numel() for p in engine.model.parameters() if p.ndim == 2)
    assert zeros(engine.run.masks) == round(0.75 * total)
    logged = [(step, value) for step, name, value in engine.run.history if name == "largest_first/sparsity"]
    assert [step for step, _ in logged] == [1, 3, 5]
    assert [value for _, value in logged] == pytest.approx([0.25, 0.5, 0.75], abs=1 / total)


@pytest.mark.usefixtures("largest")
def test_the_highest_scores_stay_and_the_pattern_holds() -> None:
    engine = trained("largest_first: {pattern: '2:4', targets: [0.weight], power: 2.0}", steps=1)
    before = mlp_weight()
    mask = engine.run.masks.get("0.weight")
    assert mask is not None
    assert torch.equal(mask.view(-1, 4).sum(1), torch.full((32,), 2))
    kept = before.abs().view(-1, 4)[mask.view(-1, 4)].view(-1, 2).max(1).values
    gone = before.abs().view(-1, 4)[~mask.view(-1, 4)].view(-1, 2).min(1).values
    assert bool((kept <= gone).all())


def mlp_weight() -> Tensor:
    torch.manual_seed(0)
    weight: Tensor = mlp()[0].weight.detach()  # type: ignore[assignment, union-attr]
    return weight


def test_solve_may_move_what_stays() -> None:
    @register("halver")
    class Halver(Pruner):
        """Prunes the first weights of each target and halves the others."""

        def solve(self, run: Run, slots: Sequence[Slot], sparsity: float | None) -> tuple[list[Tensor], list[Tensor]]:
            assert sparsity is not None
            masks = [torch.arange(s.tensor.numel()).view(s.tensor.shape) >= sparsity * s.tensor.numel() for s in slots]
            return masks, [slot.gather() / 2 for slot in slots]

    model = mlp()
    before = model[0].weight.detach().clone()
    engine = Engine(model, recipe("halver: {sparsity: 0.25, targets: [0.weight]}"), steps_per_epoch=1, epochs=1)
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    after = model[0].weight.detach()
    assert torch.equal(after.view(-1)[:32], torch.zeros(32))
    assert torch.equal(after.view(-1)[32:], before.view(-1)[32:] / 2)


def test_a_pruner_without_either_says_so() -> None:
    @register("idle")
    class Idle(Pruner):
        """Forgets its method."""

    with pytest.raises(NotImplementedError, match="Idle has neither 'scores' nor 'solve'"):
        Engine(
            mlp(), recipe("idle: {sparsity: 0.5, start: 1ep, targets: [0.weight]}"), steps_per_epoch=2, epochs=2
        ).prepare()


def test_two_pruners_whose_names_differ_by_the_suffix_keep_both() -> None:
    class Shuffled(Pruner):
        """Never runs."""

        def scores(self, run: Run, slots: Sequence[Slot]) -> list[Tensor]:
            return []

    register("rand")(type("Rand", (Shuffled,), {"__doc__": "One."}))
    register("rand_prune")(type("RandPrune", (Shuffled,), {"__doc__": "Another."}))
    assert {"rand", "rand_prune", "magnitude"} <= set(pruner_names())


def test_a_plugin_that_can_not_be_imported_is_named_where_a_modifier_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = EntryPoint("mine", "no_such_module_of_mine", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group: [broken])
    registry.broken_plugins.cache_clear()
    try:
        assert Recipe.parse("modifiers: [{constant_mask: {}}]").modifiers  # a recipe without it is of no concern
        words = r"no modifier 'mine'.* The plugin 'mine' \(no_such_module_of_mine\) of an unknown package can't be"
        with pytest.raises(RecipeError, match=words):
            Recipe.parse("modifiers: [{mine: {}}]")
    finally:
        registry.broken_plugins.cache_clear()


def test_a_modifier_that_nobody_knows_may_be_a_plugins() -> None:
    with pytest.raises(RecipeError, match=r"A plugin's modifiers come with its package \(entry points 'ovit_engine\."):
        Recipe.parse("modifiers: [{mine: {}}]")


@pytest.mark.usefixtures("own_obd")
@pytest.mark.parametrize("sparsity", [0.3, 0.8])
def test_a_mean_over_gradients_is_that_of_the_built_in_pruner(sparsity: float) -> None:
    options = f"start: 2st, sparsity: {sparsity}, targets: ['re:.*weight'], gradients: 6, images_per_gradient: 3"
    ours, theirs = both("own_obd", options, calibration=calibration())
    for name in theirs:
        assert torch.equal(ours[name]["bits"], theirs[name]["bits"]), name


@pytest.mark.usefixtures("own_obd")
@pytest.mark.filterwarnings("ignore:.*no calibration was given:UserWarning")
def test_without_calibration_it_takes_the_last_gradients_of_training() -> None:
    ours, theirs = both("own_obd", "start: 4st, sparsity: 0.5, targets: [0.weight], gradients: 3")
    assert torch.equal(ours["0.weight"]["bits"], theirs["0.weight"]["bits"])


@pytest.mark.usefixtures("largest")
def test_it_sweeps_exports_and_is_compared(tmp_path: Path) -> None:
    line = f"largest_first: {RANGE % ', sweep: [0.5, 0.75]'}"
    engine = trained(line, output=tmp_path)
    assert sorted(engine.sweep.points) == [0.5, 0.75]  # type: ignore[union-attr]
    certificate = engine.export(tmp_path / "m.onnx", X[:1], data=[(X, Y)])
    zeros_promised = sum(layer.zeros for layer in certificate.promise.layers)
    assert zeros_promised == zeros(engine.run.masks)
    half = load_point(mlp(), tmp_path / "sweep" / "0.5.pt")
    assert half.run.masks.sparsity() == 0.5
    found = oneshot(
        mlp(),
        recipe(line),
        calibration=calibration(),
        evaluate=lambda model: 1 / (1 + loss_of(model).item()),
        sparsities=[0.5],
        compare=["largest_first", "magnitude"],
    )
    assert [(point.pruner, point.sparsity) for point in found.points] == [("largest_first", 0.5), ("magnitude", 0.5)]


@pytest.mark.usefixtures("largest", "own_obd")
def test_a_comparison_offers_pruners_that_it_can_run_and_no_others() -> None:
    @register("percent_prune")
    class PercentPrune(Modifier):
        """Has the fields of a pruner and is none."""

        sparsity: str = "50%"
        targets: list[str]

    assert {"largest_first", "own_obd", "magnitude", "obd"} <= set(pruner_names())
    assert not {"percent", "percent_prune", "movement", "structured"} & set(pruner_names())


def test_a_sparsity_in_words_of_its_own_is_exported(tmp_path: Path) -> None:
    @register("percent_prune")
    class PercentPrune(Modifier):
        """A plain modifier whose sparsity is text."""

        sparsity: str = "50%"
        targets: list[str]

        def attach(self, run: Run) -> None:
            for slot in find_slots(run.model, self.targets):
                count = int(slot.tensor.numel() * float(self.sparsity.rstrip("%")) / 100)
                mask = torch.ones(slot.tensor.numel(), dtype=torch.bool)
                mask[slot.tensor.detach().abs().flatten().argsort()[:count]] = False
                run.masks.set(slot, mask.view(slot.tensor.shape))

    engine = trained("percent_prune: {sparsity: '50%', targets: ['0.weight']}")
    certificate = engine.export(tmp_path / "m.onnx", X[:1], data=[(X, Y)])
    assert [(layer.name, layer.zeros) for layer in certificate.promise.layers] == [("0.weight", 64)]
    assert Recipe.parse(engine.recipe.dump()).modifiers == engine.recipe.modifiers
