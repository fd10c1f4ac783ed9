"""AC/DC (Peste et al. 2021, arXiv 2106.12379): training that alternates sparse and dense phases and ends sparse."""

from collections.abc import Iterable
from typing import Literal

import torch
from pydantic import Field, PrivateAttr, model_validator

from ovit_engine import Claim, Clock, Row, Run, Time, register
from ovit_engine.bases.amounts import Sparsity
from ovit_engine.bases.pruner import Masking
from ovit_engine.core.loggers import sparsity_name
from ovit_engine.modifiers._updates import forget
from ovit_engine.pruning import prune_tensors

Phase = Literal["sparse", "dense"]


@register("acdc")
class Acdc(Masking):
    """Alternates magnitude-pruned phases with dense ones, in which pruned weights start again from zero.

    Sparse first, `every` long each; then one more sparse phase, a last dense and a last sparse one. What does not
    divide lengthens the last.
    """

    start: Time = Field("0ep", description="time of the first sparse phase; before it training is dense")
    end: Time = Field("100%", description="end of the last sparse phase; its mask stays")
    every: Time = Field(description="length of a phase")
    last_dense: Time | None = Field(None, description="length of the last dense phase; as the others if left out")
    last_sparse: Time | None = Field(None, description="length of the last sparse phase; as the others if left out")
    sparsity: Sparsity | None = Field(None, description="share of zeros in sparse phases; N:M implies its own")

    _phases: dict[int, Phase] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "Acdc":
        self.pattern.resolve(self.sparsity)
        return self

    def phases(self, clock: Clock) -> dict[int, Phase]:
        """First step of each phase, in the order of time."""
        start, end, every = clock.steps(self.start), self.time_of(clock, "end"), self.interval_of(clock, "every")
        last_dense = every if self.last_dense is None else clock.steps(self.last_dense)
        last_sparse = every if self.last_sparse is None else clock.steps(self.last_sparse)
        pairs, _ = divmod(end - start - every - last_dense - last_sparse, 2 * every)
        if pairs < 0:
            raise self.too_short(
                f"{end - start} steps from start to end do not hold a sparse phase of {every}, a dense one of "
                f"{last_dense} and a last sparse one of {last_sparse}",
                "every",
            )
        starts = [start + number * every for number in range(2 * pairs + 2)]
        phases: dict[int, Phase] = {step: "dense" if number % 2 else "sparse" for number, step in enumerate(starts)}
        return {**phases, starts[-1] + last_dense: "sparse"}

    def timeline(self, clock: Clock) -> Iterable[Row]:
        for step, phase in self.phases(clock).items():
            yield step, "sparsity", self.describe(self.sparsity) if phase == "sparse" else f"dense ({self.name})"

    def changes(self, clock: Clock) -> Iterable[int]:
        return self.phases(clock)

    def prepare(self, run: Run) -> None:
        self._phases = self.phases(run.clock)
        super().prepare(run)

    def claims(self, run: Run) -> Iterable[Claim]:
        for slot in self._slots:
            yield Claim("mask", slot.name, min(self._phases), run.clock.steps(self.end))
        yield from self.gate_claims(run, 0)  # its sparsity is of all weights

    def detach(self, run: Run) -> None:
        late = [step for step in self._phases if step > self._done]
        if late:
            self.finish_late(run, f"the last sparse phase at step {late[-1]}")
            self._compress(run)

    def _act(self, run: Run) -> None:
        step = self.due(run, self._phases)
        if step is None:
            return
        if self._phases[step] == "sparse":
            self._compress(run)
        else:
            self._decompress(run)
        self._done = step

    def _compress(self, run: Run) -> None:
        """Prune by magnitude, whatever was pruned in earlier phases."""
        masks, weights = prune_tensors(
            [slot.gather() for slot in self._slots],
            None,
            method="magnitude",
            sparsity=self.sparsity,
            scope=self.scope,
            pattern=self.pattern,
        )
        self.write(run, masks, weights)

    def _decompress(self, run: Run) -> None:
        """Free all weights; those that were zero have no past in the optimizer."""
        for slot, mask in zip(self._slots, self.present_masks(run), strict=True):
            forget(run.optimizers, slot, ~mask)
            run.masks.set(slot, torch.ones_like(mask))
        run.log(sparsity_name(self.name), 0.0)
