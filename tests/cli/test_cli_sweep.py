"""ovit sweep, and what ovit train says after one."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ovit_engine.cli import main
from ovit_engine.distributed.launch import Launch
from ovit_engine.sweep.folder import FOLDER, Index, Point, read_index, write_index
from ovit_engine.training import trainer
from ovit_engine.training.api import SILENT
from tests.cli.conftest import RECIPE, Ovit

SWEPT = RECIPE.replace('sparsity: "${sparsity}"', "sparsity: {1st: 0.5, 6st: 0.9}, sweep: [0.5, 0.9]").replace(
    "  - quantize: {start: 1ep}\n", ""
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run with a sweep, and what was printed; tests add files of their own to it."""
    folder = tmp_path_factory.mktemp("swept")
    (folder / "r.yaml").write_text(SWEPT)
    arguments = ["train", "--recipe", folder / "r.yaml", "--data", "digits", "--output", folder / "run"]
    done = CliRunner().invoke(main, [str(argument) for argument in [*arguments, "--device", "cpu"]])
    assert done.exit_code == 0, done.output
    return folder / "run", done.stdout


def test_show_marks_the_points(ovit: Ovit) -> None:
    Path("r.yaml").write_text(SWEPT)
    lines = ovit("show", "r.yaml").stdout.splitlines()
    assert [line.split()[1] for line in lines if line.rstrip().endswith("(magnitude_prune), sweep point")] == ["1", "6"]


def test_train_names_the_points_and_the_next_command(swept: tuple[Path, str]) -> None:
    folder, printed = swept
    assert printed.splitlines()[-1] == f"the sweep left models at 0.5, 0.9; next: ovit sweep {folder}"


def test_the_table_and_the_plot(ovit: Ovit, swept: tuple[Path, str]) -> None:
    done = ovit("sweep", swept[0])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["point", "sparsity", "accuracy", "epoch", "left", "size", "gzip", "multiply-adds"]
    points = read_index(swept[0] / FOLDER).points
    for line, point in zip(lines[1:3], points, strict=True):
        assert line.split()[:3] == [str(point.sparsity), f"{point.measured:.2%}", f"{point.metric:.2%}"]
        assert line.split()[-1] == f"-{point.flop_reduction:.1%}"
    assert [line.rpartition("/")[2] for line in lines[3:]] == ["accuracy_over_size.svg", "accuracy_over_size.png"]


def test_onnx_files_on_request(ovit: Ovit, swept: tuple[Path, str]) -> None:
    done = ovit("sweep", swept[0], "--onnx")
    assert done.exit_code == 0, done.output
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["ONNX", "file", "accuracy", "size", "gzip"] in rows
    for name in ("0.5", "0.9"):
        assert any(row[0] == f"{name}.onnx" for row in rows)
        checked = ovit("verify", swept[0] / FOLDER / f"{name}.onnx")
        assert checked.exit_code == 0, checked.output
    assert len(ovit("sweep", swept[0]).stdout.splitlines()) >= 6  # they stay in the index


def zeros(path: Path) -> dict[str, torch.Tensor]:
    model: dict[str, Any] = torch.load(path, weights_only=True)["model"]
    return {name: tensor == 0 for name, tensor in model.items() if tensor.ndim == 2 and "blocks" in name}


def test_a_point_goes_on_with_the_tail(ovit: Ovit, swept: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = swept[0]
    tail = folder / FOLDER / "0.9-tail"
    save = trainer.Trainer._save

    def broken_off(run: Any, epoch: int) -> None:
        save(run, epoch)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_save", broken_off)
        ovit("sweep", folder, "--continue", 0.9, "--epochs", 2, "--device", "cpu")
    assert "epochs: 2" in (tail / "recipe.yaml").read_text()
    done = ovit("sweep", folder, "--continue", 0.9, "--device", "cpu")  # where it was broken off, at its own length
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.stdout.splitlines()[:2]] == ["going", "epoch"]
    assert done.stdout.splitlines()[1].startswith("epoch 2/2")
    assert done.stdout.splitlines()[-1] == (f"saved {tail / 'last.pt'}; next: ovit export {tail} --output model.onnx")
    before, after = zeros(folder / FOLDER / "0.9.pt"), zeros(tail / "last.pt")
    assert sum(int(mask.sum()) for mask in before.values()) == round(0.9 * sum(m.numel() for m in before.values()))
    assert all(torch.equal(mask, after[name]) for name, mask in before.items())
    assert ovit("export", tail, "--output", "tail.onnx").exit_code == 0
    longer = ovit("sweep", folder, "--continue", 0.9, "--epochs", 3)
    assert longer.exit_code == 1
    assert f"{str(tail)!r} holds a tail of 2 epochs, not 3: leave --epochs out" in longer.stderr
    again = ovit("sweep", folder, "--continue", 0.9)
    assert again.exit_code == 1
    assert "is finished: all 2 epochs are done" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--continue", "0.8"], "the sweep has no point 0.8; there are 0.5, 0.9"),
        (["--continue", "x"], "Invalid value for '--continue'"),
        (["--epochs", "3"], "--epochs goes with --continue SPARSITY"),
        (["--continue", "0.9", "--onnx"], "--onnx exports the sweep's points; export a tail with ovit export"),
    ],
)
def test_errors(ovit: Ovit, swept: tuple[Path, str], arguments: list[str], words: str) -> None:
    done = ovit("sweep", swept[0], *arguments)
    assert done.exit_code != 0
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_folder_without_a_sweep(ovit: Ovit) -> None:
    done = ovit("sweep", "nowhere")
    assert done.stderr == "ovit: error: no sweep in 'nowhere': a recipe with 'sweep' in its pruner leaves one\n"


def test_a_sweep_under_way(ovit: Ovit) -> None:
    point = Point(
        sparsity=0.5,
        measured=0.5,
        step=5,
        epoch=0.5,
        metric=None,
        checkpoint="0.5.pt",
        bytes=2_000_000,
        gzip_bytes=1000,
        parameters=100,
        parameters_left=50,
    )
    index = Index(
        recipe="r",
        recipe_hash="",
        asked=(0.5, 0.75, 0.9),
        metric="loss",
        best="min",
        onnx=False,
        finished=False,
        baseline=1.25,
        points=(point,),
    )
    folder = Path("run") / FOLDER
    folder.mkdir(parents=True)
    write_index(folder, index)
    assert read_index(folder) == index
    lines = [line.rstrip() for line in ovit("sweep", "run").stdout.splitlines()]
    assert [line.split() for line in lines[1:3]] == [
        ["dense", "1.25"],
        ["0.5", "50.00%", "0.5", "50", "2.00", "MB", "1.0", "kB"],
    ]
    assert lines[3:] == [
        "no model yet at 0.75, 0.9",
        "no loss was reported for some: the last model before the next change",
    ]
    assert "the run is not finished: go on with ovit train --resume run" in ovit("sweep", "run", "--onnx").stderr


def test_of_several_processes_one_begins_a_tail(
    ovit: Ovit, swept: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []

    def train(*arguments: Any, progress: Any, checkpoint: Any, **options: Any) -> Any:
        told.append(progress)
        return SimpleNamespace(checkpoint=checkpoint)

    monkeypatch.setattr("ovit_engine.training.api.train", train)
    tail = swept[0] / FOLDER / "0.5-tail"
    for rank in (1, 0):
        monkeypatch.setattr("ovit_engine.distributed.launch.launched", lambda rank=rank: Launch(rank=rank, count=2))
        done = ovit("sweep", swept[0], "--continue", 0.5)
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith("saved ") == tail.exists() == (rank == 0)
        assert bool(done.stdout) == (rank == 0)
    assert told[0] is SILENT
    assert told[1] is not SILENT
    shutil.rmtree(tail)
