"""Structured pruning at once or step by step: heads and MLP units go by a score, and do not come back.

The baselines of the structured tables: magnitude at once (SOMP) and gradually (SGMP) with `score: l1`, Taylor (TP) and
salience (SSP-like).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt, PrivateAttr, model_validator
from torch import Tensor

from ovit_engine.gate_choice import keep_best, keep_within, kept_count
from ovit_engine.gate_ranking import Statistics, find_ranker
from ovit_engine.gates import GateSite, Kind
from ovit_engine.modifier import Claim, Run
from ovit_engine.modifiers._amount import Amount, SparsitySteps
from ovit_engine.modifiers._gates import GateModifier
from ovit_engine.modifiers._when import Given, ScheduledModifier, spelled
from ovit_engine.registry import register
from ovit_engine.schedule import Clock

Budget = Literal["heads", "units", "parameters"]
Score = Annotated[str, AfterValidator(lambda name: find_ranker(name).name)]
_OPTIONS: dict[Budget, str] = {
    "heads": "head_sparsity",
    "units": "unit_sparsity",
    "parameters": "parameter_sparsity",
}


@register("structured_prune")
class StructuredPrune(ScheduledModifier, GateModifier):
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
        10, description="training steps before a pruning step whose gradients count, for scores by gradient"
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
        return found

    def timeline(self, clock: Clock) -> Iterable[tuple[int, str, str]]:
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
        self._total = sum(parameter.numel() for parameter in run.model.parameters())
        self._check_reach()

    def _check_reach(self) -> None:
        reach = sum((site.count - 1) * site.parameters for site in self._sites) / self._total
        for share in spelled(self.parameter_sparsity) if self.parameter_sparsity is not None else ():
            if share > reach:
                raise self.error(
                    f"{share:g} is out of reach: with one head and one unit left in each block {reach:.4f} of the "
                    f"{self._total} parameters are gone",
                    "parameter_sparsity",
                )
        for kind, option, amount in (
            ("heads", "head_sparsity", self.head_sparsity),
            ("units", "unit_sparsity", self.unit_sparsity),
        ):
            counts = [site.count for site in self._sites if site.kind == kind]
            for share in spelled(amount) if amount is not None and self.scope == "global" else ():
                if len(counts) - sum(counts) * (1 - share) >= 1:  # by more than rounding
                    raise self.error(
                        f"{share:g} is out of reach: with one left in each block {1 - len(counts) / sum(counts):.4f} "
                        f"of the {sum(counts)} {kind} are gone",
                        option,
                    )

    def claims(self, run: Run) -> Iterable[Claim]:
        for site in self._sites:
            yield Claim(f"the gate of {site.name}", self.window_start(self._steps[0]), self._steps[-1])

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
        return ranker.score(site, Statistics(gradients=gradients, seed=self.seed))

    def _keep(self, budget: Budget, share: float, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        sites = self._sites if budget == "parameters" else self.sites(budget)
        if budget == "parameters":
            each = find_ranker(self.score).additive
            sizes = [site.parameters for site in sites]
            ranked = [scores[site.name] / (site.parameters if each else 1) for site in sites]
            after = keep_within([site.gate for site in sites], ranked, sizes, int(share * self._total))
        else:
            groups = [[site] for site in sites] if self.scope == "layer" else [sites]
            after = []
            for group in groups:
                kept = kept_count(sum(site.count for site in group), share)
                after += keep_best([site.gate for site in group], [scores[site.name] for site in group], kept)
        return {site.name: keep for site, keep in zip(sites, after, strict=True)}
