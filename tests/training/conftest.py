"""Small recipes and image folders."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovit_engine import Recipe

MODEL = """
  model: vit_tiny_patch16_224
  model_args: {img_size: 8, patch_size: 2, in_chans: 1, embed_dim: 16, depth: 1, num_heads: 2, drop_rate: 0.1}
"""


def tiny_recipe(modifiers: str = "[]", *, epochs: int = 2, extra: str = "batch_size: 256, lr: 1.0e-3") -> Recipe:
    """A one-block ViT of digits; `extra` are more options of the training section, in flow style."""
    more = "".join(f"  {part.strip()}\n" for part in extra.split(", "))
    return Recipe.parse(f"name: tiny\ntraining:{MODEL}  epochs: {epochs}\n{more}modifiers: {modifiers}\n")


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of 12x10 images, `count` a class, each of one grey of its own."""

    def make(
        classes: tuple[str, ...] = ("cat", "dog"), count: int = 4, parts: tuple[str, ...] = ("train", "val")
    ) -> Path:
        root = tmp_path / "photos"
        for part in parts:
            for number, name in enumerate(("cat", "dog")):
                folder = root / part / name
                folder.mkdir(parents=True)
                for index in range(count):
                    grey = 20 * (number * count + index) % 256
                    Image.fromarray(np.full((10, 12, 3), grey, np.uint8)).save(folder / f"{index}.png")
        return root

    return make
