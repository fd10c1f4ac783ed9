"""What a recipe needs of Hugging Face's Trainer: its length, true rates, checkpoints that are found again."""

import base64
import functools
import inspect
import io
import math
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments

from ovit_engine.engine import Engine


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


def training_length(args: TrainingArguments, loader: Any) -> tuple[int, int]:
    """Optimizer steps of an epoch and of all training, as the Trainer counts them."""
    try:
        batches = len(loader)
    except TypeError:  # a stream
        return args.max_steps, args.max_steps
    steps = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return steps, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)


def keep_names(model: Any) -> None:
    """Have `save_pretrained` write the names that the model has.

    Of some models (ViT among them) Transformers 5 writes those of older versions, and its Trainer does not find them
    when it resumes: it warns, and goes on with random weights (huggingface/transformers issues 43701 and 48805).
    """
    if "save_original_format" in inspect.signature(model.save_pretrained).parameters:
        model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)


def packed(engine: Engine) -> dict[str, Any]:
    """The engine's state as JSON takes it, and enough of the weights to see whether they are loaded with it."""
    file = io.BytesIO()
    torch.save(engine.state_dict(), file)
    return {"engine": base64.b64encode(file.getvalue()).decode(), "weights": _sampled(engine.model)}


def unpack(engine: Engine, state: TrainerState, name: str) -> None:
    """Load what `packed` gave the callback `name`. Raises ValueError where it, or the weights, are missing."""
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
    """The first number of each parameter."""
    return {name: float(parameter.detach().flatten()[0]) for name, parameter in model.named_parameters()}
