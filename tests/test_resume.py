"""A run that is broken off and taken up again equals the unbroken one bit for bit."""

import copy
import io
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from ovit_engine import Calibration, Engine, RecipeError
from ovit_engine.training.verify_resume import state_differences
from tests.loops import PRUNE, X, Y, mlp, recipe, zeros

LR = "cyclic_lr: {max: 0.1, min: 0.001, period: 10st}"
OVIT = (
    "ovit_prune: {start: 8st, end: 24st, every: 8st, sparsity: {from: 0.2, to: 0.5}, targets: ['re:.*weight'], "
    "block: 16, gradients: 6, images_per_gradient: 4, damp: 1.0e-4}"
)
MOVEMENT = PRUNE.replace("magnitude_prune", "movement_prune").replace("[0.weight]", "['re:.*weight']")
DATA = torch.utils.data.TensorDataset(X, Y)


class Training:
    """All that a script makes anew when it starts again."""

    def __init__(self, *modifiers: str) -> None:
        self.model = mlp()
        groups = [{"params": self.model[0].parameters()}, {"params": self.model[2].parameters(), "lr": 0.02}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.2)
        self.engine = Engine(self.model, recipe(*modifiers), steps_per_epoch=10, epochs=4)

    def attach(self, *, calibrated: bool = True) -> "Training":
        calibration = Calibration(DATA, nn.functional.mse_loss) if calibrated else None
        self.engine.attach(self.optimizer, calibration=calibration)
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
        model, optimizer, engine = read(saved)
        self.engine.load_state_dict(engine)  # first: it makes the quantizers that the model's state is of
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        return self


def read(saved: bytes) -> list[Any]:
    found: list[Any] = torch.load(io.BytesIO(saved), weights_only=True)
    return found


def same(one: Training, two: bytes) -> bool:
    """To the last bit, in all that is saved of them."""
    return not list(state_differences(read(one.save()), read(two)))


RECIPES = {
    "magnitude": [PRUNE, LR],
    "ovit, cyclic LR, int8": [OVIT, LR, "quantize: {start_observers: 26st, start: 28st, freeze_observers: 34st}"],
    "movement": [MOVEMENT, LR],
    "ac/dc": ["acdc: {start: 6st, every: 7st, last_sparse: 9st, sparsity: 0.5, targets: ['re:.*weight']}"],
    "in parts": [OVIT.replace("gradients: 6", "gradients: 6, recomputations: 2")],
    "int8 from the start": ["quantize: {start: 0ep}", LR],
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_goes_on_from_any_step(name: str) -> None:
    unbroken, saved = Training(*RECIPES[name]).attach(), []
    for step in range(40):
        saved.append(unbroken.save())
        unbroken.train(step, step + 1)
    saved.append(unbroken.save())
    unbroken.engine.detach()
    for cut, state in enumerate(saved):
        until = min(cut + 3, 40)
        resumed = Training(*RECIPES[name]).load(state).attach().train(cut, until)
        assert same(resumed, saved[until]), cut
    resumed.engine.detach()
    assert same(resumed, unbroken.save())


@pytest.mark.filterwarnings("ignore:.*no calibration was given:UserWarning")
def test_the_gradients_of_training_are_kept_where_there_is_no_calibration() -> None:
    window = OVIT.replace("block: 16", "block: 4")
    unbroken, saved = Training(window).attach(calibrated=False), []
    for step in range(40):
        saved.append(unbroken.save())
        unbroken.train(step, step + 1)
    result = unbroken.save()
    assert [len(read(state)[2]["modifiers"][0]["recent"]) for state in saved[:10]] == [0, 0, 0, 0, 0, 1, 2, 3, 0, 0]
    for cut in (4, 5, 7, 8, 22):
        assert same(Training(window).load(saved[cut]).attach(calibrated=False).train(cut, 40), result), cut


class ConvNet(Training):
    """With batch normalization, whose statistics a recipe may freeze."""

    def __init__(self, *modifiers: str) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 1), nn.BatchNorm1d(1))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.engine = Engine(self.model, recipe(*modifiers), steps_per_epoch=10, epochs=4)


@pytest.mark.parametrize("freeze", [0, 5])
def test_batch_norm_statistics_stay_frozen(freeze: int) -> None:
    modifier = f"quantize: {{start: 2st, freeze_batch_norm: {freeze}st}}"
    unbroken, saved = ConvNet(modifier).attach(), []
    for step in range(8):
        saved.append(unbroken.save())
        unbroken.model.train()
        unbroken.train(step, step + 1)
    for cut, state in enumerate(saved):
        resumed = ConvNet(modifier).load(state).attach()
        resumed.model.train()
        assert same(resumed.train(cut, 8), unbroken.save()), cut


def test_zeros_that_are_held_are_recorded_once() -> None:
    held = "constant_mask: {targets: [0.weight]}"

    def sparse() -> Training:
        training = Training(held)
        training.model[0].weight.data[::2] = 0.0
        return training

    saved = sparse().attach().save()
    assert same(Training(held).load(saved).attach().train(0, 5), sparse().attach().train(0, 5).save())


def test_a_state_without_the_ranges_of_its_model_is_refused() -> None:
    state = read(Training("quantize: {start: 5st}").attach().train(0, 9).save())
    resumed = Training("quantize: {start: 5st}")
    resumed.engine.load_state_dict(state[2])
    with pytest.raises(RuntimeError, match=r"at step 9 layers are rounded already, .*: call model.load_state_dict"):
        resumed.attach()
    resumed = Training("quantize: {start: 5st}")
    resumed.engine.load_state_dict(state[2])
    resumed.model.load_state_dict(state[0])
    resumed.attach()


def test_an_averaged_copy_goes_on_too() -> None:
    def averaged(training: Training) -> ModelEmaV3:
        training.engine.prepare()
        return ModelEmaV3(training.model, decay=0.8)

    def follow(training: Training, ema: ModelEmaV3, first: int, last: int, states: list[Any]) -> None:
        for step in range(first, last):
            states.append((training.save(), copy.deepcopy(ema.state_dict())))
            training.train(step, step + 1)
            ema.update(training.model)

    modifiers = RECIPES["ovit, cyclic LR, int8"]
    calibration = Calibration(DATA, nn.functional.mse_loss)
    unbroken, saved = Training(*modifiers), []
    ema = averaged(unbroken)
    unbroken.engine.attach(unbroken.optimizer, calibration=calibration, ema=ema)
    follow(unbroken, ema, 0, 40, saved)
    saved.append((unbroken.save(), ema.state_dict()))
    for cut in (7, 8, 9, 25, 26, 27, 28, 29, 33, 34, 35):
        resumed = Training(*modifiers)
        copied = averaged(resumed)
        resumed.load(saved[cut][0])
        copied.load_state_dict(saved[cut][1])
        resumed.engine.attach(resumed.optimizer, calibration=calibration, ema=copied)
        until = min(cut + 9, 40)
        follow(resumed, copied, cut, until, [])
        assert same(resumed, saved[until][0]), cut
        assert not list(state_differences(dict(copied.state_dict()), dict(saved[until][1]))), cut


def test_what_is_due_at_step_0_happens_once() -> None:
    prune = "magnitude_prune: {sparsity: 0.5, targets: [0.weight]}"
    saved = Training(prune).attach().save()
    resumed = Training(prune).load(saved).attach()
    assert same(resumed.train(0, 40), Training(prune).attach().train(0, 40).save())
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


@pytest.mark.parametrize("when", ["after the masks", "before the masks", "never"])
def test_masks_without_their_weights_are_refused(when: str) -> None:
    weights, _, state = read(Training(PRUNE).attach().train(0, 40).save())[:3]
    resumed = Training(PRUNE)
    if when == "before the masks":
        resumed.model.load_state_dict(weights)
    resumed.engine.load_state_dict(state)
    if when == "after the masks":
        resumed.model.load_state_dict(weights)
    words = "the masks that were loaded prune '0.weight', whose weights are not zero there: call model.load_state_dict"
    with pytest.raises(RuntimeError, match=words) if when == "never" else nullcontext():
        resumed.attach()


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
        ({"version": 99}, "the engine state has version 99, this release reads 2: go on with the release that wrote"),
        ({"steps_per_epoch": 11}, "its steps_per_epoch is 11, here 10"),
        ({"total_steps": 400}, "its total_steps is 400, here 40"),
        ({"recipe_hash": "abc"}, "of another recipe: its text was changed"),
        ({"recipe_hash": "abc", "recipe": "{"}, "of another recipe: its text is damaged"),
        ({"step": "20"}, "the engine state is damaged: step: input should be a valid integer, not '20'"),
        ({"step": True}, "step: input should be a valid integer, not True"),
        ({"step": -1}, "step: input should be greater than or equal to 0, not -1"),
        ({"masks": []}, r"masks: input should be a valid dictionary, not \[\]"),
        ({"finished": 0}, "finished: input should be a valid boolean, not 0"),
        ({"sweep": 1}, "sweep: input should be a valid dictionary, not 1"),
        ({"modifiers": []}, "is of 0 modifiers, the recipe has 1"),
        ({"modifiers": [3]}, "modifiers.0: input should be a valid dictionary, not 3"),
        ({"modifiers": [{}]}, r"it lacks modifiers\[0\] \(magnitude_prune\).done"),
        (
            {"modifiers": [{"done": 1.5}]},
            r"modifiers\[0\] \(magnitude_prune\).done: input should be a valid integer, not 1.5",
        ),
        ({"masks": {"0.weight": {}}}, "mask of '0.weight' is damaged: it has no shape, bits and pattern"),
        (
            {"masks": {"0.weight": {"shape": [16, 8], "bits": torch.zeros(3, dtype=torch.uint8), "pattern": "2:4"}}},
            r"mask of '0.weight' is damaged: its bits must be 16 bytes, not torch.uint8 of \[3\]",
        ),
        (
            {"masks": {"0.weight": {"shape": [16, 8], "bits": "x", "pattern": "2:4"}}},
            "its bits must be 16 bytes, not str",
        ),
    ],
)
def test_half_a_state_or_one_of_another_training_is_refused(change: dict[str, Any], words: str) -> None:
    state = Training(PRUNE).attach().train(0, 20).engine.state_dict()
    state = {key: change.get(key, value) for key, value in state.items() if change.get(key, value) is not None}
    if "sweep" not in change:
        state["sweep"] = None
    training = Training(PRUNE)
    before = training.save()
    with pytest.raises(ValueError, match=words) as refused:
        training.engine.load_state_dict(state)
    assert "\n" not in str(refused.value)
    assert not list(state_differences(read(before), read(training.save())))
    assert training.engine.run.step == 0


def test_what_is_no_state_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be what engine.state_dict\(\) gave, not list"):
        Training(PRUNE).engine.load_state_dict([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("modifiers", "words"),
    [
        ([PRUNE.replace("to: 0.5", "to: 0.6")], r"modifiers\[0\].magnitude_prune.sparsity.to is 0.5 there, 0.6 here"),
        ([PRUNE, LR], r"modifiers\[1\].cyclic_lr.period is nothing there, '10st' here"),
        (
            [PRUNE.replace("magnitude_prune", "movement_prune")],
            r"modifiers\[0\].magnitude_prune.targets\[0\] is '0.weight' there, nothing here; .*; and 9 more",
        ),
    ],
)
def test_another_recipe_is_refused(modifiers: list[str], words: str) -> None:
    state = Training(PRUNE).attach().engine.state_dict()
    with pytest.raises(ValueError, match=f"of another recipe: {words}"):
        Training(*modifiers).engine.load_state_dict(state)


@pytest.mark.parametrize("steps", [0, 20])  # with masks and without
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (
            lambda: nn.Sequential(nn.Linear(8, 17)),
            r"than Sequential here: '2.weight' is missing; '2.bias' is missing; '0.weight' is \[17, 8\], there "
            r"\[16, 8\]; and 1 more",
        ),
        (lambda: nn.Sequential(*mlp(), nn.Linear(1, 1)), r"'3.weight' is new; '3.bias' is new$"),
    ],
)
def test_another_model_is_refused(steps: int, model: Any, words: str) -> None:
    state = Training(PRUNE).attach().train(0, steps).engine.state_dict()
    other = Engine(model(), recipe(PRUNE), steps_per_epoch=10, epochs=4)
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(state)
    assert (other.run.step, other.run.masks.names()) == (0, [])


def test_scores_and_gradients_of_other_targets_are_refused() -> None:
    state = Training(MOVEMENT).attach().train(0, 3).engine.state_dict()
    state["modifiers"][0]["scores"]["0.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"scores of '0.weight' \[3\] fits nothing here"):
        Training(MOVEMENT).engine.load_state_dict(state)
    with pytest.warns(UserWarning, match="no calibration was given"):
        state = Training(OVIT).attach(calibrated=False).train(0, 7).engine.state_dict()
    state["modifiers"][0]["recent"][0].pop()
    with pytest.raises(ValueError, match="the checkpoint's training gradients are not those of the targets here"):
        Training(OVIT).engine.load_state_dict(state)


def test_a_state_comes_before_attach() -> None:
    training = Training(PRUNE).attach()
    with pytest.raises(RuntimeError, match=r"load the engine's state before engine.attach\(optimizer\)"):
        training.engine.load_state_dict(training.engine.state_dict())


def test_a_state_that_lost_its_masks_is_refused() -> None:
    weights, _, state = read(Training(PRUNE).attach().train(0, 40).save())[:3]
    resumed = Training(PRUNE)
    resumed.engine.load_state_dict({**state, "masks": {}, "finished": False})
    resumed.model.load_state_dict(weights)
    with pytest.raises(ValueError, match=r"half a state was loaded: it acted at step \d+, and '0.weight' has no mask"):
        resumed.attach()


@pytest.mark.parametrize("count", [1, 2])
def test_optimizers_with_fewer_groups_or_more_of_them_are_refused(count: int) -> None:
    def groups(model: nn.Sequential) -> list[dict[str, Any]]:
        return [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.01}]

    rates, model = recipe("cyclic_lr: {max: 0.1, min: 0.01}"), mlp()
    engine = Engine(model, rates, steps_per_epoch=10, epochs=4).attach(torch.optim.SGD(groups(model), 0.1))
    resumed = mlp()
    other = Engine(resumed, rates, steps_per_epoch=10, epochs=4)
    other.load_state_dict(engine.state_dict())
    parts = [resumed] if count == 1 else [resumed[0], resumed[2]]
    words = r"of optimizers with \[2\] parameter groups, here they have \[1" + (r"\]" if count == 1 else ", 1")
    with pytest.raises(RecipeError, match=words):
        other.attach(*[torch.optim.SGD(part.parameters(), 0.1) for part in parts])
