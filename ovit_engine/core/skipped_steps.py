"""Steps that a gradient scaler skips, counted by the loops that know when they try one."""

from ovit_engine.core.run import Run


class SkippedSteps:
    """Counts each step that was tried and not applied."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._before: int | None = None  # steps applied as a step was begun; None between steps

    def begin(self) -> None:
        """Call before the optimizer whose steps count is stepped."""
        self.end()
        self._before = self._run.step

    def end(self) -> bool:
        """Call once the step that was begun, if any, is over; return whether it was skipped."""
        before, self._before = self._before, None
        if before is None or self._run.step != before:
            return False
        self._run.skip_step()
        return True
