"""A training with a sweep, which can be stopped and made again."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ovit_engine import Engine
from ovit_engine.sweep.folder import FOLDER, read_index
from tests.loops import PRUNE, mlp, plain, recipe

SWEEP = f"{PRUNE[:-1]}, sweep: [0.25, 0.375, 0.5]}}"  # steps 10, 20, 30 of 40


class Training:
    """All that a script makes anew when it starts again; `metric` gives a value to report after a step, or None."""

    def __init__(self, output: Path | None, *modifiers: str, model: nn.Module | None = None, **options: Any) -> None:
        self.model = model or mlp()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.engine = Engine(self.model, recipe(*modifiers or (SWEEP,)), steps_per_epoch=10, epochs=4, output=output)
        self.options = options
        self.film: dict[int, dict[str, Tensor]] = {}  # every model after the step and before what the recipe does
        self.optimizer.register_step_post_hook(self._expose)

    def _expose(self, *arguments: Any) -> None:
        self.engine.run.masks.project()
        self.film[self.engine.run.step + 1] = copy.deepcopy(self.model.state_dict())

    def attach(self) -> "Training":
        self.engine.attach(self.optimizer, **self.options)
        return self

    def train(self, first: int, last: int, metrics: dict[int, float] | None = None, name: str = "accuracy") -> Any:
        for step in range(first + 1, last + 1):
            plain(self.model, self.optimizer)
            if metrics and step in metrics:
                self.engine.metric(name, metrics[step])
        return self

    def save(self) -> list[Any]:
        return copy.deepcopy([part.state_dict() for part in (self.model, self.optimizer, self.engine)])

    def load(self, saved: list[Any]) -> "Training":
        for part, state in zip((self.model, self.optimizer, self.engine), saved, strict=True):
            part.load_state_dict(state)  # type: ignore[attr-defined]
        return self


def kept(output: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(output / FOLDER / f"{name}.pt", weights_only=True)
    return content


def steps(output: Path) -> dict[float, int]:
    return {point.sparsity: point.step for point in read_index(output / FOLDER).points}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


RISING = {5: 0.99, 10: 0.5, 14: 0.8, 17: 0.8, 19: 0.7, 20: 0.9, 25: float("nan"), 29: 0.4, 35: float("inf"), 40: 0.3}
