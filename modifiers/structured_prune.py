"""Structured pruning at once or step by step: heads and MLP units go by a score, and do not come back.

The baselines of the structured tables: magnitude at once (SOMP) and gradually (SGMP) with `score: l1`, Taylor (TP) and
salience (SSP-like).
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, PrivateAttr, model_validator
from torch import Tensor

from ovit_engine import Claim, Clock, Modifier, Row, Run, register
from ovit_engine.bases.amounts import Amount, Given, PruningSchedule, SparsitySteps, spelled
from ovit_engine.modifiers._gates import GateModifier, count_parameters
from ovit_engine.structured.gates import GateSite, Kind
from ovit_engine.structured.ranking import Statistics, find_ranker
from ovit_engine.structured.selection import keep_best, keep_within, kept_count

Budget = Literal["heads", "units", "parameters"]
Score = Annotated[str, AfterValidator(lambda name: find_ranker(name).name)]
_OPTIONS: dict[Budget, str] = {
    "heads": "head_sparsity",
    "units": "unit_sparsity",
    "parameters": "parameter_sparsity",
}


@register("structured_prune")
class StructuredPrune(PruningSchedule, GateModifier):
    """Switches off the heads and MLP units of lowest score, for good; export removes them.

    Each block keeps at least one head and one unit. Scores by gradient are means over the samples of the last training
    steps before a pruning step, so that one can't be at step 0.
    """

    head_sparsity: Amount | None = Field(
        None, description="share of heads that are off: a number, {from, to, curve}, or {time: number, ...}"
    )
    unit_sparsity: Amount | None = Field(None, description="the same of hidden units of the MLPs")
    parameter_sparsity: Amount | None = Field(
        None, description="in place of both: share of all parameters of the model that go with heads and units"
    )
    score: Score = Field(
        "taylor", description="which go: taylor, salience (both by training gradients), l1, random, or a ranker's name"
    )
    scope: Literal["global", "layer"] = Field(
        "global", description="rank the heads (or units) of all layers together, or take as many from each"
    )
    gradients: PositiveInt = Field(
        10,
        description="training steps before a pruning step whose gradients count, for scores by gradient; 10, or as "
        "many as there are, if left out",
    )
    seed: int = Field(0, ge=0, description="of a random score")

    _events: dict[Budget, dict[int, float]] = PrivateAttr(default_factory=dict)
    _steps: list[int] = PrivateAttr(default_factory=list)
    _total: int = PrivateAttr(default=0)  # parameters of the model

    @model_validator(mode="after")
    def _consistent(self) -> "StructuredPrune":
        amounts = self._amounts()
        if not amounts:
            raise ValueError("nothing to prune: give 'head_sparsity', 'unit_sparsity' or 'parameter_sparsity'")
        if "parameters" in amounts and len(amounts) > 1:
            raise ValueError("'parameter_sparsity' stands for heads and units: leave out the budgets of each")
        if "parameters" in amounts and "scope" in self.model_fields_set and self.scope == "layer":
            raise ValueError("'scope: layer' does not go with 'parameter_sparsity', which ranks all layers together")
        self.check_times(list(amounts.values()))
        ranker = find_ranker(self.score)
        if ranker.needs == "outputs":
            raise ValueError(f"score {self.score!r} needs outputs of heads, which are not recorded here")
        if unfit := [kind for kind in self.kinds() if kind not in ranker.kinds]:
            raise ValueError(f"score {self.score!r} ranks {' and '.join(ranker.kinds)}, not {unfit[0]}")
        if "gradients" in self.model_fields_set and ranker.needs != "gradients":
            raise ValueError(f"'gradients' does not go with score {self.score!r}, which takes none")
        if "seed" in self.model_fields_set and not ranker.seeded:
            raise ValueError(f"'seed' does not go with score {self.score!r}, in which nothing is random")
        return self

    def _amounts(self) -> dict[Budget, Given]:
        given = {budget: getattr(self, option) for budget, option in _OPTIONS.items()}
        return {budget: amount for budget, amount in given.items() if amount is not None}

    def kinds(self) -> Sequence[Kind]:
        amounts = self._amounts()
        both: tuple[Kind, ...] = ("heads", "units")
        return both if "parameters" in amounts else [kind for kind in both if kind in amounts]

    def events(self, clock: Clock) -> dict[Budget, dict[int, float]]:
        """By budget the pruning steps and the share that is off after each, in the order of time."""
        found: dict[Budget, dict[int, float]] = {}
        for budget, amount in self._amounts().items():
            steps = self.scheduled(clock, amount, _OPTIONS[budget])
            if 0 in steps and find_ranker(self.score).needs == "gradients":
                option = _OPTIONS[budget] if isinstance(amount, SparsitySteps) else "start"
                raise self.error(
                    f"at step 0 no gradient was seen, which score {self.score!r} needs: prune later", option
                )
            found[budget] = {step: share for step, share in steps.items() if share is not None}
        self._check_windows(sorted({step for steps in found.values() for step in steps}))
        return found

    def _check_windows(self, steps: Sequence[int]) -> None:
        """`gradients` that were asked for must find room before each pruning step."""
        if "gradients" not in self.model_fields_set:
            return
        before, after = min(pairwise([0, *steps]), key=lambda pair: pair[1] - pair[0])
        if after - before < self.gradients:
            raise self.error(
                f"{self.gradients} gradients are more than the {after - before} steps before the pruning step {after}",
                "gradients",
            )

    def timeline(self, clock: Clock) -> Iterable[Row]:
        for budget, steps in self.events(clock).items():
            for step, share in steps.items():
                yield step, budget, f"{share:.2%} off ({self.name}, {self.score})"

    def changes(self, clock: Clock) -> Iterable[int]:
        return sorted({step for steps in self.events(clock).values() for step in steps})

    def prepare(self, run: Run) -> None:
        self._events, self._steps = self.events(run.clock), list(self.changes(run.clock))
        if find_ranker(self.score).needs == "gradients":
            self._scored, self._window = self._steps, self.gradients
        super().prepare(run)
        self._total = count_parameters(run.model)

    def coordinate(self, run: Run, modifiers: Sequence[Modifier]) -> None:
        super().coordinate(run, modifiers)
        for budget, amount in self._amounts().items():
            for share in spelled(amount):
                if budget == "parameters":
                    self._check_parameters(share)
                elif self.scope == "global":
                    self.check_reach(self.sites(budget), share, _OPTIONS[budget])
                else:
                    for site in self.sites(budget):
                        self.check_reach([site], share, _OPTIONS[budget])

    def _check_parameters(self, share: float) -> None:
        reach = sum((site.count - self.groups(site).size) * site.parameters for site in self._sites) / self._total
        if share > reach:
            raise self.error(
                f"{share:g} is out of reach: with one head and one unit left in each block {reach:.4f} of the "
                f"{self._total} parameters are gone",
                "parameter_sparsity",
            )

    def kept_each(self, run: Run) -> dict[str, int]:
        if self.scope != "layer":
            return {}
        sizes = {site.name: self.groups(site) for site in self._sites}
        shares = {budget: max(spelled(amount)) for budget, amount in self._amounts().items()}
        kept = {site.name: kept_count(sizes[site.name].number, shares[site.kind]) for site in self._sites}
        return {name: sizes[name].members(number) for name, number in kept.items()}

    def outcome(self, run: Run) -> Iterable[str]:
        yield from super().outcome(run)
        for budget, amount in self._amounts().items():
            share = max(spelled(amount))
            if budget == "parameters":
                yield f"{int(share * self._total):,} of {self._total:,} parameters go at most"
            elif self.scope == "global":
                total, groups = sum(site.count for site in self.sites(budget)), map(self.groups, self.sites(budget))
                least = "at least " * any(each.size > 1 for each in groups)
                left = kept_count(total, share)
                yield f"{least}{left} of {total} {budget} left in all blocks together, {1 - left / total:.2%} off"

    def claims(self, run: Run) -> Iterable[Claim]:
        for site in self._sites:
            yield Claim("gate", site.name, self.window_start(self._steps[0]), self._steps[-1])

    def detach(self, run: Run) -> None:
        super().detach(run)
        if self._steps[-1] > self._done:
            self.finish_late(run, f"pruning at step {self._steps[-1]}")
            self._prune(run, self._steps[-1])

    def _act(self, run: Run) -> None:
        due = max((step for step in self._steps if self._done < step <= run.step), default=None)
        if due is not None:
            self._prune(run, due)

    def _prune(self, run: Run, event: int) -> None:
        """Bring every budget to its share after the step `event`."""
        scores = {site.name: self._score(site) for site in self._sites}
        keeps: dict[str, Tensor] = {}
        for budget, steps in self._events.items():
            share = max((share for step, share in steps.items() if step <= event), default=0.0)
            keeps |= self._keep(budget, share, scores)
        self.write(run, keeps)
        gone = sum(int((~site.gate).sum()) * site.parameters for site in self._sites)
        run.log(f"{self.name}/parameters_off", gone / self._total)
        self._done = event

    def _score(self, site: GateSite) -> Tensor:
        ranker = find_ranker(self.score)
        gradients = self.scores(site) if ranker.needs == "gradients" else None
        with self.errors_at("score"):
            return ranker.scores(site, Statistics(gradients=gradients, seed=self.seed))

    def _keep(self, budget: Budget, share: float, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sites = self._sites if budget == "parameters" else self.sites(budget)
        groups = [self.groups(site) for site in sites]
        gates = [each.of_gate(site.gate) for each, site in zip(groups, sites, strict=True)]
        ranked = [each.of_scores(scores[site.name]) for each, site in zip(groups, sites, strict=True)]
        sizes = [each.size for each in groups]
        if budget == "parameters":
            if find_ranker(self.score).additive:
                ranked = [each / site.parameters for each, site in zip(ranked, sites, strict=True)]
            sizes = [size * site.parameters for size, site in zip(sizes, sites, strict=True)]
            after = keep_within(gates, ranked, sizes, int(share * self._total))
        elif self.scope == "global":
            total = sum(site.count for site in sites)
            after = keep_within(gates, ranked, sizes, total - kept_count(total, share))
        else:
            after = [
                keep_best([gate], [score], kept_count(each.number, share))[0]
                for gate, score, each in zip(gates, ranked, groups, strict=True)
            ]
        return {site.name: site.gate & each.spread(keep) for site, each, keep in zip(sites, groups, after, strict=True)}
