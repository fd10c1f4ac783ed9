"""Sees to it that all processes of a run do the same to their model, or stop together."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from ovit_engine.core.modifier import Event, Modifier, Run
from ovit_engine.core.recipe import Recipe
from ovit_engine.distributed.comm import Fact, agree, digest, ranks


class Agreement:
    """Compares masks, and what modifiers put into `Run.shared`, after each event that changes them; not at each step.

    A process alone pays nothing.
    """

    def __init__(self, recipe: Recipe, modifiers: Sequence[Modifier], run: Run) -> None:
        self._recipe, self._modifiers, self._run = recipe, modifiers, run
        self._changes = {step for modifier in modifiers for step in modifier.changes(run.clock)}

    def begin(self) -> None:
        """Raise RuntimeError on every rank where the ranks would not act at the same steps."""
        everyone, run = ranks(), self._run
        if everyone.count > 1 and self._modifiers:
            facts: dict[str, Fact] = {
                "steps_per_epoch": run.steps_per_epoch,
                "the number of steps": run.total_steps,
                "the recipe": self._recipe.hash.encode(),
                "the step to go on from": run.step,
            }
            if run.teacher is not None:
                facts["the teacher"] = run.teacher.fingerprint.encode()
            agree(everyone, facts, "at attach")

    @contextmanager
    def over(self, event: Event) -> Iterator[None]:
        """Around what may change the model: it fails on all ranks where it fails on one, or where results differ."""
        everyone, run = ranks(), self._run
        now = event is Event.ATTACH or (event is Event.STEP_END and run.step in self._changes)
        due = now and bool(self._modifiers)
        when = "at attach" if event is Event.ATTACH else f"after step {run.step}"
        if due and everyone.count > 1:  # before the work, in which ranks of unequal clocks would wait for one another
            agree(everyone, {"the number of applied steps": run.step}, when)
        with everyone.together() if due else nullcontext():
            yield
        shared, run.shared = run.shared, {}
        if everyone.count > 1 and (due or run.masks.changed or shared):
            masks = {f"the mask of {name!r}": run.masks.get(name) for name in run.masks.names()}
            facts = {name: digest(tensor) for name, tensor in {**masks, **shared}.items() if tensor is not None}
            agree(everyone, facts, when)
