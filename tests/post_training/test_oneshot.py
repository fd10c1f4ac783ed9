"""One-shot runs on a model that is not timm's: what is measured, what is left alone, what is refused."""

import copy
import csv
import io
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from ovit_engine import Calibration, Recipe, RecipeError
from ovit_engine.masking.targets import find_slots
from ovit_engine.post_training.oneshot import oneshot
from ovit_engine.post_training.oneshot_report import GridStep, OneShot
from ovit_engine.post_training.pruners import choose_pruners, pruner_names
from ovit_engine.pruning import prune_tensors

RECIPE = """
name: mine
modifiers:
  - ovit_prune: {start: 1ep, end: 3ep, every: 1ep, sparsity: {from: 0.2, to: 0.5}, targets: ["re:[02]\\\\.weight"],
                 gradients: 8, images_per_gradient: 4, block: 12, damp: 1.0e-5}
  - cyclic_lr: {max: 0.1, min: 0.01}
  - quantize: {start: 2ep}
"""


@cache
def points() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 6, generator=generator)
    return x, (x[:, 0] > x[:, 1]).long() + (x[:, 2] > 1).long()


@cache
def trained() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    x, y = points()
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(model(x[:64]), y[:64]).backward()
        optimizer.step()
    return model.eval()


def accuracy(model: nn.Module) -> float:
    x, y = points()
    with torch.no_grad():
        return float((model(x[64:]).argmax(1) == y[64:]).float().mean())


def calibration(seed: int = 0) -> Calibration:
    x, y = points()
    return Calibration(TensorDataset(x[:64], y[:64]), cross_entropy, seed=seed)


def run(recipe: str = RECIPE, **options: Any) -> Any:
    model = options.pop("model", trained())
    settings: dict[str, Any] = {"calibration": calibration(), "evaluate": accuracy, "sparsities": (0.5,), **options}
    return oneshot(model, Recipe.parse(recipe, file="r.yaml"), **settings)


def pruned_by_hand(method: str, sparsity: float, **options: Any) -> nn.Module:
    model = copy.deepcopy(trained())
    slots = find_slots(model, ["re:[02]\\.weight"])
    chunks = calibration().gradients(model, slots, count=8, images_per_gradient=4, chunk=8)
    gradients = [chunk.clone() for chunk in next(chunks)]
    weights = [slot.gather() for slot in slots]
    _, new = prune_tensors(weights, gradients, method=method, sparsity=sparsity, **options)
    for slot, weight in zip(slots, new, strict=True):
        slot.write(weight)
    return model


def test_each_point_is_the_dense_model_pruned_at_once() -> None:
    found = run(sparsities=(0.9, 0.5), compare=("ovit", "obert", "magnitude"))
    own: dict[str, dict[str, Any]] = {"ovit": {"block": 12, "damp": 1e-5}, "obert": {"block": 192}, "magnitude": {}}
    assert [(point.pruner, point.asked) for point in found.points] == [(n, s) for n in own for s in (0.9, 0.5)]
    for point in found.points:
        by_hand = pruned_by_hand(point.pruner, point.asked, **own[point.pruner])
        assert point.accuracy == accuracy(by_hand)
        assert point.sparsity == round(point.asked * 108) / 108
        assert point.drop == found.dense - point.accuracy
    assert found.dense == accuracy(trained()) > 0.6


def test_what_a_pruner_has_of_its_own_and_what_it_takes_from_the_recipe() -> None:
    found = run(compare=("obert", "obert_independent", "mfac_prune", "ovit", "magnitude", "obert"))
    assert list(found.options) == ["obert", "obert_independent", "mfac", "ovit", "magnitude"]
    shared = {"gradients": 8, "images_per_gradient": 4, "scope": "global", "targets": ["re:[02]\\.weight"]}
    for label in ("obert", "mfac", "ovit"):
        assert shared.items() <= found.options[label].items()
    assert (found.options["ovit"]["block"], found.options["ovit"]["damp"]) == (12, 1e-5)
    assert (found.options["obert"]["block"], found.options["obert"]["damp"]) == (192, 1e-6)
    assert (found.options["obert"]["update"], found.options["obert_independent"]["update"]) == ("joint", "independent")
    assert found.options["mfac"]["block"] == 2048
    assert "gradients" not in found.options["magnitude"]
    assert not {"start", "end", "every", "sparsity"} & set(found.options["ovit"])


def test_another_pruner_of_the_recipe_keeps_its_options() -> None:
    two = RECIPE + "  - obert_prune: {start: 4ep, sparsity: 0.9, targets: [0.weight], damp: 1.0e-3}\n"
    with pytest.raises(ValueError, match=r"'mine' has 2 pruners: name one to compare, or all \(ovit,obert\)"):
        run(two)
    found = run(two, compare=("obert", "obd"))
    assert found.options["obert"]["damp"] == 1e-3
    assert found.options["obert"]["targets"] == ["0.weight"]
    assert found.options["obd"]["targets"] == ["re:[02]\\.weight"]  # of the recipe's first


def test_the_model_is_left_as_it_was_even_by_a_careless_evaluation() -> None:
    model = copy.deepcopy(trained()).train()
    before = copy.deepcopy(model.state_dict())

    def careless(pruned: nn.Module) -> float:
        pruned.eval()
        with torch.no_grad():
            pruned[0].weight.zero_()
        return 0.5

    run(model=model, evaluate=careless)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(p.grad is not None for p in model.parameters())


def test_the_seed_is_that_of_the_gradients() -> None:
    same, again, other = (
        [point.accuracy for point in run(sparsities=(0.5, 0.7, 0.8), calibration=calibration(s)).points]
        for s in (0, 0, 1)
    )
    assert same == again
    assert same != other


def test_an_n_m_pattern_implies_the_sparsity() -> None:
    recipe = "modifiers: [{magnitude_prune: {pattern: '2:4', targets: [2.weight]}}]"
    found = run(recipe, sparsities=(), compare=("magnitude", "ovit"))
    assert [(point.asked, point.sparsity) for point in found.points] == [(None, 0.5), (None, 0.5)]
    assert "implied" in str(found)
    with pytest.raises(ValueError, match="magnitude: the pattern 2:4 implies its sparsity: give none beside it"):
        run(recipe)


def test_flops_are_counted_with_example_inputs() -> None:
    assert run().points[0].flops_reduction is None
    assert run(example_inputs=torch.zeros(1, 6)).points[0].flops_reduction == 0.5
    one = run("modifiers: [{magnitude_prune: {sparsity: 0.5, targets: [0.weight]}}]", example_inputs=torch.zeros(1, 6))
    assert one.points[0].flops_reduction == pytest.approx(36 / 108)


def test_table_csv_json_and_plot_say_the_same(tmp_path: Path) -> None:
    found = run(sparsities=(0.5, 0.75), compare=("ovit", "magnitude"), about={"model": "mlp"})
    rows = list(csv.DictReader(io.StringIO(found.csv())))
    assert [row["pruner"] for row in rows] == ["dense", "ovit", "ovit", "magnitude", "magnitude"]
    lines = str(found).splitlines()
    assert lines[1].split() == ["dense", f"{found.dense:.2%}"]
    for row, point, line in zip(rows[1:], found.points, lines[2:], strict=False):
        assert float(row["accuracy"]) == point.accuracy
        assert float(row["sparsity"]) == point.sparsity
        assert json.loads(row["options"]) == found.options[point.pruner]
        assert line.split()[:5] == [
            point.pruner,
            f"{100 * point.asked:g}%",
            f"{point.sparsity:.2%}",
            f"{point.accuracy:.2%}",
            f"{100 * point.drop:.2f}",
        ]
    assert lines[6] == "targets re:[02]\\.weight, scope global, pattern unstructured"
    assert lines[7] == (
        "ovit: gradients 8, images_per_gradient 4, recomputations 1, block 12, damp 1e-05, rule cumulative"
    )
    assert lines[8] == "magnitude: no options of its own"
    document = json.loads(found.json())
    assert document["model"] == "mlp"
    assert document["recipe_sha256"] == found.recipe.hash
    assert document["dense"] == found.dense
    assert [point["accuracy"] for point in document["points"]] == [point.accuracy for point in found.points]
    assert document["options"]["ovit"]["damp"] == 1e-5
    assert {"torch", "ovit-engine"} <= set(document["versions"])
    assert document["machine"]["cores"] > 0
    files = [*found.save(tmp_path), *found.plot(tmp_path)]
    assert [file.name for file in files] == ["oneshot.csv", "oneshot.json", "oneshot.svg", "oneshot.png"]
    assert files[0].read_text() == found.csv()
    svg = files[2].read_text()
    for text in ("ovit", "magnitude", "dense", "One-shot pruning of mlp", "75 %"):
        assert f"<!-- {text} -->" in svg


def test_progress_counts_gradients_and_keeps_what_is_known() -> None:
    steps: list[GridStep[OneShot]] = []
    found = run(sparsities=(0.5, 0.75), compare=("ovit", "magnitude"), progress=steps.append)
    assert [step.what for step in steps] == [
        "ovit at 50%",
        "ovit at 75%",
        "magnitude at 50%",
        "magnitude at 75%",
        "done",
    ]
    assert [len(step.result.points) for step in steps] == [0, 1, 2, 3, 4]
    assert [step.done for step in steps] == [64, 136, 208, 272, 336]
    assert {step.total for step in steps} == {336}
    assert steps[-1].result == found


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("modifiers: [{quantize: {}}]", {}, "recipe 'r' has no pruner to run one-shot; it has quantize"),
        ("modifiers: []", {}, "recipe 'r' has no pruner to run one-shot; it has no modifier at all"),
        (RECIPE, {"compare": ["obret"]}, "no pruner 'obret' to compare; did you mean 'obert'?"),
        (RECIPE, {"compare": ["xyz"]}, "no pruner 'xyz' to compare; there are grad_weight, magnitude, mfac, obd"),
        (RECIPE, {"compare": ["movement"]}, "no pruner 'movement' to compare; there are grad_weight"),
        (
            "modifiers: [{movement_prune: {start: 1ep, sparsity: 0.5, targets: [0.weight]}}]",
            {},
            "recipe 'r': movement_prune prunes only while a model trains, not one-shot",
        ),
        (RECIPE, {"sparsities": []}, "no sparsity was given: name one or several, such as 0.5,0.75,0.9"),
        (RECIPE, {"sparsities": [75]}, "ovit: sparsity 75 is not in [0, 1): did you mean 0.75?"),
        (RECIPE, {"evaluate": lambda model: 97.5}, "evaluate must return an accuracy between 0 and 1, not 97.5"),
        (RECIPE, {"evaluate": lambda model: float("nan")}, "evaluate must return an accuracy between 0 and 1, not nan"),
        (RECIPE.replace("[02]", "[34]"), {}, "r.yaml:4:93: ovit_prune.targets: target 're:[34]"),
    ],
)
def test_what_can_not_be_done_is_said_before_any_work(
    recipe: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Calibration, "gradients", lambda *args, **kwargs: pytest.fail("gradients were taken"))
    with pytest.raises(ValueError, match=re.escape(message)):
        run(recipe, **options)


def test_all_pruners_are_checked_before_the_first_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Calibration, "gradients", lambda *args, **kwargs: pytest.fail("gradients were taken"))
    two = RECIPE + "  - obd_prune: {sparsity: 0.9, targets: [4.weight]}\n"
    with pytest.raises(RecipeError, match=r"r\.yaml:8:\d+: obd_prune\.targets: target '4\.weight' matches no"):
        run(two, compare=("ovit", "obd"))


def test_a_pattern_that_does_not_fit_is_said_at_its_place() -> None:
    recipe = "modifiers:\n  - magnitude_prune: {sparsity: 0.5, pattern: {block: [1, 5]}, targets: [0.weight]}\n"
    with pytest.raises(RecipeError, match=r"r\.yaml:2:47: magnitude_prune\.pattern: 0\.weight"):
        run(recipe)


def test_a_pruner_twice_in_a_recipe_can_not_be_chosen() -> None:
    twice = RECIPE + "  - ovit_prune: {sparsity: 0.9, targets: [0.weight]}\n"
    with pytest.raises(ValueError, match="has ovit_prune 2 times: leave one for a one-shot run"):
        choose_pruners(Recipe.parse(twice))


def test_all_registered_pruners_can_be_named() -> None:
    assert pruner_names() == [
        "grad_weight",
        "magnitude",
        "mfac",
        "obd",
        "obert",
        "obert_independent",
        "ovit",
    ]
    for name in pruner_names():
        assert choose_pruners(Recipe.parse(RECIPE), [name])[0].label == name
