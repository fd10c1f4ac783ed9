"""S2ViTE (Chen et al. 2021, arXiv 2106.04533, section 3.2): training with part of the heads and units, which change.

The published code zeroes the weights of what is off, and so never revives an MLP unit: row, column and bias then have
no gradient at all. Here a gate multiplies heads and units, whose gradient is known of what is off as well; `official`
options are the published rules (specs/structured-and-tokens.md §3).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt, PrivateAttr, model_validator
from torch import Tensor
from torch.distributed.tensor import DTensor

from ovit_engine.gate_choice import keep_best, kept_count, swap, swap_count
from ovit_engine.gate_ranking import Statistics, find_ranker
from ovit_engine.gates import GateSite, Kind
from ovit_engine.modifier import Claim, Run, Time
from ovit_engine.modifiers._amount import Sparsity
from ovit_engine.modifiers._gates import GateModifier
from ovit_engine.registry import register
from ovit_engine.schedule import Clock, Schedule
from ovit_engine.targets import Slot


@register("s2vite")
class S2Vite(GateModifier):
    """Trains with a share of the heads and MLP units switched off; at each update the least important change places.

    Each layer keeps as many as it started with: its share rounded down, as in the published code. Weights of what is
    off stay (only weight decay moves them), and removal at export changes nothing else.
    """

    head_sparsity: Sparsity | None = Field(None, description="share of the heads of each block that is off")
    unit_sparsity: Sparsity | None = Field(None, description="share of the hidden units of each MLP that is off")
    every: Time = Field(description="time between two updates, in which heads and units change places")
    end: Time = Field("80%", description="time from which they stay")
    drop: float = Field(0.5, gt=0, le=1, description="share of what is on that an update moves, at the start")
    drop_end: float = Field(
        0.005, ge=0, le=1, description="the same at the end of training, to which a cosine leads; end may come before"
    )
    min_swap: NonNegativeInt = Field(
        1, description="how many move at least in each layer; 0 rounds the share down, so that at last none does"
    )
    score: Literal["gate", "official"] = Field(
        "gate", description="gate: by gradients of gates; official: heads come by |gradient|, units go by |weight|"
    )
    mlp_growth: Literal["gate", "official"] = Field(
        "gate", description="units come by gradients of gates; official: of their weights, which revives none"
    )
    gradients: PositiveInt = Field(1, description="steps before an update whose gradients count")
    seed: int = Field(0, ge=0, description="of the heads and units that are on at first")

    _updates: range = PrivateAttr(default=range(0))
    _gains: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # |weight gradient| of units at the last step
    _ever: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # what was on at any time

    @model_validator(mode="after")
    def _consistent(self) -> "S2Vite":
        if self.head_sparsity is None and self.unit_sparsity is None:
            raise ValueError("nothing to switch off: give 'head_sparsity', 'unit_sparsity' or both")
        if self.drop_end > self.drop:
            raise ValueError(f"the share that moves falls: 'drop' is {self.drop:g}, 'drop_end' {self.drop_end:g}")
        return self

    def kinds(self) -> Sequence[Kind]:
        shares: dict[Kind, float | None] = {"heads": self.head_sparsity, "units": self.unit_sparsity}
        return [kind for kind, share in shares.items() if share is not None]

    def updates(self, clock: Clock) -> range:
        """The steps at whose end heads and units change places."""
        every, end = clock.steps(self.every), clock.steps(self.end)
        self.check_end(clock, end, "end")
        if every < 1:
            raise self.error(f"{self.every!r} is less than a step of {clock.steps_per_epoch} steps an epoch", "every")
        if every >= end:
            raise self.error(f"no update comes before the end at {self.end!r}, step {end}: update more often", "every")
        if self.gradients > every:
            raise self.error(f"{self.gradients} gradients are more than the {every} steps between updates", "gradients")
        return range(every, end, every)

    def share(self, step: int, clock: Clock) -> float:
        """Which share of what is on each layer changes in an update at `step`."""
        return Schedule(self.drop, self.drop_end, "cosine").value(step / clock.total_steps)

    def timeline(self, clock: Clock) -> Iterable[tuple[int, str, str]]:
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

    def claims(self, run: Run) -> Iterable[Claim]:
        for site in self._sites:
            yield Claim(f"the gate of {site.name}", 0, self._updates[-1])

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
        random = find_ranker("random").score
        keeps = {}
        for site in self._sites:
            scores = random(site, Statistics(seed=self.seed))
            kept = kept_count(site.count, self._sparsity(site.kind))
            (keeps[site.name],) = keep_best([torch.ones_like(site.gate)], [scores], kept)
        self._ever = {name: torch.zeros_like(keep) for name, keep in keeps.items()}
        self._finish(run, keeps, 0)

    def _update(self, run: Run, step: int) -> None:
        """Swap in all layers, or where one of them has no scores in none."""
        share, keeps = self.share(step, run.clock), {}
        for site in self._sites:
            count = swap_count(int(site.gate.sum()), share, self.min_swap)
            keeps[site.name] = swap(site.gate, self._drop_score(site), self._grow_score(site), count)
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
            return find_ranker("l1").score(site, Statistics())
        return self.scores(site).importance

    def _grow_score(self, site: GateSite) -> Tensor:
        if site.kind == "units":
            return self.scores(site).importance if self.mlp_growth == "gate" else self._gains[site.name]
        scores = self.scores(site)
        return scores.importance if self.score == "gate" else scores.growth

    def _weight_gain(self, run: Run, site: GateSite) -> Tensor:
        """Sum of |gradient| over a unit's row of fc1 and column of fc2."""
        sums = []
        for name, module, axis in ((site.source_name, site.source, 1), (site.name, site.linear, 0)):
            gradient = run.gradient(Slot(f"{name}.weight", module, "weight"))
            if gradient is None:
                raise self.error(f"{name + '.weight'!r} gets no gradient from the training loss", "mlp_growth")
            whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
            sums.append(whole.float().abs().sum(axis))
        return sums[0] + sums[1]

    def _sparsity(self, kind: Kind) -> float:
        share = self.head_sparsity if kind == "heads" else self.unit_sparsity
        assert share is not None
        return share

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ever": {name: ever.clone() for name, ever in self._ever.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        for name, ever in state["ever"].items():
            if name not in state["gates"] or ever.shape != state["gates"][name].shape:
                raise ValueError(f"the checkpoint's record of {name!r} {list(ever.shape)} fits no gate here")
        self._ever = {name: ever.clone() for name, ever in state["ever"].items()}
