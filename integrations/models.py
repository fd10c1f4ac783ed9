"""timm models as the `training` section of a recipe names them."""

import difflib
from dataclasses import replace
from typing import Any

import timm
from pydantic import ValidationError
from torch import nn

from ovit_engine.integrations.augmentation import with_preset
from ovit_engine.integrations.data import ImageData
from ovit_engine.random_states import seed_everything
from ovit_engine.recipe import Recipe, Training


def with_training(recipe: Recipe, **options: Any) -> Recipe:
    """`recipe` with other options in its `training` section; those that are None stay.

    Raises:
        ValueError: an option that does not fit.
    """
    given = {key: value for key, value in options.items() if value is not None}
    try:
        training = Training.model_validate({**recipe.training.model_dump(exclude_unset=True), **given})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(["training", *map(str, first["loc"])])
        value = "" if first["type"] == "value_error" else f", not {first['input']!r}"
        raise ValueError(f"{where}: {first['msg'].removeprefix('Value error, ')}{value}") from None
    training._origins = recipe.training._origins
    return replace(recipe, training=training)


def model_name(training: Training) -> str:
    """The timm model of a `training` section.

    Raises:
        ValueError: none is named, or one that timm does not have; the nearest names are shown.
    """
    name = training.model
    if name is None:
        raise ValueError("no model: name one with --model, or as 'model' in the recipe's training section")
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        raise ValueError(f"timm has no model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else ""))
    return name


def make_model(training: Training, *, pretrained: bool = False) -> nn.Module:
    """The timm model of a `training` section, its weights seeded.

    Raises:
        ValueError: as `model_name`, or a model without stochastic depth where a preset wants it.
    """
    name = model_name(training)
    seed_everything(training.seed)
    args = with_preset(training).model_args
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **args)
    except TypeError as error:
        if "drop_path_rate" not in str(error) or "drop_path_rate" in training.model_args:
            raise
        raise ValueError(
            f"{name} has no stochastic depth, which augmentation {training.augmentation!r} sets: "
            "write model_args: {drop_path_rate: null}"
        ) from None
    return model


def with_classes(recipe: Recipe, data: ImageData) -> Recipe:
    """`recipe` with a model of as many classes as the data have, unless it says how many itself."""
    given = recipe.training.model_args.get("num_classes")
    if given is None and data.classes is None:
        raise ValueError(f"{data.name!r} does not tell its classes: give --model-arg num_classes=N")
    if given is None:
        return with_training(recipe, model_args={**recipe.training.model_args, "num_classes": data.classes})
    if data.classes is not None and given < data.classes:
        raise ValueError(f"the model has {given} classes, {data.name!r} has {data.classes}")
    return recipe
