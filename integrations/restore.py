"""A run of the bundled trainer read back from its checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ovit_engine.engine import Engine
from ovit_engine.integrations.checkpoint import deployed_weights, folder_of, load_checkpoint, saved_manifest
from ovit_engine.integrations.models import make_model
from ovit_engine.integrations.teachers import Teachers
from ovit_engine.recipe import Recipe
from ovit_engine.shrink import rebuild


@dataclass(frozen=True)
class Restored:
    """A run read back from its checkpoint."""

    model: nn.Module
    engine: Engine
    data: str
    preprocessing: dict[str, Any]
    epoch: int


def restore(path: str | Path) -> Restored:
    """Rebuild model and engine of a run from its checkpoint, on the CPU; with the averaged weights, where it has some.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no checkpoint of ours, or damaged.
    """
    state = load_checkpoint(Path(path))
    recipe = Recipe.parse(state["recipe"], file=f"recipe in {path}")
    model = rebuild(make_model(recipe.training), saved_manifest(state))
    engine = Engine(
        model,
        recipe,
        steps_per_epoch=state["engine"]["steps_per_epoch"],
        epochs=recipe.training.epochs,
        teacher=None if state["engine"].get("finished") else Teachers(recipe).saved(folder_of(Path(path))),
    ).prepare()
    model.load_state_dict(deployed_weights(state))
    engine.load_state_dict(state["engine"])
    return Restored(model, engine, state["data"], state["preprocessing"], state["epoch"])
