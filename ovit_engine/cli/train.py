"""ovit train: the bundled trainer."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ovit_engine.cli import options

if TYPE_CHECKING:
    from ovit_engine.core.recipe import Recipe
    from ovit_engine.training.api import EpochMetrics, TrainingListener


@click.command()
@click.option("--recipe", help="Recipe file, or the name of one of ours (ovit recipes).")
@click.option("--data", help="'digits', an image folder with train/ and val/, or a timm dataset name.")
@options.data_root
@options.model
@options.model_args
@options.epochs
@click.option("--batch-size", type=click.IntRange(min=1), help="Images a step; the recipe's if left out.")
@click.option("--seed", type=click.IntRange(min=0), help="Of weights, order and augmentation.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Weights to start from: a file, or a run's folder.")
@click.option("--pretrained", is_flag=True, help="Start from timm's weights (downloads them).")
@click.option(
    "--resume", metavar="PATH|auto", help="Go on from a checkpoint; auto: from the last whole one in --output, if any."
)
@click.option(
    "--checkpoint-every",
    "minutes",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    metavar="MINUTES",
    help="Save within an epoch too; 0: at every step.",
)
@click.option("--amp", is_flag=True, default=None, help="Mixed precision: float16 on a GPU, bfloat16 on a CPU.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder of the run; runs/<recipe> if left out.")
@options.device
@options.workers
@click.option("--strict-images", is_flag=True, help="Stop at the first unreadable image.")
@options.variables
def train(
    recipe: str | None,
    data: str | None,
    data_root: Path | None,
    model: str | None,
    model_args: tuple[tuple[str, Any], ...],
    epochs: int | None,
    batch_size: int | None,
    seed: int | None,
    checkpoint: Path | None,
    pretrained: bool,
    resume: str | None,
    minutes: float,
    amp: bool | None,
    output: Path | None,
    device: str,
    workers: int,
    strict_images: bool,
    variables: tuple[tuple[str, Any], ...],
) -> None:
    """Train a timm model under a recipe.

    A resumed run needs neither --recipe nor --data: its checkpoint knows them. Where torchrun starts several processes
    (torchrun --nproc-per-node 4 -m ovit_engine train ...), --batch-size is that of all together.
    """
    from ovit_engine.distributed.launch import launched
    from ovit_engine.training.api import SILENT, FinishedRunError
    from ovit_engine.training.api import train as run
    from ovit_engine.training.checkpoint import LAST, PREVIOUS

    if resume is not None and (checkpoint is not None or pretrained):
        raise click.UsageError("--resume goes on with a run's own weights: no --checkpoint or --pretrained beside it")
    options.check_weights(checkpoint, pretrained)
    start = _resumed(resume, output, recipe)
    if resume is not None and start is None and recipe is None:
        raise click.UsageError(f"no checkpoint in {str(output)!r} to go on from: name a --recipe to begin with")
    read, known_data = _recipe_and_data(recipe, start, dict(variables))
    data = data or known_data
    if data is None:
        raise click.UsageError("Missing option '--data'.")
    if start is not None and recipe is None and epochs not in (None, read.training.epochs):
        raise click.UsageError(
            f"a resumed run keeps its {read.training.epochs} epochs: to train its model further, "
            f"begin a new run with --checkpoint {start}"
        )
    read = options.with_options(read, model, model_args, epochs=epochs, batch_size=batch_size, seed=seed)
    if output is None:
        output = Path("runs") / read.name if start is None else (start if start.is_dir() else start.parent)
    leads = launched().is_main
    try:
        with TrainingDisplay() if leads else nullcontext() as display:
            trained = run(
                read,
                data=data,
                output=output,
                checkpoint=checkpoint,
                pretrained=pretrained,
                resume=start,
                device=device,
                workers=workers,
                strict=strict_images,
                root=data_root,
                amp=amp,
                save_every=60 * minutes,
                progress=SILENT if display is None else display.listener(),
            )
    except KeyboardInterrupt:
        if leads and any((output / name).exists() for name in (LAST, PREVIOUS)):
            click.echo(f"stopped; go on with: ovit train --output {output} --resume auto", err=True)
        raise
    except FinishedRunError as error:
        if resume != "auto":
            raise
        if leads:  # no error: a job that is started until it is done is done
            click.echo(f"{error}; next: ovit export {output} --output model.onnx")
        return
    if not leads:
        return
    click.echo(f"saved {trained.checkpoint}; next: ovit export {output} --output model.onnx")
    if trained.engine.sweep is not None:
        names = ", ".join(trained.engine.sweep.names)
        click.echo(f"the sweep left models at {names}; next: ovit sweep {output}")


def _resumed(resume: str | None, output: Path | None, recipe: str | None) -> Path | None:
    """Return the checkpoint to go on from, if there is one."""
    if resume != "auto":
        return None if resume is None else Path(resume)
    if output is None and recipe is None:
        raise click.UsageError("--resume auto looks in --output: name it")
    from ovit_engine.core.recipe import Recipe
    from ovit_engine.training.checkpoint import last_whole

    return last_whole(output or Path("runs") / Recipe.load(recipe or "").name)


def _recipe_and_data(recipe: str | None, start: Path | None, variables: Any) -> tuple["Recipe", str | None]:
    from ovit_engine.core.recipe import Recipe

    known: dict[str, Any] = {}
    if start is not None:
        from ovit_engine.training.checkpoint import load_checkpoint

        known = load_checkpoint(start)
    if recipe is not None:
        return Recipe.load(recipe, **variables), known.get("data")
    if start is None:
        raise click.UsageError("Missing option '--recipe'.")
    return Recipe.parse(known["recipe"], file=f"recipe in {start}", **variables), known["data"]


class TrainingDisplay:
    """Show a bar per epoch on a terminal, and print a line at the end of each epoch everywhere."""

    def __init__(self) -> None:
        from rich.console import Console

        from ovit_engine.utils.progress import ProgressReport

        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._report = ProgressReport(self._console)
        self._epoch, self._steps, self._done = "", 0, 0

    def __enter__(self) -> "TrainingDisplay":
        self._report.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._report.__exit__(*error)

    def listener(self) -> "TrainingListener":
        """Return what the trainer calls."""
        from ovit_engine.training.api import TrainingListener

        return TrainingListener(
            begin=self._begin, step=self._step, end=self._end, work=self._report, resume=self._resume
        )

    def _resume(self, checkpoint: Path) -> None:
        self._console.print(f"going on from {checkpoint}")

    def _begin(self, epoch: int, epochs: int, steps: int) -> None:
        self._epoch, self._steps, self._done = f"epoch {epoch}/{epochs}", steps, 0

    def _step(self) -> None:
        self._done += 1
        if self._report.has_bars:
            self._report(self._epoch, self._done, self._steps)

    def _end(self, metrics: "EpochMetrics") -> None:
        self._console.print(
            f"{self._epoch}  loss {metrics.loss:.4f}  accuracy {metrics.accuracy:.2%}  "
            f"lr {metrics.lr:.2e}  sparsity {metrics.sparsity:.2%}  {metrics.seconds:.1f} s"
        )
