"""Loops like timm's own train.py: how long they are, and calibration on the loaders that timm makes."""

import math
from pathlib import Path
from typing import Any

from timm.data.loader import PrefetchLoader, fast_collate
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from ovit_engine.core.recipe import Recipe
from ovit_engine.engine import Engine
from ovit_engine.gradients.backward import LossFunction
from ovit_engine.gradients.calibration import Calibration


def timm_engine(
    model: nn.Module,
    recipe: Recipe | str | Path,
    loader: Any,
    *,
    epochs: int,
    grad_accum_steps: int = 1,
    teacher: nn.Module | None = None,
) -> Engine:
    """Return a prepared engine. Call it before the optimizer, the EMA copy, DDP and torch.compile are made.

    Args:
        loader: of training, as `timm.data.create_loader` makes it.
        epochs: all that are trained: with a schedule of timm's, what `create_scheduler_v2` returns beside it.
        grad_accum_steps: as in train.py; an epoch's last step may have fewer micro-batches.
        teacher: as that of an Engine. Where a recipe has extra loss terms (`distill`) give `train_loss_fn` to
            `engine.attach(criterion=...)`.
    """
    steps = math.ceil(len(loader) / grad_accum_steps)
    return Engine(model, recipe, steps_per_epoch=steps, epochs=epochs, teacher=teacher).prepare()


def timm_calibration(loader: Any, loss_fn: LossFunction = cross_entropy, *, seed: int = 0) -> Calibration:
    """Calibration on the images of a timm loader, augmented as in training but with hard labels: without mixup.

    With a prefetcher, images are normalized as it does; its random erasing is left out.
    """
    if not isinstance(loader, PrefetchLoader):
        return Calibration(loader, loss_fn, seed=seed)
    inner: DataLoader[Any] = loader.loader
    plain = DataLoader(
        inner.dataset,
        batch_size=inner.batch_size,
        sampler=inner.sampler,
        num_workers=inner.num_workers,
        collate_fn=_Normalized(loader.mean.float().cpu(), loader.std.float().cpu()),
        worker_init_fn=inner.worker_init_fn,
    )
    return Calibration(plain, loss_fn, seed=seed)


class _Normalized:
    """Float images and classes of a list of items, as the prefetcher makes them; an object, since workers pickle it."""

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        self._mean, self._std = mean, std  # in levels 0 to 255

    def __call__(self, items: list[Any]) -> tuple[Tensor, Tensor]:
        images, classes = fast_collate(items)  # type: ignore[no-untyped-call]
        return images.float().sub(self._mean).div(self._std), classes
