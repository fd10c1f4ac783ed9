"""ovit pack, ovit unpack: sparse weights as a smaller file."""

from pathlib import Path

import click


@click.command(short_help="Write FILE smaller by its zeros.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="The packed file; if left out FILE.packed.")
def pack(file: Path, output: Path | None) -> None:
    """Write an ONNX file of any origin as a bitmask and the values that are not zero, and print its sizes.

    ovit unpack gives back the same bytes; in a program ovit_engine.export.load_packed does.
    """
    from rich.table import Table

    from ovit_engine.export.pack import SUFFIX, pack_file
    from ovit_engine.utils.console import table_console

    output = output or file.with_name(file.name + SUFFIX)
    sizes = pack_file(file, output)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("form", no_wrap=True)
    for column in ("bytes", "of the file"):
        table.add_column(column, justify="right", no_wrap=True)
    for form, count in (
        ("ONNX file", sizes.raw),
        ("gzip -9", sizes.gzip),
        ("zstd -19", sizes.zstd),
        ("bitmask and values", sizes.bitmask),
        ("packed (deflated)", sizes.packed),
        ("packed, at the entropy of weights", sizes.bound),
    ):
        text = ("zstandard is not installed", "") if count is None else (f"{count:,}", f"{count / sizes.raw:.1%}")
        table.add_row(form, *text)
    table_console().print(table)
    click.echo(f"{output} written")


@click.command(short_help="Write the ONNX file of a packed FILE.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--output", type=click.Path(path_type=Path), help="The ONNX file; FILE without .packed if left out.")
def unpack(file: Path, output: Path | None) -> None:
    """Write the ONNX file that was packed, byte for byte."""
    from ovit_engine.export.pack import SUFFIX, load_packed
    from ovit_engine.utils.files import atomic_write

    content = load_packed(file)
    if output is None:
        if file.suffix != SUFFIX:
            raise click.UsageError(f"{file.name!r} does not end in {SUFFIX}: name the ONNX file with --output")
        output = file.with_suffix("")
    atomic_write(output, lambda stream: stream.write(content))
    click.echo(f"{output}: {len(content):,} bytes, as they were packed")
