"""What only some modifiers need: a modifier inherits each capability that it has, and the engine asks `isinstance`."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

from torch import Tensor, nn

from ovit_engine.core.errors import TooShortError
from ovit_engine.core.modifier import Modifier
from ovit_engine.core.run import Run
from ovit_engine.core.schedule import Clock
from ovit_engine.core.training_length import check_length, finish_late
from ovit_engine.pruning.patterns import Pattern

C = TypeVar("C", bound=Modifier)


def having(modifiers: Iterable[Modifier], capability: type[C]) -> list[C]:
    """Return the modifiers that have a capability, in their order."""
    return [modifier for modifier in modifiers if isinstance(modifier, capability)]


# --- time

Row = tuple[int, str, str]  # step, quantity, value: for people


@dataclass(frozen=True)
class SweepPlan:
    """Sparsities of which a training leaves a checkpoint each, and how the best model of each is chosen."""

    points: Mapping[int, float]  # sparsity by the pruning step at which it is reached, in the order of time
    metric: str
    best: Literal["max", "min"]
    onnx: bool


class Scheduled(Modifier):
    """Acts at times that the recipe spells."""

    @abstractmethod
    def timeline(self, clock: Clock) -> Iterable[Row]:
        """Return what happens when, for `ovit show`; raise RecipeError for times that do not fit."""

    def changes(self, clock: Clock) -> Iterable[int]:
        """Return the steps at whose end weights are pruned, revived or first quantized: a sweep keeps them before."""
        return ()

    def outcome(self, run: Run) -> Iterable[str]:
        """Return lines on what will be left of `run.model`, once PREPARE is over."""
        return ()

    def sweep_plan(self, clock: Clock) -> SweepPlan | None:
        """Return the steps of which a checkpoint is kept, or None."""
        return None

    def time_of(self, clock: Clock, option: str) -> int:
        """Return the step that a time option spells; TooShortError where it is past the end of training."""
        spelled = getattr(self, option)
        step = clock.steps(spelled)
        if step > clock.total_steps:
            raise self.too_short(
                f"{spelled!r} is step {step}, past the end of training at step {clock.total_steps} "
                f"({clock.epochs(clock.total_steps):g} epochs of {clock.steps_per_epoch} steps)",
                option,
            )
        return step

    def interval_of(self, clock: Clock, option: str) -> int:
        """Return the steps that an option spells, of which there must be one at least."""
        spelled = getattr(self, option)
        steps = clock.steps(spelled)
        if steps < 1:
            raise self.error(f"{spelled!r} is less than a step of {clock.steps_per_epoch} steps an epoch", option)
        return steps

    def too_short(self, message: str, option: str) -> TooShortError:
        """Return an error like `error`, for a recipe that a longer training would let pass."""
        return TooShortError(str(self.error(message, option)))

    def check_length(self, run: Run, what: str) -> None:
        """Raise RuntimeError where so many steps are missing before `what` that `steps_per_epoch` was wrong."""
        check_length(run, self.name, what)

    def finish_late(self, run: Run, what: str) -> None:
        """Call at DETACH before finishing `what`, which the schedule did not reach.

        Warn where a few steps are missing; raise RuntimeError as `check_length` does.
        """
        finish_late(run, self.name, what)


def timeline_rows(modifiers: Iterable[Modifier], clock: Clock) -> list[Row]:
    """Return what the modifiers of a recipe do, in the order of time; raise RecipeError for times that do not fit."""
    rows = [row for modifier in having(modifiers, Scheduled) for row in modifier.timeline(clock)]
    return sorted(rows, key=lambda row: row[0])


# --- the loss and the learning rate


class LossTerm(Modifier):
    """Adds a term to each loss of training."""

    @abstractmethod
    def loss_term(self, run: Run) -> Tensor | None:
        """Return the term; None where no forward pass of the model was seen, which is an error at the next step."""

    def has_loss_term(self, step: int) -> bool:
        """Return whether the loss has the term after `step` steps."""
        return True


class Distillation(LossTerm):
    """Compares the model with `run.teacher`, which the engine makes before PREPARE."""


class LearningRate(Modifier):
    """Writes the learning rate; no scheduler may do so too."""

    @abstractmethod
    def write_rates(self, run: Run) -> None:
        """Write the rates of the coming step, before a closure runs."""


# --- other modifiers and other processes

Resource = Literal["mask", "gate", "quantization", "tokens", "learning rate"]


@dataclass(frozen=True)
class Claim:
    """Something that a modifier writes from one step to another; two claims on it at a time are a conflict."""

    resource: Resource
    name: str  # of the weight, layer or module; "" where there is only one
    start: int
    end: int
    reason: str = ""  # why nobody else may, for a claim on something that the claimer only needs left alone

    def __str__(self) -> str:
        return f"the {self.resource} of {self.name}" if self.name else f"the {self.resource}"


class Exclusive(Modifier):
    """Writes something that no other modifier may write at the same time."""

    @abstractmethod
    def claims(self, run: Run) -> Iterable[Claim]:
        """Return what it writes and when, once PREPARE is over."""


class Patterned(Modifier):
    """Gives zeros a pattern that gates beside them must not break."""

    @abstractmethod
    def patterns(self) -> Mapping[str, Pattern]:
        """Return the pattern of each weight by name, once PREPARE is over."""


class Coordinated(Modifier):
    """Depends on what the other modifiers do."""

    @abstractmethod
    def coordinate(self, run: Run, modifiers: Sequence[Modifier]) -> None:
        """Decide, once all `modifiers` of the recipe have prepared."""


class Synchronized(Modifier):
    """Has tensors that must be the same in all processes; masks always must."""

    @abstractmethod
    def synchronized(self, run: Run) -> Mapping[str, Tensor]:
        """Return what changed for good in the last event, by a name for messages."""


# --- the model: its modules, copies of it, the file


class Surgical(Modifier):
    """Replaces modules at PREPARE: an error where the model is wrapped or compiled already."""

    def reloaded(self, run: Run) -> None:
        """Keep the present phase in force where the loop loads a state into the model while it trains."""

    def abandon(self, run: Run) -> None:
        """Put back what a step that failed half-way left changed in the user's objects."""


class Deployable(Modifier):
    """Changes what is exported, and what averaged copies of the model are."""

    removes_units: ClassVar[bool] = False  # whether export removes heads and units behind its gates
    removes_dead: ClassVar[bool] = False  # whether export removes heads and units that pruning left without effect

    def apply_to(self, model: nn.Module) -> None:
        """Bring another copy of the model (EMA) to the same state."""

    def copies_are_behind(self, run: Run) -> bool:
        """Return whether the last event changed the model so that copies must follow; those of masks always do."""
        return False

    def check(self, model: nn.Module) -> None:
        """Raise RuntimeError where a copy that is about to be exported is not the model that training left."""

    def bake(self, model: nn.Module) -> None:
        """Turn the training form of a copy into what is deployed."""
