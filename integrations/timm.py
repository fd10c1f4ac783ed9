"""The bundled trainer: any timm model on any dataset of `load_data`, under a recipe."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ovit_engine.engine import Engine
from ovit_engine.integrations.checkpoint import (
    LAST,
    PREVIOUS,
    deployed_weights,
    folder_of,
    load_checkpoint,
    saved_manifest,
)
from ovit_engine.integrations.evaluation import evaluate as evaluate
from ovit_engine.integrations.models import make_model as make_model
from ovit_engine.integrations.models import model_name as model_name
from ovit_engine.integrations.models import with_training as with_training
from ovit_engine.integrations.processes import choose_device, joined
from ovit_engine.integrations.sweep import clear_broken_start
from ovit_engine.integrations.teachers import Teachers
from ovit_engine.integrations.trainer import SAVE_EVERY, Trainer
from ovit_engine.integrations.trainer import FinishedRunError as FinishedRunError
from ovit_engine.integrations.trainer import Trained as Trained
from ovit_engine.integrations.training_log import SILENT as SILENT
from ovit_engine.integrations.training_log import EpochMetrics as EpochMetrics
from ovit_engine.integrations.training_log import Progress as Progress
from ovit_engine.recipe import Recipe
from ovit_engine.schedule import Clock
from ovit_engine.shrink import rebuild

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
    amp: bool | None = None,
    save_every: float = SAVE_EVERY,
    progress: Progress = SILENT,
) -> Trained:
    """Train the model of `recipe.training` under the recipe; `output` gets last.pt and metrics.csv at every epoch.

    Processes that torchrun started train together: `batch_size` is that of all, which process 0 alone writes down.

    Args:
        data: "digits", an image folder, a timm dataset name (see `load_data`).
        checkpoint: weights to start from, as a file or a run's folder.
        pretrained: start from timm's own weights (downloads them).
        resume: a checkpoint of a run of this recipe, to go on from its last step. On a CPU the result is the same, bit
            for bit, as that of an unbroken run.
        device: "auto" takes a GPU where there is one.
        workers: processes that read images.
        strict: stop at the first unreadable image.
        root: where downloaded datasets are kept.
        amp: mixed precision, float16 with scaled gradients on a GPU, bfloat16 on a CPU; None: as the resumed run.
            Validation stays in float32, in which the model is exported.
        save_every: seconds after which last.pt is written within an epoch too. It changes no bit of the result.

    Raises:
        RecipeError: the recipe can't be followed on this model or in this time.
        ValueError: data, weights or checkpoint that do not fit, or a loss that is no number any more.
        FinishedRunError: (a ValueError) the run to resume is finished.
        FileExistsError: `output` holds another run.
    """
    place = choose_device(device)
    with joined(place) as processes:
        start = None if resume is None else str(resume)
        processes.agree((recipe.hash, start), "what training starts from (hash of the recipe, checkpoint)")
        trainer = Trainer(
            recipe,
            str(data),
            Path(output),
            place,
            workers,
            strict,
            root,
            amp=amp,
            save_every=save_every,
            processes=processes,
        )
        _set_up(trainer, recipe, checkpoint, pretrained, resume)
        told = progress if processes.leads else SILENT
        if resume is not None:
            told.resume(Path(resume))
        return trainer.fit(told)


def _set_up(
    trainer: Trainer, recipe: Recipe, checkpoint: str | Path | None, pretrained: bool, resume: str | Path | None
) -> None:
    """Make the model, and load what it starts from."""
    if resume is not None:
        trainer.prepare(pretrained=False, checkpoint=None, resumed=Path(resume))
        trainer.resume(Path(resume))
    else:
        if any((trainer.output / name).exists() for name in (LAST, PREVIOUS)):
            raise FileExistsError(
                f"{str(trainer.output)!r} holds a run already: resume it (--resume auto), or choose another --output"
            )
        if checkpoint is None and not pretrained and _prunes_at_once(recipe):
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
        teacher=None if state["engine"].get("finished") else Teachers(recipe).saved(folder_of(Path(path))),
    ).prepare()
    model.load_state_dict(deployed_weights(state))
    engine.load_state_dict(state["engine"])
    return Restored(model, engine, state["data"], state["preprocessing"], state["epoch"])
