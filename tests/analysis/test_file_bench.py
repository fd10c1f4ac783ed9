"""Bench: the arithmetic of the claim, and one small real run."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from ovit_engine.analysis import file_bench
from ovit_engine.analysis.file_bench import bench_files
from ovit_engine.analysis.paired_timing import paired_ratio
from ovit_engine.certificate.machine import physical_cores
from ovit_engine.certificate.ratio import Ratio
from ovit_engine.export.writer import write_onnx


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (Ratio(median=2.0, low=1.9, high=2.1), "2.00x faster (1.90-2.10x)"),
        (Ratio(median=0.5, low=0.4, high=0.8), "2.00x slower (1.25-2.50x)"),
        (Ratio(median=1.05, low=0.98, high=1.2), "within noise (0.98-1.20x)"),
        (Ratio(median=1.02, low=1.01, high=1.025), "within noise (1.01-1.02x)"),  # as one file opened twice
        (Ratio(median=1.04, low=1.035, high=1.05), "1.04x faster (1.03-1.05x)"),
        (Ratio(median=0.99, low=0.975, high=0.995), "within noise (0.97-0.99x)"),
        (Ratio(median=1.0, low=1.0, high=1.0), "within noise (1.00-1.00x)"),
        (
            Ratio(median=1.3, low=1.2, high=1.4, noise=0.5),
            "within noise (1.20-1.40x; the baseline varies by 50%)",
        ),
    ],
)
def test_words_follow_the_interval(ratio, words):
    assert ratio.describe() == words
    assert ratio.verdict in words


def test_pairing_removes_what_strikes_both():
    generator = np.random.default_rng(0)
    load = generator.uniform(1, 10, 100)
    ratio = paired_ratio(2 * load, load * generator.uniform(0.99, 1.01, 100), generator)
    assert 1.98 < ratio.low <= ratio.median <= ratio.high < 2.02
    noise = paired_ratio(generator.uniform(1, 2, 100), generator.uniform(1, 2, 100), generator)
    assert noise.verdict == "within noise"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_onnx(nn.Linear(8, 4), torch.randn(2, 8), folder / "small.onnx")
    write_onnx(nn.Linear(8, 4), torch.randn(2, 8), folder / "fixed.onnx", dynamic_batch=False)
    write_onnx(nn.Linear(6, 4), torch.randn(2, 6), folder / "narrow.onnx")
    return folder


def test_a_real_run(files):
    report = bench_files([files / "small.onnx"], baseline=files / "fixed.onnx", batch_sizes=[2], repeats=5)
    base, row = report.rows
    assert (base.path.name, row.path.name, base.ratio) == ("fixed.onnx", "small.onnx", None)
    assert row.quartiles[0] <= row.median <= row.quartiles[1]
    assert row.throughput == pytest.approx(2 / row.median)
    stream = io.StringIO()
    report.render(Console(file=stream, width=150))
    assert row.ratio.describe() in stream.getvalue()
    assert "5 paired rounds" in stream.getvalue()


def test_the_same_file_twice_is_measured_once(files):
    report = bench_files([files / "small.onnx"] * 2, batch_sizes=[1, 3], repeats=5)
    assert [(row.batch_size, row.ratio) for row in report.rows] == [(1, None), (3, None)]


def test_the_first_of_several_files_is_the_baseline_and_threads_are_the_cores(files):
    seen = []
    report = bench_files(
        [files / "small.onnx", files / "fixed.onnx"],
        batch_sizes=[2],
        repeats=5,
        progress=lambda *done: seen.append(done),
    )
    assert report.baseline == files / "small.onnx"
    assert [row.ratio is None for row in report.rows] == [True, False]
    assert report.threads == physical_cores() == report.conditions.cores
    assert seen == [("batch 2", done, 5) for done in range(1, 6)]


def test_all_is_checked_before_anything_is_measured(files, monkeypatch):
    monkeypatch.setattr(file_bench, "measure_rounds", lambda *_: pytest.fail("it measured"))
    with pytest.raises(ValueError, match=r"narrow\.onnx takes inputs of 6, small\.onnx of 8: only files that take"):
        bench_files([files / "small.onnx", files / "narrow.onnx"])
    with pytest.raises(ValueError, match="takes batches of 2 only, not 8"):
        bench_files([files / "fixed.onnx"], batch_sizes=[2, 8])


def test_bad_requests(files, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.onnx"):
        bench_files([tmp_path / "none.onnx"])
    with pytest.raises(ValueError, match="takes batches of 2 only, not 1"):
        bench_files([files / "fixed.onnx"], batch_sizes=[1])
    for wrong in ({"repeats": 4}, {"threads": 0}, {"batch_sizes": []}, {"batch_sizes": [0]}):
        with pytest.raises(ValueError, match="need repeats >= 5"):
            bench_files([files / "small.onnx"], **wrong)
