"""All that the author of a modifier reads: what a run holds, and the one class to subclass."""

import logging
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, PrivateAttr
from torch import Tensor, nn
from torch.optim import Optimizer

from ovit_engine.core.loggers import Log
from ovit_engine.core.schedule import Clock, check_time
from ovit_engine.distillation.teacher import Teacher
from ovit_engine.gradients.calibration import Calibration
from ovit_engine.masking.masks import Masks
from ovit_engine.masking.parameters import Slot
from ovit_engine.structured.groups import Tile
from ovit_engine.utils.progress import Progress, ProgressReport

log = logging.getLogger(__name__)

Time = Annotated[str, BeforeValidator(check_time)]


@dataclass
class Run:
    """What modifiers see of training. `step` counts applied optimizer steps."""

    model: nn.Module
    clock: Clock
    step: int = 0
    # steps of the loop that a gradient scaler skipped. The engine sees those of fused optimizers alone; the loop adds
    # the others (our integrations do), and is then no shorter for them
    skipped: int = 0
    optimizers: list[Optimizer] = field(default_factory=list)
    masks: Masks = field(default_factory=Masks)
    grad_scale: Tensor | float = 1.0
    calibration: Calibration | None = None
    teacher: Teacher | None = None  # where a modifier needs one: the model before surgery, or what the user gave
    copies_behind: bool = False  # whether an averaged copy of the model must follow, apart from masks
    history: list[tuple[int, str, float]] = field(default_factory=list)
    # told how far long work is, as progress("ovit_prune: gradients", 512, 1024); the default logs now and then
    progress: Progress = field(default_factory=ProgressReport)
    # seconds of such work by modifier and stage ("ovit_prune/gradients"); never the same twice, so no part of history
    timings: dict[str, float] = field(default_factory=dict)
    logs: list[Log] = field(default_factory=list)  # who is told; `Engine.log_to` adds to it
    # by weight, the rows and columns that its patterns will hold together; complete once all have prepared
    tiles: dict[str, Tile] = field(default_factory=dict)
    # by site, the gates that a modifier put in force last: several may write one, each in its time
    gates: dict[str, Tensor] = field(default_factory=dict)
    # by name, what a modifier just made final: it must be the same in all processes, or the run stops (masks always do)
    shared: dict[str, Tensor] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps an epoch, as the user gave them."""
        return self.clock.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        return self.clock.total_steps

    @property
    def nearly_done(self) -> bool:
        """Whether at most a few steps are missing, besides those that are known to have been skipped."""
        return self.total_steps - self.step - self.skipped <= self.tolerance

    @property
    def tolerance(self) -> int:
        """How many steps may be missing without a word: 2 %, as when a gradient scaler skipped some."""
        return max(1, self.total_steps // 50)

    def gradient(self, slot: Slot) -> Tensor | None:
        """The gradient of a slot at STEP_BEGIN, unscaled; None where there is none."""
        grad = slot.tensor.grad
        return None if grad is None else grad / self.grad_scale

    def log(self, name: str, value: float) -> None:
        """Record a measured value at the present step."""
        self.history.append((self.step, name, float(value)))
        log.info("step %d: %s = %.6g", self.step, name, value)
        self.tell({name: float(value)})

    def tell(self, values: dict[str, float]) -> None:
        """Give values to the loggers alone, such as seconds: what is in no history may differ in a resumed run."""
        for each in self.logs if values else ():
            each(values, self.step)


@dataclass(frozen=True)
class Origin:
    """Where in a recipe file something stands; lines and columns count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


class RecipeError(ValueError):
    """A recipe that cannot be followed: what, where (file:line:column), the value, the nearest right name."""


class TooShortError(RecipeError):
    """A recipe that needs a longer training than it gets."""


@dataclass(frozen=True)
class Claim:
    """Something that a modifier writes from one step to another; two claims on it at a time are a conflict."""

    what: str
    start: int
    end: int
    reason: str = ""  # why nobody else may, for a claim on something that the claimer only needs left alone


@dataclass(frozen=True)
class SweepPlan:
    """Sparsities of which a training leaves a checkpoint each, and how the best model of each is chosen."""

    points: Mapping[int, float]  # sparsity by the pruning step at which it is reached, in the order of time
    metric: str
    best: Literal["max", "min"]
    onnx: bool


class Modifier(BaseModel):
    """One change to training: options are fields, runtime state is private. What you don't override does nothing.

    A method named after an event runs when the engine fires it. The others:

    - `settle` runs once all modifiers have prepared: what depends on the others is decided there.
    - `pre_step` runs in the optimizer's pre-hook, before a closure: the learning rate is written there.
    - `claims` says what is written when, so that two writers of one thing are an error before training.
    - `reloaded` keeps the present phase in force where the loop loads a state into the model while it trains.
    - `abandon` puts back what a step that failed half-way left changed in the user's objects.
    - `check` raises where a copy that is about to be exported is not the model that training left.
    - `bake` turns the training form of a model copy into what is deployed.
    - `apply_to` brings another copy of the model (EMA) to the same state.
    - `timeline` lists what will happen, for `ovit show`.
    - `outcome` tells what will be left of this model, in whole numbers, where shares are rounded.
    - `changes` says at which steps the model becomes another one (pruned further, quantized): a sweep keeps it before.
    - `loss_term` is added to each loss of training, `has_loss_term` says when; `needs_teacher` says whether it compares
      with `run.teacher`.
    - `sweep_plan` says which of those steps leave a checkpoint.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    name: ClassVar[str]
    surgery: ClassVar[bool] = False  # whether `prepare` replaces modules
    removes_units: ClassVar[bool] = False  # whether files of a recipe with it may lack heads and units
    removes_dead: ClassVar[bool] = False  # whether export removes heads and units that pruning left without effect
    _origins: dict[str, Origin] = PrivateAttr(default_factory=dict)  # of each option, "" = the modifier itself

    def __eq__(self, other: object) -> bool:
        """Equal options; where they stood in a file and runtime state do not count."""
        return type(self) is type(other) and self.model_dump() == other.model_dump()

    def prepare(self, run: Run) -> None: ...
    def settle(self, run: Run) -> None: ...
    def attach(self, run: Run) -> None: ...
    def pre_step(self, run: Run) -> None: ...
    def step_begin(self, run: Run) -> None: ...
    def step_end(self, run: Run) -> None: ...
    def detach(self, run: Run) -> None: ...
    def reloaded(self, run: Run) -> None: ...
    def abandon(self, run: Run) -> None: ...
    def check(self, model: nn.Module) -> None: ...
    def bake(self, model: nn.Module) -> None: ...
    def apply_to(self, model: nn.Module) -> None: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def loss_term(self, run: Run) -> Tensor | None:
        """An extra term of the training loss, or None."""
        return None

    def has_loss_term(self, step: int) -> bool:
        """Whether `loss_term` is part of the loss after `step` steps, which then must come to it before the next."""
        return type(self).loss_term is not Modifier.loss_term

    def needs_teacher(self) -> bool:
        """Whether `run.teacher` is used, which is made before any PREPARE."""
        return False

    def state_dict(self) -> dict[str, Any]:
        """Runtime state as tensors, numbers and strings, so that `torch.load(weights_only=True)` reads it."""
        return {}

    def claims(self, run: Run) -> Iterable[Claim]:
        """What this modifier writes, once PREPARE is over."""
        return ()

    def timeline(self, clock: Clock) -> Iterable[tuple[int, str, str]]:
        """Rows of (step, quantity, value) for a training of this length."""
        return ()

    def outcome(self, run: Run) -> Iterable[str]:
        """Lines on what is left of `run.model` in the end, once PREPARE is over."""
        return ()

    def changes(self, clock: Clock) -> Iterable[int]:
        """Steps at whose end this modifier prunes, revives or starts to quantize weights."""
        return ()

    def sweep_plan(self, clock: Clock) -> SweepPlan | None:
        """Steps of which a checkpoint is kept, or None."""
        return None

    def error(self, message: str, option: str = "") -> RecipeError:
        """A RecipeError that says where in the recipe `option` of this modifier stands."""
        return RecipeError(self._placed(message, option))

    def too_short(self, message: str, option: str) -> TooShortError:
        """The same, where a longer training would do."""
        return TooShortError(self._placed(message, option))

    def _placed(self, message: str, option: str) -> str:
        origin = self._origins.get(option) or self._origins.get("")
        where = f"{origin}: " if origin else ""
        return f"{where}{self.name}{'.' + option if option else ''}: {message}"

    def finish_late(self, run: Run, what: str) -> None:
        """Call at DETACH before finishing `what`, which the schedule did not reach.

        Warns where a few steps are missing; raises RuntimeError where so many are that `steps_per_epoch` was wrong.
        """
        self.check_length(run, what)
        seen = f"{_seen(run)}{'' if run.skipped else ' (skipped steps?)'}"
        warnings.warn(f"{self.name}: {seen}; {what} is done now", stacklevel=6)

    def check_length(self, run: Run, what: str) -> None:
        """Raise RuntimeError where so many steps are missing before `what` that `steps_per_epoch` was wrong."""
        if not run.nearly_done:
            raise RuntimeError(
                f"{self.name}: training ended before {what}: {_seen(run)}. steps_per_epoch counts optimizer steps: "
                "divide len(loader) by gradient accumulation; attach the optimizer that the loop steps; load the "
                "engine's state where a run goes on; add the steps that a gradient scaler skipped to engine.run.skipped"
            )

    def check_end(self, clock: Clock, step: int, option: str) -> None:
        """Raise TooShortError where `step`, read from `option`, lies past the end of training."""
        if step > clock.total_steps:
            raise self.too_short(
                f"{getattr(self, option)!r} is step {step}, past the end of training at step {clock.total_steps} "
                f"({clock.epochs(clock.total_steps):g} epochs of {clock.steps_per_epoch} steps)",
                option,
            )


def _seen(run: Run) -> str:
    applied = f"the optimizer applied {run.step} of {run.total_steps} steps"
    return f"{applied} and {run.skipped} were skipped" if run.skipped else applied


def anew(modifier: Modifier) -> Modifier:
    """A copy of a modifier for a run of its own, which remembers where it stood in its file."""
    copy = modifier.model_copy(deep=True)
    copy._origins = modifier._origins
    return copy


class Event(Enum):
    """Where each event fires in a loop that knows nothing of us.

        engine = Engine(model, recipe, steps_per_epoch=..., epochs=...)
        engine.prepare()                     # PREPARE: surgery on modules; before DDP, FSDP2, torch.compile and EMA
        engine.attach(optimizer)             # ATTACH: the optimizer is known; what is due at step 0
        for batch in loader:
            loss(model(batch)).backward()    # any number of micro-batches
            optimizer.step()                 # STEP_BEGIN: gradients whole and unscaled, weights old
                                             # STEP_END: weights new, masks held, then pruning
        engine.detach()                      # DETACH: masks are final and exact, hooks are gone

    `attach` fires PREPARE itself where the user did not and it is still safe. A step that a gradient scaler skips fires
    neither STEP event and does not move the clock. The value of an event is the name of the method it calls.
    """

    PREPARE = "prepare"
    ATTACH = "attach"
    STEP_BEGIN = "step_begin"
    STEP_END = "step_end"
    DETACH = "detach"
