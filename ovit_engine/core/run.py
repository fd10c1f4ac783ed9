"""What a modifier sees of training."""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.optim import Optimizer

from ovit_engine.core.loggers import Log
from ovit_engine.core.schedule import Clock
from ovit_engine.masking.masks import Masks
from ovit_engine.masking.parameters import Slot
from ovit_engine.utils.progress import Progress, ProgressReport

if TYPE_CHECKING:
    from ovit_engine.distillation.teacher import Teacher
    from ovit_engine.gradients.calibration import Calibration

log = logging.getLogger(__name__)


@dataclass
class Run:
    """One training under a recipe.

    Attributes:
        model: the model that is trained.
        clock: how long training is, in optimizer steps.
        step: how many optimizer steps were applied.
        optimizers: those that the engine is attached to; the first one counts the steps.
        masks: the weights that are held at zero.
        calibration: batches and a loss that give gradients, if the user gave them.
        teacher: the model to learn from, where a modifier is a `Distillation`.
        grad_scale: the factor that gradients still have at STEP_BEGIN; `gradient` divides by it.
        history: (step, name, value) of everything that was logged.
        progress: reports long work, as `progress("ovit_prune: gradients", 512, 1024)`.
        skipped: steps that a gradient scaler left out, as far as known; see `Engine.skip_step`.
        logs: functions that take what is logged; `Engine.log_to` adds to them.
        is_rehearsal: whether this is the copy of a rehearsal, in which pruners go by magnitude.
    """

    model: nn.Module
    clock: Clock
    step: int = 0
    optimizers: list[Optimizer] = field(default_factory=list)
    masks: Masks = field(default_factory=Masks)
    calibration: "Calibration | None" = None
    teacher: "Teacher | None" = None
    grad_scale: Tensor | float = 1.0
    history: list[tuple[int, str, float]] = field(default_factory=list)
    progress: Progress = field(default_factory=ProgressReport)
    skipped: int = 0
    logs: list[Log] = field(default_factory=list)
    is_rehearsal: bool = False
    _seen: int = 0  # of the steps skipped since the last one applied, those that the engine saw itself

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch, as the user gave them."""
        return self.clock.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.clock.total_steps

    def count_step(self) -> None:
        """Count an applied step."""
        self.step += 1
        self._seen = 0

    def skip_step(self, *, seen: bool = False) -> None:
        """Count a skipped step once: the engine sees (`seen`) those of fused optimizers, and loops report them too."""
        if seen or not self._seen:
            self.skipped += 1
            self._seen += seen
        else:
            self._seen -= 1

    def gradient(self, slot: Slot) -> Tensor | None:
        """Return the gradient of a slot at STEP_BEGIN, unscaled; None where there is none."""
        grad = slot.tensor.grad
        return None if grad is None else grad / self.grad_scale

    def log(self, name: str, value: float) -> None:
        """Record a measured value at the present step."""
        self.history.append((self.step, name, float(value)))
        log.info("step %d: %s = %.6g", self.step, name, value)
        self.report({name: float(value)})

    def report(self, values: dict[str, float]) -> None:
        """Give values to the loggers only: seconds, which differ in a resumed run, have no place in the history."""
        for each in self.logs if values else ():
            each(values, self.step)
