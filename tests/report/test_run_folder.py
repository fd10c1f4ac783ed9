"""What is found in a run's folder: all of a real one, parts of others, and one line for what is damaged."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper

from ovit_engine import Engine, Recipe
from ovit_engine.analysis.sparse_table import ProductRow, SparseTable, write_table
from ovit_engine.certificate.ratio import Ratio
from ovit_engine.cli import main
from ovit_engine.report import read_run, render_page
from ovit_engine.report.advice import advise


def test_a_real_run_is_read_whole(whole_run):
    run = read_run(whole_run)
    assert run.problems == ()
    assert run.training.finished
    assert run.recipe.name == "tiny_<b>bold"
    rows = list(csv.DictReader((whole_run / "metrics.csv").read_text().splitlines()))
    assert [(epoch.epoch, epoch.accuracy) for epoch in run.epochs] == [
        (int(row["epoch"]), float(row["accuracy"])) for row in rows
    ]
    assert [(name, round(value, 3)) for _, name, value in run.training.sparsity_steps] == [
        ("magnitude_prune", 0.5),
        ("magnitude_prune", 0.75),
    ]
    assert [point.sparsity for point in run.sweep.points] == [0.75]
    assert [run.label(file) for file in run.files] == ["model.onnx", "sweep/0.75.onnx"]
    assert all(file.unchanged for file in run.files)
    assert [run.file_of(row).path.name for row in run.benches[0].rows] == ["0.75.onnx", "model.onnx"]


def test_sparsity_a_layer_is_that_of_the_weights_in_the_exported_file(whole_run):
    """Zeros counted in the ONNX file of the float sweep point, without any of our readers."""
    model = onnx.load(whole_run / "sweep" / "0.75.onnx")
    counted = sorted(
        int((values == 0).sum())
        for values in map(numpy_helper.to_array, model.graph.initializer)
        if values.ndim == 2 and (values == 0).mean() > 0.1
    )
    layers = read_run(whole_run).layers
    assert len(layers) == 4
    assert sorted(round(layer.sparsity * layer.numel) for layer in layers) == counted
    assert {layer.pattern for layer in layers} == {"unstructured"}


def test_the_masks_of_a_checkpoint_are_counted_bit_by_bit(whole_run):
    weights = torch.load(whole_run / "last.pt", weights_only=True)["model"]
    for layer in read_run(whole_run).layers:
        assert layer.sparsity == pytest.approx(float((weights[layer.name] == 0).float().mean()), abs=1e-6)
        assert layer.shape == tuple(weights[layer.name].shape)


@pytest.mark.parametrize(
    ("kept", "missing"),
    [
        ("last.pt", "last.pt"),
        ("metrics.csv", "metrics.csv"),
        ("sweep", "sweep"),
        ("bench.json", "bench.json"),
        ("model.*", "model.onnx"),
    ],
)
def test_any_part_alone_makes_a_page(whole_run, tmp_path, kept, missing):
    for path in whole_run.glob(kept):
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    assert (tmp_path / missing).exists()
    page = render_page(read_run(tmp_path))
    assert page.count("<section id=") == 6


def test_layers_come_from_a_file_where_there_is_no_checkpoint(whole_run, tmp_path):
    for path in whole_run.glob("model.*"):
        shutil.copy(path, tmp_path)
    of_file = {layer.name: layer.sparsity for layer in read_run(tmp_path).layers}
    of_run = {layer.name: layer.sparsity for layer in read_run(whole_run).layers}
    assert of_file.keys() == of_run.keys()
    # int8 rounds small weights to zero as well
    assert all(share >= of_run[name] - 1e-9 for name, share in of_file.items())


def test_a_file_that_was_changed_or_is_gone_is_seen(run_copy):
    content = bytearray((run_copy / "model.onnx").read_bytes())
    content[-1] ^= 1
    (run_copy / "model.onnx").write_bytes(content)
    (run_copy / "sweep" / "0.75.onnx").unlink()
    run = read_run(run_copy)
    assert [file.unchanged for file in run.files] == [False, None]
    page = render_page(run)
    assert "its bytes have changed" in page
    assert "the file is not" in page
    assert "Don&#39;t ship model.onnx before it is verified." in page


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("last.pt", b"no zip", "last.pt' is damaged, or no checkpoint"),
        (
            "metrics.csv",
            b"epoch,loss\n1,2\n",
            "metrics.csv' is damaged, or no metrics of a run: row 0, accuracy: F",
        ),
        ("sweep/sweep.json", b"{}", "sweep.json' is damaged, or no index"),
        ("model.certificate.json", b"{}", "model.certificate.json' is damaged, or of another version"),
    ],
)
def test_what_is_damaged_is_told_and_the_rest_is_shown(run_copy, name, content, words):
    (run_copy / name).write_bytes(content)
    run = read_run(run_copy)
    (problem,) = run.problems
    assert words in problem
    assert "Could not be read" in render_page(run)


def test_a_damaged_bench_is_told(run_copy):
    content = json.loads((run_copy / "bench.json").read_text())
    (run_copy / "bench.json").write_text(json.dumps({**content, "threads": "many"}))
    (problem,) = read_run(run_copy).problems
    assert "bench.json' is damaged, or no JSON of ovit bench: threads:" in problem


def test_a_checkpoint_of_something_else_is_told(tmp_path, whole_run):
    shutil.copy(whole_run / "metrics.csv", tmp_path)
    torch.save({"model": {}}, tmp_path / "last.pt")
    assert "last.pt' is no checkpoint of a run: KeyError 'engine'" in read_run(tmp_path).problems[0]


def test_nothing_to_report_on(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_run(tmp_path / "none")
    with pytest.raises(ValueError, match=r"nothing to report on in .*: no last\.pt, metrics\.csv, sweep/sweep\.json"):
        read_run(tmp_path)
    (tmp_path / "last.pt").write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"bench that can be read: .*last\.pt' is damaged"):
        read_run(tmp_path)


def test_files_that_are_named_must_be_there_and_whole(whole_run, tmp_path):
    shutil.copy(whole_run / "metrics.csv", tmp_path)
    run = read_run(tmp_path, onnx=[whole_run / "model.onnx"], benches=[whole_run / "bench.json"])
    assert [run.label(file) for file in run.files] == [str(whole_run / "model.onnx")]
    assert len(run.benches) == 1
    with pytest.raises(FileNotFoundError, match=r"no certificate .*x\.certificate\.json' beside x\.onnx"):
        read_run(tmp_path, onnx=[tmp_path / "x.onnx"])
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        read_run(tmp_path, benches=[tmp_path / "none.json"])
    with pytest.raises(ValueError, match=r"metrics\.csv' is damaged, or no JSON of ovit bench"):
        read_run(tmp_path, benches=[tmp_path / "metrics.csv"])
    twice = read_run(whole_run, onnx=[whole_run / "model.onnx"], benches=[whole_run / "bench.json"])
    assert len(twice.files) == 2
    assert len(twice.benches) == 1


def test_a_row_of_a_bench_belongs_to_a_file_only_where_that_is_certain(whole_run, run_copy):
    """Two files are called model.onnx: a path tells them apart, a name alone does not."""
    run = read_run(whole_run, onnx=[run_copy / "model.onnx"])
    row = replace(run.benches[0].rows[1], path=run_copy / "sweep" / ".." / "model.onnx")
    assert run.file_of(row).path == run_copy / "model.onnx"
    assert run.file_of(replace(row, path=Path("elsewhere/model.onnx"))) is None
    assert run.file_of(replace(row, path=Path("elsewhere/0.75.onnx"))).path == whole_run / "sweep" / "0.75.onnx"
    assert run.file_of(replace(row, path=Path("elsewhere/other.onnx"))) is None


def test_a_table_of_a_gpu_is_shown(tmp_path):
    ratio = Ratio(median=1.5, low=1.4, high=1.6)
    row = ProductRow(dtype="int8", out_features=64, in_features=32, rows=100, ratio=ratio)
    known = SparseTable(
        device="Abacus", capability=(8, 0), backend="cutlass", versions={}, date="", repeats=5, rows=(row,)
    )
    write_table(known, tmp_path / "break_even.json")
    page = render_page(read_run(tmp_path))
    assert "2:4 on Abacus" in page
    assert "int8, 64×32: 2:4 is faster from 100 rows on (100 to 100 rows were measured)" in page


def test_the_command_writes_the_page_and_warns_of_damage(run_copy):
    (run_copy / "metrics.csv").write_text("x\n1\n")
    done = CliRunner().invoke(main, ["report", str(run_copy)])
    assert done.exit_code == 0
    assert done.stdout == f"wrote {run_copy / 'report.html'}\n"
    assert done.stderr.startswith("ovit: warning: ")
    assert (run_copy / "report.html").read_text() == render_page(read_run(run_copy))
    other = run_copy.parent / "x.html"
    assert CliRunner().invoke(main, ["report", str(run_copy), "--output", str(other)]).exit_code == 0
    assert other.read_text() == (run_copy / "report.html").read_text()
    gone = CliRunner().invoke(main, ["report", "none"])
    assert (gone.exit_code, gone.stderr) == (1, "ovit: error: no folder 'none'\n")


def test_masks_of_blocks_and_groups_are_named(tmp_path):
    mask = np.packbits(np.array([[True, False, True, False]]).reshape(-1))
    masks = {
        name: {"shape": [1, 4], "bits": torch.from_numpy(mask), "pattern": pattern}
        for name, pattern in (("a", "2:4"), ("b", {"block": [1, 2]}))
    }
    engine = {"steps_per_epoch": 2, "total_steps": 4, "step": 1, "finished": False, "recipe": "modifiers: []"}
    torch.save({"engine": {**engine, "history": [], "masks": masks}}, tmp_path / "last.pt")
    layers = read_run(Path(tmp_path)).layers
    assert [(layer.pattern, layer.sparsity) for layer in layers] == [("2:4", 0.5), ("block 1x2", 0.5)]


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_read(whole_run, tmp_path):
    shutil.copy(whole_run / "last.pt", tmp_path / "previous.pt")
    (tmp_path / "last.pt").write_bytes((whole_run / "last.pt").read_bytes()[:-3000])
    done = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert done.stderr.startswith(f"ovit: warning: '{tmp_path}/last.pt' is damaged")
    assert done.stderr.endswith(f"{tmp_path}/previous.pt\n")
    assert done.stderr.count("\n") == 1
    found = read_run(tmp_path, checkpoint=tmp_path / "previous.pt")
    assert found.training == read_run(whole_run).training
    assert "magnitude_prune" in (tmp_path / "report.html").read_text()
    (tmp_path / "previous.pt").unlink()
    alone = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert alone.exit_code == 1
    assert f"'{tmp_path}/last.pt' is damaged" in alone.stderr


@pytest.mark.parametrize(("steps", "finished"), [(3, False), (4, True)])
def test_a_checkpoint_of_a_loop_of_ones_own(tmp_path, steps, finished):
    """Saved before engine.detach(), and nothing that ovit train or ovit export could read."""
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = Engine(model, Recipe.parse("name: own\nmodifiers: []"), steps_per_epoch=4, epochs=1)
    engine.attach(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 4)).sum().backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "engine": engine.state_dict()}, tmp_path / "last.pt")
    run = read_run(tmp_path)
    assert run.recipe.name == "own"
    assert (run.training.step, run.training.finished, run.training.bundled) == (steps, finished, False)
    assert not any((advice.command or "").startswith(("ovit train", "ovit export")) for advice in advise(run))
