"""oViT through a recipe: where its gradients come from, and what it does with them."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from ovit_engine import Calibration, Engine, Recipe, RecipeError
from ovit_engine.masking.targets import find_slots
from ovit_engine.pruning import prune_tensors
from tests.loops import X, Y, loss_of, mlp, plain, recipe, zeros

DATA = torch.utils.data.TensorDataset(X, Y)
OPTIONS = "targets: [0.weight], block: 16, gradients: 8, images_per_gradient: 4, damp: 1.0e-4"
mse = nn.functional.mse_loss


def started(options: str, calibrated: bool = True, steps: int = 10) -> tuple[Any, Any, Engine]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    engine = Engine(model, recipe(f"ovit_prune: {{{options}, {OPTIONS}}}"), steps_per_epoch=steps, epochs=1)
    engine.attach(optimizer, calibration=Calibration(DATA, mse) if calibrated else None)
    return model, optimizer, engine


def test_a_step_is_prune_tensors_on_calibrated_gradients() -> None:
    dense = mlp()
    slots = find_slots(dense, ["0.weight"])
    calibrated = Calibration(DATA, mse).gradients(dense, slots, count=8, images_per_gradient=4, chunk=8, draw=0)
    gradients = [chunk.clone() for chunk in next(iter(calibrated))]
    masks, weights = prune_tensors([slots[0].gather()], gradients, sparsity=0.5, block=16, damp=1e-4)
    model, _, engine = started("sparsity: 0.5")
    found = engine.run.masks.get("0.weight")
    assert found is not None
    assert torch.equal(found, masks[0])
    torch.testing.assert_close(model[0].weight.detach(), weights[0])
    assert not torch.equal(model[0].weight[masks[0]], dense[0].weight[masks[0]])  # the survivors moved


def test_each_pruning_step_sees_other_batches() -> None:
    draws = []

    class Noting(Calibration):
        def gradients(self, *args: Any, **options: Any) -> Any:
            draws.append(options["draw"])
            return super().gradients(*args, **options)

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    text = f"ovit_prune: {{sparsity: {{0st: 0.2, 2st: 0.4}}, recomputations: 2, {OPTIONS}}}"
    engine = Engine(model, recipe(text), steps_per_epoch=4, epochs=1)
    with engine.attach(optimizer, calibration=Noting(DATA, mse)):
        for _ in range(4):
            plain(model, optimizer)
    assert len(draws) == len(set(draws)) == 4
    assert zeros(model[0]) == round(0.4 * 128)


def test_recomputations_end_at_the_same_count_with_other_masks() -> None:
    once, _, _ = started("sparsity: 0.6")
    thrice, _, _ = started("sparsity: 0.6, recomputations: 3")
    assert zeros(once[0]) == zeros(thrice[0]) == round(0.6 * 128)
    assert not torch.equal(once[0].weight, thrice[0].weight)


def test_n_to_m() -> None:
    model, _, _ = started("pattern: '2:4'")
    assert bool(((model[0].weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all())


def test_zeros_hold_and_the_count_grows() -> None:
    model, optimizer, engine = started("sparsity: {from: 0.25, to: 0.5}, start: 2st, end: 6st, every: 2st")
    with engine:
        for count in range(1, 11):
            plain(model, optimizer)
            assert zeros(model[0]) == (0 if count < 2 else 32 if count < 4 else 48 if count < 6 else 64)


def test_without_calibration_it_takes_the_gradients_of_training_and_says_so() -> None:
    with pytest.warns(UserWarning, match="no calibration was given, so the gradients of at most 8 training steps"):
        model, optimizer, engine = started("sparsity: 0.5, start: 9st", calibrated=False)
    weight_before, gradients = torch.empty(0), []
    for count in range(1, 10):
        optimizer.zero_grad()
        loss_of(model).backward()
        gradients.append(model[0].weight.grad.clone())
        if count == 9:  # the same step without the engine, to know the weight that is pruned
            buffer = optimizer.state[model[0].weight]["momentum_buffer"]
            weight_before = (model[0].weight - 0.1 * (0.9 * buffer + gradients[-1])).detach()
        optimizer.step()
    masks, weights = prune_tensors(
        [weight_before], [torch.stack(gradients[1:])], sparsity=0.5, block=16, damp=1e-4, dtype=torch.float32
    )
    found = engine.run.masks.get("0.weight")
    assert found is not None
    assert torch.equal(found, masks[0])
    torch.testing.assert_close(model[0].weight.detach(), weights[0], atol=1e-5, rtol=1e-4)


def test_gradients_of_training_serve_one_pruning_step() -> None:
    with pytest.warns(UserWarning, match="no calibration was given"):
        model, optimizer, engine = started("sparsity: {4st: 0.2, 7st: 0.4}", calibrated=False)
    modifier: Any = engine.modifiers[0]
    held = []
    for _ in range(10):
        plain(model, optimizer)
        held.append(len(modifier._recent))
    assert held == [1, 2, 3, 0, 1, 2, 0, 0, 0, 0]
    assert zeros(model[0]) == round(0.4 * 128)


def test_a_frozen_model_gives_no_gradients_of_training() -> None:
    with pytest.warns(UserWarning, match="no calibration was given"):
        model, optimizer, _ = started("sparsity: 0.5, start: 5st", calibrated=False)
    model[0].weight.requires_grad_(False)
    with pytest.raises(RecipeError, match=r"ovit_prune.targets: '0\.weight' gets no gradient from the training loss"):
        plain(model, optimizer)


def test_pruning_at_step_0_needs_calibration() -> None:
    with pytest.raises(RecipeError, match=r"r.yaml:2:\d+: ovit_prune: pruning at step 0 needs gradients: attach"):
        started("sparsity: 0.5", calibrated=False)


def test_with_calibration_nothing_is_warned_of_and_no_gradient_is_kept() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, engine = started("sparsity: 0.5, start: 5st")
        for _ in range(4):
            plain(model, optimizer)
    modifier: Any = engine.modifiers[0]
    assert not modifier._recent


def test_nan_in_calibration_leaves_the_weights_as_they_were() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = Engine(model, recipe(f"ovit_prune: {{sparsity: 0.5, {OPTIONS}}}"), steps_per_epoch=4, epochs=1)
    broken = torch.utils.data.TensorDataset(X * float("nan"), Y)
    with pytest.raises(ValueError, match=r"calibration batch 0 \(from 0\): the loss is nan"):
        engine.attach(optimizer, calibration=Calibration(broken, mse))
    assert torch.equal(model[0].weight, mlp()[0].weight)
    assert engine.run.masks.names() == []


def test_a_run_resumed_inside_the_window_says_how_few_gradients_it_saw() -> None:
    text = (
        "modifiers: [{ovit_prune: {start: 8st, sparsity: 0.5, targets: ['weight'], block: 4, gradients: 4, "
        "damp: 1.0e-4}}]"
    )
    model = nn.Linear(4, 4)
    engine = Engine(model, Recipe.parse(text), steps_per_epoch=10, epochs=1)
    state = {**engine.state_dict(), "step": 6}
    engine.load_state_dict(state)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="no calibration was given"):
        engine.attach(optimizer)
    model(torch.randn(3, 4)).square().sum().backward()
    optimizer.step()
    with pytest.warns(UserWarning, match="only 2 training gradients were seen before this step"):
        optimizer.step()
    assert int((model.weight == 0).sum()) == 8
