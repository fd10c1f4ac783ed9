"""ovit verify-resume: on which model, for how long, and what is said of it."""

from pathlib import Path

import pytest
import torch

from ovit_engine import Recipe
from ovit_engine.cli.verify_resume import quick, steps_per_epoch
from ovit_engine.masking.targets import find_slots
from ovit_engine.training.api import with_training
from ovit_engine.training.models import make_model, small_setup, with_small_model
from tests.cli.conftest import RECIPE, Ovit


def test_it_trains_kills_and_tells(ovit: Ovit) -> None:
    done = ovit("verify-resume", "tiny.yaml", "--kills", 2, "--steps", 8, "--var", "sparsity=0.25")
    assert (done.exit_code, done.stderr) == (0, "")
    first, head, *kills, last = done.stdout.splitlines()
    assert first == "tiny on vit_tiny_patch16_224: 8 steps, a checkpoint every 1"
    assert head.split() == ["killed", "resumed", "at"]
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
    ("model", "family", "last", "deep"),
    [
        ("deit_base_patch16_224", "vit", "blocks.1.attn.qkv.weight", "blocks.11.attn.qkv.weight"),
        ("xcit_small_12_p16_224", "xcit", "blocks.1.mlp.fc1.weight", "blocks.11.mlp.fc1.weight"),
        (
            "swin_tiny_patch4_window7_224",
            "swin",
            "layers.2.blocks.1.mlp.fc1.weight",
            "layers.2.blocks.5.mlp.fc1.weight",
        ),
        ("convnext_tiny", "convnext", "stages.2.blocks.1.mlp.fc1.weight", "stages.2.blocks.8.mlp.fc1.weight"),
        ("resnet50d", "resnet", "layer3.1.conv1.weight", "layer3.5.conv1.weight"),
        (
            "efficientformer_l1",
            "efficientformer",
            "stages.3.blocks.2.token_mixer.qkv.weight",
            "stages.3.blocks.4.token_mixer.qkv.weight",
        ),
        ("efficientnetv2_rw_t", "efficientnetv2", "blocks.4.0.conv_pw.weight", "blocks.3.4.conv_pw.weight"),
    ],
)
def test_models_are_made_small(model: str, family: str, last: str, deep: str) -> None:
    """Narrow and a few blocks deep, but with every part of the preset; where a target is deeper, not that."""
    training = small_recipe(model, f"preset:{family}").training
    setup = small_setup(training, 4)
    assert sum(parameter.numel() for parameter in setup.model.parameters()) < 1e6
    inputs, targets = zip(*(setup.dataset[index] for index in range(2)), strict=True)
    assert inputs[0].shape[1] <= (224 if family == "efficientformer" else 64)  # whose attention has its own size
    assert setup.model.num_classes == 10
    assert all(0 <= int(target) < 10 for target in targets)
    names = [slot.name for slot in find_slots(setup.model, [f"preset:{family}"])]
    assert last in names
    assert deep not in names
    with torch.device("meta"):
        assert find_slots(make_model(small_recipe(model, deep).training), [deep])


def small_recipe(model: str, target: str) -> Recipe:
    text = f"training: {{model: {model}}}\nmodifiers: [{{magnitude_prune: {{sparsity: 0.5, targets: ['{target}']}}}}]"
    return with_small_model(Recipe.parse(text), 6)


def test_a_small_model_stays_as_it_is() -> None:
    recipe = Recipe.parse(RECIPE)
    assert with_small_model(recipe, 6) is recipe


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
