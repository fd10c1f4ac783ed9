"""The contract for authors of modifiers; `capabilities.py` has what only some modifiers need."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from typing import Any, ClassVar, Self

from pydantic import ConfigDict

from ovit_engine.core.errors import Placed, RecipeError
from ovit_engine.core.run import Run


class Event(Enum):
    """Where each event fires in a loop that does not know the engine.

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


class Modifier(Placed):
    """One change to training: options are pydantic fields, runtime state is private attributes.

    Override what you need; each method does nothing by default. The first five are called once for each `Event`. A
    modifier that writes weights, gates or learning rates, has a schedule to show, adds a term to the loss or changes
    what is deployed also inherits the capabilities of `ovit_engine.core.capabilities`.
    """

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)

    name: ClassVar[str]

    def prepare(self, run: Run) -> None:
        """Look at the model, and change its modules if need be."""

    def attach(self, run: Run) -> None:
        """Begin: the optimizers are known. Also called where a run resumes, after `load_state_dict`."""

    def step_begin(self, run: Run) -> None:
        """Read gradients, before an optimizer step is applied."""

    def step_end(self, run: Run) -> None:
        """Act after an optimizer step: `run.step` counts it already."""

    def detach(self, run: Run) -> None:
        """Finish: training is over."""

    def state_dict(self) -> dict[str, Any]:
        """Return runtime state as tensors, numbers and strings, so that `torch.load(weights_only=True)` reads it."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned, between `prepare` and `attach`."""

    def error(self, message: str, option: str = "") -> RecipeError:
        """Return an error that says where in the recipe `option` of this modifier stands."""
        origin = self.origin(option)
        where = f"{origin}: " if origin else ""
        return RecipeError(f"{where}{self.name}{'.' + option if option else ''}: {message}")

    @contextmanager
    def errors_at(self, option: str = "", subject: str = "") -> Iterator[None]:
        """Turn a ValueError inside into `error`, which begins with a `subject` if one is given."""
        try:
            yield
        except RecipeError:
            raise
        except ValueError as error:
            raise self.error(f"{subject}: {error}" if subject else str(error), option) from None

    def fresh_copy(self) -> Self:
        """Return a copy for a run of its own, which remembers where it stood in its file."""
        return self.model_copy(deep=True).set_origins(self.origins)

    def __eq__(self, other: object) -> bool:
        """Return whether options are equal; origins and runtime state do not count."""
        return type(self) is type(other) and self.model_dump() == other.model_dump()
