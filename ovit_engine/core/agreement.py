"""Stops all processes of a run together where they would no longer train the same model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from torch import Tensor

from ovit_engine.core.capabilities import Scheduled, Synchronized, having
from ovit_engine.core.modifier import Event, Modifier
from ovit_engine.core.recipe import Recipe
from ovit_engine.core.run import Run
from ovit_engine.distributed.comm import world


class Agreement:
    """Compares masks, and what `Synchronized` modifiers changed, after each event that changes them; not at each step.

    A single process pays nothing.
    """

    def __init__(self, recipe: Recipe, modifiers: Sequence[Modifier], run: Run) -> None:
        self._recipe, self._modifiers, self._run = recipe, modifiers, run
        self._changes = {step for modifier in having(modifiers, Scheduled) for step in modifier.changes(run.clock)}

    def begin(self) -> None:
        """Raise RuntimeError in every process where they would not act at the same steps."""
        if self._modifiers:
            world().assert_equal(self._beginning, "at attach")

    def _beginning(self) -> Mapping[str, object]:
        run = self._run
        facts: dict[str, object] = {
            "steps_per_epoch": run.steps_per_epoch,
            "the number of steps": run.total_steps,
            "the recipe": self._recipe.hash.encode(),
            "the step to go on from": run.step,
        }
        if run.teacher is not None:
            facts["the teacher"] = run.teacher.fingerprint.encode()
        return facts

    @contextmanager
    def over(self, event: Event) -> Iterator[None]:
        """Run what may change the model: it fails in all processes where it fails in one, or where results differ."""
        comm, run = world(), self._run
        now = event is Event.ATTACH or (event is Event.STEP_END and run.step in self._changes)
        due = now and bool(self._modifiers)
        when = "at attach" if event is Event.ATTACH else f"after step {run.step}"
        if due:  # before the work, in which ranks of unequal clocks would wait for one another
            comm.assert_equal(lambda: {"the number of applied steps": run.step}, when)
        with comm.fail_together() if due else nullcontext():
            yield
        if comm.count == 1:
            return
        shared: dict[str, Tensor] = {}
        for modifier in having(self._modifiers, Synchronized):
            shared |= modifier.synchronized(run)
        if due or run.masks.changed or shared:
            masks = {f"the mask of {name!r}": run.masks.get(name) for name in run.masks.names()}
            comm.assert_equal(lambda: {**masks, **shared}, when)
