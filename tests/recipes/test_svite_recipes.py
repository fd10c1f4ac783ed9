"""The recipes under recipes/svite: the released settings written out here, and short runs of small models."""

import math
from pathlib import Path
from typing import Any

import pytest

from ovit_engine import Clock, Recipe
from ovit_engine.core.recipe import shipped_recipes
from ovit_engine.training.api import train, with_training

NAMES = [name for name in shipped_recipes() if name.startswith("svite/") and "s2vite" not in name]
IMAGENET = 1_281_167 // 512  # steps an epoch in batches of 512
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "weight_init": "jax"}


@pytest.mark.parametrize(("name", "sparsity"), [("deit_tiny_50", 0.5), ("deit_small_60", 0.6)])
def test_the_released_settings(name: str, sparsity: float) -> None:
    """specs/structured-and-tokens.md §2.1."""
    recipe = Recipe.load(f"svite/{name}")
    modifier: Any = recipe.modifiers[0]
    training = recipe.training
    assert (training.epochs, training.batch_size, training.lr) == (600, 512, 5e-4 * 512 / 512)
    assert (training.optimizer, training.weight_decay, training.ema) == ("adamw", 0.05, 0.99996)
    assert (modifier.sparsity, modifier.scope, modifier.init, modifier.grow) == (sparsity, "erk", "random", "gradient")
    assert (modifier.drop, modifier.drop_end, modifier.gradients) == (0.5, 0.005, 1)
    clock = Clock(IMAGENET, 600 * IMAGENET)
    updates = modifier.updates(clock)
    assert (updates[0], updates.step, len(updates)) == (15000, 15000, 80)
    assert updates[-1] < 0.8 * clock.total_steps
    assert modifier.share(updates[0], clock) == pytest.approx(
        0.005 + 0.2475 * (1 + math.cos(math.pi * 15000 / clock.total_steps))
    )


def test_the_names_are_those_of_the_files() -> None:
    assert NAMES == ["svite/deit_small_60", "svite/deit_tiny_50", "svite/digits_vit_50"]
    assert [Recipe.load(name).name for name in NAMES] == [name.removeprefix("svite/") for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_a_run(name: str, tmp_path: Path, jpeg_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of a small model, an epoch for what would be hundreds; sparse in the checkpoint of every epoch."""
    recipe = Recipe.load(name, **({} if "digits" in name else {"every": "2st"}))
    digits = {"model_args": {**recipe.training.model_args, "depth": 1}, "epochs": 1}
    images = {"model_args": SMALL, "batch_size": 8, "epochs": 6}
    recipe = with_training(recipe, **(digits if "digits" in name else images))
    data = "digits" if "digits" in name else jpeg_folder
    trained = train(recipe, data=data, output=tmp_path / "run", device="cpu")
    sparsity = recipe.vars["sparsity"]
    assert [row.sparsity for row in trained.metrics] == pytest.approx([sparsity] * recipe.training.epochs, abs=1e-3)
    assert all(math.isfinite(row.loss) for row in trained.metrics)
    told = [(step, value) for step, what, value in trained.engine.run.history if what == "svite/ever_active"]
    modifier: Any = trained.engine.modifiers[0]
    assert [step for step, _ in told] == [0, *modifier.updates(trained.engine.run.clock)]
    assert told[-1][1] > told[0][1] == pytest.approx(1 - sparsity, abs=1e-3)
    assert "the weights are random" not in caplog.text  # as they should be
