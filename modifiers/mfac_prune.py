"""M-FAC (Frantar et al. 2021): oBERT on large Fisher blocks, whose inverse is never formed."""

from typing import ClassVar

from pydantic import Field

from ovit_engine import register
from ovit_engine.bases.gradient_pruner import BrainSurgeon
from ovit_engine.pruning import LARGEST_BLOCK


@register("mfac_prune")
class MfacPrune(BrainSurgeon):
    """Prunes as obert_prune does, from all gradients kept in memory instead of an inverse Fisher matrix."""

    method: ClassVar[str] = "mfac"

    block: int = Field(
        2048, ge=1, le=LARGEST_BLOCK, description="size of a Fisher block; memory is weights x gradients all the same"
    )

    def part_sparsity(self, present: float, final: float, part: int) -> float:
        """Density falls geometrically, as published: (1 - s_j) = (1 - s_0) ((1 - s_1) / (1 - s_0))^(j / R)."""
        if present >= final:
            return final
        ratio = (1 - final) / (1 - present)
        return 1 - (1 - present) * float(ratio ** (part / self.recomputations))
