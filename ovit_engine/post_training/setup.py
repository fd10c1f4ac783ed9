"""A timm model, its weights and its data, ready for one-shot pruning and tuning."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

from ovit_engine.core.recipe import Recipe
from ovit_engine.gradients.calibration import Calibration
from ovit_engine.post_training.tune import hold_out
from ovit_engine.training.checkpoint import load_weights
from ovit_engine.training.data import ImageData, load_data, model_data_config
from ovit_engine.training.device import choose_device
from ovit_engine.training.metrics import evaluate
from ovit_engine.training.models import make_model, model_name, with_classes

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ModelSetup:
    """All that `oneshot` and `tune` take."""

    model: nn.Module
    calibration: Calibration  # training images; with a preset less augmented than they are trained on
    evaluate: Callable[[nn.Module], float]  # top-1 on the validation images
    example_inputs: Tensor  # [1, C, H, W]
    about: dict[str, Any]
    data: ImageData
    plain: Callable[[], ImageData]  # the same without augmentation
    loader: dict[str, Any]  # options of loaders

    def split(self) -> tuple[Calibration, DataLoader[Any]]:
        """Gradients from one part of the training images, and the other part, as at evaluation, to tune on."""
        seed = self.calibration.seed
        rest, held = hold_out(len(self.data.train), seed=seed)  # type: ignore[arg-type]
        calibration = Calibration(self._loader(Subset(self.data.calibration, rest)), cross_entropy, seed=seed)
        return calibration, self._loader(Subset(self.plain().train, held))

    def _loader(self, images: Any) -> DataLoader[Any]:
        return DataLoader(images, **self.loader)


def set_up(
    recipe: Recipe,
    *,
    data: str | Path,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    device: str = "auto",
    workers: int = 0,
    root: str | Path | None = None,
    config: dict[str, Any] | None = None,
) -> ModelSetup:
    """Return the model of `recipe.training` with weights from `checkpoint` (or timm's), and the images of `data`.

    `config` says how the weights want their images, where that is known; otherwise the timm model's own is taken.

    Raises:
        ValueError: data, weights or a model that do not fit; FileNotFoundError where one is not there.
    """
    name = model_name(recipe.training)
    if checkpoint is None and not pretrained:
        log.warning("the weights are random, so accuracies say nothing: did you mean --checkpoint or --pretrained?")
    config = config or model_data_config(name, recipe.training.model_args)
    augmentation = recipe.training.augmentation
    images = load_data(data, config=config, augmentation=augmentation, root=root)
    training = with_classes(recipe, images).training
    place = choose_device(device)
    model = make_model(training, pretrained=pretrained)
    if checkpoint is not None:
        load_weights(model, Path(checkpoint))
    model.to(place).eval()
    options: dict[str, Any] = {"batch_size": training.batch_size // training.accumulate, "num_workers": workers}
    loader: DataLoader[Any] = DataLoader(images.val, **options)
    return ModelSetup(
        model=model,
        calibration=Calibration(DataLoader(images.calibration, **options), cross_entropy, seed=training.seed),
        evaluate=lambda pruned: evaluate(pruned, loader, place),
        example_inputs=torch.zeros(1, *config["input_size"]),
        about={
            "model": name,
            "model_args": training.model_args,
            "data": images.name,
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "pretrained": pretrained,
            "augmentation": augmentation,
            "seed": training.seed,
            "device": str(place),
        },
        data=images,
        plain=lambda: load_data(data, config=config, root=root),
        loader=options,
    )
