"""S2ViTE (Chen et al. 2021, arXiv 2106.04533, section 3.2): training with part of the heads and units, which change.

The published code zeroes the weights of what is off, and so never revives an MLP unit: row, column and bias then have
no gradient at all. Here a gate multiplies heads and units, whose gradient is known of what is off as well; `official`
options are the published rules (specs/structured-and-tokens.md §3).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PrivateAttr, model_validator
from torch import Tensor

from ovit_engine import Claim, Clock, Modifier, Row, Run, register
from ovit_engine.bases.amounts import Sparsity
from ovit_engine.core.saved import place_saved
from ovit_engine.distributed.sharding import gathered
from ovit_engine.modifiers._gates import GateModifier
from ovit_engine.modifiers._updates import UpdatingModifier
from ovit_engine.structured.gates import GateSite, Kind
from ovit_engine.structured.ranking import Statistics, find_ranker
from ovit_engine.structured.selection import keep_best, kept_count, swap, swap_count


@register("s2vite")
class S2Vite(UpdatingModifier, GateModifier):
    """Trains with a share of the heads and MLP units switched off; at each update the least important change places.

    Each layer keeps as many as it started with: its share rounded down, as in the published code. Weights of what is
    off stay (only weight decay moves them), and removal at export changes nothing else.
    """

    head_sparsity: Sparsity | None = Field(None, description="share of the heads of each block that is off")
    unit_sparsity: Sparsity | None = Field(None, description="share of the hidden units of each MLP that is off")
    min_swap: NonNegativeInt = Field(
        1, description="how many move at least in each layer; 0 rounds the share down, so that at last none does"
    )
    score: Literal["gate", "official"] = Field(
        "gate", description="gate: by gradients of gates; official: heads come by |gradient|, units go by |weight|"
    )
    mlp_growth: Literal["gate", "official"] = Field(
        "gate", description="units come by gradients of gates; official: of their weights, which revives none"
    )
    seed: int = Field(0, ge=0, description="of the heads and units that are on at first")

    _updates: range = PrivateAttr(default=range(0))
    _gains: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # |weight gradient| of units at the last step
    _ever: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # what was on at any time

    @model_validator(mode="after")
    def _consistent(self) -> "S2Vite":
        if self.head_sparsity is None and self.unit_sparsity is None:
            raise ValueError("nothing to switch off: give 'head_sparsity', 'unit_sparsity' or both")
        if self.unit_sparsity is None and "mlp_growth" in self.model_fields_set:
            raise ValueError("'mlp_growth' goes with 'unit_sparsity': no units are switched")
        return self

    def kinds(self) -> Sequence[Kind]:
        shares: dict[Kind, float | None] = {"heads": self.head_sparsity, "units": self.unit_sparsity}
        return [kind for kind, share in shares.items() if share is not None]

    def timeline(self, clock: Clock) -> Iterable[Row]:
        updates = self.updates(clock)
        for kind in self.kinds():
            yield 0, kind, f"{self._sparsity(kind):.2%} off ({self.name}), at random"
            yield updates[0], kind, f"{self.share(updates[0], clock):.2%} change, and again every {self.every}"
            yield updates[-1], kind, f"{self.share(updates[-1], clock):.2%} change, a last time"

    def changes(self, clock: Clock) -> Iterable[int]:
        return (0, *self.updates(clock))

    def prepare(self, run: Run) -> None:
        self._updates = self.updates(run.clock)
        self._scored, self._window = list(self._updates), self.gradients
        super().prepare(run)

    def coordinate(self, run: Run, modifiers: Sequence[Modifier]) -> None:
        super().coordinate(run, modifiers)
        for site in self._sites:
            self.check_reach([site], self._sparsity(site.kind), f"{site.kind[:-1]}_sparsity")

    def kept_each(self, run: Run) -> dict[str, int]:
        groups = {site.name: self.groups(site) for site in self._sites}
        kept = {site.name: kept_count(groups[site.name].number, self._sparsity(site.kind)) for site in self._sites}
        return {name: groups[name].members(number) for name, number in kept.items()}

    def claims(self, run: Run) -> Iterable[Claim]:
        for site in self._sites:
            yield Claim("gate", site.name, 0, self._updates[-1])

    def step_begin(self, run: Run) -> None:
        if run.step + 1 in self._updates and self.mlp_growth == "official":
            self._gains = {site.name: self._weight_gain(run, site) for site in self.sites("units")}

    def detach(self, run: Run) -> None:
        super().detach(run)
        if self._done < self._updates[-1]:
            self.finish_late(run, "freezing the gates")

    def _act(self, run: Run) -> None:
        if self._done < 0:
            self._start(run)
        step = min(run.step // self._updates.step * self._updates.step, self._updates[-1])
        if step > self._done:
            self._update(run, step)

    def _start(self, run: Run) -> None:
        random, keeps = find_ranker("random"), {}
        for site in self._sites:
            groups = self.groups(site)
            scores = groups.of_scores(random.scores(site, Statistics(seed=self.seed)))
            kept = kept_count(groups.number, self._sparsity(site.kind))
            (keep,) = keep_best([groups.of_gate(torch.ones_like(site.gate))], [scores], kept)
            keeps[site.name] = groups.spread(keep)
        self._ever = {name: torch.zeros_like(keep) for name, keep in keeps.items()}
        self._finish(run, keeps, 0)

    def _update(self, run: Run, step: int) -> None:
        """Swap in all layers, or where one of them has no scores in none."""
        share, keeps = self.share(step, run.clock), {}
        for site in self._sites:
            groups = self.groups(site)
            drop, grow = groups.of_scores(self._drop_score(site)), groups.of_scores(self._grow_score(site))
            gate = groups.of_gate(site.gate)
            count = swap_count(int(gate.sum()), share, self.min_swap)
            keeps[site.name] = groups.spread(swap(gate, drop, grow, count))
        self._finish(run, keeps, step)

    def _finish(self, run: Run, keeps: Mapping[str, Tensor], step: int) -> None:
        self.write(run, keeps)
        self._ever = {name: self._ever[name].to(keep.device) | keep for name, keep in keeps.items()}
        self._gains, self._done = {}, step
        for kind in self.kinds():
            ever = torch.cat([self._ever[site.name].cpu() for site in self.sites(kind)])
            run.log(f"{self.name}/{kind}_ever_on", float(ever.float().mean()))

    def _drop_score(self, site: GateSite) -> Tensor:
        if self.score == "official" and site.kind == "units":
            return find_ranker("l1").scores(site, Statistics())
        return self.scores(site).importance

    def _grow_score(self, site: GateSite) -> Tensor:
        if site.kind == "units":
            return self.scores(site).importance if self.mlp_growth == "gate" else self._gains[site.name]
        scores = self.scores(site)
        return scores.importance if self.score == "gate" else scores.growth

    def _weight_gain(self, run: Run, site: GateSite) -> Tensor:
        """Sum of |gradient| over a unit's row of fc1 and column of fc2."""
        sums = []
        for slot, layout in site.weights:
            gradient = run.gradient(slot)
            if gradient is None:
                raise self.error(f"{slot.name!r} gets no gradient from the training loss", "mlp_growth")
            sums.append(layout.sums(gathered(gradient).abs()))
        return sums[0] + sums[1]

    def _sparsity(self, kind: Kind) -> float:
        share = self.head_sparsity if kind == "heads" else self.unit_sparsity
        assert share is not None
        return share

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ever": {name: ever.clone() for name, ever in self._ever.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._ever = place_saved(state["ever"], {site.name: site.gate for site in self._sites}, "record")
