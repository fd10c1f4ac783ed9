"""What a run does with its sweep: load a point, count FLOPs, export, and the recipe of the fine-tuning tail."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from ovit_engine.certificate.manifest import Manifest
from ovit_engine.core.recipe import Recipe
from ovit_engine.engine import Engine
from ovit_engine.flops import count_flops
from ovit_engine.structured.shrink_model import rebuild
from ovit_engine.sweep.folder import FOLDER, INDEX, Index, Point, draw, point_name, read_index, write_index
from ovit_engine.training.checkpoint import load_checkpoint
from ovit_engine.utils.torch_files import load_file

# the additional fine-tuning of the oViT paper
TAIL_EPOCHS = 100

TAIL_MAX, TAIL_MIN = 5e-5, 1e-5


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


def complete(
    output: Path,
    make_model: Callable[[], nn.Module],
    preprocessing: Mapping[str, Any],
    *,
    data: Iterable[Any] | None = None,
) -> Index:
    """Add to `sweep.json` the theoretical FLOP reduction of each point and, with `data`, its verified ONNX file.

    Args:
        output: the run's folder.
        make_model: builds the model that was trained; its weights do not matter.
        preprocessing: with the `size` [C, H, W] of an image; written into the ONNX files.
        data: (images, labels) batches for parity and accuracy.

    Raises:
        FileNotFoundError: no sweep there.
        ValueError: damaged files.
        ExportError: a file is not what the recipe promised.
    """
    folder = output / FOLDER
    index = read_index(folder)
    images = torch.zeros(1, *preprocessing["size"])
    for number, point in enumerate(index.points):
        model = make_model()
        engine = load_point(model, folder / point.checkpoint)
        point = replace(point, flop_reduction=count_flops(model, images, engine.run.masks).reduction)
        if data is not None:
            name = f"{point_name(point.sparsity)}.onnx"
            certificate = engine.export(folder / name, images, data=data, preprocessing=preprocessing)
            point = replace(
                point,
                onnx=name,
                onnx_bytes=certificate.bytes,
                onnx_gzip_bytes=certificate.gzip_bytes,
                onnx_metric=None if certificate.accuracy is None else certificate.accuracy.file,
            )
        index = replace(index, points=(*index.points[:number], point, *index.points[number + 1 :]))
        write_index(folder, index)  # each by itself: what was exported stays known if the next fails
    draw(folder, index)
    return index


def find_point(index: Index, asked: float) -> Point:
    """Return the point of a sparsity. Raises ValueError with the points there are."""
    found = next((point for point in index.points if point_name(point.sparsity) == point_name(asked)), None)
    if found is None:
        there_are = ", ".join(point_name(point.sparsity) for point in index.points) or "none yet"
        raise ValueError(f"the sweep has no point {point_name(asked)}; there are {there_are}")
    return found


def tail_recipe(checkpoint: Path, epochs: int = TAIL_EPOCHS) -> Recipe:
    """Return the fine-tuning tail of the oViT paper for a point that the bundled trainer left.

    Zeros are held, the learning rate falls on a cosine from 5e-5 to 1e-5, the `training` section is that of the run.
    Where the point was quantized already, the tail is too, from its start.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a point of the bundled trainer.
    """
    content = load_checkpoint(checkpoint)
    run = Recipe.parse(content["recipe"], file=f"recipe in {checkpoint}")
    name = f"{run.name}_{checkpoint.stem}_tail"
    sparse = [name for name in content["engine"]["masks"] if bool((content["model"][name] == 0).any())]
    modifiers: list[dict[str, Any]] = [{"constant_mask": {"targets": sparse}}] if sparse else []
    modifiers.append({"cyclic_lr": {"max": TAIL_MAX, "min": TAIL_MIN, "curve": "cosine"}})
    if any(key.endswith("weight_quantizer.enabled") and bool(value) for key, value in content["model"].items()):
        modifiers += [{"quantize": _from_the_start(entry)} for entry in _entries(run, "quantize")]
    document = {
        "name": name,
        "description": f"fine-tuning tail of {run.name} at {checkpoint.stem}: {epochs} epochs at its present zeros",
        "training": {**run.training.model_dump(exclude_unset=True), "epochs": epochs},
        "modifiers": modifiers,
    }
    return Recipe.parse(yaml.safe_dump(document, sort_keys=False), file=f"{name}.yaml")


def clear_broken_start(output: Path, recipe: Recipe) -> None:
    """Remove what a run of this recipe left that was broken off before its first checkpoint: it starts again."""
    folder = output / FOLDER
    if not (folder / INDEX).is_file():
        return
    index = read_index(folder)
    if index.recipe_hash == recipe.hash and not index.finished:
        for point in index.points:
            (folder / point.checkpoint).unlink(missing_ok=True)
        (folder / INDEX).unlink()


def _entries(recipe: Recipe, name: str) -> list[dict[str, Any]]:
    """Return the options, as written, of the modifiers of one kind."""
    document = yaml.safe_load(recipe.dump())
    return [entry[name] for entry in document["modifiers"] if name in entry]


def _from_the_start(options: dict[str, Any]) -> dict[str, Any]:
    """Options of `quantize` without the times of another training."""
    times = ("start", "freeze_observers", "freeze_batch_norm")
    return {key: value for key, value in options.items() if key not in times}
