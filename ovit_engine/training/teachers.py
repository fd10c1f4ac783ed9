"""The teacher of a run of the bundled trainer: made as the recipe says, kept beside the checkpoints."""

from pathlib import Path
from typing import Any

from torch import nn

from ovit_engine.core.capabilities import Distillation, having
from ovit_engine.core.recipe import Recipe
from ovit_engine.core.state import whole_state_dict
from ovit_engine.core.training_options import Training
from ovit_engine.training.checkpoint import load_weights
from ovit_engine.training.models import empty_model, make_model
from ovit_engine.utils.torch_files import load_file, save_file

FILE = "teacher.pt"  # the weights, so that a resumed run needs nothing but its folder


def make_teacher(recipe: Recipe) -> nn.Module | None:
    """Return the teacher that the recipe's training names; None for a copy of the model that training starts from.

    The model of the recipe has as many classes as the data.

    Raises:
        ValueError: no such model, or weights that are not its own.
        FileNotFoundError: no such checkpoint.
    """
    named = recipe.training.teacher
    if named is None or (named.model == "same" and named.checkpoint is None):
        return None
    try:
        teacher = make_model(_training_of_teacher(recipe), pretrained=named.checkpoint is None)
        if named.checkpoint is not None:
            load_weights(teacher, Path(named.checkpoint))
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"training.teacher: {error}") from error
    return teacher


def check_teacher(recipe: Recipe) -> None:
    """Raise ValueError if timm does not have the teacher that the recipe's training names."""
    if recipe.training.teacher is None or recipe.training.teacher.model == "same":
        return
    try:
        empty_model(_training_of_teacher(recipe))
    except ValueError as error:
        raise ValueError(f"training.teacher: {error}") from error


def save_teacher(teacher: nn.Module, folder: Path) -> None:
    """Keep a teacher's weights for a resumed run."""
    save_file(folder / FILE, {"model": whole_state_dict(teacher)})


def load_teacher(recipe: Recipe, folder: Path) -> nn.Module | None:
    """Return the teacher of the run in a folder; None if there is none.

    Raises:
        ValueError: damaged, or of another recipe.
    """
    is_needed = recipe.training.teacher is not None or bool(having(recipe.modifiers, Distillation))
    if not is_needed or not (folder / FILE).is_file():
        return None
    teacher = make_model(_training_of_teacher(recipe))
    try:
        teacher.load_state_dict(load_file(folder / FILE)["model"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{str(folder / FILE)!r} does not fit the teacher of this recipe: {error}") from error
    return teacher


def _training_of_teacher(recipe: Recipe) -> Training:
    training, named = recipe.training, recipe.training.teacher
    if named is None or named.model == "same":
        return training
    shared = {key: training.model_args[key] for key in ("num_classes", "in_chans") if key in training.model_args}
    changes: dict[str, Any] = {
        "model": named.model,
        "model_args": {**shared, **named.model_args},
        "augmentation": "none",
    }
    return training.model_copy(update=changes)
