"""Training and validation images by name: digits, an image folder, or any timm dataset."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.data.config import resolve_data_config
from timm.data.dataset_factory import create_dataset
from timm.data.readers.reader_factory import create_reader
from timm.data.transforms_factory import create_transform
from timm.models import get_pretrained_cfg
from torch import Tensor
from torch.utils.data import Dataset

from ovit_engine.training.arrangement import Arrange, arrangement, in_rgb
from ovit_engine.training.augmentation import (
    AUGMENTATION_PRESETS,
    GaussianNoise,
    calibration_transform,
    data_config,
    known_config,
    training_transform,
)
from ovit_engine.training.digits import SIZE, split_digits
from ovit_engine.training.images import Images, ImageSource
from ovit_engine.utils.suggest import did_you_mean

log = logging.getLogger(__name__)

TRAIN, VALIDATION = ("train", "training"), ("val", "validation", "valid")

PREFIXES = ("torch", "hfds")

_TOLD = ("size", "mean", "std", "crop", "interpolation")

_EXAMPLE = (
    "preprocessing={'size': [3, 224, 224], 'mean': [0.485, 0.456, 0.406], 'std': [0.229, 0.224, 0.225], 'crop': 1.0, "
    "'interpolation': 'bicubic'}, with your values"
)

WHAT = f"give 'digits', an image folder with train/ and val/, or a timm dataset name ({'/..., '.join(PREFIXES)}/...)"


@dataclass(frozen=True)
class ImageData:
    """What a trainer needs of a dataset; items are (image [C, H, W] float32, class)."""

    name: str
    train: Dataset[tuple[Tensor, int]]
    val: Dataset[tuple[Tensor, int]]
    calibration: Dataset[tuple[Tensor, int]]  # the training images as pruners see them
    classes: int | None  # None where the dataset does not tell
    preprocessing: dict[str, Any]  # size, mean, std, scale, crop, interpolation

    @property
    def unreadable(self) -> list[str]:
        """Names of the images that could not be read so far."""
        return [name for part in (self.train, self.val) if isinstance(part, Images) for name in part.unreadable]


def load_data(
    source: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    augmentation: str = "none",
    strict: bool = False,
    root: str | Path | None = None,
) -> ImageData:
    """Training and validation sets, transformed for a model.

    Args:
        source: "digits", an image folder with train/ and val/ (a folder a class in each), or a timm dataset name such
            as "torch/cifar10" or "hfds/uoft-cs/cifar10".
        config: what the model takes, from `model_data_config`; the dataset's own size without it (digits only).
        augmentation: of training images: "none", "noise" (Gaussian), "standard" (timm's crop, flip and colour jitter)
            or a preset of `augmentation.AUGMENTATION_PRESETS`.
        strict: raise UnreadableImageError at the first unreadable image; otherwise the next one stands in for it.
        root: where downloaded datasets are kept.

    Raises:
        FileNotFoundError: neither a folder nor a name that is known.
        ValueError: no images, no split, or other classes in one split than in the other.
    """
    name = str(source)
    if name == "digits":
        return _digits(config, augmentation)
    folder = Path(source)
    classes: int | None
    if config is None:
        raise ValueError(f"images of {name!r} have no one size: give config=model_data_config(...)")
    if folder.is_dir():
        train, val, classes = _folder_sources(folder)
    elif folder.exists():
        raise ValueError(f"{name!r} is a file: {WHAT}")
    elif name.partition("/")[0].lower() in PREFIXES and "/" in name:
        train, val, classes = _timm_sources(name, root)
    else:
        folders = [each.name for each in sorted(folder.parent.glob("*")) if each.is_dir()]
        near = did_you_mean(folder.name, ["digits", *folders], cutoff=0.8)
        raise FileNotFoundError(f"no data {name!r}{near or f': {WHAT}'}")
    mode = {1: "L", 3: "RGB"}.get(config["input_size"][0])
    if mode is None:
        raise ValueError(f"images have 1 or 3 channels, the model takes {config['input_size'][0]}")
    config = data_config(config, augmentation)
    rgb = in_rgb(config)
    transforms: list[Callable[[Any], Tensor]] = [
        training_transform(rgb, augmentation),
        create_transform(**known_config(rgb)),
        calibration_transform(rgb, augmentation),
    ]
    if arrangement(config):
        transforms = [Arrange(config, each) for each in transforms]
    images = Images(train, transforms[0], mode=mode, strict=strict, ignore=False)
    return ImageData(
        name,
        images,
        Images(val, transforms[1], mode=mode, strict=strict, ignore=True),
        images.with_transform(transforms[2]),
        classes,
        _preprocessing(config),
    )


def model_data_config(model: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a timm model wants its images: input_size [C, H, W], mean, std, crop and interpolation."""
    known = get_pretrained_cfg(model)
    cfg: dict[str, Any] = known.to_dict() if known else {}  # type: ignore[no-untyped-call]
    channels, *own_size = tuple[int, ...](cfg.get("input_size") or (3, 224, 224))
    size: Any = model_args.get("img_size", own_size)
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    wanted: dict[str, Any] = {"input_size": (model_args.get("in_chans", channels), height, width)}
    if wanted["input_size"][0] != channels:  # grey images of a colour model: the mean colour
        defaults = resolve_data_config({}, pretrained_cfg=cfg)  # type: ignore[no-untyped-call]
        for key in ("mean", "std"):
            wanted[key] = (sum(defaults[key]) / len(defaults[key]),) * wanted["input_size"][0]
    return dict(resolve_data_config(wanted, pretrained_cfg=cfg))  # type: ignore[no-untyped-call]


def warn_if_classes_differ(images: ImageData, outputs: int | None) -> None:
    """Warn if a model has other classes than the images: its accuracy would mean nothing."""
    if None not in (images.classes, outputs) and images.classes != outputs:
        log.warning(
            "%s has %d classes, the model has %d: its accuracy means nothing", images.name, images.classes, outputs
        )


def config_of(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """Return the `config` that `preprocessing` (of a checkpoint or an ONNX file) came from.

    Raises:
        ValueError: something is missing or is no such value.
    """
    missing = [key for key in _TOLD if key not in preprocessing]
    if missing:
        raise ValueError(f"the preprocessing of the images is not told ({', '.join(missing)}): export with {_EXAMPLE}")
    try:
        return {
            "input_size": tuple(preprocessing["size"]),
            "mean": tuple(preprocessing["mean"]),
            "std": tuple(preprocessing["std"]),
            "crop_pct": preprocessing["crop"],
            "interpolation": preprocessing["interpolation"],
            "crop_mode": preprocessing.get("crop_mode", "center"),
            **arrangement(preprocessing),
        }
    except TypeError:
        told = {key: preprocessing[key] for key in ("size", "mean", "std")}
        raise ValueError(f"size, mean and std must be lists, not {told}: export with {_EXAMPLE}") from None


def _preprocessing(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "size": list(config["input_size"]),
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "scale": 1 / 255,
        "crop": config["crop_pct"],
        "crop_mode": config["crop_mode"],
        "interpolation": config["interpolation"],
        **arrangement(config),
    }


def _digits(config: Mapping[str, Any] | None, augmentation: str) -> ImageData:
    if augmentation == "standard" or augmentation in AUGMENTATION_PRESETS:
        raise ValueError(
            f"digits must not be flipped or cropped, as {augmentation!r} does: use augmentation none or noise"
        )
    channels, height, width = SIZE if config is None else config["input_size"]
    if config is not None and arrangement(config):
        raise ValueError("digits are grey and [C, H, W]: for another order give an image folder")
    augment = GaussianNoise() if augmentation == "noise" else None
    train, val, preprocessing = split_digits((channels, height, width), augment)
    return ImageData("digits", train, val, train, 10, preprocessing)


def _folder_sources(folder: Path) -> tuple[ImageSource, ImageSource, int]:
    train, train_classes = _folder_source(folder, TRAIN)
    val, val_classes = _folder_source(folder, VALIDATION)
    if train_classes != val_classes:
        only = [
            f"only in {part}: {', '.join(sorted(more)[:5])}{', ...' * (len(more) > 5)}"
            for part, more in (("train", train_classes - val_classes), ("val", val_classes - train_classes))
            if more
        ]
        raise ValueError(f"{str(folder)!r} has different classes to train and to validate; {'; '.join(only)}")
    return train, val, len(train_classes)


def _folder_source(folder: Path, names: tuple[str, ...]) -> tuple[ImageSource, set[str]]:
    part = next((folder / name for name in names if (folder / name).is_dir()), None)
    if part is None:
        raise ValueError(
            f"{str(folder)!r} has no {names[0]}/: an image folder holds train/ and val/, and these a folder a class"
        )
    try:
        reader = create_reader("", root=str(part))
    except RuntimeError:
        raise ValueError(f"no images in {str(part)!r}: it holds a folder a class, with image files") from None
    if "" in reader.class_to_idx:
        raise ValueError(f"{str(part)!r} has images that lie in no class folder")
    return ImageSource(reader), set(reader.class_to_idx)


def _timm_sources(name: str, root: str | Path | None) -> tuple[ImageSource, ImageSource, int | None]:
    place = Path(root) if root is not None else Path.home() / ".cache" / "ovit" / "data"
    place.mkdir(parents=True, exist_ok=True)
    made = []
    for split in ("train", "validation"):
        extra: dict[str, Any] = {} if name.lower().endswith("folder") else {"download": True}
        try:
            made.append(create_dataset(name, root=str(place), split=split, **extra))
        except (AssertionError, ImportError, RuntimeError) as error:
            raise ValueError(f"timm can't load {name!r} ({split}): {' '.join(str(error).split())}") from error
    classes = getattr(made[0], "classes", None)
    sources = [ImageSource(getattr(part, "reader", part)) for part in made]
    return sources[0], sources[1], len(classes) if classes else None
