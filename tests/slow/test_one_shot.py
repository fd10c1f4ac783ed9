"""One-shot pruning without training, on a real if small vision transformer."""

import copy
import statistics

import pytest
import torch
from torch.nn.functional import cross_entropy

from ovit_engine import Calibration, Engine, Recipe
from tests.slow.digits import PRUNED, accuracy, images, trained_vit

METHODS = {
    "ovit": "ovit_prune: {block: 64, gradients: 512, images_per_gradient: 16, damp: 1.0e-7, ",
    "magnitude": "magnitude_prune: {",
}


def pruned_accuracy(model: torch.nn.Module, method: str) -> float:
    model = copy.deepcopy(model)
    recipe = Recipe.parse(f"modifiers:\n  - {METHODS[method]}sparsity: 0.75, targets: ['{PRUNED}']}}")
    engine = Engine(model, recipe, steps_per_epoch=1, epochs=1)
    engine.attach(torch.optim.SGD(model.parameters(), 0.0), calibration=Calibration(images()[0], cross_entropy))
    assert engine.run.masks.sparsity() == 0.75
    return accuracy(model)


@pytest.mark.slow
def test_ovit_beats_global_magnitude_by_ten_points_at_75_percent() -> None:
    dense, ovit, magnitude = [], [], []
    for seed in (0, 1, 2):
        model = trained_vit(seed)
        dense.append(accuracy(model))
        ovit.append(pruned_accuracy(model, "ovit"))
        magnitude.append(pruned_accuracy(model, "magnitude"))
    print(f"dense {dense}\novit {ovit}\nmagnitude {magnitude}")
    assert statistics.mean(dense) >= 0.96
    assert statistics.mean(ovit) >= statistics.mean(magnitude) + 0.10
