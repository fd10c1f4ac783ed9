"""Heads and hidden units that weight pruning left without effect are removed from the exported file."""

from collections.abc import Iterable

from ovit_engine import Clock, Deployable, Row, Run, Scheduled, register
from ovit_engine.structured.shrink_model import known_sites


@register("shrink")
class Shrink(Scheduled, Deployable):
    """Export removes the attention heads and MLP units that weight pruning left without effect.

    At 90 % sparsity whole rows and columns are zero: such a unit only costs time. Constants that it added move into a
    bias, the copy that is exported computes the same in float64, and the certificate says what was removed. Training
    sees nothing of it. Heads and units behind gates (structured pruners) are removed without this line.
    """

    removes_units = removes_dead = True

    def prepare(self, run: Run) -> None:
        with self.errors_at():
            known_sites(run.model)

    def timeline(self, clock: Clock) -> Iterable[Row]:
        yield clock.total_steps, "export", "heads and units without effect are removed"
