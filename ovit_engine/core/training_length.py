"""A training that ends earlier, or later, than the engine was told."""

from ovit_engine.core.run import Run
from ovit_engine.utils.warn import warn


def tolerated(run: Run) -> int:
    """Return how many steps may be missing without an error: 2 %, as when a gradient scaler skipped some."""
    return max(1, run.total_steps // 50)


def is_nearly_done(run: Run) -> bool:
    """Return whether at most a few steps are missing, apart from those that are known to have been skipped."""
    return run.total_steps - run.step - run.skipped <= tolerated(run)


def check_length(run: Run, name: str, what: str) -> None:
    """Raise RuntimeError where so many steps are missing before `what` that `steps_per_epoch` was wrong."""
    if not is_nearly_done(run):
        raise RuntimeError(
            f"{name}: training ended before {what}: {_seen(run)}. steps_per_epoch counts optimizer steps: "
            "divide len(loader) by gradient accumulation; attach the optimizer that the loop steps; load the "
            "engine's state where a run goes on; call engine.skip_step() for each step that a gradient scaler skipped"
        )


def finish_late(run: Run, name: str, what: str) -> None:
    """Check the length, and warn that `what` is done at the end of a training that has not reached it."""
    check_length(run, name, what)
    warn(f"{name}: {_seen(run)}{'' if run.skipped else ' (skipped steps?)'}; {what} is done now")


def warn_of_an_early_end(run: Run) -> None:
    """At DETACH: warn where more than a few steps are missing, also where a gradient scaler skipped them."""
    if not is_nearly_done(run):
        warn(
            f"the optimizer applied {run.step} of {run.total_steps} steps: the recipe's times came late; "
            "steps_per_epoch counts optimizer steps (divide len(loader) by gradient accumulation)"
        )
    elif run.total_steps - run.step > tolerated(run):
        warn(
            f"the gradient scaler skipped {run.skipped} steps, and {run.step} of {run.total_steps} were applied: the "
            "recipe's times came late, and what was due after the last step is done without training after it; train "
            "longer, or begin with a smaller scale"
        )


def warn_of_a_late_end(run: Run) -> None:
    """After each step: warn at the first one that is past the end."""
    if run.step == run.total_steps + 1:
        warn(
            f"training goes on past the {run.total_steps} steps that steps_per_epoch and epochs gave: the "
            "recipe's schedule was too short for this loop"
        )


def _seen(run: Run) -> str:
    applied = f"the optimizer applied {run.step} of {run.total_steps} steps"
    return f"{applied} and {run.skipped} were skipped" if run.skipped else applied
