"""Reading back what a sweep kept."""

from pathlib import Path

from torch import nn

from ovit_engine.engine import Engine
from ovit_engine.manifest import Manifest
from ovit_engine.recipe import Recipe
from ovit_engine.shrink import rebuild
from ovit_engine.torch_files import load_file


def load_point(model: nn.Module, path: str | Path) -> Engine:
    """Load a point of a sweep ("runs/x/sweep/0.75.pt") into a fresh model; `engine.export(...)` writes its file.

    Args:
        model: built as the one that was trained; it gets the weights, and quantizers where the recipe has them.

    Returns:
        An engine at the end of training under the recipe, with the masks of the point.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged, something else than a point, or of another model.
    """
    content = load_file(Path(path))
    if not isinstance(content, dict) or not {"model", "engine", "point"} <= set(content):
        raise ValueError(f"{str(path)!r} is no point of a sweep")
    state = content["engine"]
    if content.get("manifest"):
        rebuild(model, Manifest.model_validate(content["manifest"]))
    recipe = Recipe.parse(state["recipe"], file=f"recipe in {path}")
    steps = state["steps_per_epoch"]
    engine = Engine(model, recipe, steps_per_epoch=steps, epochs=state["total_steps"] // steps).prepare()
    try:
        model.load_state_dict(content["model"])
    except RuntimeError as error:
        first = str(error).splitlines()[1:2]  # below a heading
        raise ValueError(f"{str(path)!r} does not fit the model: {' '.join(first).strip()}") from error
    engine.load_state_dict(state)
    return engine
