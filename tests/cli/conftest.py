"""Runs the command line inside the test, as a user would call it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ovit_engine.cli import main

RECIPE = r"""
name: tiny
vars: {sparsity: 0.5}
training:
  model: vit_tiny_patch16_224
  model_args: {img_size: 8, patch_size: 2, in_chans: 1, num_classes: 10, embed_dim: 16, depth: 1, num_heads: 2}
  epochs: 2
  batch_size: 256
modifiers:
  - magnitude_prune: {sparsity: "${sparsity}", targets: ["re:blocks.*(qkv|proj|fc1|fc2)\\.weight"]}
  - quantize: {start: 1ep}
"""

Ovit = Callable[..., Result]


@pytest.fixture
def ovit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ovit:
    """`ovit("show", "tiny.yaml")` in an empty folder that holds tiny.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    Path("tiny.yaml").write_text(RECIPE)
    return lambda *arguments: CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of tiny.yaml on the digits; read it only."""
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "tiny.yaml"
    recipe.write_text(RECIPE)
    arguments = ["train", "--recipe", recipe, "--data", "digits", "--output", folder / "run", "--device", "cpu"]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return folder / "run"
