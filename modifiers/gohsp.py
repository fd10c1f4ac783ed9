"""GOHSP (Yin et al., AAAI 2023): heads ranked by a walk over their similarities, then soft and hard pruning.

Only the outline is published where we could read it; similarities, penalties and their growth are our reconstruction
(specs/structured-and-tokens.md §6.2). Heads that rank last are drawn to zero by a quadratic penalty, and so are all but
so many units of each MLP, by ADMM; then gates switch both off, and training goes on.
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from ovit_engine import Claim, Clock, Modifier, Row, Run, Time, register, whole_model
from ovit_engine.bases.amounts import Sparsity
from ovit_engine.distributed.comm import world
from ovit_engine.modifiers._gates import GateModifier, count_parameters
from ovit_engine.modifiers._gohsp_options import BATCH, Penalty, Ranking
from ovit_engine.modifiers._soft_phase import SoftPhase
from ovit_engine.structured.gates import GateSite, Kind
from ovit_engine.structured.ranking import Statistics, find_ranker
from ovit_engine.structured.recording import Tally
from ovit_engine.structured.selection import kept_count, spread_evenly
from ovit_engine.structured.similarity import OutputTally, mean_similarity, watched

log = logging.getLogger(__name__)

_LEFT = 0.2  # of the norm: with more of it left, hard pruning is no small change


class _Steps(NamedTuple):
    start: int
    end: int
    every: int


@register("gohsp")
class Gohsp(GateModifier):
    """Removes heads and MLP units in four phases: rank heads, draw what goes to zero, switch it off, fine-tune.

    Each block keeps at least one head and one unit. The pull on what goes is added to the gradients as the optimizer
    steps, after a loop has clipped them, and so depends on no loss.
    """

    start: Time = Field("0ep", description="time at which heads are ranked and soft pruning begins")
    end: Time = Field(description="time of hard pruning; the rest of training fine-tunes")
    every: Time = Field("1ep", description="time between updates of which units go, and of how hard penalties pull")
    head_sparsity: Sparsity | None = Field(None, description="share of the heads of each block that go")
    unit_sparsity: Sparsity | None = Field(None, description="share of the hidden units of each MLP that go")
    parameter_sparsity: Sparsity | None = Field(
        None,
        description="in place of both: share of all parameters of the model that go at least, spread evenly over the "
        "blocks, over heads and over units",
    )
    rank: Ranking = Field(default_factory=Ranking, description="how heads are ranked")
    penalty: Penalty = Field(default_factory=Penalty, description="how hard soft pruning pulls")

    _times: _Steps = PrivateAttr(default=_Steps(0, 0, 1))
    _soft: int = PrivateAttr(default=0)  # the step at which soft pruning begins: after heads are ranked
    _phase: SoftPhase | None = PrivateAttr(default=None)
    _planned_at: int = PrivateAttr(default=-1)  # the step at which the phase last chose what goes

    @model_validator(mode="after")
    def _consistent(self) -> "Gohsp":
        apart = [share for share in (self.head_sparsity, self.unit_sparsity) if share is not None]
        if self.parameter_sparsity is not None and apart:
            raise ValueError("'parameter_sparsity' stands for heads and units: leave out the shares of each")
        if self.parameter_sparsity is None and not apart:
            raise ValueError("nothing to prune: give 'head_sparsity', 'unit_sparsity' or 'parameter_sparsity'")
        if "rank" in self.model_fields_set and "heads" not in self.kinds():
            raise ValueError("'rank' is of heads, and none go: give 'head_sparsity', or leave it out")
        for kind in ("heads", "units"):
            if kind in self.penalty.model_fields_set and kind not in self.kinds():
                raise ValueError(f"'penalty' has a value for {kind}, of which none go")
        return self

    def kinds(self) -> Sequence[Kind]:
        if self.parameter_sparsity is not None:
            return ("heads", "units")
        shares: dict[Kind, float | None] = {"heads": self.head_sparsity, "units": self.unit_sparsity}
        return [kind for kind, share in shares.items() if share is not None]

    def times(self, clock: Clock) -> _Steps:
        """The steps of ranking and hard pruning, and the steps between updates."""
        start, end, every = clock.steps(self.start), self.time_of(clock, "end"), self.interval_of(clock, "every")
        ranked = start + self._window_steps(calibrated=True)
        if ranked >= end:
            what = f"the start at {self.start!r}" + f" and {ranked - start} steps of ranking" * (ranked > start)
            raise self.error(f"{self.end!r}, step {end}, leaves no step of soft pruning after {what}", "end")
        return _Steps(start, end, every)

    def _window_steps(self, *, calibrated: bool) -> int:
        """How many training steps tell what the ranker needs."""
        needs = find_ranker(self.rank.score).needs if "heads" in self.kinds() else "nothing"
        return self.rank.steps if needs == "gradients" or (needs == "outputs" and not calibrated) else 0

    def timeline(self, clock: Clock) -> Iterable[Row]:
        start, end, _ = self.times(clock)
        by = f" by {self.rank.score}" if "heads" in self.kinds() else ""
        yield start, "gohsp", f"ranking{by}, then soft pruning"
        if self.parameter_sparsity is not None:
            yield end, "parameters", f"{self.parameter_sparsity:.2%} off ({self.name})"
        for kind, share in (("heads", self.head_sparsity), ("units", self.unit_sparsity)):
            if share is not None:
                yield end, kind, f"{share:.2%} off ({self.name})"

    def changes(self, clock: Clock) -> Iterable[int]:
        return (self.times(clock).end,)

    def prepare(self, run: Run) -> None:
        self._times = self.times(run.clock)
        super().prepare(run)

    def coordinate(self, run: Run, modifiers: Sequence[Modifier]) -> None:
        super().coordinate(run, modifiers)
        kept = dict(zip((site.name for site in self._sites), self._counts(run), strict=True))
        self._phase = SoftPhase(self._sites, self._groups, kept, self.penalty)

    @property
    def _soft_phase(self) -> SoftPhase:
        assert self._phase is not None
        return self._phase

    def _counts(self, run: Run) -> list[int]:
        """How many groups of heads and units of each site are kept."""
        whole = [(site, self.groups(site)) for site in self._sites]
        if self.parameter_sparsity is None:
            shares = {"heads": self.head_sparsity or 0.0, "units": self.unit_sparsity or 0.0}
            for site, _ in whole:
                self.check_reach([site], shares[site.kind], f"{site.kind[:-1]}_sparsity")
            return [kept_count(groups.number, shares[site.kind]) for site, groups in whole]
        total = count_parameters(run.model)
        # a group counts as one head or unit that is so many times as wide
        sites = [replace(site, count=groups.number, width=site.width * groups.size) for site, groups in whole]
        try:
            return spread_evenly(sites, math.ceil(Fraction(repr(self.parameter_sparsity)) * total))
        except ValueError as error:
            share = self.parameter_sparsity
            raise self.error(f"{share:g} of {total} is out of reach: {error}", "parameter_sparsity") from None

    def kept_each(self, run: Run) -> dict[str, int]:
        counts = zip(self._sites, self._counts(run), strict=True)
        return {site.name: self.groups(site).members(number) for site, number in counts}

    def claims(self, run: Run) -> Iterable[Claim]:
        for site in self._sites:
            yield Claim("gate", site.name, self._times.start, self._times.end)

    def recorded(self) -> Sequence[GateSite]:
        return self.sites("heads")

    def tally(self, site: GateSite) -> Tally:
        if find_ranker(self.rank.score).needs == "gradients":
            return super().tally(site)
        return OutputTally(site, self.rank.kernel, self.rank.temperature)

    def attach(self, run: Run) -> None:
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in run.optimizers):
            raise self.error("penalties are added to the gradients of a step, and LBFGS takes several gradients in one")
        if self._done < 0:
            start, end, _ = self._times
            window = self._window_steps(calibrated=run.calibration is not None)
            self._soft = start + window
            if self._soft >= end:
                raise self.error(
                    f"without calibration heads are ranked by {window} training steps, after which {self.end!r} leaves "
                    "none: attach(optimizer, calibration=Calibration(loader, loss_fn))",
                    "end",
                )
            self._scored, self._window = [self._soft] if window else [], window
        self._soft_phase.place()
        super().attach(run)

    def detach(self, run: Run) -> None:
        super().detach(run)
        if self._done < self._times.end:
            self.finish_late(run, f"hard pruning at step {self._times.end}")
            self._cut(run)

    def _act(self, run: Run) -> None:
        _, end, every = self._times
        if self._done >= end:
            return
        if run.step >= end:
            self._cut(run)
        elif self._done < 0 and run.step >= self._soft:
            self._soften(run)
        elif self._done >= 0:
            due = self._soft + (run.step - self._soft) // every * every
            if due > self._done:
                self._update(run)
                self._done = due

    # --- rank

    def _soften(self, run: Run) -> None:
        """Say which heads and units go, and begin to draw them to zero."""
        phase = self._soft_phase
        phase.begin(self._head_scores(run))
        self._planned_at = run.step
        self._log(run, "residual", phase.residuals())
        self._sums, self._done = {}, self._soft

    def synchronized(self, run: Run) -> Mapping[str, Tensor]:
        plan = self._soft_phase.plan if self._planned_at == run.step else {}
        return {**super().synchronized(run), **{f"which of {name!r} stay": keep for name, keep in plan.items()}}

    def _log(self, run: Run, what: str, values: Mapping[Kind, float]) -> None:
        for kind, value in values.items():
            run.log(f"{self.name}/{kind}_{what}", value)

    def _head_scores(self, run: Run) -> dict[str, Tensor]:
        ranker, sites = find_ranker(self.rank.score), self.sites("heads")
        similarity = self._similarities(run, sites) if ranker.needs == "outputs" and sites else {}
        scores = {}
        for site in sites:
            gradients = self.scores(site) if ranker.needs == "gradients" else None
            known = Statistics(gradients=gradients, similarity=similarity.get(site.name), seed=self.rank.seed)
            with self.errors_at("rank", site.owner_name):
                found = ranker.scores(site, known)
            scores[site.name] = -found if self.rank.invert else found
            log.info("%s: %s of the heads of %s: %s", self.name, self.rank.score, site.owner_name, found.tolist())
        return scores

    def _similarities(self, run: Run, sites: Sequence[GateSite]) -> dict[str, Tensor]:
        """Of head outputs on calibration images, which processes share, or of those that training showed."""
        sums: Mapping[str, Tensor] = self._sums
        if not self._window:
            assert run.calibration is not None
            comm = world()
            watch = watched(sites, self.rank.kernel, self.rank.temperature)
            share = (comm.rank, comm.count)
            with whole_model(run.model) as model, comm.fail_together(), watch as sums:
                run.calibration.forward(model, count=self.rank.batches, images=BATCH, draw=run.step, share=share)
            for each in sums.values():
                comm.sum(each)
        if not sums:
            raise self.error("no outputs of heads were recorded: training ended before the steps that would tell them")
        with self.errors_at("rank"):
            return {site.name: mean_similarity(site, sums[site.name]) for site in sites}

    # --- soft

    def step_begin(self, run: Run) -> None:
        """Add the gradients of the penalties."""
        phase = self._soft_phase
        if not phase.plan:
            return
        if not phase.rates:
            phase.start_rates(run)
            self._log(run, "penalty", phase.rates)
        with self.errors_at():
            phase.add_gradients(run.grad_scale)

    def _update(self, run: Run) -> None:
        self._log(run, "residual", self._soft_phase.update())
        self._log(run, "penalty", self._soft_phase.rates)
        self._planned_at = run.step

    # --- hard

    def _cut(self, run: Run) -> None:
        """Switch off what goes, and free what soft pruning needed."""
        phase = self._soft_phase
        if not phase.plan:
            self._soften(run)
        left = phase.residuals()
        self._log(run, "residual", left)
        for kind, value in left.items():
            if value > _LEFT:
                cut = f"{value:.0%} of the norm of {kind} is cut at step {run.step}"
                log.warning("%s: %s: soft pruning was too short, or its penalty too small", self.name, cut)
        self.write(run, phase.plan)
        phase.clear()
        self._done = self._times.end

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "soft": self._soft, "phase": self._soft_phase.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._soft = state["soft"]
        self._soft_phase.load_state_dict(state["phase"])
