"""ovit diagnose: which layer costs a file its accuracy."""

from pathlib import Path

import click


@click.command(short_help="Which layer or part of an int8 file costs its accuracy, and which recipe line fixes it.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="'digits', an image folder with train/ and val/, or a timm dataset name.")
@click.option("--data-root", type=click.Path(path_type=Path), help="Where downloaded datasets are kept.")
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="The float ONNX file that FILE was made from: adds what rounded weights and sparsity cost.",
)
def diagnose(file: Path, data: str, data_root: Path | None, reference: Path | None) -> None:
    """Run FILE with parts and layers of it in float, and print what each costs and the recipe line that helps."""
    from ovit_engine.analysis.diagnose import diagnose_file
    from ovit_engine.cli.verify import images_for

    diagnose_file(file, images_for(file, data, data_root), reference=reference).render()
