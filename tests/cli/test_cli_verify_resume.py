"""ovit verify-resume: on which model, for how long, and what is said of it."""

from pathlib import Path

import pytest

from ovit_engine import Recipe
from ovit_engine.cli.verify_resume import quick, steps_per_epoch
from ovit_engine.integrations.small_models import shrink, small_setup
from ovit_engine.integrations.timm import with_training
from ovit_engine.recipe import Training
from ovit_engine.targets import find_slots
from tests.cli.conftest import RECIPE, Ovit


def test_it_trains_kills_and_tells(ovit: Ovit) -> None:
    done = ovit("verify-resume", "tiny.yaml", "--kills", 2, "--steps", 8, "--var", "sparsity=0.25")
    assert (done.exit_code, done.stderr) == (0, "")
    first, head, *kills, last = done.stdout.splitlines()
    assert first == "tiny on vit_tiny_patch16_224: 8 steps, a checkpoint every 1"
    assert head.split() == ["killed", "resumed", "from", "step"]
    assert len(kills) == 2
    assert last == "bit-identical: 2 kills, all 8 checkpoints equal the unbroken run's"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nope.yaml"], "no recipe file 'nope.yaml'"),
        (["tiny.yaml", "--model", "deit_tyny_patch16_224"], "timm has no model 'deit_tyny_patch16_224'; did you mean"),
        (["late.yaml", "--epochs", "3"], "past the end of training"),
        (["tiny.yaml", "--model-arg", "depth=0"], "matches no parameter of VisionTransformer"),
    ],
)
def test_errors_are_one_line(ovit: Ovit, arguments: list[str], words: str) -> None:
    Path("late.yaml").write_text("modifiers: [{quantize: {start: 4ep}}]")
    done = ovit("verify-resume", *arguments)
    assert done.exit_code == 1
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "model",
    ["deit_base_patch16_224", "xcit_small_12_p16_224", "swin_tiny_patch4_window7_224", "convnext_tiny", "resnet50d"],
)
def test_models_are_made_narrow(model: str) -> None:
    training = Training(model=model)
    narrow = training.model_copy(update={"model_args": shrink(training)})
    setup = small_setup(narrow, 4)
    assert sum(parameter.numel() for parameter in setup.model.parameters()) < 1e6
    inputs, targets = zip(*(setup.dataset[index] for index in range(2)), strict=True)
    assert inputs[0].shape[1] <= 64
    assert setup.model.num_classes == 10
    assert all(0 <= int(target) < 10 for target in targets)
    preset = {"deit": "vit", "xcit": "xcit", "swin": "swin", "convnext": "convnext", "resnet50d": "resnet"}
    assert find_slots(setup.model, [f"preset:{preset[model.partition('_')[0]]}"])


def test_a_small_model_stays_as_it_is() -> None:
    training = Recipe.parse(RECIPE).training
    assert shrink(training) == training.model_args


def test_a_recipe_is_made_quick() -> None:
    recipe = Recipe.load("paper/table2_deit_tiny")
    pruner, rates = quick(recipe).modifiers
    assert (pruner.gradients, pruner.images_per_gradient, pruner.block) == (16, 4, 32)  # type: ignore[attr-defined]
    assert rates == recipe.modifiers[1]
    assert recipe.modifiers[0].gradients == 4096  # type: ignore[attr-defined]
    wide = Recipe.parse(
        "modifiers: [{ovit_prune: {sparsity: 0.5, targets: [a], pattern: {block: [1, 48]}, block: 96}}]"
    )
    assert quick(wide).modifiers[0].block == 48  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("modifier", "expected"),
    [
        ("cyclic_lr: {max: 1, min: 0.1}", 6),
        ("quantize: {start: 1ep, freeze_observers: 1.1ep}", 6),  # 6.6 -> 7
        ("quantize: {start: 1ep, freeze_observers: 1.04ep}", 13),  # two steps that fall on one are an error
        ("quantize: {start: 300st}", 31),
    ],
)
def test_epochs_are_long_enough_for_the_recipe(modifier: str, expected: int) -> None:
    recipe = with_training(Recipe.parse(f"modifiers: [{{{modifier}}}]"), epochs=10)
    assert steps_per_epoch(recipe, 60) == expected


def test_a_recipe_that_never_fits_is_told() -> None:
    recipe = with_training(Recipe.parse("modifiers: [{quantize: {start: 100000st}}]"), epochs=10)
    with pytest.raises(ValueError, match="quantize"):
        steps_per_epoch(recipe, 60)
