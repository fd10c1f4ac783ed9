"""Optimizers in optimizers: the inner one is the clock, masks hold after the step of each."""

from typing import Any

import pytest
import torch
from timm.optim.lookahead import Lookahead
from torch.optim import SGD, Optimizer

from ovit_engine import Engine
from ovit_engine.core.optimizers import layers_of, nests
from tests.loops import PRUNE, hooks_on, loss_of, mlp, plain, recipe, zeros, zeros_at


class Accelerated(Optimizer):
    """As accelerate's AcceleratedOptimizer: torch's constructor is skipped, steps of accumulation are not passed on."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer, self.every, self.calls = optimizer, 3, 0

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    @property
    def defaults(self) -> Any:
        return self.optimizer.defaults

    def step(self, closure: Any = None) -> None:
        self.calls += 1
        if self.calls % self.every == 0:
            self.optimizer.step(closure)


class Perturbing(Optimizer):
    """As SAM: weights are moved, put back, then stepped by the optimizer inside."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.base = SGD(self.param_groups, 0.1)

    def step(self, closure: Any = None) -> None:
        before = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p += 0.05
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            for p, old in zip((p for group in self.param_groups for p in group["params"]), before, strict=True):
                p.copy_(old)
        self.base.step()


def test_others_of_a_wrapper_class_step_as_before() -> None:
    class Skips(Accelerated):
        """A class that no other test attaches."""

    layers_of(Skips(SGD(mlp().parameters(), 0.1)))
    other = Skips(SGD(mlp().parameters(), 0.1))
    other.step()
    assert other.calls == 1


def test_wrappers_from_the_inside_out() -> None:
    inner = SGD(mlp().parameters(), 0.1)
    slow = Lookahead(inner)
    outer = Accelerated(slow)
    assert [id(each) for each in layers_of(outer)] == [id(inner), id(slow), id(outer)]
    assert layers_of(inner) == [inner]


def test_one_that_refers_to_itself() -> None:
    inner = SGD(mlp().parameters(), 0.1)
    inner.itself = inner  # type: ignore[attr-defined]
    assert layers_of(inner) == [inner]


@pytest.mark.parametrize("clear", ["model", "optimizer", "neither"])
def test_lookahead_counts_once_and_brings_no_weight_back(clear: str) -> None:
    model = mlp()
    inner = SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer = Lookahead(inner, k=3)
    engine = Engine(model, recipe(PRUNE), steps_per_epoch=10, epochs=4).attach(optimizer)
    for count in range(1, 41):
        if clear != "neither":
            (model if clear == "model" else optimizer).zero_grad()
        loss_of(model).backward()
        optimizer.step()
        assert (engine.run.step, zeros(model[0])) == (count, zeros_at(count))
    engine.detach()
    assert hooks_on(inner) == hooks_on(optimizer) == 0


def test_a_wrapper_that_does_not_pass_each_step_on() -> None:
    model = mlp()
    inner = SGD(model.parameters(), 0.1)
    optimizer = Accelerated(inner)
    text = (PRUNE, "cyclic_lr: {max: 0.2, min: 0.1}")
    engine = Engine(model, recipe(*text), steps_per_epoch=10, epochs=4).attach(optimizer)
    for count in range(1, 121):
        loss_of(model).backward()
        optimizer.step()
        if count % 3 == 0:
            model.zero_grad()
        assert (engine.run.step, zeros(model[0])) == (count // 3, zeros_at(count // 3))
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 - 0.1 * max(0, count // 3 - 1) / 40) or count < 3
    engine.detach()


def test_sharpness_aware_steps() -> None:
    model = mlp()
    optimizer = Perturbing(model.parameters())
    engine = Engine(model, recipe(PRUNE), steps_per_epoch=10, epochs=4).attach(optimizer)
    for count in range(1, 41):

        def evaluate() -> None:
            optimizer.zero_grad()
            loss_of(model).backward()

        evaluate()
        optimizer.step(evaluate)
        assert (engine.run.step, zeros(model[0])) == (count, zeros_at(count))
    engine.detach()


def test_a_step_that_raises_once_does_not_stop_the_clock() -> None:
    """Out of memory in a closure, or Ctrl-C in a notebook: the nested call's end is never told."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    torch.optim.Adam(mlp().parameters())  # torch patches the base class of AdamW: its steps nest from now on
    assert nests(optimizer)
    engine = Engine(model, recipe(PRUNE), steps_per_epoch=10, epochs=4).attach(optimizer)
    plain(model, optimizer)

    def fails() -> float:
        raise torch.OutOfMemoryError("out of memory")

    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            optimizer.step(fails)
        plain(model, optimizer)
    assert engine.run.step == 3


def test_a_second_engine_on_the_optimizer_inside_is_refused() -> None:
    model = mlp()
    inner = SGD(model.parameters(), 0.1)
    Engine(model, recipe(), steps_per_epoch=10, epochs=4).attach(Lookahead(inner))
    with pytest.raises(RuntimeError, match="another engine is attached"):
        Engine(model, recipe(), steps_per_epoch=10, epochs=4).attach(inner)
