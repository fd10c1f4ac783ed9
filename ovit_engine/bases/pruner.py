"""Base classes of modifiers that set weights to zero: their targets, pattern and schedule."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, PlainSerializer, PrivateAttr, field_validator, model_validator
from torch import Tensor, nn

from ovit_engine.bases.amounts import Amount, PruningSchedule, SparsityRange, Sweep, place_targets, spelled
from ovit_engine.core.capabilities import (
    Claim,
    Coordinated,
    Deployable,
    Exclusive,
    Patterned,
    Row,
    Scheduled,
    SweepPlan,
    having,
)
from ovit_engine.core.loggers import sparsity_name
from ovit_engine.core.modifier import Modifier
from ovit_engine.core.run import Run
from ovit_engine.core.schedule import Clock
from ovit_engine.distributed.sharding import gathered
from ovit_engine.masking.owners import sums_along_rows, why_not_pruned
from ovit_engine.masking.parameters import Slot
from ovit_engine.masking.targets import check_target_syntax, find_slots
from ovit_engine.pruning import prune_by_scores
from ovit_engine.pruning.patterns import NM, Block, Pattern, Unstructured, parse_pattern
from ovit_engine.structured.gates import GateSite, installed, live_mask
from ovit_engine.structured.groups import Groups, tiles_of

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)  # weights [in, out, ...]


Target = Annotated[str, BeforeValidator(lambda value: check_target_syntax(value) if isinstance(value, str) else value)]

Targets = Annotated[list[Target], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]

PatternField = Annotated[
    Unstructured | NM | Block, BeforeValidator(parse_pattern), PlainSerializer(lambda pattern: pattern.describe())
]


class Masking(Scheduled, Exclusive, Patterned, Coordinated):
    """Makes weights of its targets zero. A subclass states when, and which."""

    targets: Targets = Field(
        min_length=1, description='weights: names, "re:" and regular expressions, or presets such as preset:vit'
    )
    scope: Literal["global", "layer", "erk"] = Field(
        "global",
        description="share the sparsity out over all targets, alike in each, or with small ones denser",
    )
    pattern: PatternField = Field(
        default_factory=Unstructured, description='unstructured, "keep:group" or {block: [r, c]}'
    )

    @field_validator("scope", mode="before")
    @classmethod
    def _known_scope(cls, value: Any) -> Any:
        if value == "uniform":  # the papers' word
            raise ValueError("'uniform' is called 'layer' here: the same sparsity in each")
        return value

    _slots: list[Slot] = PrivateAttr(default_factory=list)
    _done: int = PrivateAttr(default=-1)  # the last of its times at which it acted

    @property
    def slots(self) -> Sequence[Slot]:
        """Return the targets, from PREPARE on."""
        return self._slots

    def prepare(self, run: Run) -> None:
        with self.errors_at("targets"):
            self._slots = find_slots(run.model, self.targets)
        for slot in self._slots:
            with self.errors_at("pattern", slot.name):
                self.pattern.check(slot.tensor.shape)
            if reason := why_not_pruned(slot):
                raise self.error(f"{slot.name!r} can't be pruned: {reason}; leave it out", "targets")
            if self.pattern.group > 1 and isinstance(slot.module, _TRANSPOSED):
                kind = type(slot.module).__name__
                raise self.error(
                    f"{slot.name}: {self.pattern} in a {kind}, whose axes no sparse kernel reads", "pattern"
                )
            if self.pattern.group > 1 and not sums_along_rows(slot):
                raise self.error(
                    f"{slot.name!r} belongs to {type(slot.module).__name__}, which may store it as [in, out], and "
                    f"{self.pattern} must lie along the inputs: make it the weight of an nn.Linear, or leave it out",
                    "pattern",
                )

    def patterns(self) -> Mapping[str, Pattern]:
        return dict.fromkeys((slot.name for slot in self._slots), self.pattern)

    def coordinate(self, run: Run, modifiers: Sequence[Modifier]) -> None:
        for site, groups in gates_beside(run, self._slots, modifiers):
            self._check_whole(site, groups)
        check_gates(self, run, self._slots, modifiers)

    def attach(self, run: Run) -> None:
        lost = [slot.name for slot in self._slots if self._done >= 0 and run.masks.get(slot.name) is None]
        if lost:
            raise self.error(f"half a state was loaded: it acted at step {self._done}, and {lost[0]!r} has no mask")
        self._act(run)

    def step_end(self, run: Run) -> None:
        self._act(run)

    @abstractmethod
    def _act(self, run: Run) -> None:
        """Do what is due, at ATTACH and after every step."""

    def due(self, run: Run, times: Iterable[int]) -> int | None:
        """The latest of `times` that has come and was not acted on: one that was interrupted is made up for."""
        return max((time for time in times if self._done < time <= run.step), default=None)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._done = state["done"]

    def write(self, run: Run, masks: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        """Put masks (True = kept) in force and write the weights under them."""
        for slot, mask, weight in zip(self._slots, masks, weights, strict=True):
            slot.write(weight)
            run.masks.set(slot, mask, self.pattern.describe())
        alive = self.alive(run)
        kept = sum(int((mask.to(live.device) & live).sum()) for mask, live in zip(masks, alive, strict=True))
        run.log(sparsity_name(self.name), 1 - kept / sum(int(live.sum()) for live in alive))

    def training_gradients(self, run: Run) -> list[Tensor]:
        """Whole gradients of the training loss at STEP_BEGIN, one a slot; a slot without one is a RecipeError."""
        found = []
        for slot in self._slots:
            grad = run.gradient(slot)
            if grad is None:
                raise self.error(f"{slot.name!r} gets no gradient from the training loss", "targets")
            found.append(gathered(grad))
        return found

    def present_masks(self, run: Run) -> list[Tensor]:
        """The masks in force, all True where a slot is dense; what a gate switched off is pruned already."""
        masks = [run.masks.get(slot.name) for slot in self._slots]
        return [live if mask is None else mask & live for mask, live in zip(masks, self.alive(run), strict=True)]

    def alive(self, run: Run) -> list[Tensor]:
        """Which weights of each slot gates leave; all True without gates."""
        found = live_mask(run.model)
        return [found[slot.name] if slot.name in found else _all_true(slot) for slot in self._slots]

    def gate_claims(self, run: Run, start: int) -> Iterable[Claim]:
        """From `start` on no gate beside a target may change: what it switches off counts for no sparsity."""
        reason = "sparsity is a share of the weights that gates leave, so gates come first and stay: prune after them"
        for site, _ in gates_beside(run, self._slots):
            yield Claim("gate", site.name, start, run.total_steps, reason)

    def _check_whole(self, site: GateSite, groups: Groups) -> None:
        """A block of which gates take a part is neither removed nor zero: its sparsity could not be had."""
        split = groups.spread(groups.of_gate(site.gate)) & ~site.gate
        if isinstance(self.pattern, Block) and not site.gate.is_meta and bool(split.any()):
            raise self.error(
                f"{int(split.sum())} of {site.count} {site.kind} of {site.owner_name} are off in groups of "
                f"{groups.size} that {self.pattern} holds together, and others of their groups are on: switch whole "
                "groups, or shrink(model) first (ovit_engine.structured)",
                "pattern",
            )

    def describe(self, sparsity: float | None) -> str:
        """A sparsity as the timeline shows it."""
        return f"{self.pattern.resolve(sparsity):.2%} {self.pattern} ({self.name})"


class Pruner(PruningSchedule, Masking):
    """Prunes targets step by step. A subclass overrides `scores`, or `solve` if it moves the weights that stay.

    The base has the options of every pruner (`sparsity`, `start`, `end`, `every`, `targets`, `scope`, `pattern`,
    `sweep`), keeps to patterns and exact counts, and holds the masks.
    """

    needs_training: ClassVar[bool] = False  # whether it can't prune a model at once

    sparsity: Amount | None = Field(
        None, description="share of zeros: a number, {from, to, curve}, or {time: number, ...}; N:M implies its own"
    )
    sweep: Sweep = Field(
        None,
        description="sparsities that leave a checkpoint each: a list, or {sparsity, metric, best, onnx}",
    )

    _events: dict[int, float | None] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> "Pruner":
        for amount in spelled(self.sparsity):
            self.pattern.resolve(amount)
        self.check_times([self.sparsity])
        return self

    def scores(self, run: Run, slots: Sequence[Slot]) -> Sequence[Tensor]:
        """Return a score of each weight, whole and shaped as `slot.gather()`: the lowest go."""
        raise NotImplementedError  # `prepare` refuses a class that overrides neither

    def solve(self, run: Run, slots: Sequence[Slot], sparsity: float | None) -> tuple[list[Tensor], list[Tensor]]:
        """Return masks (True = kept) and new weights of `slots`, whole, for a sparsity (None: that of the pattern).

        What is pruned already, the False of `present_masks`, stays so.
        """
        return self._solve_by(self.scores(run, slots), run, slots, sparsity)

    def _solve_by_magnitude(
        self, run: Run, slots: Sequence[Slot], sparsity: float | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        return self._solve_by([slot.gather().abs() for slot in slots], run, slots, sparsity)

    def _solve_by(
        self, scores: Sequence[Tensor], run: Run, slots: Sequence[Slot], sparsity: float | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        pruned = prune_by_scores(
            [slot.gather() for slot in slots],
            scores,
            names=[slot.name for slot in slots],
            masks=self.present_masks(run),
            sparsity=sparsity,
            scope=self.scope,
            pattern=self.pattern,
        )
        return pruned.masks, pruned.weights

    def events(self, clock: Clock) -> dict[int, float | None]:
        """Pruning steps and the sparsity after each (None = what the pattern implies), in the order of time."""
        scheduled = self.scheduled(clock, self.sparsity, "sparsity")
        return {**scheduled, **self._points(scheduled)}

    def _points(self, scheduled: Mapping[int, float | None]) -> dict[int, float]:
        """The pruning steps that the sweep keeps, each to exactly its sparsity."""
        if self.sweep is None:
            return {}
        if isinstance(self.pattern, NM):
            raise self.error(
                f"a sweep goes over sparsities, and pattern {self.pattern} has but one: leave it out", "sweep"
            )
        known = {step: sparsity for step, sparsity in scheduled.items() if sparsity is not None}
        with self.errors_at("sweep"):
            return place_targets(known, self.sweep.sparsity, movable=isinstance(self.sparsity, SparsityRange))

    def timeline(self, clock: Clock) -> Iterable[Row]:
        points = self._points(self.scheduled(clock, self.sparsity, "sparsity"))
        for step, sparsity in self.events(clock).items():
            yield step, "sparsity", self.describe(sparsity) + ", sweep point" * (step in points)

    def changes(self, clock: Clock) -> Iterable[int]:
        return self.events(clock)

    def sweep_plan(self, clock: Clock) -> SweepPlan | None:
        if self.sweep is None:
            return None
        points = self._points(self.scheduled(clock, self.sparsity, "sparsity"))
        return SweepPlan(points, self.sweep.metric, self.sweep.best, self.sweep.onnx)

    def prepare(self, run: Run) -> None:
        kind = type(self)
        if kind.scores is Pruner.scores and kind.solve is Pruner.solve:
            raise NotImplementedError(f"{kind.__name__} has neither 'scores' nor 'solve'")
        self._events = self.events(run.clock)
        super().prepare(run)

    def claims(self, run: Run) -> Iterable[Claim]:
        for slot in self._slots:
            yield Claim("mask", slot.name, min(self._events), max(self._events))
        yield from self.gate_claims(run, min(self._events))

    def coordinate(self, run: Run, modifiers: Sequence[Modifier]) -> None:
        super().coordinate(run, modifiers)
        gated = [site.name for site, _ in gates_beside(run, self._slots)]
        if gated and self.scope != "global" and not isinstance(self.pattern, NM):
            raise self.error(
                f"the gate of {gated[0]} leaves some weights of each tensor: share out by scope: global", "scope"
            )

    def detach(self, run: Run) -> None:
        late = [step for step in self._events if step > self._done]
        if late:
            self.finish_late(run, f"pruning at step {late[-1]}")
            self._prune(run, late[-1])

    def _of_all(self, run: Run, sparsity: float | None) -> float | None:
        """The share of all that must go so that `sparsity` is that of what gates leave."""
        if sparsity is None or isinstance(self.pattern, NM):
            return sparsity
        units = [self.pattern.to_layout(live).reshape(-1, self.pattern.unit).any(1) for live in self.alive(run)]
        total, left = sum(each.numel() for each in units), sum(int(each.sum()) for each in units)
        return sparsity if left == total else (total - left + sparsity * left) / total

    def _act(self, run: Run) -> None:
        event = self.due(run, self._events)
        if event is not None:
            self._prune(run, event)

    def _prune(self, run: Run, event: int) -> None:
        begin = perf_counter()
        solve = self._solve_by_magnitude if run.is_rehearsal else self.solve
        masks, weights = solve(run, self._slots, self._of_all(run, self._events[event]))
        self.write(run, masks, weights)
        self._done = event
        run.report({f"{self.name}/seconds": perf_counter() - begin})


def gates_beside(
    run: Run, slots: Iterable[Slot], modifiers: Iterable[Modifier] = ()
) -> Iterable[tuple[GateSite, Groups]]:
    """Yield the gates whose layers hold a slot, and which of their heads or units patterns hold together."""
    names = {slot.name for slot in slots}
    tiles = tiles_of(modifier.patterns() for modifier in having(modifiers, Patterned))
    for site in installed(run.model):
        if names & {f"{site.name}.weight", f"{site.source_name}.weight"}:
            yield site, Groups.of(site, tiles)


def check_gates(modifier: Modifier, run: Run, slots: Iterable[Slot], modifiers: Iterable[Modifier]) -> None:
    """Raise where `modifier` masks slots beside gates that are off from before, and so could not export its result.

    An earlier recipe left them, or they were set by hand. Export removes what is off, which must be asked for.
    """
    if any(each.removes_units for each in having(modifiers, Deployable)):
        return
    for site, groups in gates_beside(run, slots, modifiers):
        if not site.gate.is_meta and not groups.of_gate(site.gate).all():
            raise modifier.error(
                f"{int((~site.gate).sum())} of {site.count} {site.kind} of {site.owner_name} are off already, and "
                "export would remove them, which this recipe doesn't ask for: shrink(model) first "
                "(ovit_engine.structured)"
            )


def _all_true(slot: Slot) -> Tensor:
    return torch.ones(slot.tensor.shape, dtype=torch.bool, device=slot.tensor.device)
