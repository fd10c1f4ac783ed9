"""Pruning by magnitude: the baseline (Han et al. 2015; gradual: Zhu and Gupta 2017)."""

from collections.abc import Sequence

from torch import Tensor

from ovit_engine import Pruner, Run, Slot, register


@register("magnitude_prune")
class MagnitudePrune(Pruner):
    """Prunes the weights of smallest absolute value, over all targets or in each."""

    def scores(self, run: Run, slots: Sequence[Slot]) -> list[Tensor]:
        return [slot.gather().abs().float() for slot in slots]
