"""The pruners that take gradients beside oViT: each is its method of `prune_tensors` on calibrated gradients."""

from typing import Any

import pytest
import torch
from torch import nn

from ovit_engine import Calibration, Engine, RecipeError
from ovit_engine.second_order import estimate_memory, memory, prune_tensors
from ovit_engine.targets import find_slots
from tests.loops import X, Y, mlp, plain, recipe, zeros

DATA = torch.utils.data.TensorDataset(X, Y)
mse = nn.functional.mse_loss
OPTIONS = {  # in the recipe, and the same for prune_tensors
    "obert_prune": ("block: 16, damp: 1.0e-4", {"method": "obert", "block": 16, "damp": 1e-4}),
    "obert_prune ": (
        "block: 16, damp: 1.0e-4, update: independent",
        {"method": "obert", "block": 16, "damp": 1e-4, "update": "independent"},
    ),
    "mfac_prune": ("block: 64, damp: 1.0e-4", {"method": "mfac", "block": 64, "damp": 1e-4}),
    "obd_prune": ("damp: 1.0e-4", {"method": "obd", "damp": 1e-4}),
    "grad_weight_prune": ("scope: layer", {"method": "grad_weight", "scope": "layer"}),
    "ovit_prune": ("block: 16, damp: 1.0e-4, scope: erk", {"block": 16, "damp": 1e-4, "scope": "erk"}),
}
DEFAULTS = {
    "ovit_prune": {"block": 192, "damp": 1e-8},
    "obert_prune": {"block": 192, "damp": 1e-6, "update": "joint"},
    "mfac_prune": {"block": 2048, "damp": 1e-6, "update": "joint"},
    "obd_prune": {"damp": 1e-6},
    "grad_weight_prune": {},
}


def started(name: str, options: str, calibrated: bool = True) -> tuple[Any, Any, Engine]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    text = f"{name}: {{gradients: 8, images_per_gradient: 4, targets: [0.weight, 2.weight], {options}}}"
    engine = Engine(model, recipe(text), steps_per_epoch=10, epochs=1)
    engine.attach(optimizer, calibration=Calibration(DATA, mse) if calibrated else None)
    return model, optimizer, engine


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.6), ("2:4", None), ({"block": [1, 4]}, 0.5)])
def test_a_step_is_prune_tensors_on_calibrated_gradients(name: str, pattern: Any, sparsity: float | None) -> None:
    spelled, options = OPTIONS[name]
    dense = mlp()
    slots = find_slots(dense, ["0.weight", "2.weight"])
    calibrated = Calibration(DATA, mse).gradients(dense, slots, count=8, images_per_gradient=4, chunk=8, draw=0)
    gradients = [chunk.clone() for chunk in next(iter(calibrated))]
    weights = [slot.gather() for slot in slots]
    masks, expected = prune_tensors(weights, gradients, pattern=pattern, sparsity=sparsity, **options)  # type: ignore[arg-type]
    text = f"'{pattern}'" if isinstance(pattern, str) else "{block: [1, 4]}"
    amount = "" if sparsity is None else f", sparsity: {sparsity}"
    model, _, engine = started(name.strip(), f"pattern: {text}{amount}, {spelled}")
    for index, slot in enumerate(slots):
        found = engine.run.masks.get(slot.name)
        assert found is not None
        assert found.equal(masks[index])
        torch.testing.assert_close(model[2 * index].weight.detach(), expected[index])


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_papers(name: str) -> None:
    (modifier,) = recipe(f"{name}: {{sparsity: 0.5, targets: [a]}}").modifiers
    for option, value in {"gradients": 4096, "images_per_gradient": 16, **DEFAULTS[name]}.items():
        assert getattr(modifier, option) == value


@pytest.mark.parametrize("name", ["obert_prune", "mfac_prune", "obd_prune", "grad_weight_prune"])
def test_gradual_counts_are_exact_and_zeros_hold(name: str) -> None:
    model, optimizer, engine = started(name, "sparsity: {2st: 0.25, 4st: 0.5, 6st: 0.5, 8st: 0.75}, recomputations: 2")
    before = torch.zeros(128, dtype=torch.bool)
    with engine:
        for step in range(1, 11):
            plain(model, optimizer)
            share = 0 if step < 2 else 0.25 if step < 4 else 0.5 if step < 8 else 0.75
            assert zeros(model[0]) + zeros(model[2]) == round(share * 144)
            now = (model[0].weight == 0).flatten()
            assert bool((now | ~before).all())
            before = now


@pytest.mark.parametrize("name", ["obert_prune", "mfac_prune", "obd_prune", "grad_weight_prune"])
def test_without_calibration_the_gradients_of_training_serve(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name}: pruning at step 0 needs gradients"):
        started(name, "sparsity: 0.5", calibrated=False)
    with pytest.warns(UserWarning, match=f"{name}: no calibration was given, so the gradients of the last 8 training"):
        model, optimizer, _ = started(name, "sparsity: 0.5, start: 3st", calibrated=False)
    for _ in range(3):
        plain(model, optimizer)
    assert zeros(model[0]) + zeros(model[2]) == 72


def test_too_little_memory_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 100)
    with pytest.raises(MemoryError, match="use fewer gradients or fewer targets"):
        started("mfac_prune", "sparsity: 0.5, start: 5st")
    with pytest.raises(MemoryError, match="use a smaller block or fewer targets"):
        started("obert_prune", "sparsity: 0.5, start: 5st")


def test_memory_is_that_of_the_gradients_which_come() -> None:
    _, _, engine = started("mfac_prune", "sparsity: 0.5, start: 5st, block: 4")
    expected = estimate_memory([(16, 8), (1, 16)], method="mfac", block=4, gradients=8) / 2**30
    assert engine.run.history == [(0, "mfac_prune/memory_gib", expected)]
    with pytest.warns(UserWarning, match="the last 4 training steps"):
        _, _, engine = started("mfac_prune", "sparsity: 0.5, start: 5st, block: 4", calibrated=False)
    expected = (estimate_memory([(16, 8), (1, 16)], method="mfac", block=4, gradients=4) + 4 * 144 * 4) / 2**30
    assert engine.run.history == [(0, "mfac_prune/memory_gib", expected)]
