"""What a run of the bundled trainer starts from: random weights, timm's, those of a file, or a run that goes on."""

import logging
from pathlib import Path

from ovit_engine.integrations.checkpoint import LAST, PREVIOUS
from ovit_engine.integrations.sweep import clear_broken_start
from ovit_engine.integrations.trainer import Trainer
from ovit_engine.recipe import Recipe
from ovit_engine.schedule import Clock

log = logging.getLogger(__name__)


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
            if trainer.processes.leads:
                clear_broken_start(trainer.output, trainer.recipe)
            if checkpoint is not None or pretrained:
                trainer.engine.sweep.baseline = trainer.accuracy()


def _prunes_at_once(recipe: Recipe) -> bool:
    """Whether weights become zero before the first step."""
    clock = Clock(100, 100 * recipe.training.epochs)
    rows = (row for modifier in recipe.modifiers for row in modifier.timeline(clock))
    return any(step == 0 and what == "sparsity" for step, what, _ in rows)
