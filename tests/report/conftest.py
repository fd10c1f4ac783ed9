"""A real run, small and whole: trained with a sweep, exported, benched. Read it only, or copy it."""

import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.utils.data import DataLoader

from ovit_engine import Recipe, load_point
from ovit_engine.cli import main
from ovit_engine.export.deploy import promise_of
from ovit_engine.export.exporter import export_model
from ovit_engine.quant import bake
from ovit_engine.training.data import load_data
from ovit_engine.training.models import make_model

RECIPE = r"""
name: tiny_<b>bold
description: "half of the zeros & <script>alert('no')</script>"
training:
  model: vit_tiny_patch16_224
  model_args: {img_size: 8, patch_size: 2, in_chans: 1, num_classes: 10, embed_dim: 16, depth: 1, num_heads: 2}
  epochs: 4
  batch_size: 256
modifiers:
  - magnitude_prune: {start: 1ep, end: 2ep, every: 1ep, sparsity: {from: 0.5, to: 0.75},
                      targets: ["re:blocks.*(qkv|proj|fc1|fc2)\\.weight"], sweep: {sparsity: [0.75]}}
  - cyclic_lr: {period: 1ep, max: 1.0e-3, min: 1.0e-5}
  - quantize: {start: 3ep}
"""


def ovit(*arguments: object) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def export_point(point: Path) -> None:
    """The float model of a sweep's point, beside it."""
    model = make_model(Recipe.parse(RECIPE).training)
    engine = load_point(model, point)
    floating = bake(model.eval())
    data = load_data("digits")
    export_model(
        floating,
        point.with_suffix(".onnx"),
        torch.zeros(1, 1, 8, 8),
        promise=promise_of(floating, engine.run.masks),
        preprocessing=data.preprocessing,
        data=DataLoader(data.val, batch_size=64),
    )


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    (folder / "tiny.yaml").write_text(RECIPE)
    run = folder / "run"
    ovit("train", "--recipe", folder / "tiny.yaml", "--data", "digits", "--output", run, "--device", "cpu")
    ovit("export", run, "--output", run / "model.onnx")
    export_point(run / "sweep" / "0.75.pt")
    files = [run / "sweep" / "0.75.onnx", run / "model.onnx"]
    ovit("bench", *files, "--batch", "1", "--repeats", "5", "--threads", "1", "--output", run / "bench.json")
    return run


@pytest.fixture
def run_copy(whole_run: Path, tmp_path: Path) -> Path:
    """The same in a folder of one's own, to damage."""
    shutil.copytree(whole_run, tmp_path / "run")
    return tmp_path / "run"
