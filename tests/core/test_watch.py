"""An engine on an optimizer that the loop does not step says so while the loop runs; no right loop is accused."""

import copy
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from ovit_engine import Engine
from ovit_engine.core.watch import CHANGES, PASSES
from tests.loops import PRUNE, loss_of, mlp, plain, recipe


def attached(rate: float = 0.1, **options: Any) -> tuple[nn.Sequential, torch.optim.Optimizer, Engine]:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), rate, **options)
    engine = Engine(model, recipe(PRUNE), steps_per_epoch=10, epochs=4).attach(optimizer)
    return model, optimizer, engine


def hooks_of(model: nn.Module) -> int:
    return sum(len(getattr(p, "_post_accumulate_grad_hooks", None) or ()) for p in model.parameters())


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
def test_weights_that_another_optimizer_moves(options: dict[str, Any]) -> None:
    model, _, engine = attached()
    other = torch.optim.AdamW(model.parameters(), 0.1, **options)
    for _ in range(CHANGES):
        plain(model, other)
    with pytest.raises(
        RuntimeError, match=r"the weights change, and the AdamW .* was not ever stepped: the loop steps an"
    ):
        plain(model, other)
    plain(model, other)  # said once
    assert engine.run.step == 0


def test_a_wrapper_that_steps_by_itself() -> None:
    """As optimizers do that keep a master copy of the weights and never call the one that they were given."""
    model, optimizer, _ = attached()

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model).backward()
        for parameter in model.parameters():
            parameter.data -= 0.1 * parameter.grad  # by `data`, which moves no version counter

    for _ in range(CHANGES):
        step()
    with pytest.raises(RuntimeError, match="not ever stepped"):
        step()


def test_a_deep_copied_optimizer_moves_copies_of_the_weights() -> None:
    model, optimizer, engine = attached()
    optimizer = copy.deepcopy(optimizer)
    for count in range(1, PASSES + 10):
        words = f"{PASSES} backward passes and no step of the AdamW"
        with pytest.warns(UserWarning, match=words) if count == PASSES else nullcontext():
            plain(model, optimizer)
    assert engine.run.step == 0


def test_an_optimizer_that_is_made_anew_in_the_middle() -> None:
    model, optimizer, _ = attached()
    for _ in range(4):
        plain(model, optimizer)
    other = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(CHANGES + 1):
        plain(model, other)
    with pytest.raises(RuntimeError, match=r"the AdamW .* was not stepped again after step 4: the loop steps another"):
        plain(model, other)


def test_steps_of_different_lengths_and_evaluations_between_them_are_no_foreign_steps() -> None:
    model, optimizer, engine = attached()
    for passes in (1, 5, 2, 9):
        optimizer.zero_grad()
        for _ in range(passes):
            loss_of(model).backward()
        optimizer.step()
        kept = copy.deepcopy(model.state_dict())
        model.load_state_dict(mlp(passes).state_dict())  # averaged weights are evaluated, say
        model.load_state_dict(kept)
    assert engine.run.step == 4


def test_one_weight_is_watched_after_the_first_step_and_none_after_detach() -> None:
    model, optimizer, engine = attached()
    assert hooks_of(model) == 4
    plain(model, optimizer)
    assert hooks_of(model) == 1
    model, _, engine = attached()
    with pytest.raises(RuntimeError, match="0 of 40 steps"):
        engine.detach()
    assert hooks_of(model) == 0


def test_a_watched_model_is_copied_and_pickled_without_the_watch() -> None:
    model, _, _ = attached()
    loss_of(model).backward()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert hooks_of(other) == 0


def test_long_accumulation_and_loading_weights_are_no_foreign_steps() -> None:
    model, optimizer, engine = attached()
    for count in range(PASSES - 1):
        loss_of(model).backward()
        if count in (1, 100):
            model.load_state_dict(mlp(count).state_dict())
    optimizer.step()
    assert engine.run.step == 1


def test_steps_that_a_scaler_skips_at_first_are_none() -> None:
    model, optimizer, engine = attached()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for count in range(20):
        optimizer.zero_grad()
        scaler.scale(loss_of(model) * (float("inf") if count < 19 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert engine.run.step == 1


def test_a_clock_that_is_stepped_seldom() -> None:
    model = mlp()
    seldom = torch.optim.SGD(model[0].parameters(), 0.1)
    often = torch.optim.SGD(model[2].parameters(), 0.1)
    engine = Engine(model, recipe(), steps_per_epoch=10, epochs=1).attach(seldom, often)
    for _ in range(20):
        plain(model, often)
    seldom.step()
    assert engine.run.step == 1


def test_frozen_parameters_and_an_optimizer_of_a_part() -> None:
    model = mlp()
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    Engine(model, recipe(PRUNE), steps_per_epoch=10, epochs=4).attach(optimizer)
    other = torch.optim.SGD(model[2].parameters(), 0.1)
    for _ in range(CHANGES):
        plain(model, other)
    with pytest.raises(RuntimeError, match="not ever stepped"):
        plain(model, other)


def test_it_neither_breaks_nor_recompiles_a_compiled_graph() -> None:
    model, optimizer, engine = attached()
    counter = CompileCounterWithBackend("aot_eager")
    compiled: Any = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(3):
        plain(compiled, optimizer)
    assert (engine.run.step, counter.frame_count) == (3, 1)


def test_a_compiled_model_is_watched_too() -> None:
    model, _, _ = attached()
    other = torch.optim.SGD(model.parameters(), 0.1)
    compiled: Any = torch.compile(model, backend="aot_eager")
    for _ in range(CHANGES):
        plain(compiled, other)
    with pytest.raises(RuntimeError, match="not ever stepped"):
        plain(compiled, other)


def test_a_first_step_of_a_closure_that_moves_the_weights_often() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=20)
    engine = Engine(model, recipe(), steps_per_epoch=1, epochs=1).attach(optimizer)

    def evaluate() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss.item()

    optimizer.step(evaluate)
    assert engine.run.step == 1


def test_what_a_closure_does_inside_a_step_is_not_watched() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), 0.1, max_iter=20)
    engine = Engine(model, recipe(), steps_per_epoch=2, epochs=1).attach(optimizer)

    def evaluate() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss.item()

    for _ in range(2):
        evaluate()  # so that one weight is watched from the first step on
        optimizer.step(evaluate)
    assert (engine.run.step, hooks_of(model)) == (2, 1)
