"""One-shot pruning without training, on a real if small vision transformer: the paper's Figure 3 in small."""

import copy
import statistics

import pytest
import torch
from torch.nn.functional import cross_entropy

from ovit_engine import Calibration, Engine, Recipe
from tests.slow.digits import PRUNED, accuracy, images, trained_vit

GRADIENTS = "gradients: 512, images_per_gradient: 16, "
METHODS = {
    "ovit": f"ovit_prune: {{block: 64, damp: 1.0e-7, {GRADIENTS}",
    "obert, independent": f"obert_prune: {{block: 64, update: independent, damp: 1.0e-6, {GRADIENTS}",
    "obert, joint": f"obert_prune: {{block: 64, damp: 1.0e-6, {GRADIENTS}",
    "mfac": f"mfac_prune: {{block: 256, damp: 1.0e-6, {GRADIENTS}",
    "obd": f"obd_prune: {{damp: 1.0e-6, {GRADIENTS}",
    "grad_weight": f"grad_weight_prune: {{{GRADIENTS}",
    "magnitude": "magnitude_prune: {",
}


def pruned_accuracy(model: torch.nn.Module, method: str, sparsity: float) -> float:
    model = copy.deepcopy(model)
    recipe = Recipe.parse(f"modifiers:\n  - {METHODS[method]}sparsity: {sparsity}, targets: ['{PRUNED}']}}")
    engine = Engine(model, recipe, steps_per_epoch=1, epochs=1)
    engine.attach(torch.optim.SGD(model.parameters(), 0.0), calibration=Calibration(images()[0], cross_entropy))
    assert engine.run.masks.sparsity() == pytest.approx(sparsity, abs=1e-5)
    return accuracy(model)


@pytest.mark.slow
def test_ovit_is_ahead_of_every_other_pruner() -> None:
    found: dict[str, list[float]] = {"dense": []}
    for seed in (0, 1, 2):
        model = trained_vit(seed)
        found["dense"].append(accuracy(model))
        for method in METHODS:
            for sparsity in (0.75, 0.9):
                result = pruned_accuracy(model, method, sparsity)
                found.setdefault(f"{method} {sparsity}", []).append(result)
    mean = {name: statistics.mean(values) for name, values in found.items()}
    print(*(f"{name:24} {value:.1%}" for name, value in mean.items()), sep="\n")
    assert mean["dense"] >= 0.96
    assert mean["ovit 0.75"] >= mean["obert, independent 0.75"] + 0.05
    assert mean["obert, independent 0.75"] + 0.05 >= mean["magnitude 0.75"] + 0.10
    for method in list(METHODS)[1:]:
        assert mean["ovit 0.9"] >= mean[f"{method} 0.9"] + 0.15, method
