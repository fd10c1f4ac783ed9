"""Pruning by magnitude: the baseline (Han et al. 2015; gradual: Zhu and Gupta 2017)."""

from collections.abc import Sequence

from torch import Tensor

from ovit_engine.core.modifier import Run
from ovit_engine.core.registry import register
from ovit_engine.masking.parameters import Slot
from ovit_engine.modifiers._pruning import PruningModifier
from ovit_engine.pruning import prune_tensors


@register("magnitude_prune")
class MagnitudePrune(PruningModifier):
    """Prunes the weights of smallest absolute value, over all targets or in each."""

    def solve(self, run: Run, slots: Sequence[Slot], sparsity: float | None) -> tuple[list[Tensor], list[Tensor]]:
        return prune_tensors(
            [slot.gather() for slot in slots],
            None,
            method="magnitude",
            sparsity=sparsity,
            scope=self.scope,
            pattern=self.pattern,
            masks=self.present_masks(run),
        )
