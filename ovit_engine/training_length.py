"""What is told where training is not as long as the recipe was resolved for."""

import warnings

from ovit_engine.modifier import Run


def warn_of_an_early_end(run: Run) -> None:
    """At DETACH: warn where more than a few steps are missing, and say so where a gradient scaler skipped them."""
    if not run.nearly_done:
        warnings.warn(
            f"the optimizer applied {run.step} of {run.total_steps} steps: the recipe's times came late; "
            "steps_per_epoch counts optimizer steps (divide len(loader) by gradient accumulation)",
            stacklevel=3,
        )
    elif run.total_steps - run.step > run.tolerance:
        warnings.warn(
            f"the gradient scaler skipped {run.skipped} steps, and {run.step} of {run.total_steps} were applied: the "
            "recipe's times came late, and what was due after the last step is done without training after it; train "
            "longer, or begin with a smaller scale",
            stacklevel=3,
        )


def warn_of_a_late_end(run: Run) -> None:
    """After each step: warn at the first one that is past the end."""
    if run.step == run.total_steps + 1:
        warnings.warn(
            f"training goes on past the {run.total_steps} steps that steps_per_epoch and epochs gave: the "
            "recipe's schedule was too short for this loop",
            stacklevel=6,
        )
