"""How long training is, and what is refused, made good or told where a loop is shorter or longer than that."""

from typing import Any

import pytest
import torch

from ovit_engine import Engine, RecipeError
from tests.loops import PRUNE, loss_of, mlp, plain, recipe, started, zeros


@pytest.mark.parametrize(("steps", "epochs"), [(0, 1), (2.5, 1), (5, 0), (5, 1.5), (5, True), ("5", 1)])
def test_the_length_of_training_is_whole(steps: Any, epochs: Any) -> None:
    with pytest.raises(ValueError, match=r"(steps_per_epoch|epochs) must be a positive whole number, not"):
        Engine(mlp(), recipe(), steps_per_epoch=steps, epochs=epochs)


def test_accumulation_that_halves_the_steps_raises_at_detach() -> None:
    model, optimizer, engine = started(PRUNE)
    engine.attach(optimizer)
    for _ in range(20):
        plain(model, optimizer)
    words = "training ended before pruning at step 30: the optimizer applied 20 of 40 steps.*gradient accumulation"
    with pytest.raises(RuntimeError, match=words):
        engine.detach()


def test_a_learning_rate_schedule_that_ends_half_way_raises_at_detach() -> None:
    model, optimizer, engine = started("cyclic_lr: {max: 0.1, min: 0.01}")
    engine.attach(optimizer)
    for _ in range(20):
        plain(model, optimizer)
    with pytest.raises(RuntimeError, match="the optimizer applied 20 of 40 steps"):
        engine.detach()


def test_half_of_the_steps_warn_even_where_the_recipe_is_done() -> None:
    model, optimizer, engine = started("magnitude_prune: {start: 5st, sparsity: 0.5, targets: [0.weight]}")
    engine.attach(optimizer)
    for _ in range(20):
        plain(model, optimizer)
    with pytest.warns(UserWarning, match="applied 20 of 40 steps"):
        engine.detach()
    assert engine.finished


def test_a_few_missing_steps_are_made_good_with_a_warning() -> None:
    prune = PRUNE.replace("end: 30st", "end: 100%")
    model, optimizer, engine = started(prune, steps=50, epochs=4)
    engine.attach(optimizer)
    for _ in range(197):
        plain(model, optimizer)
    assert zeros(model[0]) < 64
    with pytest.warns(UserWarning, match="applied 197 of 200 steps.*pruning at step 200 is done now"):
        engine.detach()
    assert zeros(model[0]) == 64
    assert engine.finished


def test_too_many_steps_warn_once() -> None:
    model, optimizer, engine = started(PRUNE)
    engine.attach(optimizer)
    for _ in range(40):
        plain(model, optimizer)
    with pytest.warns(UserWarning, match="past the 40 steps"):
        plain(model, optimizer)
    for _ in range(5):  # a second warning would be an error
        plain(model, optimizer)
    engine.detach()
    assert zeros(model[0]) == 64


def test_an_optimizer_that_never_steps_is_noticed() -> None:
    _, optimizer, engine = started(PRUNE)
    engine.attach(optimizer)
    with pytest.raises(RuntimeError, match="attach the optimizer that the loop steps"):
        engine.detach()


def test_a_recipe_that_lasts_longer_than_training_fails_before_anything_is_done() -> None:
    with pytest.raises(RecipeError, match=r"r.yaml:2:\d+: magnitude_prune.end: '30st' is step 30, past the end"):
        started(PRUNE, steps=7)
    steps = "magnitude_prune: {sparsity: {1st: 0.2, 5ep: 0.5}, targets: [0.weight]}"
    with pytest.raises(RecipeError, match=r"r.yaml:2:\d+: magnitude_prune.sparsity: '5ep' is past the end"):
        started(steps)
    with pytest.raises(RecipeError, match=r"r.yaml:2:\d+: cyclic_lr.end: '41st' is step 41, past the end"):
        started("cyclic_lr: {max: 0.1, min: 0.01, end: 41st}")


@pytest.mark.parametrize("length", [{}, {"epochs": 4, "total_steps": 40}])
def test_a_length_is_given_in_one_way(length: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give either epochs or total_steps, not epochs="):
        Engine(mlp(), recipe(), steps_per_epoch=10, **length)


def test_training_that_ends_within_an_epoch() -> None:
    engine = Engine(mlp(), recipe(PRUNE), steps_per_epoch=10, total_steps=34)
    assert engine.run.total_steps == 34
    assert engine.run.clock.steps("50%") == 17
    with pytest.raises(ValueError, match="total_steps must be a positive whole number, not 0"):
        Engine(mlp(), recipe(), steps_per_epoch=10, total_steps=0)


@pytest.mark.parametrize("fused", [False, True], ids=["foreach", "fused"])
def test_steps_that_a_scaler_skipped_are_not_missing_where_they_are_counted(fused: bool) -> None:
    """The engine sees what a fused optimizer skips; a loop adds what others do."""
    for counts in (True, False):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=fused)
        prune = "magnitude_prune: {start: 9st, sparsity: 0.5, targets: [0.weight]}"
        engine = Engine(model, recipe(prune), steps_per_epoch=10, epochs=1).attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for step in range(10):
            optimizer.zero_grad()
            scaler.scale(loss_of(model) * (torch.inf if step < 4 else 1.0)).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            if counts and step < 4:
                engine.skip_step()  # a step that the engine saw itself is not counted twice
        assert (engine.run.step, engine.run.skipped) == (6, 4 if fused or counts else 0)
        if not (fused or counts):
            with pytest.raises(RuntimeError, match=r"6 of 10 steps\. .* call engine\.skip_step\(\) for"):
                engine.detach()
            continue
        with (
            pytest.warns(UserWarning, match="6 of 10 steps and 4 were skipped; pruning at step 9 is done now"),
            pytest.warns(UserWarning, match="the gradient scaler skipped 4 steps, and 6 of 10 were applied"),
        ):
            engine.detach()
        assert zeros(model[0]) == 64


def test_steps_that_were_skipped_and_made_again_are_no_matter() -> None:
    model, optimizer, engine = started(PRUNE)
    engine.attach(optimizer)
    engine.skip_step(total=7)
    for _ in range(40):
        plain(model, optimizer)
    engine.detach()  # a warning would be an error
    assert engine.finished


def test_a_run_that_ends_before_quantization_says_so_and_nothing_else() -> None:
    model, optimizer, engine = started("quantize: {start: 9st, freeze_observers: 10st}", steps=10, epochs=1)
    engine.attach(optimizer)
    for _ in range(9):
        plain(model, optimizer)
    with pytest.raises(RecipeError, match=r"quantize.start: training ended before a step with quantization was made"):
        engine.detach()  # a warning that it is done now would be an error
