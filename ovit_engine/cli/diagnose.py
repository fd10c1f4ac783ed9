"""ovit diagnose: which layer costs a file its accuracy."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from ovit_engine.cli import options

_SECONDS = 2  # between two lines of progress


@click.command(short_help="Which layer or part of an int8 file costs its accuracy, and which recipe line fixes it.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--data",
    required=True,
    help="'digits', an image folder with train/ and val/, a timm dataset name, or an .npz file with the inputs.",
)
@click.option("--data-root", type=click.Path(path_type=Path), help="Where downloaded datasets are kept.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="The float ONNX file that FILE was made from: adds what rounded weights and sparsity cost.",
)
@click.option("--model", help="timm model whose images FILE takes, where FILE does not say so.")
@options.shapes
@options.preprocessing
def diagnose(
    file: Path,
    data: str,
    data_root: Path | None,
    reference: Path | None,
    model: str | None,
    shapes: tuple[tuple[str, list[int]], ...],
    **preprocessing: Any,
) -> None:
    """Run FILE with parts and layers of it in float, and print what each costs and the recipe line that helps.

    FILE is of ovit-engine, one that failed among them, or another tool's with QuantizeLinear/DequantizeLinear pairs.
    """
    from ovit_engine.analysis.diagnose import diagnose_file

    told = options.preprocessing_of(preprocessing)
    images = _images(file, data, data_root, model, told, dict(shapes))
    diagnose_file(file, images, reference=reference, progress=_progress()).render()


def _images(
    file: Path, data: str, root: Path | None, model: str | None, told: dict[str, Any], shapes: dict[str, list[int]]
) -> Iterable[Any]:
    """The images or arrays to run the file on."""
    from torch.utils.data import DataLoader

    from ovit_engine.certificate.stored import load_onnx
    from ovit_engine.post_training.onnx_images import image_config, read_inputs
    from ovit_engine.training.data import load_data

    proto = load_onnx(file)
    if data.endswith(".npz"):
        return read_inputs(proto, Path(data))[1]
    config = image_config(proto, file.name, model, data, told, shapes)
    return DataLoader(load_data(data, config=config, root=root).val, batch_size=64)


def _progress() -> Callable[[int], None]:
    """Print a line on stderr now and then: how many variants of the file were run."""
    import time

    said = time.monotonic()

    def report(runs: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _SECONDS:
            said = time.monotonic()
            click.echo(f"diagnose: {runs} variants of the file were run", err=True)

    return report
