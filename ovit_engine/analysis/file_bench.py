"""Paired latency of ONNX files in ONNX Runtime: no claim without a measurement, no difference inside the noise."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ovit_engine.analysis.bench_report import BenchReport, BenchRow
from ovit_engine.analysis.paired_timing import Timer, measure_rounds, paired_ratio, self_noise
from ovit_engine.certificate.kernels import open_session
from ovit_engine.certificate.machine import conditions_now, load_average, physical_cores
from ovit_engine.certificate.ratio import SESSION_NOISE
from ovit_engine.utils.progress import Progress

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
}


def bench_files(
    paths: Sequence[str | Path],
    *,
    baseline: str | Path | None = None,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 50,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure ONNX files side by side in ONNX Runtime on the CPU, all on the same seeded noise.

    Args:
        paths: files that take the same inputs; names and types of inputs may differ.
        baseline: what ratios are to, measured too; the first of several `paths` by default.
        repeats: rounds, in each of which every file is timed once.
        threads: of the runtime; by default the physical cores that this process may use.
        progress: called after each round.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: numbers below 1 (`repeats` below 5), files of different inputs, or a batch size that a file of
            fixed batch cannot take.
    """
    threads = physical_cores() if threads is None else threads
    if repeats < 5 or threads < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError(f"need repeats >= 5, threads and batch sizes >= 1, got {repeats}, {threads}, {batch_sizes}")
    files = list(dict.fromkeys(map(Path, [*([] if baseline is None else [baseline]), *paths])))
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"no such file: {file}")
    first = files[0] if len(files) > 1 else None
    opened = [*files, first] if first else files  # the baseline once more: how far is a file from itself?
    sessions = [open_session(file, threads=threads) for file in opened]
    generator = np.random.default_rng(seed)
    feeds = {size: _feeds(sessions, opened, size, generator) for size in batch_sizes}
    load = load_average()
    rows: list[BenchRow] = []
    for size in batch_sizes:
        timers = [_timer(session, feed) for session, feed in zip(sessions, feeds[size], strict=True)]
        seconds = measure_rounds(timers, repeats, generator, progress and partial(progress, f"batch {size}"))
        rows += _rows(files, first, size, seconds, generator)
    found = conditions_now(load)
    return BenchReport(rows=tuple(rows), baseline=first, threads=threads, repeats=repeats, conditions=found)


def _rows(
    files: Sequence[Path], first: Path | None, size: int, seconds: np.ndarray, generator: np.random.Generator
) -> list[BenchRow]:
    """One row a file from seconds [files (+ the first again), rounds]."""
    noise = SESSION_NOISE if first is None else self_noise(seconds[0], seconds[-1], generator)
    rows = []
    for file, measured in zip(files, seconds, strict=False):
        low, median, high = (float(value) for value in np.quantile(measured, [0.25, 0.5, 0.75]))
        compared = first is not None and file != first
        ratio = paired_ratio(seconds[0], measured, generator, noise=noise) if compared else None
        rows.append(BenchRow(path=file, batch_size=size, median=median, quartiles=(low, high), ratio=ratio))
    return rows


def _timer(session: Any, feeds: dict[str, np.ndarray]) -> Timer:
    def timed(loops: int) -> float:
        start = time.perf_counter()
        for _ in range(loops):
            session.run(None, feeds)
        return (time.perf_counter() - start) / loops

    return timed


def _feeds(
    sessions: Sequence[Any], paths: Sequence[Path], size: int, generator: np.random.Generator
) -> list[dict[str, np.ndarray]]:
    """The inputs of each session, made of the same noise. Raises ValueError where files do not take the same."""
    shapes = [_shapes(session, size, path) for session, path in zip(sessions, paths, strict=True)]
    for shape, path in zip(shapes, paths, strict=True):
        if shape != shapes[0]:
            raise ValueError(
                f"{path.name} takes inputs of {_spelled(shape)}, {paths[0].name} of {_spelled(shapes[0])}: "
                "only files that take the same inputs can be compared"
            )
    noise = [np.abs(generator.standard_normal((size, *shape))) for shape in shapes[0]]
    return [
        {value.name: part.astype(_TYPES[value.type]) for value, part in zip(session.get_inputs(), noise, strict=True)}
        for session in sessions
    ]


def _shapes(session: Any, size: int, path: Path) -> list[tuple[int, ...]]:
    """The shape of each input without the batch."""
    for value in session.get_inputs():
        if value.type not in _TYPES:
            raise ValueError(f"{path.name}: cannot make up inputs of type {value.type}")
        fixed = value.shape[0] if value.shape else 1
        if isinstance(fixed, int) and fixed != size:
            raise ValueError(f"{path.name} takes batches of {fixed} only, not {size}")
        if not all(isinstance(length, int) for length in value.shape[1:]):
            raise ValueError(f"{path.name}: input {value.name} has free dimensions besides the batch: {value.shape}")
    return [tuple(value.shape[1:]) for value in session.get_inputs()]


def _spelled(shapes: Sequence[tuple[int, ...]]) -> str:
    return " and ".join("x".join(map(str, shape)) or "one number" for shape in shapes)
