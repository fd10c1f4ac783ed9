"""The recipes of S2ViTE under recipes/svite: the released settings written out here, and short runs of small models."""

import math
from pathlib import Path
from typing import Any

import pytest

from ovit_engine import Clock, Recipe
from ovit_engine.structured.gates import installed
from ovit_engine.training.api import train, with_training

# specs/structured-and-tokens.md §3.1: shares of heads and of units that are off, steps between updates, batch size
RELEASED = {
    "s2vite_deit_tiny": (0.3, 0.3, 15000, 512),
    "s2vite_deit_small": (0.3, 0.4, 15000, 512),
    "s2vite_deit_base": (0.3, 0.4, 7000, 1024),
}
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 36, "depth": 2, "num_heads": 3, "weight_init": "jax"}


@pytest.mark.parametrize("name", RELEASED)
def test_the_released_settings(name: str) -> None:
    heads, units, every, batch_size = RELEASED[name]
    recipe = Recipe.load(f"svite/{name}")
    modifier: Any = recipe.modifiers[0]
    training = recipe.training
    assert recipe.name == name
    assert training.model == f"{name.removeprefix('s2vite_')}_patch16_224"
    assert (training.epochs, training.batch_size, training.lr) == (
        600,
        batch_size,
        pytest.approx(5e-4 * batch_size / 512),
    )
    assert (training.optimizer, training.weight_decay, training.ema) == ("adamw", 0.05, 0.99996)
    assert (modifier.head_sparsity, modifier.unit_sparsity, modifier.min_swap) == (heads, units, 1)
    assert (modifier.drop, modifier.drop_end, modifier.gradients) == (0.5, 0.005, 1)
    steps = 1_281_167 // batch_size * 600
    updates = modifier.updates(Clock(steps // 600, steps))
    assert (updates[0], updates.step) == (every, every)
    assert 79 <= len(updates) <= 86
    assert updates[-1] < 0.8 * steps


@pytest.mark.parametrize("variables", [{}, {"score": "official", "growth": "official"}])
def test_a_run(variables: dict[str, str], tmp_path: Path, jpeg_folder: Path) -> None:
    """Of a small model, an epoch for a hundred."""
    recipe = Recipe.load("svite/s2vite_deit_small", every="2st", **variables)
    recipe = with_training(recipe, model_args=SMALL, batch_size=8, epochs=6)
    trained = train(recipe, data=jpeg_folder, output=tmp_path / "run", device="cpu")
    assert all(math.isfinite(row.loss) for row in trained.metrics)
    counts = [int(site.gate.sum()) for site in installed(trained.engine.model)]
    assert counts == [2, 86, 2, 86]  # int(0.7 * 3), int(0.6 * 144)
    told = [value for _, what, value in trained.engine.run.history if what == "s2vite/units_ever_on"]
    assert (told[-1] > told[0]) != bool(variables)
