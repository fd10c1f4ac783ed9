"""The bundled trainer: any timm model on any dataset of `load_data`, under a recipe."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ovit_engine.engine import Engine
from ovit_engine.integrations.checkpoint import LAST, load_checkpoint
from ovit_engine.integrations.models import make_model as make_model
from ovit_engine.integrations.models import model_name as model_name
from ovit_engine.integrations.models import with_training as with_training
from ovit_engine.integrations.sweep import clear_broken_start
from ovit_engine.integrations.trainer import SILENT as SILENT
from ovit_engine.integrations.trainer import EpochMetrics as EpochMetrics
from ovit_engine.integrations.trainer import Progress as Progress
from ovit_engine.integrations.trainer import Trained as Trained
from ovit_engine.integrations.trainer import Trainer
from ovit_engine.integrations.trainer import evaluate as evaluate
from ovit_engine.recipe import Recipe
from ovit_engine.schedule import Clock

log = logging.getLogger(__name__)


def train(
    recipe: Recipe,
    *,
    data: str | Path,
    output: str | Path,
    checkpoint: str | Path | None = None,
    pretrained: bool = False,
    resume: str | Path | None = None,
    device: str = "auto",
    workers: int = 0,
    strict: bool = False,
    root: str | Path | None = None,
    progress: Progress = SILENT,
) -> Trained:
    """Train the model of `recipe.training` under the recipe; `output` gets last.pt and metrics.csv at every epoch.

    Args:
        data: "digits", an image folder, a timm dataset name (see `load_data`).
        checkpoint: weights to start from, as a file or a run's folder.
        pretrained: start from timm's own weights (downloads them).
        resume: a checkpoint of a run of this recipe, to go on from the end of its last epoch. On a CPU the result is
            the same, bit for bit, as that of an unbroken run.
        device: "auto" takes a GPU where there is one.
        workers: processes that read images.
        strict: stop at the first unreadable image.
        root: where downloaded datasets are kept.

    Raises:
        RecipeError: the recipe can't be followed on this model or in this time.
        ValueError: data, weights or checkpoint that do not fit, or a loss that is no number any more.
        FileExistsError: `output` holds another run.
    """
    trainer = Trainer(recipe, str(data), Path(output), device, workers, strict, root)
    if resume is not None:
        trainer.prepare(pretrained=False, checkpoint=None)
        trainer.resume(Path(resume))
    else:
        if (trainer.output / LAST).exists():
            raise FileExistsError(
                f"{str(trainer.output)!r} holds a run already: resume it (--resume auto), or choose another --output"
            )
        if checkpoint is None and not pretrained and _prunes_at_once(recipe):
            log.warning(
                "the recipe prunes at step 0, and the weights are random: did you mean --checkpoint or --pretrained?"
            )
        trainer.prepare(pretrained=pretrained, checkpoint=None if checkpoint is None else Path(checkpoint))
        if trainer.engine.sweep is not None:
            clear_broken_start(trainer.output, trainer.recipe)
            if checkpoint is not None or pretrained:
                trainer.engine.sweep.baseline = trainer.accuracy(trainer.model)
    return trainer.fit(progress)


def _prunes_at_once(recipe: Recipe) -> bool:
    clock = Clock(100, 100 * recipe.training.epochs)
    rows = (row for modifier in recipe.modifiers for row in modifier.timeline(clock))
    return any(step == 0 and what == "sparsity" for step, what, _ in rows)


@dataclass(frozen=True)
class Restored:
    """A run read back from its checkpoint."""

    model: nn.Module
    engine: Engine
    data: str
    preprocessing: dict[str, Any]
    epoch: int


def restore(path: str | Path) -> Restored:
    """Rebuild model and engine of a run from its checkpoint, on the CPU.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no checkpoint of ours, or damaged.
    """
    state = load_checkpoint(Path(path))
    recipe = Recipe.parse(state["recipe"], file=f"recipe in {path}")
    model = make_model(recipe.training)
    engine = Engine(
        model, recipe, steps_per_epoch=state["engine"]["steps_per_epoch"], epochs=recipe.training.epochs
    ).prepare()
    model.load_state_dict(state["model"])
    engine.load_state_dict(state["engine"])
    return Restored(model, engine, state["data"], state["preprocessing"], state["epoch"])
