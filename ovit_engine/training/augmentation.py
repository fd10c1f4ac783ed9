"""Augmentation and regularization of the bundled trainer: the presets of oViT's Appendix B (Table 3), and plainer ones.

The papers name values, timm and torchvision have the transforms. `training` options that a recipe writes win.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import RandAugment
from timm.data.mixup import Mixup
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import Compose, TrivialAugmentWide  # type: ignore[import-untyped]

from ovit_engine.core.training_options import Training

Transform = Callable[[Any], Tensor]

NOISE = 0.5  # in standard deviations of normalised pixels

SMOOTHING = 0.1

SWITCH = 0.5  # how often a mixed batch is cutmix where mixup is on too

TRIVIAL = "trivial"


@dataclass(frozen=True, kw_only=True)
class AugmentationPreset:
    """A row of `AUGMENTATION_PRESETS`. All also have flips, crops of 8 to 100 % of the area, label smoothing 0.1."""

    # RandAugment as timm spells it, or TRIVIAL
    auto: str
    # aspect ratios of crops
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    # alpha of the Beta distributions; 0: off
    mixup: float = 0.0
    cutmix: float = 0.0
    # share of batches that are mixed
    mixing: float = 1.0
    # share of images from which a rectangle is erased
    erasing: float = 0.0
    # stochastic depth: the model argument drop_path_rate
    drop_path: float = 0.0
    weight_decay: float
    # largest gradient norm
    clip_grad: float | None = None
    # times that each image drawn comes in a batch; an epoch has as many images as without
    repeats: int = 1
    # of AdamW
    eps: float = 1e-8
    # share of an image's side that evaluation looks at; None: as the model says
    crop: float | None = 0.9


def _steiner(auto: str, mix: float) -> AugmentationPreset:
    """Of "How to train your ViT" (Steiner et al. 2021)."""
    return AugmentationPreset(auto=auto, mixup=mix, cutmix=mix, weight_decay=0.03, clip_grad=1.0, eps=1e-6)


def _deit(auto: str, **options: Any) -> AugmentationPreset:
    """Of DeiT (Touvron et al. 2021)."""
    return AugmentationPreset(
        auto=auto, ratio=(0.67, 1.5), mixup=0.8, cutmix=1.0, erasing=0.25, drop_path=0.1, **options
    )


# light1 and deit are Table 3; the others come from the configurations released with it (specs/second-order.md §3)
AUGMENTATION_PRESETS = {
    "light1": _steiner("rand-m0-n2-inc1", 0.0),
    "light2": _steiner("rand-m10-n2-inc1", 0.2),
    "medium1": _steiner("rand-m15-n2-inc1", 0.2),
    "medium2": _steiner("rand-m15-n2-inc1", 0.5),
    "deit_light": _deit("rand-m6-mstd0.5-inc1", mixing=0.2, weight_decay=0.005),
    "deit": _deit("rand-m9-mstd0.5-inc1", weight_decay=0.05, repeats=3),
    # the recipe of the torchvision blog post that Appendix D names for convolutional networks
    "torchvision": AugmentationPreset(
        auto=TRIVIAL, mixup=0.2, cutmix=1.0, erasing=0.1, weight_decay=2e-5, repeats=4, crop=None
    ),
}


def with_preset(training: Training) -> Training:
    """`training` with what its preset says of the options that the recipe left out.

    These are weight_decay, clip_grad, label_smoothing and the model argument drop_path_rate.
    """
    preset = AUGMENTATION_PRESETS.get(training.augmentation)
    if preset is None:
        return training
    values: dict[str, Any] = {
        "weight_decay": preset.weight_decay,
        "clip_grad": preset.clip_grad,
        "label_smoothing": SMOOTHING,
    }
    changed = {key: value for key, value in values.items() if key not in training.model_fields_set}
    if preset.drop_path:
        changed["model_args"] = {"drop_path_rate": preset.drop_path, **training.model_args}
    return training.model_copy(update=changed)


def data_config(config: Mapping[str, Any], augmentation: str) -> Mapping[str, Any]:
    """Return how images are evaluated where the training images are augmented so: a preset may name another crop."""
    preset = AUGMENTATION_PRESETS.get(augmentation)
    return config if preset is None or preset.crop is None else {**config, "crop_pct": preset.crop}


def training_transform(config: Mapping[str, Any], augmentation: str) -> Transform:
    """PIL image -> [C, H, W] float32, normalised; without augmentation they look as at evaluation.

    Args:
        config: of the model, as `model_data_config` makes it.

    Raises:
        ValueError: a preset, which works on colours, for a model of grey images.
    """
    preset = AUGMENTATION_PRESETS.get(augmentation)
    if preset is not None:
        return _preset_transform(known_config(config), preset, augmentation)
    if augmentation == "standard":
        standard: Transform = create_transform(**known_config(config), is_training=True)
        return standard
    plain: Transform = create_transform(**known_config(config))
    return Compose([plain, GaussianNoise()]) if augmentation == "noise" else plain


def calibration_transform(config: Mapping[str, Any], augmentation: str) -> Transform:
    """Of the training images that pruners take gradients from: those of a preset are but cropped, flipped, jittered.

    So the authors of oViT have it (specs/second-order.md §1.1a): no RandAugment, no mixing, no erasing.
    """
    return training_transform(config, "standard" if augmentation in AUGMENTATION_PRESETS else augmentation)


def known_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a `config` that timm's transforms take."""
    keys = ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation")
    return {key: config[key] for key in keys}


def mixes_images(training: Training) -> bool:
    """Return whether the images of a batch are mixed with each other."""
    preset = AUGMENTATION_PRESETS.get(training.augmentation)
    return preset is not None and (preset.mixup > 0 or preset.cutmix > 0)


def make_mixup(training: Training, classes: int) -> Mixup | None:
    """timm's mixup and cutmix for batches [N, C, H, W] with labels [N], which become soft targets [N, classes]."""
    if not mixes_images(training):
        return None
    preset = AUGMENTATION_PRESETS[training.augmentation]
    return Mixup(  # type: ignore[no-untyped-call]
        mixup_alpha=preset.mixup,
        cutmix_alpha=preset.cutmix,
        prob=preset.mixing,
        switch_prob=SWITCH,
        label_smoothing=training.label_smoothing,
        num_classes=classes,
    )


class GaussianNoise:
    """Adds noise of half a standard deviation of the pixels: the regulariser that small digits bear well."""

    def __call__(self, image: Tensor) -> Tensor:
        return image + NOISE * torch.randn(image.shape)


def _preset_transform(config: dict[str, Any], preset: AugmentationPreset, name: str) -> Transform:
    channels = config["input_size"][0]
    if channels != 3:
        raise ValueError(
            f"augmentation {name!r} is made for colour images: the model takes {channels} channel{'s' * (channels > 1)}"
            " (use standard, noise or none)"
        )
    trivial = preset.auto == TRIVIAL
    crop_and_flip, auto, to_tensor = create_transform(
        **config,
        is_training=True,
        ratio=preset.ratio,
        auto_augment=None if trivial else preset.auto,
        color_jitter=0.0,  # with RandAugment there is none, in DeiT's and Steiner's code neither
        re_prob=preset.erasing,
        re_mode="pixel",
        separate=True,
    )
    if trivial:
        auto = TrivialAugmentWide()
    else:
        _keep_a_bit(auto.transforms[0])
    whole: Transform = Compose([crop_and_flip, auto, to_tensor])
    return whole


def _keep_a_bit(augment: RandAugment) -> None:
    """At magnitude 10, which noise reaches in `deit`, timm posterizes to 0 bits, and Pillow 13 raises."""
    for operation in augment.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    return ImageOps.posterize(image, max(bits, 1))
