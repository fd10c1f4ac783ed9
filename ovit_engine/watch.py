"""Notices that training goes on and the attached optimizer's `step` is never called."""

import warnings

import torch
from torch import Tensor
from torch.optim import Optimizer

from ovit_engine.sharding import local_part

CHANGES = 3  # of weights without a step of ours: loading a checkpoint after attach is one
PASSES = 256  # backward passes without a step: more than anyone accumulates


class StepWatch:
    """Counts gradients from attach until the first step is begun, by hooks on the optimizer's parameters.

    Nothing else shows that a loop trains: hooks on modules are lost in compiled graphs, and forwards may be evaluation.
    Weights that change between backward passes were stepped by something else, which is an error; many passes at the
    same weights may be a long accumulation, which is a warning.
    """

    def __init__(self, optimizer: Optimizer, steps_per_epoch: int) -> None:
        self._optimizer = type(optimizer).__name__
        self._patience = max(PASSES, steps_per_epoch)
        self._watched: Tensor | None = None  # the first parameter that gets a gradient
        self._norm = 0.0
        self._passes = self._changes = 0
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._handles = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in parameters]

    def remove(self) -> None:
        """Take the hooks away: a step was begun, or the engine was detached."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._watched = [], None

    def _on_gradient(self, parameter: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if self._watched is None:
            self._watched, self._norm = parameter, _norm(parameter)
        if parameter is not self._watched:
            return
        self._passes += 1
        before, self._norm = self._norm, _norm(parameter)
        changed = self._norm != before
        self._changes += changed
        if changed and self._changes == CHANGES:
            raise RuntimeError(
                f"the weights change, and the {self._optimizer} that the engine is attached to was never stepped: the "
                "loop steps another optimizer (a copy of it, or one made later). Attach the one that the loop steps, "
                "and make no copy after engine.attach(optimizer)"
            )
        if self._passes == self._patience:
            warnings.warn(
                f"{self._passes} backward passes and no step of the {self._optimizer} that the engine is attached to: "
                "does the loop step another one, such as a deep copy, whose parameters are not this model's?",
                stacklevel=2,
            )


def _norm(parameter: Tensor) -> float:
    return float(torch.linalg.vector_norm(local_part(parameter), dtype=torch.float64))
