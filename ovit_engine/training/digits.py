"""scikit-learn's digits: 1,797 scanned 8x8 images that need no download."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import Dataset

HELD_OUT = 450

MEAN, STD = 0.3052, 0.3760  # of the 1,347 training images, pixels scaled from 0..16 to 0..1

SIZE = (1, 8, 8)


class Digits(Dataset[tuple[Tensor, int]]):
    """Normalised images in memory, resized and repeated over channels where a model takes other shapes.

    Args:
        images: [N, 8, 8], pixels 0..16.
        labels: [N], 0..9.
        size: channels, height, width of an item.
        augment: applied to each image [C, H, W] when it is taken.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        size: tuple[int, int, int],
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self._images = ((images.float() / 16 - MEAN) / STD).unsqueeze(1)
        self._labels = [int(label) for label in labels]
        self._size = size
        self._augment = augment

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = self._images[index]
        if tuple(image.shape[1:]) != self._size[1:]:
            image = interpolate(image[None], self._size[1:], mode="bilinear", align_corners=False)[0]
        image = image.expand(self._size)
        return (image if self._augment is None else self._augment(image)), self._labels[index]


def split_digits(
    size: tuple[int, int, int], augment: Callable[[Tensor], Tensor] | None
) -> tuple[Digits, Digits, dict[str, Any]]:
    """Training images, the held-out 450 (stratified, always the same), and what was done to the pixels.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed; it says how to get it.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
        from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits come with scikit-learn: pip install 'ovit-engine[demo]'") from error
    bunch = load_digits()
    train, held_out = train_test_split(
        range(len(bunch.target)), test_size=HELD_OUT, stratify=bunch.target, random_state=0
    )
    images, labels = torch.from_numpy(bunch.images), torch.from_numpy(bunch.target)
    preprocessing = {
        "size": list(size),
        "mean": [MEAN] * size[0],
        "std": [STD] * size[0],
        "scale": 1 / 16,
        "crop": 1.0,
        "interpolation": "bilinear",
    }
    return (
        Digits(images[train], labels[train], size, augment),
        Digits(images[held_out], labels[held_out], size),
        preprocessing,
    )
