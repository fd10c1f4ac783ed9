"""A small problem for each framework: 8x8 digits, a ViT of one block, oViT with a cyclic learning rate and int8."""

from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from ovit_engine import Engine, Recipe

BATCH, STEPS, EPOCHS = 32, 10, 4  # 320 images

RECIPE = r"""
modifiers:
  - ovit_prune:
      {start: 1ep, end: 2ep, every: 1ep, sparsity: {from: 0.3, to: 0.5}, targets: ["re:.*TARGET\\.weight"],
       block: 16, gradients: 8, images_per_gradient: 4, damp: 1.0e-6}
  - cyclic_lr: {max: 2.0e-3, min: 1.0e-4, period: 1ep}
  - quantize: {start: 2.5ep, freeze_observers: 3.5ep}
"""


def recipe(target: str = "(qkv|fc1)") -> Recipe:
    return Recipe.parse(RECIPE.replace("TARGET", target))


def lr_of(step: int) -> float:
    """The recipe's learning rate in step number `step`, which counts from 1 (oViT eq. 8)."""
    return 2e-3 - 1.9e-3 * ((step - 1) % STEPS) / STEPS


def digits() -> tuple[Tensor, Tensor]:
    """640 images [640, 1, 8, 8] in [-1, 1] and their classes."""
    found = load_digits()
    images = torch.from_numpy(found.images).float().div(8).sub(1).unsqueeze(1)
    return images[:640], torch.from_numpy(found.target)[:640]


IMAGES, CLASSES = digits()
TRAIN: Dataset[tuple[Tensor, ...]] = TensorDataset(IMAGES[:320], CLASSES[:320])
VAL: Dataset[tuple[Tensor, ...]] = TensorDataset(IMAGES[320:], CLASSES[320:])


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=10
    )
    return model


class RecordingAdamW(torch.optim.AdamW):
    """Writes down the learning rate that each step is made with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rates: list[float] = []

    def step(self, closure: Any = None) -> Any:
        self.rates.append(float(self.param_groups[0]["lr"]))
        return super().step(closure)


def equal(one: nn.Module, two: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), two.state_dict().values(), strict=True)
    return all(torch.equal(ours, theirs) for (_, ours), theirs in pairs)


def check_trained(engine: Engine, sparsity: float = 0.5) -> None:
    """Whether all of the recipe was done: exact zeros, int8 on, the clock at its end, hooks gone."""
    run = engine.run
    assert engine.finished
    assert run.step == run.total_steps
    assert run.masks.sparsity() == sparsity
    weights = dict(engine.model.named_parameters())
    for name in run.masks.names():
        mask = run.masks.get(name)
        assert mask is not None
        assert torch.equal(weights[name] == 0, ~mask), name
    flags = [bool(value) for name, value in engine.model.named_buffers() if name.endswith("enabled")]
    assert flags
    assert all(flags)
    for optimizer in run.optimizers:
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
