"""GrW: gradient times weight (oViT, arXiv 2210.09223, eq. 9)."""

from typing import ClassVar

from ovit_engine import register
from ovit_engine.bases.gradient_pruner import SecondOrderPruner
from ovit_engine.pruning import PruneOptions


@register("grad_weight_prune")
class GradWeightPrune(SecondOrderPruner):
    """Prunes by the sum of |weight x gradient| over mini-batches; what stays is not moved."""

    method: ClassVar[str] = "grad_weight"

    def options(self) -> PruneOptions:
        return {}
