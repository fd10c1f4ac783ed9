"""The recipes under recipes/gohsp: budgets on the models they name, and short runs of small models."""

import math
from pathlib import Path
from typing import Any

import pytest

from ovit_engine import Engine, Recipe
from ovit_engine.core.recipe import shipped_recipes
from ovit_engine.structured.gates import installed
from ovit_engine.training.api import train, with_training
from ovit_engine.training.models import empty_model

NAMES = [name for name in shipped_recipes() if name.startswith("gohsp/")]
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 36, "depth": 2, "num_heads": 3, "weight_init": "jax"}


@pytest.mark.parametrize(
    ("name", "variables", "share", "heads"),
    [
        ("gohsp_digits_vit", {}, 0.4, 2),
        ("gohsp_deit_tiny", {}, 0.3, 2),
        ("gohsp_deit_small", {}, 0.35, 4),
        ("gohsp_deit_small", {"sparsity": 0.5, "score": "taylor"}, 0.5, 3),
    ],
)
def test_what_is_left_of_the_model_it_names(name: str, variables: dict[str, Any], share: float, heads: int) -> None:
    assert f"gohsp/{name}" in NAMES
    assert len(NAMES) == 3
    recipe = Recipe.load(f"gohsp/{name}", **variables)
    assert recipe.name == name
    model = empty_model(recipe.training)
    engine = Engine(model, recipe, steps_per_epoch=20, epochs=recipe.training.epochs).prepare()
    kept = engine.modifiers[0]._soft_phase._kept  # type: ignore[attr-defined]
    sites = installed(model)
    gone = sum((site.count - kept[site.name]) * site.parameters for site in sites)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert share <= gone / total < share + 1e-3
    assert {kept[site.name] for site in sites if site.kind == "heads"} == {heads}


@pytest.mark.parametrize("name", ["gohsp_deit_tiny", "gohsp_deit_small"])
def test_a_run_on_images(name: str, tmp_path: Path, jpeg_folder: Path) -> None:
    """Of a small model, an epoch for ten."""
    text = (
        shipped_recipes()[f"gohsp/{name}"]
        .replace("0ep", "ep")
        .replace(": ep", ": 0ep")
        .replace("images: 512", "images: 16")
    )
    recipe = with_training(Recipe.parse(text, accumulate=2), model_args=SMALL, batch_size=8, epochs=5)
    trained = train(recipe, data=jpeg_folder, output=tmp_path / "run", device="cpu")
    assert all(math.isfinite(row.loss) for row in trained.metrics)
    told = {what: value for _, what, value in trained.engine.run.history}
    assert told["gohsp/heads_off"] == pytest.approx(1 / 3)
    total = sum(parameter.numel() for parameter in trained.model.parameters())
    gone = sum(int((~site.gate).sum()) * site.parameters for site in installed(trained.engine.model))
    assert gone / total >= (0.3 if "tiny" in name else 0.35)


def test_a_run_on_the_digits(tmp_path: Path) -> None:
    """Of a small model, an epoch for twelve."""
    text = shipped_recipes()["gohsp/gohsp_digits_vit"].replace("12ep", "1ep").replace("every: 1ep", "every: 0.5ep")
    small = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 32, "depth": 2, "num_heads": 4}
    recipe = with_training(Recipe.parse(text), model_args=small, epochs=2, batch_size=256)
    trained = train(recipe, data="digits", output=tmp_path / "run", device="cpu")
    assert all(math.isfinite(row.loss) for row in trained.metrics)
    assert {int(site.gate.sum()) for site in installed(trained.engine.model) if site.kind == "heads"} == {2}
