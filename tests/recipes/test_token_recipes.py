"""The recipes that reduce tokens: their figures written out here, and short runs of small models."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ovit_engine import Engine, Recipe
from ovit_engine.core.recipe import shipped_recipes
from ovit_engine.flops import count_flops
from ovit_engine.modifiers.dynamic_vit import DynamicViT
from ovit_engine.training.api import train, with_training
from ovit_engine.training.models import empty_model

DYNAMIC = [name for name in shipped_recipes() if name.startswith("tokens/dynamic_vit")]
# specs/structured-and-tokens.md §7.4
GMACS = {"tiny_70": 0.801, "tiny_80": 0.932, "small_70": 2.981, "small_80": 3.463}
COUNTS = {"70": [137, 96, 67], "80": [156, 125, 100]}


def test_four_are_shipped() -> None:
    assert sorted(name.removeprefix("tokens/dynamic_vit_deit_") for name in DYNAMIC) == sorted(GMACS)


@pytest.mark.parametrize("name", DYNAMIC)
def test_the_figures_of_the_released_code(name: str) -> None:
    recipe = Recipe.load(name)
    assert name == f"tokens/{recipe.name}"
    training = recipe.training
    assert (training.epochs, training.batch_size, training.lr, training.weight_decay) == (30, 1024, 1e-3, 0.05)
    model = empty_model(training)
    engine = Engine(model, recipe, steps_per_epoch=10, epochs=30)
    modifier = engine.modifiers[0]
    assert isinstance(modifier, DynamicViT)
    assert (modifier.ratio_weight, modifier.backbone_lr_scale, modifier.freeze) == (2.0, 0.01, "5ep")
    assert engine.modifiers[1].model_dump(include={"logits", "tokens"}) == {"logits": 0.5, "tokens": 0.5}
    modifier.prepare(engine.run)
    assert [stage.keep for stage in modifier.selector.stages] == COUNTS[name[-2:]]
    assert [stage.block for stage in modifier.selector.stages] == [3, 6, 9]
    size = name.removeprefix("tokens/dynamic_vit_deit_")
    counted = count_flops(model, torch.zeros(1, 3, 224, 224, device="meta")).dense / 2e9
    assert counted == pytest.approx(GMACS[size], rel=0.01)
    assert f"{counted:.2f} of" in recipe.description


def scaled(name: str, **model_args: Any) -> Recipe:
    """A fifth of the epochs (less of longer recipes), few gradients of few images, for a ViT of 16 pixels."""
    divisor = {120: 20, 300: 100}.get(Recipe.load(name).training.epochs, 5)
    text = re.sub(r"(\d+)ep\b", lambda found: f"{int(found[1]) // divisor}ep", shipped_recipes()[name])
    text = re.sub(r"warmup_epochs: \d+", "warmup_epochs: 1", text)
    text = re.sub(r"(gradients|images_per_gradient): \d+", r"\1: 4", text).replace("block: 192", "block: 16")
    text = text.replace("[3, 6, 9]", "[1]")
    small = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "weight_init": "jax"}
    recipe = Recipe.parse(text, accumulate=2)
    epochs = recipe.training.epochs // divisor
    return with_training(recipe, model_args={**small, **model_args}, batch_size=8, epochs=epochs)


RUN = ["dynamic_vit_deit_tiny_70", "evit_deit_small_70", "tome_deit_small"]


@pytest.mark.parametrize("name", [*(f"tokens/{name}" for name in RUN), "paper/table9_deit_small"])
def test_a_short_run_on_images(name: str, tmp_path: Path, jpeg_folder: Path) -> None:
    trained = train(scaled(name), data=jpeg_folder, output=tmp_path / "run", device="cpu")
    assert all(math.isfinite(row.loss) for row in trained.metrics)
    if name.startswith("paper"):
        assert trained.metrics[-1].sparsity == pytest.approx(0.75, abs=1e-3)
        certificate = trained.engine.export(tmp_path / "m.onnx", torch.zeros(1, 3, 16, 16))
        assert certificate.parity.agreement > 0.99
