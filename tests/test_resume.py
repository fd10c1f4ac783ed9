"""A run that is broken off and taken up again equals the unbroken one bit for bit."""

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ovit_engine import Calibration, Engine
from tests.loops import PRUNE, X, Y, mlp, recipe, zeros

LR = "cyclic_lr: {max: 0.1, min: 0.001, period: 10st}"
OVIT = (
    "ovit_prune: {start: 8st, end: 24st, every: 8st, sparsity: {from: 0.2, to: 0.5}, targets: ['re:.*weight'], "
    "block: 16, gradients: 6, images_per_gradient: 4, damp: 1.0e-4}"
)
DATA = torch.utils.data.TensorDataset(X, Y)


class Training:
    """All that a script makes anew when it starts again."""

    def __init__(self, *modifiers: str) -> None:
        self.model = mlp()
        groups = [{"params": self.model[0].parameters()}, {"params": self.model[2].parameters(), "lr": 0.02}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.2)
        self.engine = Engine(self.model, recipe(*modifiers), steps_per_epoch=10, epochs=4)

    def attach(self) -> "Training":
        self.engine.attach(self.optimizer, calibration=Calibration(DATA, nn.functional.mse_loss))
        return self

    def train(self, first: int, last: int) -> "Training":
        for step in range(first, last):
            batch = torch.arange(16) + step % 4 * 16
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.model(X[batch]), Y[batch]).backward()
            self.optimizer.step()
        return self

    def save(self) -> bytes:
        file = io.BytesIO()
        parts = (self.model, self.optimizer, self.engine)
        torch.save([part.state_dict() for part in parts], file)
        return file.getvalue()

    def load(self, saved: bytes) -> "Training":
        for part, state in zip((self.model, self.optimizer, self.engine), read(saved), strict=True):
            part.load_state_dict(state)  # type: ignore[attr-defined]
        return self

    def result(self) -> list[Any]:
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return [*self.model.state_dict().values(), *moments, rates, self.engine.run.history, self.engine.run.step]


def read(saved: bytes) -> list[Any]:
    found: list[Any] = torch.load(io.BytesIO(saved), weights_only=True)
    return found


def equal(one: list[Any], two: list[Any]) -> bool:
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("cut", [0, 1, 9, 10, 17, 30, 39, 40])
def test_magnitude_and_cyclic_lr(cut: int) -> None:
    unbroken = Training(PRUNE, LR).attach().train(0, 40)
    saved = Training(PRUNE, LR).attach().train(0, cut).save()
    resumed = Training(PRUNE, LR).load(saved).attach().train(cut, 40)
    assert equal(resumed.result(), unbroken.result())
    for training in (resumed, unbroken):
        training.engine.detach()
        assert zeros(training.model[0]) == 64
    assert equal(resumed.result(), unbroken.result())


@pytest.mark.parametrize("cut", [7, 8, 20])
def test_ovit_with_calibration(cut: int) -> None:
    unbroken = Training(OVIT).attach().train(0, 40)
    saved = Training(OVIT).attach().train(0, cut).save()
    resumed = Training(OVIT).load(saved).attach().train(cut, 40)
    assert equal(resumed.result(), unbroken.result())
    resumed.engine.detach()
    assert resumed.engine.run.masks.sparsity() == 0.5


def test_what_is_due_at_step_0_happens_once() -> None:
    prune = "magnitude_prune: {sparsity: 0.5, targets: [0.weight]}"
    saved = Training(prune).attach().save()
    resumed = Training(prune).load(saved).attach()
    assert equal(resumed.train(0, 40).result()[:4], Training(prune).attach().train(0, 40).result()[:4])
    moved = Training(prune).attach().train(0, 5).save()
    assert [name for _, name, _ in Training(prune).load(moved).attach().engine.run.history] == [
        "magnitude_prune/sparsity"
    ]


def test_the_ratio_of_groups_is_that_of_the_first_start() -> None:
    saved = Training(LR).attach().train(0, 5).save()
    resumed = Training(LR).load(saved)
    for group in resumed.optimizer.param_groups:
        group["lr"] = 1.0
    resumed.attach().train(5, 6)
    rates = [group["lr"] for group in resumed.optimizer.param_groups]
    assert rates == pytest.approx([0.1 - 0.099 * 0.5, (0.1 - 0.099 * 0.5) / 10])


def test_masks_of_the_checkpoint_hold_even_where_the_weights_do_not_come_with_it() -> None:
    saved = Training(PRUNE).attach().train(0, 40).save()
    resumed = Training(PRUNE)
    resumed.engine.load_state_dict(read(saved)[2])
    resumed.model.load_state_dict(mlp(1).state_dict())
    resumed.attach()
    assert zeros(resumed.model[0]) == 64


def test_a_finished_run_is_loaded_as_finished() -> None:
    training = Training(PRUNE).attach().train(0, 40)
    training.engine.detach()
    again = Training(PRUNE).load(training.save())
    assert again.engine.finished
    assert zeros(again.model[0]) == 64
    with pytest.raises(RuntimeError, match="make a new Engine"):
        again.attach()


def test_the_state_is_small() -> None:
    state = Training(PRUNE).attach().train(0, 40).engine.state_dict()
    assert state["masks"]["0.weight"]["bits"].shape == (16,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"step": None}, "the engine state is incomplete: it lacks step"),
        ({"step": None, "masks": None}, "it lacks masks, step"),
        ({"version": 99}, "its version is 99, here 1"),
        ({"steps_per_epoch": 11}, "its steps_per_epoch is 11, here 10"),
        ({"total_steps": 400}, "its total_steps is 400, here 40"),
        ({"recipe_hash": "abc"}, "of another recipe: its text was changed"),
    ],
)
def test_half_a_state_or_one_of_another_training_is_refused(change: dict[str, Any], words: str) -> None:
    state = Training(PRUNE).attach().train(0, 20).engine.state_dict()
    state = {key: change.get(key, value) for key, value in state.items() if change.get(key, value) is not None}
    training = Training(PRUNE)
    before = training.save()
    with pytest.raises(ValueError, match=words):
        training.engine.load_state_dict(state)
    assert equal(list(read(before)[0].values()), list(read(training.save())[0].values()))
    assert training.engine.run.step == 0


def test_another_recipe_is_refused() -> None:
    state = Training(PRUNE).attach().engine.state_dict()
    other = Training(PRUNE.replace("to: 0.5", "to: 0.6"))
    with pytest.raises(ValueError, match=r"of another recipe: it has 'to: 0\.5' where this one has 'to: 0\.6'"):
        other.engine.load_state_dict(state)


def test_another_model_is_refused() -> None:
    state = Training(PRUNE).attach().train(0, 20).engine.state_dict()
    model = nn.Sequential(nn.Linear(8, 17))
    with pytest.raises(ValueError, match=r"mask of '0.weight' must be boolean of shape \(17, 8\)"):
        Engine(model, recipe(PRUNE), steps_per_epoch=10, epochs=4).load_state_dict(state)


def test_a_state_comes_before_attach() -> None:
    training = Training(PRUNE).attach()
    with pytest.raises(RuntimeError, match=r"load the engine's state before engine.attach\(optimizer\)"):
        training.engine.load_state_dict(training.engine.state_dict())
