"""Errors and warnings of every command: one line on stderr, a non-zero code, no traceback unless asked."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ovit_engine.cli import main
from ovit_engine.cli.group import describe

Ovit = Callable[..., Result]


def one_error(result: Result) -> str:
    """The one line that a failed command left on stderr."""
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("ovit: error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("ovit: error: ").rstrip()


@pytest.mark.parametrize("command", ["validate", "show"])
def test_a_recipe_path_that_does_not_exist(ovit: Ovit, command: str) -> None:
    message = one_error(ovit(command, "digits_vit_dens"))
    assert (
        message
        == "no recipe file 'digits_vit_dens' nor a shipped recipe (`ovit recipes`); did you mean 'digits_vit_dense'?"
    )
    assert one_error(ovit(command, "xyz")).startswith(
        "no recipe file 'xyz' nor a shipped recipe (`ovit recipes`); there are "
    )
    assert one_error(ovit(command, "evit")).endswith("; did you mean 'tokens/evit_deit_small_70'?")
    Path("mine").mkdir()
    Path("mine/prune_later.yaml").write_text("modifiers: []")
    assert one_error(ovit(command, "mine/prune_latr.yaml")).endswith("; did you mean 'prune_later.yaml'?")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modifiers: [", "bad.yaml:1:13: not YAML"),
        ("- 1", "bad.yaml:1:1: a recipe is a mapping"),
        ("modifiers:\n  - ovit_prun: {}", "bad.yaml:2:5: no modifier 'ovit_prun'; did you mean 'ovit_prune'?"),
        ("modifiers:\n  - cyclic_lr: {max: 1, min: 1, periodd: 2ep}", "bad.yaml:2:33: cyclic_lr has no option"),
        ("modifiers:\n  - cyclic_lr: {max: 1, min: 1, end: 99ep}", "bad.yaml:2:38: cyclic_lr.end: '99ep' is step 9900"),
    ],
)
def test_a_recipe_with_a_mistake_names_the_place(ovit: Ovit, text: str, message: str) -> None:
    Path("bad.yaml").write_text(text)
    for command in ("validate", "show"):
        assert message in one_error(ovit(command, "bad.yaml"))
    assert message in one_error(ovit("train", "--recipe", "bad.yaml", "--data", "digits", "--model", "resnet10t")) or (
        "99ep" in text  # the trainer has another number of steps
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["validate", "tiny.yaml", "--model", "vit_tinny"], "timm has no model 'vit_tinny'; did you mean"),
        (["validate", "tiny.yaml", "--model", "resnet10t"], "tiny.yaml:10:57: magnitude_prune.targets: target"),
        (
            ["show", "tiny.yaml", "--var", "sparsty=0.9"],
            "the recipe has no variable 'sparsty'; did you mean 'sparsity'?",
        ),
        (["show", "tiny.yaml", "--var", "sparsity=1.2"], "sparsity 1.2 is not in [0, 1)"),
        (["train", "--recipe", "tiny.yaml", "--data", "photos"], "no data 'photos': give 'digits', an image folder"),
        (["train", "--recipe", "tiny.yaml", "--data", "digts"], "no data 'digts'; did you mean 'digits'?"),
        (["train", "--recipe", "tiny.yaml", "--data", "digits", "--model", "vit_tinny"], "timm has no model"),
        (["train", "--recipe", "tiny.yaml", "--data", "digits", "--device", "tpuu"], "no device 'tpuu'"),
        (["train", "--recipe", "tiny.yaml", "--data", "digits", "--checkpoint", "no.pt"], "no checkpoint 'no.pt'"),
        (["train", "--resume", "none"], "no checkpoint 'none'"),
        (["export", "none", "--output", "m.onnx"], "no checkpoint 'none'"),
        (["export", "none", "--output", "none/m.onnx"], "no folder 'none' to write 'm.onnx' to"),
        (["verify", "none.onnx"], "no such file: none.onnx"),
        (["verify", "none.onnx", "--data", "digits"], "no such file: none.onnx"),
        (["verify", "tiny.yaml", "--data", "digits"], "'tiny.yaml' is not an ONNX file"),
        (["bench", "none.onnx"], "no such file: none.onnx"),
        (["bench", "none.onnx", "--output", "b.xls"], "'b.xls' ends in '.xls': write a folder, or a file in .json"),
        (["bench", "--device", "cuda", "tiny.yaml", "--output", "b.csv"], "is one JSON file, write FILE.json"),
        (["recipes", "digits_vit_dens"], "no recipe 'digits_vit_dens' of ours; did you mean 'digits_vit_dense'?"),
        (["recipes", "xyz"], "no recipe 'xyz' of ours; there are "),
    ],
)
def test_what_can_not_be_done_is_said_in_one_line(ovit: Ovit, arguments: list[str], message: str) -> None:
    assert message in one_error(ovit(*arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "digits"], "Missing option '--recipe'"),
        (["train", "--recipe", "tiny.yaml"], "Missing option '--data'"),
        (["train", "--resume", "auto"], "--resume auto looks in --output"),
        (["train", "--resume", "x", "--pretrained"], "--resume goes on with a run's own weights"),
        (["train", "--checkpoint", "x", "--pretrained"], "not both"),
        (["show", "tiny.yaml", "--var", "sparsity"], "'sparsity' is not key=value"),
        (["show", "tiny.yaml", "--var", "sparsity=["], "'[' is no YAML value"),
        (["bench", "m.onnx", "--batch", "1,x"], "'1,x' is not a list of batch sizes"),
        (["bench"], "Missing argument 'FILE'"),
        (["bench", "m.onnx", "--dtype", "int8"], "--dtype and --model go with --device cuda"),
        (["bench", "--device", "cuda", "m.onnx", "--threads", "2"], "--baseline and --threads go with --device cpu"),
        (["bench", "--device", "cuda"], "needs layers: an ONNX file, a recipe or --model"),
        (["shov"], "No such command 'shov'"),
    ],
)
def test_a_wrong_call_is_a_usage_error(ovit: Ovit, arguments: list[str], message: str) -> None:
    result = ovit(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_debug_shows_the_traceback(ovit: Ovit) -> None:
    result = ovit("--debug", "show", "none.yaml")
    assert type(result.exception).__name__ == "RecipeError"


def test_an_error_that_nobody_foresaw_says_its_type() -> None:
    assert describe(KeyError("x")) == "KeyError: 'x' (ovit --debug shows the traceback)"
    assert describe(ValueError("two\nlines")) == "two lines"
    assert describe(ValueError()) == "ValueError:  (ovit --debug shows the traceback)"
    assert describe(PermissionError(13, "Permission denied", "a.pt")) == "'a.pt': Permission denied"


def test_an_unreadable_image_is_told_and_counted_or_stops_when_asked(ovit: Ovit, tmp_path: Path) -> None:
    from PIL import Image

    for part in ("train", "val"):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            Image.new("L", (8, 8)).save(folder / "1.png")
    Path("photos/train/dog/0.png").write_bytes(b"no image")
    arguments = ["train", "--recipe", "tiny.yaml", "--data", "photos", "--epochs", "2", "--device", "cpu"]
    result = ovit(*arguments)
    assert result.exit_code == 0, result.output
    warned = [line for line in result.stderr.splitlines() if "unreadable" in line]
    assert warned == [
        "ovit: warning: image 'photos/train/dog/0.png' is unreadable: no image format is known in it; "
        "the next one stands in for it",
        "ovit: warning: 1 unreadable images in all; others stood in for them",
    ]
    strict = ovit(*arguments, "--strict-images", "--output", "strict")
    random, error = strict.stderr.splitlines()
    assert random.startswith("ovit: warning: the recipe prunes at step 0, and the weights are random: did you mean")
    assert error == "ovit: error: 'photos/train/dog/0.png' is unreadable: no image format is known in it"


@pytest.mark.parametrize("start", [[Path(sys.executable).parent / "ovit"], [sys.executable, "-m", "ovit_engine"]])
def test_as_a_real_command(start: list[str | Path], tmp_path: Path) -> None:
    done = subprocess.run(
        [*map(str, start), "show", "none.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("ovit: error: no recipe file 'none.yaml'")
    assert done.stderr.count("\n") == 1


def test_a_usage_error_is_one_line_too() -> None:
    result = CliRunner().invoke(main, ["train", "--epochs", "many"])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "ovit: error: Invalid value for '--epochs': 'many' is not a valid integer" in result.stderr
    assert "train --help" in result.stderr
