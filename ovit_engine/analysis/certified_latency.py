"""Latency in a certificate: measured when asked, against files that the user names. Needs no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ovit_engine.analysis.bench_report import BenchRow
from ovit_engine.analysis.file_bench import bench_files
from ovit_engine.certificate.html import to_html
from ovit_engine.certificate.model import Certificate, Latency, certificate_path, page_path
from ovit_engine.utils.files import staged


def add_latency(
    path: str | Path,
    baselines: Sequence[str | Path],
    *,
    batch_sizes: Sequence[int] = (1, 8),
    repeats: int = 50,
    threads: int = 1,
) -> Certificate:
    """Measure a certified file paired with each baseline (dense float, dense int8) and write it into the certificate.

    Latencies measured before are replaced. They belong to the certificate's machine and moment: `verify` cannot
    measure them again elsewhere and does not try.

    Raises:
        FileNotFoundError: a file or the certificate does not exist.
        ValueError: as `bench_files`, or no baseline.
    """
    path = Path(path)
    if not baselines:
        raise ValueError("a latency says little alone: name a baseline, the dense float file for one")
    certificate = Certificate.from_json(certificate_path(path).read_text())
    rows: list[Latency] = []
    for baseline in map(Path, baselines):
        report = bench_files([path], baseline=baseline, batch_sizes=batch_sizes, repeats=repeats, threads=threads)
        rows += [_row(row, baseline, threads, repeats) for row in report.rows]
    certificate = certificate.model_copy(update={"latency": tuple(rows)})
    with staged(path) as draft:
        certificate_path(draft).write_text(certificate.to_json(), encoding="utf-8")
        page_path(draft).write_text(to_html(certificate), encoding="utf-8")
    return certificate


def _row(row: BenchRow, baseline: Path, threads: int, repeats: int) -> Latency:
    ratio = row.ratio
    return Latency(
        file=row.path.name,
        batch_size=row.batch_size,
        threads=threads,
        rounds=repeats,
        median=row.median,
        low=row.quartiles[0],
        high=row.quartiles[1],
        throughput=row.throughput,
        baseline=None if ratio is None else baseline.name,
        verdict=None if ratio is None else ratio.verdict,
        ratio=ratio,
    )
