"""What the engine hangs on a user's closure and criterion."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ovit_engine.modifier import Run

if TYPE_CHECKING:
    from ovit_engine.engine import Engine


class MaskedClosure:
    """A user's closure with the masks held: LBFGS evaluates several times inside one step.

    `begin` is called once, after the first evaluation, when gradients are still dense: pruners want them so.
    """

    def __init__(self, run: Run, closure: Any, begin: Callable[[], None]) -> None:
        self._run, self._closure, self._begin, self._first = run, closure, begin, True

    def __call__(self) -> Any:
        self._run.masks.project()
        with torch.enable_grad():
            loss = self._closure()
        if self._first:
            self._begin()
            self._first = False
        self._run.masks.project_gradients()
        return loss


class AddTerms:
    """A forward hook on the criterion; an object and not a closure, so that the model pickles."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self._engine.loss(output)
