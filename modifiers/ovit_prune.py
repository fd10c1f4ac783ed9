"""oViT (published later as CAP): correlation-aware second-order pruning."""

from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat

from ovit_engine import register
from ovit_engine.bases.gradient_pruner import SecondOrderPruner
from ovit_engine.pruning import LARGEST_BLOCK, PruneOptions


@register("ovit_prune")
class OvitPrune(SecondOrderPruner):
    """Prunes by the greedy solver of oViT on a block-diagonal empirical Fisher, and updates the weights that stay."""

    method: ClassVar[str] = "ovit"

    block: int = Field(192, ge=1, le=LARGEST_BLOCK, description="size of a Fisher block")
    damp: PositiveFloat = Field(1e-8, description="dampening, lambda in eq. 3")
    rule: Literal["cumulative", "marginal"] = Field("cumulative", description="allocation over blocks: Alg. 1, or §3.2")

    def options(self) -> PruneOptions:
        return {"block": self.block, "damp": self.damp, "rule": self.rule}
