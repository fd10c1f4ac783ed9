"""One thread, since the tensors here are tiny and the cores are shared; no deadlines, for the same reason."""

import contextlib
import functools
import gc
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image

torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, max_examples=50)
settings.load_profile("suite")


def pytest_collection_finish() -> None:
    """What was imported by now stays: no search for garbage, or for who holds a model, goes through it any more."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def operators_are_read_once() -> None:
    """Each export reads the source code of onnxscript's 500 operators again, which takes 0.4 s; one time is enough."""
    with contextlib.suppress(ImportError, AttributeError):  # torch's own matter, which may change
        apis = importlib.import_module("torch.onnx._internal._lazy_import").onnxscript_apis
        name = apis._name  # of the module that is loaded by the first export
        vars(apis)["get_torchlib_ops"] = functools.cache(lambda: importlib.import_module(name).get_torchlib_ops())


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


@pytest.fixture(autouse=True)
def commands_do_not_rehearse(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rehearsal takes seconds: of `ovit train` and `validate` only a test that is marked `rehearsed` makes one."""
    if request.node.get_closest_marker("rehearsed") is None:
        if (trainer := sys.modules.get("ovit_engine.training.trainer")) is not None:
            monkeypatch.setattr(trainer.Trainer, "_examples", lambda self: None)
        if (api := sys.modules.get("ovit_engine.training.api")) is not None:
            monkeypatch.setattr(api, "rehearse", lambda engine: None)
