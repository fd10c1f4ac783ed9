"""oBERT, or WoodFisher (Kurtic et al. 2022, Singh and Alistarh 2020): every weight scored as if it went alone."""

from typing import ClassVar

from ovit_engine import register
from ovit_engine.bases.gradient_pruner import BrainSurgeon


@register("obert_prune")
class ObertPrune(BrainSurgeon):
    """Prunes by second-order scores of single weights, or of the tiles of a block pattern, and updates what stays."""

    method: ClassVar[str] = "obert"
