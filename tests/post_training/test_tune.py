"""The grid over damp, gradients and block: what is tried, on which images, and what is said of it."""

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ovit_engine import Calibration, Recipe
from ovit_engine.post_training.oneshot import prune_copy
from ovit_engine.post_training.oneshot_report import GridStep
from ovit_engine.post_training.pruners import choose_pruners
from ovit_engine.post_training.setup import set_up
from ovit_engine.post_training.tune import Tuned, hold_out, mean_loss, settings, tune
from tests.post_training.test_oneshot import RECIPE, accuracy, points, trained
from tests.training.conftest import tiny_recipe


def held_out() -> DataLoader[Any]:
    x, y = points()
    return DataLoader(TensorDataset(x[48:64], y[48:64]), batch_size=5)


def run(recipe: str = RECIPE, **options: Any) -> Tuned:
    x, y = points()
    calibration = Calibration(TensorDataset(x[:48], y[:48]), options.pop("loss", cross_entropy))
    wanted: dict[str, Any] = {"held_out": held_out(), "evaluate": accuracy, "sparsity": 0.8, **options}
    return tune(trained(), Recipe.parse(recipe), calibration=calibration, **wanted)


def test_the_grid_around_a_recipe() -> None:
    (pruner,) = choose_pruners(Recipe.parse(RECIPE))
    own, grid = settings(pruner, 0.5)
    assert own == {"damp": 1e-5, "gradients": 8, "block": 12}
    assert [tuple(each.values()) for each in grid] == [
        (damp, gradients, block) for damp in (1e-8, 1e-7, 1e-6, 1e-5) for gradients in (2, 8) for block in (3, 12)
    ]
    (obd,) = choose_pruners(Recipe.parse(RECIPE.replace("1.0e-5", "3.0e-4")), ["obd"])
    assert settings(obd, 0.5) == (
        {"damp": 1e-6, "gradients": 8},
        [{"damp": damp, "gradients": n} for damp in (1e-8, 1e-7, 1e-6, 1e-5) for n in (2, 8)],
    )
    tiles = RECIPE.replace("gradients: 8", "gradients: 1, pattern: {block: [1, 6]}").replace("1.0e-5", "3.0e-4")
    own, grid = settings(choose_pruners(Recipe.parse(tiles))[0], 0.5)
    assert {each["block"] for each in grid} == {6, 12}  # a block holds a tile
    assert {each["gradients"] for each in grid} == {1}
    assert sorted({each["damp"] for each in grid}) == [1e-8, 1e-7, 1e-6, 1e-5, 3e-4]
    assert own in grid


def test_the_best_has_the_lowest_loss_and_only_then_validation_images_are_seen() -> None:
    seen: list[str] = []
    steps: list[GridStep[Tuned]] = []

    def evaluate(model: nn.Module) -> float:
        seen.append(steps[-1].what)
        return accuracy(model)

    found = run(evaluate=evaluate, progress=steps.append)
    assert len(found.settings) == 16
    assert found.best.loss == min(each.loss for each in found.settings)
    assert seen == ["validation"] * 3
    assert [step.what for step in steps[:2]] == [
        "damp 1e-08, gradients 2, block 3",
        "damp 1e-08, gradients 2, block 12",
    ]
    assert [len(step.result.settings) for step in steps] == [*range(16), 16, 16]
    assert steps[-2].done + 3 * 64 == steps[-1].done == steps[-1].total
    assert all(each.sparsity == round(0.8 * 108) / 108 for each in found.settings)
    assert found.dense == accuracy(trained())
    assert found.dense_loss == mean_loss(trained(), held_out(), Calibration(held_out(), cross_entropy))


def test_losses_are_of_the_held_out_images_as_a_whole() -> None:
    x, y = points()
    calibration = Calibration(held_out(), cross_entropy)
    assert mean_loss(trained(), held_out(), calibration) == pytest.approx(
        float(cross_entropy(trained()(x[48:64]), y[48:64]).detach()), rel=1e-6
    )


@pytest.mark.parametrize("damp", ["1.0e-5", "1.0e-8"])
def test_accuracies_are_those_of_the_settings_named(damp: str) -> None:
    x, y = points()
    evaluated: list[torch.Tensor] = []

    def evaluate(model: nn.Module) -> float:
        evaluated.append(next(model.parameters()).detach().clone())
        return len(evaluated) / 10

    found = run(RECIPE.replace("1.0e-5", damp), evaluate=evaluate)
    assert (found.dense, found.accuracy, found.own_accuracy) == (0.1, 0.2, 0.3)
    assert torch.equal(evaluated[0], next(trained().parameters()))
    calibration = Calibration(TensorDataset(x[:48], y[:48]), cross_entropy)
    for options, weight in zip((found.best.options, found.own), evaluated[1:], strict=True):
        again = prune_copy(trained(), found.pruner.at(0.8, **options), calibration)
        assert torch.equal(next(again.model.parameters()), weight)
    assert found.own["damp"] == float(damp)


def test_losses_are_taken_in_eval_mode() -> None:
    model = nn.Sequential(nn.Dropout(0.9), *trained()).train()
    calibration = Calibration(held_out(), cross_entropy)
    assert mean_loss(model, held_out(), calibration) == mean_loss(trained(), held_out(), calibration)


def test_of_equals_the_cheapest_is_best() -> None:
    found = run(loss=lambda outputs, targets: outputs.sum() * 0 + 1)
    assert (found.best.options["gradients"], found.best.options["block"]) == (2, 3)


def test_the_lines_to_paste_are_the_recipe_with_the_best_setting() -> None:
    found = run()
    ((name, options),) = yaml.safe_load(found.lines())[0].items()
    assert name == "ovit_prune"
    before = Recipe.parse(RECIPE).modifiers[0].model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert options == {**before, **found.best.options}  # schedule and sparsity are the recipe's
    assert Recipe.parse(f"modifiers:\n{found.lines()}").modifiers[0].name == "ovit_prune"
    joint = RECIPE + "  - obert_prune: {sparsity: 0.8, targets: [0.weight], gradients: 4, update: joint}\n"
    ((_, options),) = yaml.safe_load(run(joint, pruner="obert_independent").lines())[0].items()
    assert (options["update"], options["targets"]) == ("independent", ["0.weight"])
    other = run(pruner="obert_independent")
    ((name, options),) = yaml.safe_load(other.lines())[0].items()
    assert (name, options["update"], options["sparsity"]) == ("obert_prune", "independent", 0.8)
    assert Recipe.parse(f"modifiers:\n{other.lines()}").modifiers[0].name == "obert_prune"


def test_table_csv_and_json_say_the_same(tmp_path: Path) -> None:
    found = run(about={"model": "mlp"})
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    lines = str(found).splitlines()
    assert lines[0].split() == ["damp", "gradients", "block", "held-out", "loss", "seconds"]
    for row, line, setting in zip(rows, lines[2:18], found.settings, strict=True):
        assert float(row["loss"]) == setting.loss
        assert float(row["damp"]) == setting.options["damp"]
        cells = line.split()
        assert [float(cell) for cell in cells[:4]] == [*setting.options.values(), float(f"{setting.loss:.4f}")]
        assert cells[5:] == ["best"] * (row["best"] == "True") + ["recipe"] * (row["recipe"] == "True")
    assert sum(row["best"] == "True" for row in rows) == sum(row["recipe"] == "True" for row in rows) == 1
    assert lines[18].startswith(f"accuracy on the validation images: dense {found.dense:.2%}, the recipe's setting")
    assert [file.name for file in found.save(tmp_path)] == ["tune.csv", "tune.json"]
    document = json.loads((tmp_path / "tune.json").read_text())
    assert document["best"] == found.best.options
    assert document["accuracy"] == {"dense": found.dense, "recipe": found.own_accuracy, "best": found.accuracy}
    assert document["options"]["images_per_gradient"] == 4
    assert len(document["settings"]) == 16


def test_a_setting_without_a_finite_loss_is_never_best() -> None:
    calls = 0

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        if not torch.is_grad_enabled():
            calls += 1  # four batches a setting; the first four are of the dense model
        broken = not torch.is_grad_enabled() and 4 < calls <= 8
        return outputs.sum() * math.nan if broken else cross_entropy(outputs, targets)

    found = run(loss=loss)
    assert math.isinf(found.settings[0].loss)
    assert found.best is not found.settings[0]
    assert json.loads(found.json())["settings"][0]["loss"] is None


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        (RECIPE, {"pruner": "magnitude"}, "magnitude has no damp, gradients or block to tune"),
        (RECIPE, {"sparsity": None}, "no sparsity was given"),
        (RECIPE, {"pruner": "ovitt"}, "no pruner 'ovitt' to compare; did you mean 'ovit'?"),
        (RECIPE, {"held_out": []}, "no images were held out"),
        (RECIPE, {"loss": lambda outputs, targets: outputs.sum() * math.nan}, "the loss of the dense model"),
    ],
)
def test_what_can_not_be_tuned(recipe: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(recipe, **options)


@given(st.integers(2, 400), st.integers(0, 5))
def test_the_split_is_one(count: int, seed: int) -> None:
    rest, held = hold_out(count, seed=seed)
    assert sorted([*rest, *held]) == list(range(count))
    assert len(held) == max(1, round(0.2 * count))
    assert (rest, held) == hold_out(count, seed=seed)


def test_the_split_of_many_and_of_one() -> None:
    assert len(hold_out(100_000)[1]) == 5000
    assert hold_out(100)[1] != hold_out(100, seed=1)[1]
    with pytest.raises(ValueError, match="1 training images can't be split"):
        hold_out(1)


def test_no_validation_image_is_tuned_on(caplog: pytest.LogCaptureFixture) -> None:
    bench = set_up(tiny_recipe("[{ovit_prune: {sparsity: 0.5, targets: ['re:blocks.*qkv.weight']}}]"), data="digits")
    assert "the weights are random" in caplog.text
    calibration, held = bench.split()

    def pictures(dataset: Any) -> set[bytes]:
        return {dataset[index][0].numpy().tobytes() for index in range(len(dataset))}

    gradients, chosen, validation = pictures(calibration.dataset), pictures(held.dataset), pictures(bench.data.val)
    assert (len(gradients), len(chosen), len(validation)) == (1078, 269, 450)
    assert not gradients & chosen
    assert not (gradients | chosen) & validation


def test_settings_are_compared_on_images_without_augmentation() -> None:
    recipe = tiny_recipe(
        "[{ovit_prune: {sparsity: 0.5, targets: ['re:blocks.*qkv.weight']}}]", extra="augmentation: noise, seed: 3"
    )
    bench = set_up(recipe, data="digits", pretrained=False, checkpoint=None)
    calibration, held = bench.split()
    assert torch.equal(held.dataset[0][0], held.dataset[0][0])
    assert not torch.equal(calibration.dataset[0][0], calibration.dataset[0][0])
    assert calibration.seed == bench.calibration.seed == 3
