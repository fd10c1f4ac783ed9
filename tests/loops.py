"""A small problem, a modifier that writes down what happens to it, and every way in which a loop makes a step."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn
from torch.optim import Optimizer

from ovit_engine import Engine, LearningRate, Recipe, Run, Slot

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(64, 1, generator=torch.Generator().manual_seed(1))

PRUNE = "magnitude_prune: {start: 10st, end: 30st, every: 10st, sparsity: {from: 0.25, to: 0.5}, targets: [0.weight]}"


def zeros_at(step: int) -> int:
    """Zeros of the 128 weights `0.weight` after `step` steps under PRUNE."""
    return 0 if step < 10 else 32 if step < 20 else 48 if step < 30 else 64


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))


def recipe(*modifiers: str) -> Recipe:
    """A recipe "r.yaml" whose n-th modifier stands on line n + 2, its name in column 5."""
    lines = "\n".join(f"  - {modifier}" for modifier in modifiers)
    return Recipe.parse(f"modifiers:{' []' * (not modifiers)}\n{lines}\n", file="r.yaml")


def started(*modifiers: str, steps: int = 10, epochs: int = 4) -> tuple[nn.Sequential, Optimizer, Engine]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    return model, optimizer, Engine(model, recipe(*modifiers), steps_per_epoch=steps, epochs=epochs)


def loss_of(model: nn.Module) -> Tensor:
    return nn.functional.mse_loss(model(X), Y)


def plain(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def accumulate(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    for _ in range(3):
        (loss_of(model) / 3).backward()
    optimizer.step()


def _closure(model: nn.Module, optimizer: Optimizer) -> Callable[[], float]:
    def evaluate() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss  # type: ignore[return-value]

    return evaluate


def closure(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.step(_closure(model, optimizer))


def closure_by_keyword(model: nn.Module, optimizer: Optimizer) -> None:
    optimizer.step(closure=_closure(model, optimizer))


def zeros(module: Any) -> int:
    return int((module.weight == 0).sum())


def hooks_on(optimizer: Any) -> int:
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


class Spy(LearningRate):
    """Writes down its events, with the clock."""

    name: ClassVar[str] = "spy"
    _seen: list[tuple[str, int]] = PrivateAttr(default_factory=list)
    _gradients: list[Tensor] = PrivateAttr(default_factory=list)

    def prepare(self, run: Run) -> None:
        self._seen.append(("prepare", run.step))

    def attach(self, run: Run) -> None:
        self._seen.append(("attach", run.step))

    def write_rates(self, run: Run) -> None:
        self._seen.append(("write_rates", run.step))

    def step_begin(self, run: Run) -> None:
        self._seen.append(("step_begin", run.step))
        gradient = run.gradient(Slot("0.weight", run.model[0], "weight"))  # type: ignore[index]
        assert gradient is not None
        self._gradients.append(gradient.clone())

    def step_end(self, run: Run) -> None:
        self._seen.append(("step_end", run.step))

    def detach(self, run: Run) -> None:
        self._seen.append(("detach", run.step))
