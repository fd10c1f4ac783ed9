"""ovit bench: how fast files are on this machine, and from which size on 2:4 is faster on this GPU."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ovit_engine.cli import options

if TYPE_CHECKING:
    from ovit_engine.analysis.layer_shapes import LayerShape
    from ovit_engine.core.training_options import Training

DTYPES = ("float16", "bfloat16", "int8")


class BatchSizes(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """ "1,8,64" as whole numbers."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a list of batch sizes such as 1,8", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


@click.command(short_help="Measure latency, file against file.")
@click.argument("files", metavar="[FILE]...", nargs=-1)
@click.option("--baseline", type=click.Path(path_type=Path), help="What ratios are to; the first FILE by default.")
@click.option("--batch", "batch_sizes", type=BatchSizes(), default="1,8", show_default=True, help="Images a run.")
@click.option("--threads", type=click.IntRange(min=1), help="Of ONNX Runtime; all physical cores by default.")
@click.option("--repeats", type=click.IntRange(min=5), default=50, show_default=True, help="Paired rounds.")
@click.option("--output", type=click.Path(path_type=Path), help="A folder, or a file in .json, .csv or .md.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="See above.")
@click.option("--dtype", "dtypes", type=click.Choice(DTYPES), multiple=True, help="With cuda; all by default.")
@options.model
@options.model_args
def bench(
    files: tuple[str, ...],
    baseline: Path | None,
    batch_sizes: tuple[int, ...],
    threads: int | None,
    repeats: int,
    output: Path | None,
    device: str,
    dtypes: tuple[str, ...],
    model: str | None,
    model_args: tuple[tuple[str, Any], ...],
) -> None:
    """Measure latency and throughput of ONNX files with ONNX Runtime on the CPU, in turn within each round.

    A file is "faster" or "slower" only if the whole 95 % interval of the paired ratio is further from 1 than the
    baseline is from itself.

    --device cuda measures no file. It times 2:4 sparse against dense matrix products of the layers of FILE (an ONNX
    file or a recipe) or of --model, and writes from how many rows on 2:4 is faster on this GPU.
    """
    if device == "cuda":
        if baseline is not None or threads is not None:
            raise click.UsageError("--baseline and --threads go with --device cpu: on cuda dense is the baseline")
        _bench_sparse(_layers(files, model, dict(model_args)), batch_sizes, repeats, dtypes, output)
        return
    if dtypes or model is not None or model_args:
        raise click.UsageError("--dtype and --model go with --device cuda: on the CPU the files say what is measured")
    if not files and baseline is None:
        raise click.UsageError("Missing argument 'FILE'.")
    _bench_files([Path(file) for file in files], baseline, batch_sizes, threads, repeats, output)


def _bench_files(
    files: list[Path],
    baseline: Path | None,
    batch_sizes: tuple[int, ...],
    threads: int | None,
    repeats: int,
    output: Path | None,
) -> None:
    from rich.console import Console

    from ovit_engine.analysis.bench_report import check_output, write_bench
    from ovit_engine.analysis.file_bench import bench_files
    from ovit_engine.utils.progress import ProgressReport

    if output is not None:
        check_output(output)
    with ProgressReport(Console(stderr=True)) as progress:
        found = bench_files(
            files,
            baseline=baseline,
            batch_sizes=batch_sizes,
            repeats=repeats,
            threads=threads,
            progress=progress,
        )
    found.render()
    for file in [] if output is None else write_bench(found, output):
        click.echo(f"wrote {file}")


def _layers(files: tuple[str, ...], model: str | None, args: Any) -> tuple["LayerShape", ...]:
    """The layers of ONNX files, of recipes' models and of a named one."""
    from ovit_engine.analysis.layer_shapes import count_shapes, onnx_shapes
    from ovit_engine.core.recipe import Recipe
    from ovit_engine.core.training_options import Training

    found: list[LayerShape] = []
    for file in files:
        found += onnx_shapes(Path(file)) if file.endswith(".onnx") else _model_layers(Recipe.load(file).training)
    if model is not None:
        found += _model_layers(Training(model=model, model_args=args))
    if not found:
        raise click.UsageError("--device cuda needs layers: an ONNX file, a recipe or --model")
    return count_shapes(found)


def _model_layers(training: "Training") -> tuple["LayerShape", ...]:
    import torch

    from ovit_engine.analysis.layer_shapes import linear_shapes
    from ovit_engine.training.data import model_data_config
    from ovit_engine.training.models import empty_model

    model = empty_model(training)
    device = next(model.parameters()).device
    size = model_data_config(training.model or "", training.model_args)["input_size"]
    return linear_shapes(model, torch.zeros(1, *size, device=device))


def _bench_sparse(
    shapes: tuple["LayerShape", ...],
    batch_sizes: tuple[int, ...],
    repeats: int,
    dtypes: tuple[str, ...],
    output: Path | None,
) -> None:
    from rich.console import Console

    from ovit_engine.analysis.sparse_bench import bench_sparse
    from ovit_engine.analysis.sparse_table import write_table
    from ovit_engine.utils.progress import ProgressReport

    if output is not None and output.suffix != ".json":
        raise ValueError(f"{str(output)!r}: the table of --device cuda is one JSON file, write FILE.json")
    with ProgressReport(Console(stderr=True)) as progress:
        table = bench_sparse(
            shapes, batch_sizes=batch_sizes, dtypes=dtypes or DTYPES, repeats=repeats, progress=progress
        )
    table.render()
    if output is not None:
        write_table(table, output)
        click.echo(f"wrote {output}")
