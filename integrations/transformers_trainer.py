"""What a recipe needs of Hugging Face's Trainer: arguments it can be followed with, a true log, names that stay."""

import functools
import inspect
from typing import Any

from transformers import Trainer, TrainerControl

from ovit_engine.engine import Engine


class TrainerLog:
    """Hands what an engine measures to its Trainer's log, once a step is over."""

    def __init__(self, engine: Engine, trainer: Trainer) -> None:
        self._trainer = trainer
        self._told: dict[str, float] = {}
        engine.log_to(self._note, every=None)  # the Trainer logs its rate

    def _note(self, values: dict[str, float], step: int) -> None:
        self._told.update(values)

    def flush(self, control: TrainerControl) -> None:
        """Log what was noted."""
        if self._told:
            values, self._told = self._told, {}
            due = control.should_log
            self._trainer.log(values)
            control.should_log = due  # the Trainer's own line at this step is still to come


class OptimizersRates:
    """In the place of a scheduler, for its Trainer: changes nothing, and says what the optimizer holds."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def get_last_lr(self) -> list[float]:
        return [float(group["lr"]) for group in self._engine.run.optimizers[0].param_groups]

    def step(self) -> None: ...
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def check_arguments(trainer: Trainer) -> None:
    """Raise ValueError for training arguments that a recipe can't be followed with."""
    args = trainer.args
    refused = {
        "model_init": (trainer.model_init, "it makes another model when training starts: give the Trainer model="),
        "auto_find_batch_size": (args.auto_find_batch_size, "it changes how many steps an epoch has"),
        "load_best_model_at_end": (args.load_best_model_at_end, "it may bring back weights from before the pruning"),
        "restore_callback_states_from_checkpoint": (
            args.restore_callback_states_from_checkpoint,
            "it would make this callback anew, without its model; the engine's state is restored without it",
        ),
        "deepspeed": (trainer.is_deepspeed_enabled, "sharded weights are not supported"),
        "fsdp": (trainer.is_fsdp_enabled, "sharded weights are not supported in the Trainer"),
    }
    for name, (value, reason) in refused.items():
        if value:
            raise ValueError(f"a recipe can't be followed with {name}: {reason}")


def keep_rates(engine: Engine, trainer: Trainer) -> None:
    """Have the Trainer make no scheduler where the recipe writes the learning rate."""
    claims = [claim.what for modifier in engine.modifiers for claim in modifier.claims(engine.run)]
    if trainer.lr_scheduler is None and "the learning rate" in claims:
        trainer.lr_scheduler = OptimizersRates(engine)  # type: ignore[assignment]  # all that a Trainer asks for


def keep_names(model: Any) -> None:
    """Have `save_pretrained` write the names that the model has.

    Of some models (ViT among them) Transformers 5 writes those of older versions, and its Trainer does not find them
    when it resumes: it warns, and goes on with random weights (huggingface/transformers issues 43701 and 48805).
    """
    if "save_original_format" in inspect.signature(model.save_pretrained).parameters:
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
