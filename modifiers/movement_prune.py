"""Movement pruning: weights that training moves towards zero go first.

The score of a weight is -sum of weight x gradient over all training steps so far, one term before each optimizer step,
as SparseML has it: scores are not learned through the mask, and what is pruned does not return (unlike Sanh et al.
2020).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

from ovit_engine import Clock, Pruner, Run, Slot, register
from ovit_engine.bases.amounts import SparsitySteps
from ovit_engine.core.saved import place_saved


@register("movement_prune")
class MovementPrune(Pruner):
    """Prunes the weights that moved least away from zero since training began; what stays is not moved."""

    needs_training: ClassVar[bool] = True

    _scores: dict[str, Tensor] = PrivateAttr(default_factory=dict)

    def events(self, clock: Clock) -> dict[int, float | None]:
        events = super().events(clock)
        if 0 in events:
            option = "sparsity" if isinstance(self.sparsity, SparsitySteps) else "start"
            raise self.error("at step 0 nothing has moved yet: prune later", option)
        return events

    def attach(self, run: Run) -> None:
        places = {slot.name: slot.tensor.device for slot in self._slots}  # the model may have moved since a load
        self._scores = {name: score.to(places[name]) for name, score in self._scores.items()}
        super().attach(run)

    def step_begin(self, run: Run) -> None:
        if run.step >= max(self._events):
            return
        for slot, gradient in zip(self._slots, self.training_gradients(run), strict=True):
            if slot.name not in self._scores:
                self._scores[slot.name] = torch.zeros_like(gradient, dtype=torch.float32)
            self._scores[slot.name].addcmul_(slot.gather().float(), gradient.float(), value=-1)

    def scores(self, run: Run, slots: Sequence[Slot]) -> list[Tensor]:
        return [self._scores[slot.name] for slot in slots]

    def state_dict(self) -> dict[str, Any]:
        scores = {
            slot.name: self._scores[slot.name].clone()
            if slot.name in self._scores
            else torch.zeros(slot.tensor.shape, dtype=torch.float32)  # before the first step
            for slot in self._slots
        }
        return {**super().state_dict(), "scores": scores}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        targets = {slot.name: slot.tensor for slot in self._slots}
        self._scores = place_saved(state["scores"], targets, "scores", complete=True)
