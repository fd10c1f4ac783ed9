"""A bench on the disk: what was written reads back, in all formats, and nothing else does."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovit_engine.analysis.bench_report import (
    BenchReport,
    BenchRow,
    read_bench,
    to_csv,
    to_json,
    to_markdown,
    write_bench,
)
from ovit_engine.certificate.machine import Conditions, count_cores, load_average, physical_cores
from ovit_engine.certificate.model import Machine
from ovit_engine.certificate.ratio import Ratio


def report(spread: float = 0.02) -> BenchReport:
    dense = BenchRow(path=Path("a/m.onnx"), batch_size=8, median=0.004, quartiles=(0.0039, 0.0041), ratio=None)
    fast = BenchRow(
        path=Path("b|c/m.onnx"),
        batch_size=8,
        median=0.002,
        quartiles=(0.002, 0.002 * (1 + spread)),
        ratio=Ratio(median=2.0, low=1.9, high=2.1, noise=0.05),
    )
    machine = Machine(cpu="Abacus", cores=4, int8=("avx512_vnni",))
    conditions = Conditions(
        machine=machine, cores=2, versions={"onnxruntime": "1.23"}, load=(0.5, 1.25), date="2026-01-02T03:04:05+00:00"
    )
    return BenchReport(rows=(dense, fast), baseline=dense.path, threads=2, repeats=50, conditions=conditions)


def test_json_reads_back_as_it_was_and_holds_the_verdict(tmp_path):
    written = write_bench(report(), tmp_path / "new" / "b.json")
    assert written == [tmp_path / "new" / "b.json"]
    assert read_bench(written[0]) == report()
    row = json.loads(written[0].read_text())["rows"][1]
    assert (row["verdict"], row["ratio"]["low"], row["images_per_second"]) == ("faster", 1.9, 4000.0)


def test_a_folder_gets_all_three(tmp_path):
    assert [path.name for path in write_bench(report(), tmp_path / "x")] == ["bench.json", "bench.csv", "bench.md"]
    assert all(path.is_file() for path in (tmp_path / "x").iterdir())


def test_csv_is_a_table_of_numbers():
    first, second = csv.DictReader(io.StringIO(to_csv(report())))
    assert (first["file"], first["ratio"], first["verdict"]) == ("a/m.onnx", "", "")
    assert float(second["ms_median"]) == 2.0
    assert float(second["ratio_low"]) == 1.9
    assert (second["baseline"], second["verdict"]) == ("a/m.onnx", "faster")


def test_markdown_names_files_apart_and_keeps_its_cells():
    lines = to_markdown(report()).splitlines()
    assert lines[0].endswith("| against a/m.onnx |")
    assert lines[3] == "| b\\|c/m.onnx | 8 | 2.000 | 2.000-2.040 | 4000 | 2.00x faster (1.90-2.10x) |"
    assert lines[5].startswith("Abacus, 2 threads, 50 paired rounds, load 0.5 before, 1.2 after, on 2 cores. onnxrun")
    assert not report().notes


def test_a_noisy_machine_is_told():
    (note,) = report(spread=0.5).notes
    assert note.startswith("noisy machine: half of the rounds of b|c/m.onnx at batch 8 lie 50% of the median apart")
    assert note in to_markdown(report(spread=0.5))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1]", "it does not say 'ovit bench"),
        ('{"kind": "x"}', "it does not say"),
        ("{", "Expecting property name"),
        (to_json(report()).replace('"median": 0.004', '"median": "slow"'), "rows.0.median: Input should be a valid"),
    ],
)
def test_what_is_no_bench_is_told_in_one_line(tmp_path, content, reason):
    (tmp_path / "b.json").write_text(content)
    with pytest.raises(ValueError, match=r"b\.json' is damaged, or no JSON of ovit bench") as caught:
        read_bench(tmp_path / "b.json")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_formats_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'b\.txt' ends in '\.txt': write a folder, or a file in \.json, \.csv, \.md"):
        write_bench(report(), tmp_path / "b.txt")
    assert not list(tmp_path.iterdir())


def cpuinfo(layout: list[tuple[int, int]]) -> str:
    """/proc/cpuinfo of hardware threads on (package, core)."""
    blocks = [f"processor\t: {n}\nphysical id\t: {p}\ncore id\t\t: {c}\n" for n, (p, c) in enumerate(layout)]
    return "\n".join(blocks)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 3)), min_size=1, max_size=12), st.data())
def test_cores_are_counted_once_and_only_ours(layout, data):
    allowed = data.draw(st.sets(st.sampled_from(range(len(layout))), min_size=1))
    assert count_cores(cpuinfo(layout), allowed, "max 100000") == len({layout[thread] for thread in allowed})


@pytest.mark.parametrize(
    ("text", "threads", "quota", "expected"),
    [
        (cpuinfo([(0, n) for n in range(8)]), 8, "250000 100000", 2),
        (cpuinfo([(0, n) for n in range(8)]), 8, "50000 100000", 1),
        ("", 4, "max 100000", 4),
        ("processor : 0\nBogoMIPS : 50\n\nprocessor : 1\nBogoMIPS : 50\n", 2, "max 100000", 2),  # Arm names no cores
    ],
)
def test_cores_under_quotas_and_without_names(text, threads, quota, expected):
    assert count_cores(text, set(range(threads)), quota) == expected


def test_this_machine_has_a_core_and_a_load():
    assert physical_cores() >= 1
    assert load_average() is None or load_average() >= 0
