"""What the integrations share: how long a framework's trainer trains, and its forward in full precision."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from transformers import TrainingArguments


def plain_forward(model: nn.Module) -> Callable[..., Any]:
    """The forward that `model` had before Accelerate put one on the object that runs in autocast."""
    forward: Callable[..., Any] = vars(model).get("_original_forward", model.forward)
    return forward


def lightning_length(trainer: "Trainer") -> tuple[int, int]:
    """The length of a Lightning fit. Raises ValueError where the Trainer does not know when it ends."""
    trainer.fit_loop.setup_data()  # makes the loader; Lightning does so by itself only where epochs end training
    total = trainer.estimated_stepping_batches
    if not 0 < total < math.inf:
        raise ValueError("the Trainer does not know when training ends: give it max_steps, or data that has a length")
    batches = trainer.num_training_batches
    steps = total if batches == math.inf else math.ceil(batches / trainer.accumulate_grad_batches)
    return int(steps), int(total)


def transformers_length(args: "TrainingArguments", loader: Any) -> tuple[int, int]:
    """The length of training on the batches of `loader`, as Hugging Face's Trainer counts it."""
    try:
        batches = len(loader)
    except TypeError:  # a stream
        return args.max_steps, args.max_steps
    steps = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return steps, args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * steps)
