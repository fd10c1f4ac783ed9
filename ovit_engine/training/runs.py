"""How a run of the bundled trainer begins, and how a finished one is read back from its checkpoint."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ovit_engine.bases.pruner import Pruner
from ovit_engine.core.capabilities import having
from ovit_engine.core.recipe import Recipe
from ovit_engine.core.schedule import Clock
from ovit_engine.engine import Engine
from ovit_engine.structured.shrink_model import rebuild
from ovit_engine.training.checkpoint import LAST, PREVIOUS, deployed_weights, folder_of, load_checkpoint, saved_manifest
from ovit_engine.training.models import make_model
from ovit_engine.training.sweep_run import clear_broken_start
from ovit_engine.training.teachers import load_teacher
from ovit_engine.training.trainer import Trainer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """A run read back from its checkpoint."""

    model: nn.Module
    engine: Engine
    data: str
    preprocessing: dict[str, Any]
    epoch: int


def restore(path: str | Path) -> Restored:
    """Rebuild model and engine of a run from its checkpoint, on the CPU; with the averaged weights, where it has some.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no checkpoint of ours, or damaged.
    """
    state = load_checkpoint(Path(path))
    recipe = Recipe.parse(state["recipe"], file=f"recipe in {path}")
    model = rebuild(make_model(recipe.training), saved_manifest(state))
    engine = Engine(
        model,
        recipe,
        steps_per_epoch=state["engine"]["steps_per_epoch"],
        epochs=recipe.training.epochs,
        teacher=None if state["engine"].get("finished") else load_teacher(recipe, folder_of(Path(path))),
    ).prepare()
    model.load_state_dict(deployed_weights(state))
    engine.load_state_dict(state["engine"])
    return Restored(model, engine, state["data"], state["preprocessing"], state["epoch"])


def begin(trainer: Trainer, checkpoint: str | Path | None, pretrained: bool, resume: str | Path | None) -> None:
    """Make the model, and load what it starts from, as the options of `train` say.

    Raises:
        FileExistsError: the output holds another run.
        ValueError: weights or a checkpoint that do not fit.
    """
    if resume is not None:
        trainer.prepare(pretrained=False, checkpoint=None, resumed=Path(resume))
        trainer.resume(Path(resume))
    else:
        if any((trainer.output / name).exists() for name in (LAST, PREVIOUS)):
            raise FileExistsError(
                f"{str(trainer.output)!r} holds a run already: resume it (--resume auto), or choose another --output"
            )
        if checkpoint is None and not pretrained and _prunes_at_once(trainer.recipe):
            log.warning(
                "the recipe prunes at step 0, and the weights are random: did you mean --checkpoint or --pretrained?"
            )
        trainer.prepare(pretrained=pretrained, checkpoint=None if checkpoint is None else Path(checkpoint))
        if trainer.engine.sweep is not None:
            if trainer.comm.is_main:
                clear_broken_start(trainer.output, trainer.recipe)
            if checkpoint is not None or pretrained:
                trainer.engine.sweep.baseline = trainer.accuracy()


def _prunes_at_once(recipe: Recipe) -> bool:
    """Return whether a pruner acts before the first step; training that is sparse from the start is meant to."""
    clock = Clock(100, 100 * recipe.training.epochs)
    return any(0 in modifier.changes(clock) for modifier in having(recipe.modifiers, Pruner))
