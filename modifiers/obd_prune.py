"""Optimal brain damage (LeCun et al. 1990) with the empirical Fisher's diagonal, also called WF-1."""

from typing import ClassVar

from pydantic import Field, PositiveFloat

from ovit_engine import register
from ovit_engine.bases.gradient_pruner import SecondOrderPruner
from ovit_engine.pruning import PruneOptions


@register("obd_prune")
class ObdPrune(SecondOrderPruner):
    """Prunes by squared weight times mean squared gradient; what stays is not moved."""

    method: ClassVar[str] = "obd"

    damp: PositiveFloat = Field(1e-6, description="dampening, added to the mean squared gradient")

    def options(self) -> PruneOptions:
        return {"damp": self.damp}
