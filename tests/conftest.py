"""One thread, since the tensors here are tiny and the cores are shared; no deadlines, for the same reason."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, max_examples=50)
settings.load_profile("suite")


@pytest.fixture
def jpeg_folder(tmp_path: Path) -> Path:
    """JPEG files, 10 a class to train and 4 to validate: colour gradients that run along the class's own axis."""
    generator = np.random.default_rng(0)
    root = tmp_path / "jpegs"
    for part, count in (("train", 10), ("val", 4)):
        for axis, name in enumerate(("down", "across")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                ramp = np.linspace(0, 255, 40 if axis else 32).reshape((1, -1, 1) if axis else (-1, 1, 1))
                pixels = ramp * generator.uniform(0.3, 1, 3) + generator.uniform(0, 30, (32, 40, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.jpg", quality=90)
    return root
