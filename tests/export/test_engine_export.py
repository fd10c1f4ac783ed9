"""`Engine.export` on models that it refuses, and on those that need no training."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from ovit_engine import Engine, Recipe
from ovit_engine.certificate import ExportError

RECIPE = "modifiers: [{magnitude_prune: {sparsity: 0.75, targets: ['0.weight']}}, {quantize: {targets: ['0']}}]"


class LoopsOverTheBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.stack([self.layer(row) for row in x])


def exported(model: nn.Module, path, **options: Any) -> None:
    engine = Engine(model, Recipe.parse("modifiers: []"), steps_per_epoch=1, epochs=1)
    engine.attach(torch.optim.SGD(model.parameters(), 0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no step was made
        engine.detach()
    engine.export(path, torch.randn(2, 4), **options)


def test_a_batch_that_the_models_code_fixes_is_refused(tmp_path):
    with pytest.raises(ExportError, match="fixes the batch of 'input' to 2"):
        exported(LoopsOverTheBatch(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_half_precision_model_is_told_what_to_do(tmp_path):
    with pytest.raises(ExportError, match=r"torch.bfloat16 weights: give a float32 copy, model.float\(\)"):
        exported(nn.Linear(4, 3).bfloat16(), tmp_path / "model.onnx", data=[torch.randn(64, 4).bfloat16()])


def test_a_folder_as_the_output_is_told_so(tmp_path):
    with pytest.raises(ValueError, match="is a folder: name the file"):
        exported(nn.Linear(4, 3), tmp_path)


def test_an_empty_recipe_exports_the_dense_file_without_training(tmp_path):
    engine = Engine(nn.Linear(4, 3), Recipe.parse("modifiers: []"), steps_per_epoch=1, epochs=1)
    certificate = engine.export(tmp_path / "dense.onnx", torch.randn(1, 4))
    assert (certificate.file, certificate.integer_kernels, certificate.int8_share) == ("dense.onnx", 0, 0.0)


def test_a_recipe_without_an_optimizer_is_told_to_train(tmp_path):
    engine = Engine(nn.Sequential(nn.Linear(4, 3)), Recipe.parse(RECIPE), steps_per_epoch=1, epochs=1)
    with pytest.raises(RuntimeError, match="step 0 of 1: attach an optimizer and train first"):
        engine.export(tmp_path / "model.onnx", torch.randn(1, 4))
