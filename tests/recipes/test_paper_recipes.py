"""The recipes under recipes/paper: figures from the oViT paper written out here, models they name, and whole runs."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ovit_engine import Clock, Engine, Recipe
from ovit_engine.core.capabilities import Exclusive, having, timeline_rows
from ovit_engine.core.recipe import shipped_recipes
from ovit_engine.modifiers.cyclic_lr import CyclicLR
from ovit_engine.training.api import Trained, train, with_training
from ovit_engine.training.models import empty_model

PAPER = [name for name in shipped_recipes() if name.startswith("paper/")]

# §4.3: 40 % at once, a step every 20 epochs until 90 %, through 50, 60, 75 and 80 %; the others as released
TABLE_2 = {0: 40, 20: 50, 40: 60, 60: 65, 80: 70, 100: 75, 120: 76.67, 140: 78.33, 160: 80, 180: 81.67, 200: 83.33}
TABLE_2 |= {220: 85, 240: 86.67, 260: 88.33, 280: 90}

# --- times, sparsities and learning rates, by epoch


def sparsities(name: str, **variables: Any) -> dict[float, float]:
    """Sparsity in percent by epoch."""
    recipe = Recipe.load(f"paper/{name}", **variables)
    clock = Clock(1251, 1251 * recipe.training.epochs)  # ImageNet in batches of 1024
    rows = timeline_rows(recipe.modifiers, clock)
    return {
        clock.epochs(step): 0.0 if value.startswith("dense") else float(value.partition("%")[0])
        for step, what, value in rows
        if what == "sparsity"
    }


def rates(name: str) -> list[float]:
    """Learning rates of the optimizer's steps, two an epoch."""
    recipe = Recipe.load(f"paper/{name}")
    recipe = replace(recipe, modifiers=tuple(each for each in recipe.modifiers if isinstance(each, CyclicLR)))
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), recipe.training.lr)
    found = []
    with Engine(model, recipe, steps_per_epoch=2, epochs=recipe.training.epochs).attach(optimizer):
        for _ in range(2 * recipe.training.epochs):
            optimizer.step()
            found.append(optimizer.param_groups[0]["lr"])
    return found


GRADUAL = ["table2_deit_tiny", "table2_deit_small", "table2_deit_base", "table2_magnitude", "table6_efficientformer_l1"]
CONVNETS = ["table6_resnet50d", "table6_efficientnetv2_tiny"]


@pytest.mark.parametrize("name", [*GRADUAL, *CONVNETS])
def test_a_run_leaves_every_row_of_its_table(name: str) -> None:
    clock = Clock(2, 600)
    values = [value for _, _, value in timeline_rows(Recipe.load(f"paper/{name}").modifiers, clock)]
    kept = [value.split("%")[0] for value in values if "sweep point" in value]
    assert kept == ["50.00", "60.00", "75.00", *["80.00"] * name.startswith("table2"), "90.00"]


@pytest.mark.parametrize("name", [*GRADUAL, *CONVNETS])
def test_gradual_pruning_takes_the_steps_of_table_2(name: str) -> None:
    assert sparsities(name) == TABLE_2
    assert Recipe.load(f"paper/{name}").training.epochs == 300


@pytest.mark.parametrize(
    ("names", "largest", "smallest"), [(GRADUAL, 5e-4, 1e-5), (CONVNETS, 0.2, 1e-3)], ids=["transformers", "convnets"]
)
def test_the_cyclic_learning_rate_of_table_4(names: list[str], largest: float, smallest: float) -> None:
    cycle = [largest - (largest - smallest) * step / 40 for step in range(40)]  # eq. 8, 20 epochs
    for name in names:
        assert rates(name) == pytest.approx(cycle * 15)


def test_figure_4_prunes_twice_as_often_under_one_cosine() -> None:
    found = sparsities("figure4_acyclic_cosine")
    assert list(found) == list(range(0, 290, 10))
    for epoch, sparsity in TABLE_2.items():
        assert found[epoch] == sparsity
        if epoch:
            middle = (found[epoch - 20] + sparsity) / 2
            assert found[epoch - 10] == pytest.approx(middle, abs=0.011)
    rate = rates("figure4_acyclic_cosine")
    assert (rate[0], rate[300]) == pytest.approx((5e-4, (5e-4 + 1e-5) / 2))
    assert rate[-1] == pytest.approx(1e-5, rel=1e-2)


def test_the_tail_of_100_epochs() -> None:
    rate = rates("table2_finetune")
    assert len(rate) == 200
    assert rate == pytest.approx([1e-5 + 4e-5 * (1 + math.cos(math.pi * step / 200)) / 2 for step in range(200)])
    assert not sparsities("table2_finetune")


@pytest.mark.parametrize("name", ["table1_ovit", "table1_obert", "table1_magnitude", "table5_resnet50d"])
def test_one_shot_and_20_epochs(name: str) -> None:
    assert sparsities(name, sparsity=0.9) == {0: 90}
    assert rates(name) == pytest.approx([1e-4 - 9e-5 * step / 40 for step in range(40)])


def test_quantization_and_2_4_take_50_epochs() -> None:
    assert rates("table8_qat") == pytest.approx([1e-4 - 9e-5 * step / 100 for step in range(100)])
    assert rates("table10_2_4") == pytest.approx([5e-4 - 49e-5 * step / 100 for step in range(100)])
    assert sparsities("table10_2_4") == {0: 50}


def test_the_phases_of_appendix_j() -> None:
    found = sparsities("table11_acdc", sparsity=0.9)
    starts = [
        *range(150, 476, 25),
        525,
    ]  # 7 sparse and 6 dense phases of 25 epochs, a dense one of 50, a sparse one of 75
    assert list(found) == starts
    assert list(found.values()) == [90, 0] * 7 + [90]
    rate = rates("table11_acdc")
    cosine = [1e-6 + (5e-4 - 1e-6) * (1 + math.cos(math.pi * step / 1200)) / 2 for step in range(1200)]
    assert rate[:40] == pytest.approx([value * (step + 1) / 40 for step, value in enumerate(cosine[:40])])
    assert rate[40:] == pytest.approx(cosine[40:])


# --- hyper-parameters


@pytest.mark.parametrize(
    ("name", "expected"),
    [  # appendices D, G and H; specs/second-order.md §3
        ("table2_deit_tiny", {"block": 192, "damp": 1e-8, "gradients": 4096}),
        ("table2_deit_small", {"block": 192, "damp": 1e-8, "gradients": 4096}),
        ("table2_deit_base", {"block": 192, "damp": 1e-8, "gradients": 4096}),
        ("table6_efficientformer_l1", {"block": 192, "damp": 1e-8, "gradients": 4096}),
        ("table6_resnet50d", {"block": 256, "damp": 1e-8, "gradients": 4096}),
        ("table6_efficientnetv2_tiny", {"block": 16, "damp": 1e-8, "gradients": 4096}),
        ("figure4_acyclic_cosine", {"block": 192, "damp": 1e-8, "gradients": 4096}),
        ("table1_ovit", {"block": 192, "damp": 1e-8, "gradients": 4096}),
        ("table1_obert", {"block": 192, "damp": 1e-6, "gradients": 4096, "update": "independent"}),
        ("table5_resnet50d", {"block": 256, "damp": 1e-7, "gradients": 4096}),
        ("table10_2_4", {"block": 192, "damp": 1e-8, "gradients": 4096}),
        ("figure3_ovit", {"block": 192, "damp": 1e-8, "gradients": 4096, "scope": "global"}),
        ("figure3_obert", {"block": 192, "damp": 1e-6, "gradients": 4096, "update": "independent"}),
        ("figure3_obd", {"damp": 1e-6, "gradients": 4096}),
        ("figure3_mfac", {"block": 2048, "damp": 1e-6, "gradients": 1024}),
        ("figure3_grad_weight", {"gradients": 4096}),
    ],
)
def test_hyper_parameters_of_pruners(name: str, expected: dict[str, Any]) -> None:
    pruner = Recipe.load(f"paper/{name}").modifiers[0]
    assert {key: getattr(pruner, key) for key in expected} == expected
    assert pruner.images_per_gradient == 128  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", PAPER)
def test_every_recipe_says_what_it_reproduces(name: str) -> None:
    recipe = Recipe.load(name)
    assert name == f"paper/{recipe.name}"
    kind, number = re.match(r"(table|figure)(\d+)_", recipe.name).groups()  # type: ignore[union-attr]
    assert re.match(rf"(The arrows of )?{kind.title()}s? {number}\b", recipe.description)
    training = recipe.training
    if not recipe.name.startswith("figure3"):
        assert training.batch_size == 1024
        augmentation = (
            "light1" if "tiny" in str(training.model) else "torchvision" if training.optimizer == "sgd" else "deit"
        )
        assert training.augmentation == augmentation
    assert Recipe.parse(recipe.dump()) == recipe


# --- models

OTHERS = [
    ("figure3_ovit", {"model": "resnet50d", "preset": "resnet", "block": 256}),
    ("figure3_ovit", {"model": "convnext_tiny", "preset": "convnext", "block": 128, "damp": 1e-7}),
    ("figure3_mfac", {"model": "resnet50d", "preset": "resnet", "damp": 1e-5}),
    ("table1_ovit", {"model": "deit_base_patch16_224"}),
    ("table1_ovit", {"model": "xcit_small_12_p16_224", "preset": "xcit", "sparsity": 0.5}),
    ("table1_ovit", {"model": "swin_tiny_patch4_window7_224", "preset": "swin", "sparsity": 0.5}),
    ("table1_magnitude", {"model": "swin_tiny_patch4_window7_224", "preset": "swin", "sparsity": 0.5}),
    ("table1_obert", {"model": "resnet50d", "preset": "resnet", "block": 256}),
    ("table2_finetune", {"model": "efficientformer_l1"}),
    ("table2_finetune", {"model": "resnet50d", "augmentation": "torchvision"}),
    ("table10_2_4", {"model": "deit_tiny_patch16_224", "augmentation": "light1"}),
]
# millions of weights that are pruned: specs/second-order.md §3, and for XCiT and EfficientFormer docs/recipes.md
PRUNABLE = {
    "deit_tiny_patch16_224": 5.31,
    "deit_small_patch16_224": 21.23,
    "deit_base_patch16_224": 84.93,
    "xcit_small_12_p16_224": 24.77,
    "swin_tiny_patch4_window7_224": 27.43,
    "efficientformer_l1": 10.18,
    "convnext_tiny": 27.43,
    "resnet50d": 23.47,
    "efficientnetv2_rw_t": 12.24,
}


@pytest.mark.parametrize(
    ("name", "variables"), [*((name, {}) for name in PAPER), *((f"paper/{name}", vars) for name, vars in OTHERS)]
)
def test_on_the_model_it_names(name: str, variables: dict[str, Any], tmp_path: Path) -> None:
    recipe = Recipe.load(name, **variables)
    model = empty_model(recipe.training)
    engine = Engine(model, recipe, steps_per_epoch=2, epochs=recipe.training.epochs, output=tmp_path).prepare()
    claims = [claim for modifier in having(engine.modifiers, Exclusive) for claim in modifier.claims(engine.run)]
    names = {claim.name for claim in claims if claim.resource == "mask"}
    if "constant_mask" not in {modifier.name for modifier in recipe.modifiers}:  # its weights are found at attach
        millions = sum(model.get_parameter(name).numel() for name in names) / 1e6
        assert millions == pytest.approx(PRUNABLE[str(recipe.training.model)], abs=0.0051)


# --- runs: a small model of the same family, epochs and numbers of gradients divided

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "weight_init": "jax"}


def scaled(name: str, divisor: int, **variables: Any) -> Recipe:
    """A recipe with its times divided, small blocks and few gradients of few images, for a ViT that sees 16 pixels."""
    text = re.sub(r"(\d+)ep\b", lambda found: f"{int(found[1]) // divisor}ep", shipped_recipes()[f"paper/{name}"])
    text = re.sub(
        r"gradients: \d+", "gradients: 4", re.sub(r"images_per_gradient: \d+", "images_per_gradient: 4", text)
    )
    text = text.replace("block: 192", "block: 16")
    recipe = Recipe.parse(text, **variables)
    return with_training(recipe, model_args=SMALL, batch_size=8, epochs=recipe.training.epochs // divisor)


def run(recipe: Recipe, data: Path, output: Path, **options: Any) -> Trained:
    return train(recipe, data=data, output=output, device="cpu", **options)


@pytest.mark.parametrize("name", ["table2_deit_tiny", "table2_deit_small", "table2_magnitude"])
def test_gradual_pruning_on_images(
    name: str, tmp_path: Path, jpeg_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = run(scaled(name, 20, accumulate=2), jpeg_folder, tmp_path / "run")
    expected = [*list(TABLE_2.values())[1:], 90]  # what is pruned at 1ep is sparse at the end of the first epoch
    assert [100 * row.sparsity for row in trained.metrics] == pytest.approx(expected, abs=0.02)
    assert trained.engine.run.step == 15 * (20 // 8)
    assert all(math.isfinite(row.loss) for row in trained.metrics)
    assert "the weights are random: did you mean" in caplog.text


def test_one_shot_then_the_tail_then_int8(tmp_path: Path, jpeg_folder: Path) -> None:
    first = run(scaled("table1_ovit", 10, sparsity=0.75, block=16), jpeg_folder, tmp_path / "1")
    assert first.metrics[-1].sparsity == pytest.approx(0.75, abs=1e-4)
    tail = run(scaled("table2_finetune", 50), jpeg_folder, tmp_path / "2", checkpoint=tmp_path / "1")
    assert tail.metrics[-1].sparsity == first.metrics[-1].sparsity
    int8 = run(scaled("table8_qat", 25), jpeg_folder, tmp_path / "3", checkpoint=tmp_path / "2")
    assert int8.metrics[-1].sparsity == first.metrics[-1].sparsity
    certificate = int8.engine.export(tmp_path / "m.onnx", torch.zeros(1, 3, 16, 16))
    assert "75.0" in str(certificate)
    assert "8 layers" in str(certificate)


@pytest.mark.parametrize(("name", "divisor", "sparsity"), [("table10_2_4", 25, 0.5), ("table11_acdc", 25, 0.75)])
def test_other_ways_to_sparsity_on_images(
    name: str, divisor: int, sparsity: float, tmp_path: Path, jpeg_folder: Path
) -> None:
    trained = run(scaled(name, divisor), jpeg_folder, tmp_path / "run")
    assert trained.metrics[-1].sparsity == pytest.approx(sparsity, abs=1e-4)
