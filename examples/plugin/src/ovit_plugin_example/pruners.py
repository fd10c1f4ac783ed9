"""Relative importance without activations: the weight part of RIA (Zhang et al., "Plug-and-Play", ICLR 2024)."""

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from ovit_engine import Pruner, Run, Slot, register

TINY = torch.finfo(torch.float32).tiny


def relative_importance(weight: Tensor) -> Tensor:
    """Return |w| as a share of its output channel plus |w| as a share of its input."""
    sizes = weight.float().abs().flatten(1)
    shares = sizes / sizes.sum(1, keepdim=True).clamp_min(TINY) + sizes / sizes.sum(0).clamp_min(TINY)
    return shares.reshape(weight.shape)


def rescale_rows(weight: Tensor, pruned: Tensor, strength: float) -> Tensor:
    """Return `pruned` with each output channel scaled towards its norm in `weight`."""
    before, after = weight.float().flatten(1).norm(dim=1), pruned.float().flatten(1).norm(dim=1)
    factors = torch.where(after > 0, before / after.clamp_min(TINY), 1.0) ** strength
    return pruned * factors.to(pruned.dtype).reshape(-1, *[1] * (pruned.dim() - 1))


@register("ria_prune")
class RiaPrune(Pruner):
    """Prunes the weights that are small beside those of their row and column."""

    def scores(self, run: Run, slots: Sequence[Slot]) -> list[Tensor]:
        return [relative_importance(slot.gather()) for slot in slots]


@register("ria_rescale_prune")
class RiaRescalePrune(RiaPrune):
    """Prunes like `ria_prune`, then scales up what is left of each row (an illustration of `solve`)."""

    strength: float = Field(1.0, ge=0, le=1, description="0 leaves the rows alone, 1 gives back their whole norm")

    def solve(self, run: Run, slots: Sequence[Slot], sparsity: float | None) -> tuple[list[Tensor], list[Tensor]]:
        masks, weights = super().solve(run, slots, sparsity)
        pairs = zip(slots, weights, strict=True)
        return masks, [rescale_rows(slot.gather(), weight, self.strength) for slot, weight in pairs]
