"""timm models as the `training` section of a recipe names them, and small ones of their kind to try a recipe on."""

import inspect
import warnings
from dataclasses import replace
from functools import partial
from typing import Any

import timm
import torch
from pydantic import ValidationError
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # public, though not re-exported by "as"
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from ovit_engine.core.recipe import Recipe
from ovit_engine.core.training_options import Training
from ovit_engine.engine import Engine
from ovit_engine.export.rehearsal import MAX_EXAMPLES
from ovit_engine.masking.parameters import is_scorer
from ovit_engine.tokens import param_groups
from ovit_engine.training.augmentation import AUGMENTATION_PRESETS, with_preset
from ovit_engine.training.data import ImageData
from ovit_engine.training.verify_resume import Setup
from ovit_engine.utils.random_states import seed_everything
from ovit_engine.utils.suggest import suggest
from ovit_engine.utils.validation import reason

LARGE = 1_000_000  # parameters from which a model is made smaller

CLASSES = 10

# by what a model's constructor takes: width goes, names stay; the first whose keys it has all
_NARROW: tuple[dict[str, Any], ...] = (
    {"embed_dim": 16, "num_heads": (1, 2, 4, 8), "depths": (2, 2, 2, 2), "window_size": 2, "img_size": 64},  # Swin
    {"embed_dim": 32, "num_heads": 2, "depth": 2, "img_size": 32},  # ViT, DeiT, BEiT, XCiT
    {"embed_dims": (16, 16, 32, 32), "depths": (2, 2, 2, 2)},  # EfficientFormer, whose attention has its image size
    {"dims": (16, 16, 32, 32), "depths": (2, 2, 2, 2)},  # ConvNeXt
    {"channels": (8, 8, 16, 16), "layers": (2, 2, 2, 2), "stem_width": 8},  # ResNet
)

_DEPTHS = {"depth", "depths", "layers"}

# timm's own small ones and their arguments, by the class of models whose width no argument sets
_STAND_INS: dict[str, tuple[str, dict[str, Any]]] = {"EfficientNet": ("test_efficientnet", {"channel_multiplier": 0.5})}


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
        raise ValueError(f"{where}: {reason(first)}{value}") from None
    return replace(recipe, training=training.set_origins(recipe.training.origins))


def model_name(training: Training) -> str:
    """Return the timm model of a `training` section.

    Raises:
        ValueError: none is named, or one that timm does not have; the nearest names are shown.
    """
    name = training.model
    if name is None:
        raise ValueError("no model: name one with --model, or as 'model' in the recipe's training section")
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{suggest(name, timm.list_models(), count=3)}")
    return name


def make_model(training: Training, *, pretrained: bool = False) -> nn.Module:
    """Return the timm model of a `training` section, its weights seeded.

    Raises:
        ValueError: as `model_name`, or a model without stochastic depth where a preset wants it.
    """
    name = model_name(training)
    seed_everything(training.seed)
    args = with_preset(training).model_args
    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **args)
    except TypeError:
        if "drop_path_rate" not in args or "drop_path_rate" in training.model_args:
            raise
        without = {key: value for key, value in args.items() if key != "drop_path_rate"}
        with torch.device("meta"):
            timm.create_model(name, **without)  # raises what else is wrong
        raise ValueError(
            f"{name} has no stochastic depth, which augmentation {training.augmentation!r} sets: "
            "write model_args: {drop_path_rate: null}"
        ) from None
    return model


def make_optimizer(model: nn.Module, training: Training) -> Optimizer:
    """Return the optimizer of a `training` section for a model that is prepared."""
    options: dict[str, Any] = {}
    preset = AUGMENTATION_PRESETS.get(training.augmentation)
    if preset is not None and training.optimizer == "adamw":
        options["eps"] = preset.eps
    if any(is_scorer(name) for name, _ in model.named_parameters()):  # they may learn at a rate of their own
        options["param_group_fn"] = partial(param_groups, weight_decay=training.weight_decay)
    made: Optimizer = create_optimizer_v2(
        model,
        opt=training.optimizer,
        lr=training.lr,
        weight_decay=training.weight_decay,
        momentum=training.momentum,
        **options,
    )
    return made


def rehearse(engine: Engine) -> None:
    """Try the whole way to an ONNX file of a prepared engine whose model `make_model` made, on noise; raises as it."""
    training, model = engine.recipe.training, engine.model
    channels = next((p.shape[1] for p in model.parameters() if p.ndim == 4), 3)
    config: Any = model.pretrained_cfg
    side = _side(training, model, otherwise=config["input_size"][-1])
    noise = torch.randn(MAX_EXAMPLES, channels, side, side, generator=torch.Generator().manual_seed(0))
    engine.rehearse(make_optimizer(model, training), example_inputs=noise)


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


def with_small_model(recipe: Recipe, steps_per_epoch: int) -> Recipe:
    """`recipe` on a small model of the kind that it names: narrow, two blocks deep or two a stage, of few classes.

    A model that is small already stays as it is; one of which we know no width keeps that. Where a target of the recipe
    names a block further back, so that it would match nothing, all blocks stay. Raises ValueError as `make_model`.
    """
    training = recipe.training
    model = empty_model(training)
    if sum(parameter.numel() for parameter in model.parameters()) < LARGE:
        return recipe
    accepted = inspect.signature(type(model).__init__).parameters
    small = next((each for each in _NARROW if each.keys() <= accepted.keys()), {})
    narrow = {key: value for key, value in small.items() if key not in _DEPTHS}
    stand_in = _STAND_INS.get(type(model).__name__)
    choices = [*([] if stand_in is None else [stand_in]), (training.model, small), (training.model, narrow)]
    recipes = [
        with_training(recipe, model=name, model_args={**training.model_args, **args, "num_classes": CLASSES})
        for name, args in choices
    ]
    return next((each for each in recipes if _can_follow(each, steps_per_epoch)), recipes[-1])


def _can_follow(recipe: Recipe, steps_per_epoch: int) -> bool:
    """Return whether the recipe can be followed on its model."""
    training = recipe.training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of this model, which is not the user's
        try:
            Engine(empty_model(training), recipe, steps_per_epoch=steps_per_epoch, epochs=training.epochs).prepare()
        except ValueError:
            return False
    return True


def empty_model(training: Training) -> nn.Module:
    """Return the model without memory for its weights, where it can be made so. Raises ValueError as `make_model`."""
    try:
        with torch.device("meta"):
            return make_model(training)
    except (RuntimeError, NotImplementedError):  # it looks at values while it is made
        return make_model(training)


def small_setup(training: Training, images: int) -> Setup:
    """Return the timm model of `training` as it is, its optimizer, and `images` random images with random classes."""
    model = make_model(training)
    channels = next(parameter.shape[1] for parameter in model.parameters() if parameter.ndim == 4)
    side = _side(training, model)
    generator = torch.Generator().manual_seed(training.seed)
    x = torch.randn(images, channels, side, side, generator=generator)
    classes: Any = model.num_classes
    y = torch.randint(classes, (images,), generator=generator)

    return Setup(model, TensorDataset(x, y), cross_entropy, partial(make_optimizer, training=training))


def _side(training: Training, model: nn.Module, otherwise: int = 32) -> int:
    """Of an image, in pixels: what the model insists on, or `otherwise`."""
    side = training.model_args.get("img_size")
    if side is None and "img_size" in inspect.signature(type(model).__init__).parameters:
        side = model.pretrained_cfg["input_size"][-1]  # type: ignore[index]
    return otherwise if side is None else side if isinstance(side, int) else side[-1]
