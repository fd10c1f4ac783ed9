"""Attach, detach, what may go wrong between them, and copies of the model."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ovit_engine import Calibration, Engine, LossTerm, Recipe, RecipeError
from tests.loops import PRUNE, Spy, X, Y, hooks_on, loss_of, mlp, plain, recipe, started, zeros, zeros_at

LR = "cyclic_lr: {max: 0.1, min: 0.01}"


def test_with_attaches_and_detaches() -> None:
    model, optimizer, engine = started(PRUNE)
    with engine.attach(optimizer) as inside:
        assert inside is engine
        assert hooks_on(optimizer) == 2
        for _ in range(40):
            plain(model, optimizer)
        assert not engine.finished
    assert engine.finished
    assert hooks_on(optimizer) == 0
    plain(model, optimizer)
    assert engine.run.step == 40


def _one_step_and_then_an_error(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    plain(model, optimizer)
    raise KeyError("mine")


def test_an_exception_in_the_loop_flies_on_and_leaves_no_hook() -> None:
    model, optimizer, engine = started(PRUNE)
    with pytest.raises(KeyError, match="mine"), engine.attach(optimizer):
        _one_step_and_then_an_error(model, optimizer)
    assert hooks_on(optimizer) == 0
    assert not engine.finished
    plain(model, optimizer)
    assert engine.run.step == 1


def test_detach_that_raises_leaves_no_hook() -> None:
    model, optimizer, engine = started(PRUNE)
    engine.attach(optimizer)
    plain(model, optimizer)
    with pytest.raises(RuntimeError, match="applied 1 of 40 steps"):
        engine.detach()
    assert hooks_on(optimizer) == 0
    assert not engine.finished


def test_a_step_that_raises_does_not_stop_the_clock() -> None:
    model, optimizer, engine = started(PRUNE)
    engine.attach(optimizer)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(lambda: (_ for _ in ()).throw(KeyboardInterrupt()))  # type: ignore[arg-type]
    for _ in range(40):
        plain(model, optimizer)
    engine.detach()
    assert engine.run.step == 40


def test_the_order_of_calls() -> None:
    model, optimizer, engine = started()
    with pytest.raises(RuntimeError, match=r"detach\(\) without engine.attach\(\)"):
        engine.detach()
    engine.prepare()
    with pytest.raises(RuntimeError, match=r"prepare\(\) was called before"):
        engine.prepare()
    engine.attach(optimizer)
    with pytest.raises(RuntimeError, match="attached already"):
        engine.attach(optimizer)
    assert hooks_on(optimizer) == 2
    for _ in range(40):
        plain(model, optimizer)
    engine.detach()
    with pytest.raises(RuntimeError, match="was detached: make a new Engine"):
        engine.attach(optimizer)


@pytest.mark.parametrize(
    ("wrong", "name"), [(lambda o: torch.optim.lr_scheduler.ConstantLR(o), "ConstantLR"), (lambda o: None, "NoneType")]
)
def test_only_real_optimizers_are_attached(wrong: Any, name: str) -> None:
    _, optimizer, engine = started()
    with pytest.raises(TypeError, match=f"attach needs a torch optimizer, not {name}"):
        engine.attach(wrong(optimizer))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"criterion": nn.functional.mse_loss}, "criterion must be a module"),
        ({"calibration": torch.utils.data.DataLoader([1])}, "calibration must be Calibration.*not DataLoader"),  # type: ignore[arg-type]
    ],
)
def test_what_attach_is_given_is_checked_before_anything_happens(options: dict[str, Any], words: str) -> None:
    model, optimizer, engine = started(PRUNE)
    with pytest.raises(TypeError, match=words):
        engine.attach(optimizer, **options)
    assert hooks_on(optimizer) == 0
    engine.attach(optimizer)
    plain(model, optimizer)
    assert engine.run.step == 1


@pytest.mark.parametrize("wrapped", [False, True], ids=["module", "AveragedModel"])
def test_the_averaged_copy_keeps_the_masks(wrapped: bool) -> None:
    model, optimizer, engine = started(PRUNE)
    average: Any = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn())
    copied = average.module
    engine.attach(optimizer, ema=average if wrapped else copied)
    for count in range(1, 41):
        plain(model, optimizer)
        average.update_parameters(model)
        assert zeros(copied[0]) == zeros_at(count)
    engine.detach()
    assert torch.equal(copied[0].weight == 0, model[0].weight == 0)
    assert not torch.equal(copied[0].weight, model[0].weight)


def test_the_averaged_copy_is_masked_at_detach_whatever_happened_to_it() -> None:
    model, optimizer, engine = started(PRUNE)
    average = copy.deepcopy(model)
    engine.attach(optimizer, ema=average)
    for _ in range(40):
        plain(model, optimizer)
    with torch.no_grad():
        average[0].weight.fill_(1.0)
    engine.detach()
    assert torch.equal(average[0].weight == 0, model[0].weight == 0)


def test_a_copy_that_lacks_a_masked_weight_is_named() -> None:
    _, optimizer, engine = started("magnitude_prune: {sparsity: 0.5, targets: [0.weight]}")
    engine.attach(optimizer)
    with pytest.raises(ValueError, match=r"0\.weight"):
        engine.apply_to(nn.Linear(2, 2))


def test_masks_at_attach_hold_before_the_first_step() -> None:
    model, optimizer, engine = started("magnitude_prune: {sparsity: 0.5, targets: [0.weight]}")
    engine.attach(optimizer)
    assert zeros(model[0]) == 64
    smallest = mlp()[0].weight.detach().abs().flatten().argsort(stable=True)[:64]
    assert set((model[0].weight == 0).flatten().nonzero().flatten().tolist()) == set(smallest.tolist())


def test_one_recipe_serves_two_engines() -> None:
    shared = recipe(PRUNE, LR)
    before = shared.dump()
    runs = []
    for seed in (0, 1):
        model = mlp(seed)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        engine = Engine(model, shared, steps_per_epoch=10, epochs=4).attach(optimizer)
        for _ in range(40):
            plain(model, optimizer)
        engine.detach()
        runs.append((engine, model))
    assert [zeros(model[0]) for _, model in runs] == [64, 64]
    assert not torch.equal(runs[0][1][0].weight == 0, runs[1][1][0].weight == 0)
    assert all(one is not two for one, two in zip(runs[0][0].modifiers, shared.modifiers, strict=True))
    assert shared.dump() == before
    assert shared == recipe(PRUNE, LR)


def test_two_pruners_of_one_weight_at_overlapping_times() -> None:
    second = "magnitude_prune: {start: 30st, sparsity: 0.6, targets: ['re:.*weight']}"
    _, optimizer, engine = started(PRUNE, second)
    words = (
        r"r.yaml:3:5: magnitude_prune: writes the mask of 0.weight from step 30 to 30, "
        r"where magnitude_prune \(r.yaml:2:5\)"
    )
    for _ in range(2):  # the second time too, as when a notebook cell is run again
        with pytest.raises(RecipeError, match=words):
            engine.attach(optimizer)
    assert hooks_on(optimizer) == 0


def test_two_pruners_one_after_the_other() -> None:
    second = "magnitude_prune: {start: 31st, sparsity: 0.6, targets: ['re:.*weight'], scope: layer}"
    model, optimizer, engine = started(PRUNE, second)
    with engine.attach(optimizer):
        for _ in range(40):
            plain(model, optimizer)
    assert (zeros(model[0]), zeros(model[2])) == (round(0.6 * 128), round(0.6 * 16))


def test_two_pruners_of_different_weights_at_one_time() -> None:
    model, optimizer, engine = started(PRUNE, PRUNE.replace("0.weight", "2.weight"))
    with engine.attach(optimizer):
        for _ in range(40):
            plain(model, optimizer)
    assert (zeros(model[0]), zeros(model[2])) == (64, 8)


def test_two_writers_of_the_learning_rate() -> None:
    half = "cyclic_lr: {max: 0.1, min: 0.01, end: 50%}"
    started(half, half.replace("end: 50%", "start: 50%"))[2].prepare()
    engine = started(half, half.replace("end: 50%", "start: 19st"))[2]
    with pytest.raises(RecipeError, match=r"r.yaml:3:5: cyclic_lr: writes the learning rate from step 19 to 39, where"):
        engine.prepare()


def test_a_model_with_no_matching_layer() -> None:
    engine = Engine(nn.LayerNorm(4), recipe(PRUNE), steps_per_epoch=10, epochs=4)
    words = "r.yaml:2:.*: magnitude_prune.targets: target '0.weight' matches no parameter of LayerNorm; did you"
    with pytest.raises(RecipeError, match=words):
        engine.prepare()
    with pytest.raises(RecipeError, match="matches no parameter of ReLU; there are none"):
        Engine(nn.ReLU(), recipe(PRUNE), steps_per_epoch=10, epochs=4).prepare()


def test_metrics_stand_beside_the_step() -> None:
    model, optimizer, engine = started()
    engine.attach(optimizer)
    plain(model, optimizer)
    engine.metric("accuracy", 0.5)
    assert engine.run.history == [(1, "accuracy", 0.5)]


class Term(Spy, LossTerm):
    """Adds the mean square of the weights to the loss."""

    def loss_term(self, run: Any) -> torch.Tensor:
        return run.model[0].weight.square().mean()  # type: ignore[no-any-return]


def test_terms_of_the_loss_come_by_a_line_or_by_the_criterion() -> None:
    model, optimizer, engine = started()
    own = Engine(model, Recipe("terms", (Term(),)), steps_per_epoch=9, epochs=1)
    criterion = nn.MSELoss()
    own.attach(optimizer, criterion=criterion)
    plain_loss, term = loss_of(model), model[0].weight.square().mean()
    assert torch.equal(own.loss(plain_loss), plain_loss + term)
    assert torch.equal(criterion(model(X), Y), plain_loss + term)
    with torch.no_grad():
        assert own.loss(plain_loss) is plain_loss
    model.eval()
    assert torch.equal(criterion(model(X), Y), plain_loss)  # a validation's loss is what it says
    model.train()
    own.__exit__(ValueError, ValueError(), None)
    assert torch.equal(criterion(model(X), Y), plain_loss)
    assert torch.equal(engine.loss(plain_loss), plain_loss)


def test_nan_in_a_gradient_is_named() -> None:
    prune = (
        "ovit_prune: {start: 2st, sparsity: 0.5, targets: [0.weight, 2.weight], block: 16, gradients: 4, "
        "images_per_gradient: 4}"
    )
    for calibrated in (False, True):
        model, optimizer, engine = started(prune)
        data = torch.utils.data.TensorDataset(X * float("nan"), Y)
        calibration = Calibration(data, nn.functional.mse_loss) if calibrated else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine.attach(optimizer, calibration=calibration)
        plain(model, optimizer)
        loss_of(model).backward()
        if not calibrated:
            assert model[2].weight.grad is not None
            model[2].weight.grad[0, 3] = float("nan")
        with pytest.raises(
            ValueError, match=r"calibration batch 0 \(from 0\): the loss is nan" if calibrated else r"2\.weight"
        ):
            optimizer.step()


def test_a_second_engine_on_one_optimizer_is_refused() -> None:
    model, optimizer, engine = started()
    engine.attach(optimizer)
    with pytest.raises(RuntimeError, match="another engine is attached to this optimizer"):
        Engine(model, Recipe.parse("modifiers: []"), steps_per_epoch=1, epochs=1).attach(optimizer)


def test_an_ema_that_is_no_model_is_refused_before_anything_is_done() -> None:
    _, optimizer, engine = started()
    with pytest.raises(TypeError, match="ema must be an averaged copy of the model, not str"):
        engine.attach(optimizer, ema="average")  # type: ignore[arg-type]
    assert not optimizer._optimizer_step_pre_hooks


def test_export_says_why_it_is_too_early_or_too_late(tmp_path: Path) -> None:
    text = "modifiers: [{magnitude_prune: {start: 9st, sparsity: 0.5, targets: ['0.weight']}}]"
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = Engine(model, Recipe.parse(text), steps_per_epoch=10, epochs=1)
    engine.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"step 0 of 10: call engine.detach\(\) before export"):
        engine.export(tmp_path / "model.onnx", torch.randn(1, 4))
    with pytest.raises(RuntimeError, match="the optimizer applied 0 of 10 steps"):
        engine.detach()
    with pytest.raises(RuntimeError, match="step 0 of 10, and training was cut short"):
        engine.export(tmp_path / "model.onnx", torch.randn(1, 4))
    assert list(tmp_path.iterdir()) == []


def test_detach_holds_the_masks_a_last_time() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    text = "modifiers: [{magnitude_prune: {sparsity: 0.5, targets: ['0.weight']}}]"
    engine = Engine(model, Recipe.parse(text), steps_per_epoch=1, epochs=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    model[0].weight.data.fill_(1.0)  # as Lookahead's slow weights do
    engine.detach()
    assert int((model[0].weight == 0).sum()) == 8
