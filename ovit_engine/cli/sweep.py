"""ovit sweep: what a run with a sweep left at each sparsity, and going on from there."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ovit_engine.sweep.folder import Index


@click.command(short_help="Print the points of a sweep, export or fine-tune them.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--continue", "point", type=float, metavar="SPARSITY", help="Fine-tune the point of this sparsity.")
@click.option("--epochs", type=click.IntRange(min=1), help="Length of --continue; 100, or the tail's own, if left out.")
@click.option("--onnx", is_flag=True, help="Export each point to a verified ONNX file.")
@click.option("--data", help="'digits', an image folder or a timm dataset name; the run's own data if left out.")
@click.option("--data-root", type=click.Path(path_type=Path), help="Where downloaded datasets are kept.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda, to fine-tune on.")
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that read images.")
def sweep(
    folder: Path,
    point: float | None,
    epochs: int | None,
    onnx: bool,
    data: str | None,
    data_root: Path | None,
    device: str,
    workers: int,
) -> None:
    """Print what the run in DIR left at each sparsity of its sweep.

    --continue trains the model of one point for 100 epochs more (--epochs), its zeros held, the learning rate on a
    cosine from 5e-5 to 1e-5: the additional fine-tuning of the oViT paper. It writes DIR/sweep/SPARSITY-tail, a run
    like any other, and goes on with one that was broken off.
    """
    from ovit_engine.sweep.folder import FOLDER, draw, read_index

    if point is not None and onnx:
        raise click.UsageError("--onnx exports the sweep's points; export a tail with ovit export")
    if point is None and epochs is not None:
        raise click.UsageError("--epochs goes with --continue SPARSITY")
    index = read_index(folder / FOLDER)
    if point is not None:
        _continue(folder, index, point, epochs, data, data_root, device, workers)
        return
    if onnx and not index.finished:
        raise ValueError(f"the run is not finished: go on with ovit train --resume {folder}, then export its points")
    if onnx:
        index = _export_points(folder, index, data, data_root)
    print_points(index)
    for file in draw(folder / FOLDER, index):
        click.echo(f"wrote {file}")


def print_points(index: "Index") -> None:
    """The table of a sweep, and one of its ONNX files."""
    from rich.console import Console

    from ovit_engine.certificate.render import size_text
    from ovit_engine.sweep.folder import point_name
    from ovit_engine.utils.console import plain_table

    rows = [["dense", "", _metric(index, index.baseline)]] if index.baseline is not None else []
    for point in index.points:
        rows.append([point_name(point.sparsity), f"{point.measured:.2%}", _metric(index, point.metric)])
        rows[-1] += [f"{point.epoch:.4g}", f"{point.parameters_left:,}", size_text(point.bytes)]
        rows[-1] += [size_text(point.gzip_bytes)]
        rows[-1] += ["" if point.flop_reduction is None else f"-{point.flop_reduction:.1%}"]
    files = [
        [point.onnx, _metric(index, point.onnx_metric), size_text(point.onnx_bytes), size_text(point.onnx_gzip_bytes)]
        for point in index.points
        if point.onnx is not None and point.onnx_bytes is not None and point.onnx_gzip_bytes is not None
    ]
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(
        plain_table(["point", "sparsity", index.metric, "epoch", "left", "size", "gzip", "multiply-adds"], rows)
    )
    if files:
        console.print(plain_table(["ONNX file", index.metric, "size", "gzip"], files))
    missing = sorted(set(index.asked) - {point.sparsity for point in index.points})
    if missing:
        console.print(f"no model yet at {', '.join(map(point_name, missing))}")
    if any(point.metric is None for point in index.points):
        console.print(f"no {index.metric} was reported for some: the last model before the next change")


def _export_points(folder: Path, index: "Index", data: str | None, root: Path | None) -> "Index":
    from torch.utils.data import DataLoader

    from ovit_engine.core.recipe import Recipe
    from ovit_engine.sweep.folder import FOLDER
    from ovit_engine.training.api import make_model
    from ovit_engine.training.checkpoint import load_checkpoint
    from ovit_engine.training.data import config_of, load_data
    from ovit_engine.training.sweep_run import complete

    if not index.points:
        raise ValueError(f"the sweep in {str(folder)!r} has no point to export")
    known = load_checkpoint(folder / FOLDER / index.points[0].checkpoint)
    training = Recipe.parse(known["recipe"], file=f"recipe in {folder}").training
    images = load_data(data or known["data"], config=config_of(known["preprocessing"]), root=root)
    loader: Any = DataLoader(images.val, batch_size=64)
    return complete(folder, lambda: make_model(training), known["preprocessing"], data=loader)


def _continue(
    folder: Path,
    index: "Index",
    asked: float,
    epochs: int | None,
    data: str | None,
    root: Path | None,
    device: str,
    workers: int,
) -> None:
    from ovit_engine.cli.train import TrainingDisplay
    from ovit_engine.core.recipe import Recipe
    from ovit_engine.distributed.launch import launched
    from ovit_engine.sweep.folder import FOLDER, point_name
    from ovit_engine.training.api import SILENT, train
    from ovit_engine.training.checkpoint import LAST, load_checkpoint
    from ovit_engine.training.sweep_run import TAIL_EPOCHS, find_point, tail_recipe
    from ovit_engine.utils.files import atomic_write

    point = find_point(index, asked)
    start = folder / FOLDER / point.checkpoint
    output = folder / FOLDER / f"{point_name(point.sparsity)}-tail"
    resume = output if (output / LAST).exists() else None
    if resume is not None:
        recipe = Recipe.parse(load_checkpoint(resume)["recipe"], file=f"recipe in {resume}")
        if epochs not in (None, recipe.training.epochs):
            raise ValueError(
                f"{str(output)!r} holds a tail of {recipe.training.epochs} epochs, not {epochs}: leave --epochs out to "
                "go on with it, or move the folder away to begin another"
            )
    else:
        recipe = tail_recipe(start, epochs or TAIL_EPOCHS)
    leads = launched().is_main  # of torchrun's processes one writes and speaks
    if resume is None and leads:
        output.mkdir(exist_ok=True)
        atomic_write(output / "recipe.yaml", recipe.dump())
    with TrainingDisplay() if leads else nullcontext() as display:
        trained = train(
            recipe,
            data=data or load_checkpoint(start)["data"],
            output=output,
            checkpoint=None if resume else start,
            resume=resume,
            device=device,
            workers=workers,
            root=root,
            progress=SILENT if display is None else display.listener(),
        )
    if leads:
        click.echo(f"saved {trained.checkpoint}; next: ovit export {output} --output model.onnx")


def _metric(index: "Index", value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2%}" if index.is_share else f"{value:.4g}"
