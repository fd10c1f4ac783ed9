"""Notice training that does not call the attached optimizer's `step`, or has stopped calling it."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from ovit_engine.distributed.sharding import local_part
from ovit_engine.utils.warn import warn

CHANGES = 3  # of weights without a step of ours: loading a checkpoint after attach is one

PASSES = 256  # backward passes without a step: more than anyone accumulates


class StepWatch:
    """Count gradients between steps, by hooks on the optimizer's parameters: on all until the first step, then on one.

    Nothing else shows that a loop trains: hooks on modules are lost in compiled graphs, and forwards may be evaluation.
    Weights that change between backward passes were stepped by something else, which is an error; many passes at the
    same weights may be a long accumulation, which is a warning.
    """

    def __init__(self, optimizer: Optimizer, steps_per_epoch: int) -> None:
        self._optimizer = type(optimizer).__name__
        self._patience = max(PASSES, steps_per_epoch)
        self._watched: Tensor | None = None  # the first parameter that gets a gradient
        self._norm = 0.0
        self._passes = self._changes = 0  # since the last step
        self._usual = 0  # the most passes that a step took so far; weights are checked only beyond that
        self._steps = 0
        self._is_stepping = False
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._handles = {p: p.register_post_accumulate_grad_hook(self._on_gradient) for p in parameters}

    def begin_step(self) -> None:
        """Begin a step: what a closure does inside is not watched."""
        self._is_stepping = True
        for parameter in [p for p in self._handles if p is not self._watched]:
            self._handles.pop(parameter).remove()

    def end_step(self) -> None:
        """End a step."""
        self._is_stepping = False
        self._steps += 1
        self._usual = max(self._usual, self._passes)
        self._passes = self._changes = 0

    def remove(self) -> None:
        """Remove the hooks when the engine is detached."""
        for handle in self._handles.values():
            handle.remove()
        self._handles, self._watched = {}, None

    def _on_gradient(self, parameter: Tensor) -> None:
        if torch.compiler.is_compiling() or self._is_stepping:
            return
        if self._watched is None:
            self._watched = parameter
        if parameter is not self._watched:
            return
        self._passes += 1
        if self._passes > self._usual:
            self._look(parameter)

    def _look(self, parameter: Tensor) -> None:
        before, self._norm = self._norm, _norm(parameter)
        changed = self._norm != before and self._passes > self._usual + 1
        self._changes += changed
        since = f"stepped again after step {self._steps}" if self._steps else "ever stepped"
        if changed and self._changes == CHANGES:
            raise RuntimeError(
                f"the weights change, and the {self._optimizer} that the engine is attached to was not {since}: the "
                "loop steps another optimizer (a copy of it, or one made later). Attach the one that the loop steps, "
                "and make no copy after engine.attach(optimizer)"
            )
        if self._passes == self._usual + self._patience:
            warn(
                f"{self._patience} backward passes and no step of the {self._optimizer} that the engine is attached "
                "to: does the loop step another one, such as a deep copy, whose parameters are not this model's?"
            )


def _norm(parameter: Tensor) -> float:
    return float(torch.linalg.vector_norm(local_part(parameter), dtype=torch.float64))
