"""What modifiers add to the loss of training, once a forward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ovit_engine.core.capabilities import LossTerm, having
from ovit_engine.core.modifier import Modifier
from ovit_engine.core.run import Run


class LossTerms:
    """Adds the terms of modifiers to a loss; the Engine's own, or that of a criterion through a forward hook."""

    def __init__(self, modifiers: Sequence[Modifier], run: Run) -> None:
        self._modifiers, self._run = having(modifiers, LossTerm), run
        # steps that were skipped by then, where since the last step a loss was seen, and each modifier gave a term
        self._asked_at: int | None = None
        self._given_at: dict[int, int] = {}

    def add(self, loss: Tensor) -> Tensor:
        """Return `loss` plus the terms; nothing is added in evaluation (the model's eval mode, or no gradients)."""
        if not (torch.is_grad_enabled() and self._run.model.training):
            return loss
        due = self._due(self._run.step)
        if loss.numel() != 1 and due:
            raise ValueError(
                f"{due[0].name} adds a term to the loss of a batch, which is of shape {list(loss.shape)} here: "
                "reduce it to one number first (loss.mean())"
            )
        self._asked_at = self._run.skipped
        try:
            for modifier in due:
                if (term := modifier.loss_term(self._run)) is not None:
                    loss = loss + term
                    self._given_at[id(modifier)] = self._run.skipped
        finally:
            if self._run.teacher is not None:
                self._run.teacher.forget()
        return loss

    def end(self) -> None:
        """Add nothing any more: training under the recipe is over."""
        self._modifiers = []

    def check_step(self) -> None:
        """After a step: raise RuntimeError where a term was due, and no loss since the step before had it."""
        asked_at, self._asked_at = self._asked_at, None
        given_at, self._given_at = self._given_at, {}
        for modifier in self._due(self._run.step - 1):
            if asked_at != self._run.skipped:  # that of a skipped step is gone
                raise RuntimeError(
                    f"a step was made and the loss had no term of {modifier.name}: write loss = engine.loss(loss) "
                    "before loss.backward(), or give the loss module to engine.attach(optimizer, criterion=...); the "
                    "model must be in training mode"
                )
            if given_at.get(id(modifier)) != self._run.skipped:
                raise RuntimeError(
                    f"{modifier.name}: a step was made, and no forward pass of the model was seen: the loop must call "
                    "the model itself, not parts of it, in training mode and with gradients, before "
                    "engine.loss(loss) (reentrant checkpointing of all of the model has no gradients)"
                )

    def _due(self, step: int) -> list[LossTerm]:
        return [modifier for modifier in self._modifiers if modifier.has_loss_term(step)]


class AddTerms:
    """A forward hook on the criterion; an object and not a closure, so that the model pickles."""

    def __init__(self, terms: LossTerms) -> None:
        self._terms = terms

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self._terms.add(output)
