"""The bundled trainer: any timm model on any dataset of `load_data`, under a recipe."""

from pathlib import Path

from ovit_engine.core.recipe import Recipe
from ovit_engine.distributed.torchrun import process_group
from ovit_engine.training.device import choose_device
from ovit_engine.training.metrics import SILENT, EpochMetrics, TrainingListener, evaluate
from ovit_engine.training.models import make_model, model_name, rehearse, with_training
from ovit_engine.training.runs import begin
from ovit_engine.training.trainer import SAVE_EVERY, FinishedRunError, Trained, Trainer

__all__ = [
    "SILENT",
    "EpochMetrics",
    "FinishedRunError",
    "Trained",
    "TrainingListener",
    "evaluate",
    "make_model",
    "model_name",
    "rehearse",
    "train",
    "with_training",
]


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
    progress: TrainingListener = SILENT,
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
    with process_group(place) as comm:
        comm.assert_equal(lambda: {"the recipe": recipe.hash.encode(), "the checkpoint": str(resume)}, "at the start")
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
            comm=comm,
        )
        begin(trainer, checkpoint, pretrained, resume)
        told = progress if comm.is_main else SILENT
        if resume is not None:
            told.resume(Path(resume))
        return trainer.fit(told)
