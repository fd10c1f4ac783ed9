"""ovit report: a run's folder as one page."""

from pathlib import Path

import click


@click.command(short_help="Write a run's folder as one HTML page.")
@click.argument("folder", metavar="RUN_DIR", type=click.Path(path_type=Path))
@click.option(
    "--onnx",
    multiple=True,
    type=click.Path(path_type=Path),
    help="An exported file elsewhere, its certificate beside it.",
)
@click.option(
    "--bench", "benches", multiple=True, type=click.Path(path_type=Path), help="JSON of ovit bench, elsewhere."
)
@click.option("--output", type=click.Path(path_type=Path), help="The page; RUN_DIR/report.html by default.")
def report(folder: Path, onnx: tuple[Path, ...], benches: tuple[Path, ...], output: Path | None) -> None:
    """Write one HTML page about the run in RUN_DIR: timeline, sparsity per layer, accuracy over size and latency,
    certificates, recipe, and what to try next.

    The page needs no network and has no scripts. Nothing is measured again: it shows what ovit train, sweep, export and
    bench left in the folder.
    """
    from ovit_engine.report import read_run, render_page
    from ovit_engine.utils.files import atomic_write

    found = read_run(folder, checkpoint=_last_whole(folder), onnx=onnx, benches=benches)
    for problem in found.problems:
        click.echo(f"ovit: warning: {problem}", err=True)
    path = output or folder / "report.html"
    atomic_write(path, render_page(found))
    click.echo(f"wrote {path}")


def _last_whole(folder: Path) -> Path | None:
    """Return the checkpoint that `ovit train --resume auto` would resume from, if there is one."""
    from ovit_engine.training.checkpoint import last_whole

    try:
        return last_whole(folder)
    except ValueError:  # none is intact, or none is of ovit train: the page reports what there is
        return None
