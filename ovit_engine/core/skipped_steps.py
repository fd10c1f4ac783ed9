"""Steps that a gradient scaler skips, counted by the loops that know when they try one."""

from ovit_engine.core.modifier import Run


class SkippedSteps:
    """Adds to `run.skipped` each step that was tried and not applied.

    The engine hears nothing where a scaler leaves `optimizer.step` out. What it sees itself (a fused optimizer is
    called all the same) is not counted twice.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._before: tuple[int, int] | None = None  # applied and skipped as a step was begun; None between steps

    def begin(self) -> None:
        """The optimizer whose steps count is about to be stepped."""
        self.end()
        self._before = self._run.step, self._run.skipped

    def end(self) -> bool:
        """The step that was begun, if any, is over: whether it was skipped."""
        before, self._before = self._before, None
        if before is None or self._run.step != before[0]:
            return False
        self._run.skipped = max(self._run.skipped, before[1] + 1)
        return True
