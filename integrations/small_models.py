"""A small random model of the kind that a recipe is for, with random images: enough to see what a recipe does."""

import inspect
import warnings
from typing import Any

import torch
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # public, though not re-exported by "as"
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from ovit_engine.engine import Engine
from ovit_engine.integrations.models import make_model, with_training
from ovit_engine.recipe import Recipe, Training
from ovit_engine.verify_resume import Setup

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


def shrink(recipe: Recipe, steps_per_epoch: int) -> Recipe:
    """`recipe` on a small model of the kind that it names: narrow, two blocks deep or two a stage, of few classes.

    A model that is small already stays as it is; one of which we know no width keeps that. Where a target of the recipe
    names a block further back, so that it would match nothing, all blocks stay. Raises ValueError as `make_model`.
    """
    training = recipe.training
    model = _empty(training)
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
    return next((each for each in recipes if _fits(each, steps_per_epoch)), recipes[-1])


def _fits(recipe: Recipe, steps_per_epoch: int) -> bool:
    """Whether the recipe can be followed on its model."""
    training = recipe.training
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of this model, which is not the user's
        try:
            Engine(_empty(training), recipe, steps_per_epoch=steps_per_epoch, epochs=training.epochs).prepare()
        except ValueError:
            return False
    return True


def _empty(training: Training) -> nn.Module:
    with torch.device("meta"):
        return make_model(training)


def small_setup(training: Training, images: int) -> Setup:
    """The timm model of `training` as it is, its optimizer, and `images` random images with random classes."""
    model = make_model(training)
    channels = next(parameter.shape[1] for parameter in model.parameters() if parameter.ndim == 4)
    side = _side(training, model)
    generator = torch.Generator().manual_seed(training.seed)
    x = torch.randn(images, channels, side, side, generator=generator)
    classes: Any = model.num_classes
    y = torch.randint(classes, (images,), generator=generator)

    def optimizer(trained: nn.Module) -> Optimizer:
        made: Optimizer = create_optimizer_v2(
            trained,
            opt=training.optimizer,
            lr=training.lr,
            weight_decay=training.weight_decay,
            momentum=training.momentum,
        )
        return made

    return Setup(model, TensorDataset(x, y), cross_entropy, optimizer)


def _side(training: Training, model: nn.Module) -> int:
    """Of an image, in pixels: what the model insists on, or little."""
    side = training.model_args.get("img_size")
    if side is None and "img_size" in inspect.signature(type(model).__init__).parameters:
        side = model.pretrained_cfg["input_size"][-1]  # type: ignore[index]
    return 32 if side is None else side if isinstance(side, int) else side[-1]
