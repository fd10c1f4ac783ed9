"""What benchmarks of smaller models share: files measured against the dense one, beside the operations they save."""

import argparse
from collections.abc import Mapping
from pathlib import Path

import torch

from ovit_engine.analysis.file_bench import bench_files


def arguments(description: str | None) -> argparse.Namespace:
    """Threads, batch sizes and repeats, from the command line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    return found


def compare(files: Mapping[Path, float], settings: argparse.Namespace) -> None:
    """Print latencies of ONNX files by their multiply-adds, of which the first is the dense one.

    All are measured in the same rounds, in random order, and the dense one twice: what is within its own noise is no
    difference.
    """
    dense = next(iter(files))
    report = bench_files(
        list(files),
        baseline=dense,
        batch_sizes=settings.batch_sizes,
        threads=settings.threads,
        repeats=settings.repeats,
    )
    report.render()
    for row in report.rows:
        if row.ratio is not None:
            fewer = files[dense] / files[row.path]
            reached = f"{(row.ratio.median - 1) / (fewer - 1):.0%} of what operations give"
            print(f"{row.path.stem} at batch {row.batch_size}: {fewer:.2f} x fewer, {row.ratio.describe()}, {reached}")
