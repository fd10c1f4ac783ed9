"""Hugging Face Transformers: `RecipeTrainerCallback(trainer, recipe)`, then `trainer.train()` as before."""

import base64
import copy
import functools
import inspect
import io
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ovit_engine.certificate import Certificate
from ovit_engine.core.capabilities import LearningRate, having
from ovit_engine.core.recipe import Recipe
from ovit_engine.engine import Engine
from ovit_engine.gradients.calibration import Calibration
from ovit_engine.integrations._keyword_batches import AddToOwnLoss, KeywordCalibration, deployed, positional


def engine_state(engine: Engine) -> dict[str, Any]:
    """Return the engine's state as JSON takes it, and enough of the weights to see whether they are loaded with it."""
    file = io.BytesIO()
    torch.save(engine.state_dict(), file)
    return {"engine": base64.b64encode(file.getvalue()).decode(), "weights": _sampled(engine.model)}


def load_engine_state(engine: Engine, state: TrainerState, name: str) -> None:
    """Load what `engine_state` gave the callback `name`. Raises ValueError where it, or the weights, are missing."""
    states: Any = state.stateful_callbacks or {}
    saved, where = states.get(name), f"the checkpoint of step {state.global_step}"
    if saved is None:
        raise ValueError(f"{where} was not trained under a recipe: it holds no engine's state")
    parts = (saved[-1] if isinstance(saved, list) else saved)["attributes"]
    loaded = _sampled(engine.model)
    lost = [name for name, value in parts["weights"].items() if loaded.get(name) != value]
    if lost:
        raise ValueError(f"the Trainer did not load {len(lost)} weights of {where}, such as {lost[0]!r}")
    engine.load_state_dict(torch.load(io.BytesIO(base64.b64decode(parts["engine"])), weights_only=True))


def _sampled(model: nn.Module) -> dict[str, float]:
    """Return the first number of each parameter."""
    return {name: float(parameter.detach().flatten()[0]) for name, parameter in model.named_parameters()}


class TrainerLog:
    """Hands what an engine measures to its Trainer's log, once a step is over."""

    def __init__(self, engine: Engine, trainer: Trainer) -> None:
        self._trainer = trainer
        self._values: dict[str, float] = {}
        engine.log_to(self._note, every=None)  # the Trainer logs its rate

    def _note(self, values: dict[str, float], step: int) -> None:
        self._values.update(values)

    def flush(self, control: TrainerControl) -> None:
        """Log what was noted."""
        if self._values:
            values, self._values = self._values, {}
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


def check_training_arguments(trainer: Trainer) -> None:
    """Raise ValueError for training arguments that a recipe can't be followed with."""
    args = trainer.args
    refused = {
        "model_init": (trainer.model_init, "it makes another model when training starts: give the Trainer model="),
        "auto_find_batch_size": (args.auto_find_batch_size, "it changes how many steps an epoch has"),
        "load_best_model_at_end": (args.load_best_model_at_end, "it may bring back weights from before the pruning"),
        "restore_callback_states_from_checkpoint": (
            args.restore_callback_states_from_checkpoint,
            "it would make this callback again, without its model; the engine's state is restored without it",
        ),
        "deepspeed": (trainer.is_deepspeed_enabled, "sharded weights are not supported"),
        "fsdp": (trainer.is_fsdp_enabled, "sharded weights are not supported in the Trainer"),
    }
    for name, (value, reason) in refused.items():
        if value:
            raise ValueError(f"a recipe can't be followed with {name}: {reason}")


def keep_rates(engine: Engine, trainer: Trainer) -> None:
    """Have the Trainer make no scheduler where the recipe writes the learning rate."""
    if trainer.lr_scheduler is None and having(engine.modifiers, LearningRate):
        trainer.lr_scheduler = OptimizersRates(engine)  # type: ignore[assignment]  # all that a Trainer asks for


def keep_names(model: Any) -> None:
    """Have `save_pretrained` write the names that the model has.

    Of some models (ViT among them) Transformers 5 writes those of older versions, and its Trainer does not find them
    when it resumes: it warns, and goes on with random weights (huggingface/transformers issues 43701 and 48805).
    """
    if "save_original_format" in inspect.signature(model.save_pretrained).parameters:
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)


class RecipeTrainerCallback(TrainerCallback, ExportableState):
    """Applies a recipe to the model that a Trainer trains, and adds itself to the Trainer.

    Make it before `trainer.train()`, in a resumed run too: surgery on the model comes before checkpoint and optimizer.
    Checkpoints hold the engine's state inside trainer_state.json. Where the recipe writes the learning rate, the
    Trainer makes no scheduler, and logs the rate that is used. Evaluation metrics reach `engine.metric`.

    Args:
        calibration: the source of gradients for second-order pruners; without it the model's own loss on the training
            data.
        teacher: what `distill` learns from; a copy of the model as it is now if left out.

    Raises:
        ValueError: training arguments that a recipe can't be followed with.
    """

    def __init__(
        self,
        trainer: Trainer,
        recipe: Recipe | str | Path,
        *,
        calibration: Calibration | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        check_training_arguments(trainer)
        self._trainer, self._calibration = trainer, calibration
        steps_per_epoch, total_steps = transformers_length(trainer.args, trainer.get_train_dataloader())
        model: Any = trainer.model
        length: Any = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
        self.engine = Engine(model, recipe, **length, teacher=teacher).prepare()
        keep_names(model)
        keep_rates(self.engine, trainer)
        self._log = TrainerLog(self.engine, trainer)
        trainer.add_callback(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step:
            load_engine_state(self.engine, state, type(self).__name__)
        loader = kwargs["train_dataloader"]
        calibration = self._calibration or KeywordCalibration(loader.dataset, loader.collate_fn)
        optimizer = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        self.engine.attach(optimizer, calibration=calibration)
        # after the hooks of prepare, which read the output
        self._terms = self.engine.model.register_forward_hook(AddToOwnLoss(self.engine), with_kwargs=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._trainer.accelerator.optimizer_step_was_skipped:
            self.engine.skip_step()
        self._log.flush(control)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs: Any
    ) -> None:
        for name, value in (metrics or {}).items() if self.engine.is_attached else ():
            if isinstance(value, (int, float)) and not name.endswith(("_runtime", "_per_second", "epoch")):
                self.engine.metric(name, value)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._terms.remove()
        self.engine.detach()

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": engine_state(self.engine)}

    def export(self, path: str | Path) -> Certificate:
        """Write the deployable ONNX file and its certificate, verified on the Trainer's evaluation data.

        The inputs of the file are those of its batches, labels left out, in their order; the output is the logits.

        Raises:
            ExportError: what the file fails of its promise.
        """
        names, data = positional(self._trainer.get_eval_dataloader())
        model = deployed(copy.deepcopy(self.engine.model), names)
        return self.engine.export(path, data[0][0], model=model, data=data)


def transformers_length(args: TrainingArguments, loader: Any) -> tuple[int, int]:
    """Return the steps of an epoch of `loader` and of all of training, as Hugging Face's Trainer counts them."""
    try:
        batches = len(loader)
    except TypeError:  # a stream
        return args.max_steps, args.max_steps
    steps = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return steps, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)
