"""ovit oneshot: accuracy over sparsity, without training."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ovit_engine.cli import options

if TYPE_CHECKING:
    from ovit_engine.core.recipe import Recipe
    from ovit_engine.post_training.oneshot_report import GridStep, OneShot
    from ovit_engine.post_training.setup import ModelSetup
    from ovit_engine.post_training.tune import Tuned


class Sparsities(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """ "0.5,0.75,0.9" as shares of zeros."""

    name = "S,S,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of sparsities such as 0.5,0.75,0.9", param, ctx)
        for sparsity in found:
            if not 0 <= sparsity < 1:
                hint = f": did you mean {sparsity / 100:g}?" if 2 <= sparsity < 100 else ""
                self.fail(f"sparsity {sparsity:g} is not in [0, 1){hint}", param, ctx)
        return found


class Names(click.ParamType):  # type: ignore[type-arg]  # as above
    """ "ovit,obert" as names."""

    name = "NAME,NAME,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        return value if isinstance(value, tuple) else tuple(part.strip() for part in str(value).split(","))


@click.command(short_help="Prune without training: accuracy over sparsity.")
@click.option("--recipe", help="Recipe whose pruner is run; a file, or the name of one of ours.")
@click.option("--targets", multiple=True, help="Without --recipe: weights to prune by oViT, as preset:vit.")
@options.data
@options.data_root
@options.model
@options.model_args
@options.checkpoint
@options.pretrained
@click.option("--sparsity", "sparsities", type=Sparsities(), default=(), help="As 0.5,0.75,0.9; none with N:M.")
@click.option(
    "--compare", type=Names(), default=(), help="Pruners to compare, as ovit,obert,obd,grad_weight,magnitude."
)
@click.option("--tune", is_flag=True, help="Try dampening, gradients and block of the pruner at one sparsity.")
@click.option("--seed", type=click.IntRange(min=0), help="Of the gradients' images.")
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder of the results; runs/<recipe>-oneshot if left out."
)
@options.device
@options.workers
@options.variables
def oneshot(
    recipe: str | None,
    targets: tuple[str, ...],
    data: str,
    data_root: Path | None,
    model: str | None,
    model_args: tuple[tuple[str, Any], ...],
    checkpoint: Path | None,
    pretrained: bool,
    sparsities: tuple[float, ...],
    compare: tuple[str, ...],
    tune: bool,
    seed: int | None,
    output: Path | None,
    device: str,
    workers: int,
    variables: tuple[tuple[str, Any], ...],
) -> None:
    """Prune a trained model at once to each sparsity, without training, and measure what is left of its accuracy.

    --compare draws the oViT paper's Figure 3 for your model; --tune finds a pruner's dampening.
    """
    options.check_weights(checkpoint, pretrained)
    if tune and len(compare) > 1:
        raise click.UsageError("--tune is for one pruner: name one with --compare, or none")
    if tune and len(sparsities) > 1:
        raise click.UsageError("--tune compares settings at one sparsity: give one")
    from ovit_engine.post_training.pruners import choose_pruners
    from ovit_engine.post_training.setup import set_up

    read = _recipe(recipe, targets, dict(variables), sparsities)
    read = options.with_options(read, model, model_args, seed=seed)
    for pruner in choose_pruners(read, compare):  # before the model and the images are read
        pruner.check_sparsities(sparsities)
    folder = output or Path("runs") / f"{read.name}-{'tune' if tune else 'oneshot'}"
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{str(folder)!r} is a file: --output names the folder of the results")
    if any((folder / name).exists() for name in ("oneshot.json", "tune.json")):
        raise FileExistsError(f"{str(folder)!r} holds results already: choose another --output")
    bench = set_up(
        read,
        data=data,
        checkpoint=checkpoint,
        pretrained=pretrained,
        device=device,
        workers=workers,
        root=data_root,
    )
    folder.mkdir(parents=True, exist_ok=True)
    if tune:
        _tune(bench, read, sparsities, compare, folder)
    else:
        _oneshot(bench, read, sparsities, compare, folder)


def _recipe(recipe: str | None, targets: tuple[str, ...], variables: Any, sparsities: tuple[float, ...]) -> "Recipe":
    import yaml

    from ovit_engine.core.recipe import Recipe

    if recipe is not None and targets:
        raise click.UsageError("--targets goes without --recipe, whose pruner names its own")
    if recipe is not None:
        return Recipe.load(recipe, **variables)
    if not targets:
        raise click.UsageError("give --recipe, or the weights to prune with --targets")
    sparsity = {"sparsity": sparsities[0]} if sparsities else {"pattern": "2:4"}
    text = yaml.safe_dump({"name": "oneshot", "modifiers": [{"ovit_prune": {**sparsity, "targets": list(targets)}}]})
    return Recipe.parse(text, file="--targets")


def _oneshot(
    bench: "ModelSetup", recipe: "Recipe", sparsities: tuple[float, ...], compare: tuple[str, ...], folder: Path
) -> None:
    from rich.console import Console

    from ovit_engine.post_training.oneshot import oneshot as run
    from ovit_engine.utils.progress import ProgressReport

    def tell(step: "GridStep[OneShot]") -> None:
        if step.result.points:
            step.result.save(folder)  # after every point: what is measured is not lost
            point = step.result.points[-1]
            values = f"sparsity {point.sparsity:.2%}  accuracy {point.accuracy:.2%}  {point.seconds:.1f} s"
            console.print(f"{point.pruner}  {values}")
        else:
            console.print(f"dense  accuracy {step.result.dense:.2%}")
        progress("pruning", step.done, step.total)

    console = Console(highlight=False, markup=False, soft_wrap=True)
    with ProgressReport(console) as progress:
        found = run(
            bench.model,
            recipe,
            calibration=bench.calibration,
            evaluate=bench.evaluate,
            sparsities=sparsities,
            compare=compare,
            example_inputs=bench.example_inputs,
            about=bench.about,
            progress=tell,
        )
    found.render()
    _say_saved([*found.save(folder), *found.plot(folder)])


def _tune(
    bench: "ModelSetup", recipe: "Recipe", sparsities: tuple[float, ...], compare: tuple[str, ...], folder: Path
) -> None:
    from rich.console import Console

    from ovit_engine.post_training.tune import tune as run
    from ovit_engine.utils.progress import ProgressReport

    def tell(step: "GridStep[Tuned]") -> None:
        if not step.result.settings:
            console.print(f"dense  held-out loss {step.result.dense_loss:.4f}")
        else:
            step.result.save(folder)
            if step.result.accuracy is None:
                setting = step.result.settings[-1]
                values = "  ".join(f"{name} {value:g}" for name, value in setting.options.items())
                console.print(f"{values}  held-out loss {setting.loss:.4f}  {setting.seconds:.1f} s")
        progress("tuning", step.done, step.total)

    calibration, held_out = bench.split()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with ProgressReport(console) as progress:
        found = run(
            bench.model,
            recipe,
            calibration=calibration,
            held_out=held_out,
            evaluate=bench.evaluate,
            sparsity=sparsities[0] if sparsities else None,
            pruner=compare[0] if compare else None,
            about=bench.about,
            progress=tell,
        )
    found.render()
    _say_saved(found.save(folder))


def _say_saved(files: list[Path]) -> None:
    click.echo(f"saved {', '.join(map(str, files))}")
