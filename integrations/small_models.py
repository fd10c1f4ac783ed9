"""A small random model of the kind that a recipe is for, with random images: enough to see what a recipe does."""

import inspect
from typing import Any

import torch
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # public, though not re-exported by "as"
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from ovit_engine.integrations.models import make_model, model_name
from ovit_engine.recipe import Training
from ovit_engine.verify_resume import Setup

LARGE = 1_000_000  # parameters from which a model is made smaller
CLASSES = 10
# by what a model's constructor takes: width goes, depth and names stay; the first whose keys it has all
_NARROW: tuple[dict[str, Any], ...] = (
    {"embed_dim": 16, "num_heads": (1, 2, 4, 8), "depths": None, "window_size": 2, "img_size": 64},  # Swin
    {"embed_dim": 32, "num_heads": 2, "img_size": 32},  # ViT, DeiT, BEiT, XCiT
    {"embed_dims": (16, 16, 32, 64)},  # EfficientFormer, whose attention wants its own image size
    {"dims": (16, 32, 48, 64)},  # ConvNeXt
    {"channels": (16, 16, 32, 32), "stem_width": 8},  # ResNet
)


def shrink(training: Training) -> dict[str, Any]:
    """`model_args` for the timm model of `training` made narrow, with few classes, for images of about 32 pixels.

    A model that is small already keeps its own; one of which we know no width keeps that. Raises ValueError as
    `make_model`.
    """
    model_name(training)
    with torch.device("meta"):
        model = make_model(training)
    if sum(parameter.numel() for parameter in model.parameters()) < LARGE:
        return dict(training.model_args)
    accepted = inspect.signature(type(model).__init__).parameters
    narrow = next((each for each in _NARROW if each.keys() <= accepted.keys()), {})
    return {
        **training.model_args,
        **{key: value for key, value in narrow.items() if value is not None},
        "num_classes": CLASSES,
    }


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
