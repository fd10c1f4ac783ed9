"""What modifiers add to the loss of training, once a forward."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ovit_engine.core.modifier import Modifier, Run


class LossTerms:
    """Adds the terms of modifiers to a loss; the Engine's own, or that of a criterion through a forward hook."""

    def __init__(self, modifiers: Sequence[Modifier], run: Run) -> None:
        self._modifiers, self._run = modifiers, run
        self._asked_at: int | None = None  # steps that were skipped by then, where a loss was seen since the last step

    def add(self, loss: Tensor) -> Tensor:
        """`loss` plus the terms; nothing is added in evaluation (the model's eval mode, or no gradients)."""
        if not (torch.is_grad_enabled() and self._run.model.training):
            return loss
        if loss.numel() != 1 and (names := self._names(self._run.step)):
            raise ValueError(
                f"{names[0]} adds a term to the loss of a batch, which is of shape {list(loss.shape)} here: "
                "reduce it to one number first (loss.mean())"
            )
        self._asked_at = self._run.skipped
        try:
            for modifier in self._modifiers:
                term = modifier.loss_term(self._run)
                loss = loss if term is None else loss + term
        finally:
            if self._run.teacher is not None:
                self._run.teacher.forget()
        return loss

    def end(self) -> None:
        """Add nothing any more: training under the recipe is over."""
        self._modifiers = ()

    def check_step(self) -> None:
        """After a step: raise RuntimeError where a modifier has a term, and no loss since the step before had it."""
        is_asked, self._asked_at = self._asked_at == self._run.skipped, None  # that of a skipped step is gone
        names = self._names(self._run.step - 1)
        if names and not is_asked:
            raise RuntimeError(
                f"a step was made and the loss had no term of {names[0]}: write loss = engine.loss(loss) before "
                "loss.backward(), or give the loss module to engine.attach(optimizer, criterion=...); the model must "
                "be in training mode"
            )

    def _names(self, step: int) -> list[str]:
        return [m.name for m in self._modifiers if m.has_loss_term(step)]


class AddTerms:
    """A forward hook on the criterion; an object and not a closure, so that the model pickles."""

    def __init__(self, terms: LossTerms) -> None:
        self._terms = terms

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self._terms.add(output)
