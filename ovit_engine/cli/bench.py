"""ovit bench: how fast files are on this machine."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click


class BatchSizes(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """ "1,8,64" as whole numbers."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is not a list of batch sizes such as 1,8", param, ctx)
        return tuple(int(part) for part in parts)


@click.command(short_help="Measure latency, paired with a baseline.")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--baseline", type=click.Path(path_type=Path), help="Another file, measured in turn with FILE.")
@click.option("--batch-size", "batch_sizes", type=BatchSizes(), default="1,8", show_default=True, help="Images a run.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of ONNX Runtime.")
@click.option("--repeats", type=click.IntRange(min=5), default=50, show_default=True, help="Paired rounds.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Also write the numbers to this file.")
def bench(
    file: Path, baseline: Path | None, batch_sizes: tuple[int, ...], threads: int, repeats: int, report: Path | None
) -> None:
    """Measure latency and throughput of FILE with ONNX Runtime, paired with a baseline if there is one."""
    from ovit_engine.export.bench import bench as measure
    from ovit_engine.files import atomic_write

    found = measure([file], baseline=baseline, batch_sizes=batch_sizes, repeats=repeats, threads=threads)
    found.render()
    if report is not None:
        text = json.dumps(asdict(found), indent=2, default=str)
        atomic_write(report, lambda stream: stream.write(f"{text}\n".encode()))
