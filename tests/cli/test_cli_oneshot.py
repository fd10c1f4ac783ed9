"""ovit oneshot on a briefly trained ViT of the digits."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from ovit_engine import Recipe
from ovit_engine.cli import main

Ovit = Callable[..., Result]

TRAINING = """
training:
  model: vit_tiny_patch16_224
  model_args: {img_size: 8, patch_size: 2, in_chans: 1, num_classes: 10, embed_dim: 32, depth: 2, num_heads: 2,
               weight_init: jax}
  epochs: 6
  batch_size: 64
  lr: 5.0e-3
"""
RECIPE = f"""
name: mine
vars: {{damp: 1.0e-7}}
{TRAINING}
modifiers:
  - ovit_prune: {{start: 2ep, sparsity: 0.9, targets: ["re:blocks.*(qkv|proj|fc1|fc2)\\\\.weight"], damp: "${{damp}}",
                 gradients: 8, images_per_gradient: 16, block: 32}}
  - quantize: {{}}
"""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dense")
    schedule = "modifiers: [{cyclic_lr: {max: 5.0e-3, min: 1.0e-4}}]"
    (folder / "dense.yaml").write_text(f"name: dense\n{TRAINING}\n{schedule}")
    arguments = ["train", "--recipe", folder / "dense.yaml", "--data", "digits", "--device", "cpu", "--output", folder]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return folder


@pytest.fixture
def oneshot(ovit: Ovit, dense: Path) -> Ovit:
    """`oneshot(...)` of mine.yaml from the weights in `dense`."""
    Path("mine.yaml").write_text(RECIPE)
    common = ("oneshot", "--recipe", "mine.yaml", "--data", "digits", "--checkpoint", dense, "--device", "cpu")
    return lambda *arguments: ovit(*common, *arguments)


def lines(result: Result) -> list[str]:
    assert result.exit_code == 0, result.output
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def rows_of(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(path).read_text())))


def test_a_comparison(oneshot: Ovit) -> None:
    said = lines(oneshot("--sparsity", "0.5,0.9", "--compare", "ovit,magnitude", "--var", "damp=1.0e-6", "--seed", 5))
    assert said[0].startswith("dense accuracy ")
    assert [line.split()[0] for line in said[1:5]] == ["ovit", "ovit", "magnitude", "magnitude"]
    assert said[5] == "pruner asked sparsity accuracy drop FLOP reduction seconds"
    rows = rows_of("runs/mine-oneshot/oneshot.csv")
    assert [row["pruner"] for row in rows] == ["dense", "ovit", "ovit", "magnitude", "magnitude"]
    assert said[6] == f"dense {float(rows[0]['accuracy']):.2%}"
    assert float(rows[0]["accuracy"]) > 0.6
    for row, line in zip(rows[1:], said[7:11], strict=True):
        cells = line.split()
        assert cells[0] == row["pruner"]
        shares = (f"{float(row['asked']):.0%}", f"{float(row['sparsity']):.2%}", f"{float(row['accuracy']):.2%}")
        assert tuple(cells[1:4]) == shares
        assert cells[5] == f"{float(row['flops_reduction']):.1%}"
        assert 0.4 < float(row["flops_reduction"]) < float(row["asked"])  # patches, attention and head stay
    assert said[-1] == (
        "saved runs/mine-oneshot/oneshot.csv, runs/mine-oneshot/oneshot.json, "
        "runs/mine-oneshot/oneshot.svg, runs/mine-oneshot/oneshot.png"
    )
    document = json.loads(Path("runs/mine-oneshot/oneshot.json").read_text())
    assert document["model"] == "vit_tiny_patch16_224"
    assert (document["data"], document["seed"], document["device"]) == ("digits", 5, "cpu")
    assert document["options"]["ovit"]["damp"] == 1e-6
    assert Recipe.parse(document["recipe"]).hash == document["recipe_sha256"]
    again = oneshot("--sparsity", "0.5")
    assert again.exit_code == 1
    assert "'runs/mine-oneshot' holds results already: choose another --output" in again.stderr


def test_calibration_knows_no_label_smoothing(oneshot: Ovit) -> None:
    lines(oneshot("--sparsity", "0.9", "--output", "a"))
    Path("mine.yaml").write_text(RECIPE.replace("batch_size: 64", "batch_size: 64\n  label_smoothing: 0.3"))
    lines(oneshot("--sparsity", "0.9", "--output", "b"))
    first, second = (json.loads(Path(f"{name}/oneshot.json").read_text())["points"][0] for name in "ab")
    assert first["accuracy"] == second["accuracy"]


def test_targets_instead_of_a_recipe(ovit: Ovit, dense: Path) -> None:
    training = yaml.safe_load(TRAINING)["training"]
    args = [part for key, value in training["model_args"].items() for part in ("--model-arg", f"{key}={value}")]
    weights = ("--checkpoint", dense, "--model", training["model"], *args)
    common = ("oneshot", "--data", "digits", "--device", "cpu", *weights)
    result = ovit(*common, "--targets", "preset:vit", "--sparsity", "0.5", "--compare", "magnitude")
    assert lines(result)[1].startswith("magnitude sparsity 50.00%")
    assert "targets preset:vit, scope global" in result.stdout
    pattern = ovit(*common, "--targets", "re:blocks.*fc1\\.weight", "--compare", "magnitude", "--output", "b")
    assert lines(pattern)[1].startswith("magnitude sparsity 50.00%")
    assert "pattern 2:4" in pattern.stdout


def test_what_was_measured_is_on_disk_when_a_run_is_broken_off(oneshot: Ovit, monkeypatch: pytest.MonkeyPatch) -> None:
    from ovit_engine.post_training import oneshot as module

    prune, calls = module.prune_copy, []

    def break_off(*arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return prune(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "prune_copy", break_off)
    assert oneshot("--sparsity", "0.5,0.6,0.7", "--compare", "magnitude").exit_code == 1
    rows = rows_of("runs/mine-oneshot/oneshot.csv")
    assert [row["asked"] for row in rows] == ["", "0.5", "0.6"]


def test_tune(oneshot: Ovit) -> None:
    result = oneshot("--tune", "--sparsity", "0.8", "--compare", "obd")
    said = lines(result)
    assert said[0].startswith("dense held-out loss ")
    assert said[1].startswith("damp 1e-08 gradients 2 held-out loss ")
    rows = rows_of("runs/mine-tune/tune.csv")
    assert len(rows) == 8
    (best,) = (row for row in rows if row["best"] == "True")
    assert said[-1] == "saved runs/mine-tune/tune.csv, runs/mine-tune/tune.json"
    pasted = result.stdout.partition("to paste into the recipe:\n")[2].partition("saved ")[0]
    (modifier,) = Recipe.parse(f"modifiers:\n{pasted}").modifiers
    assert modifier.name == "obd_prune"
    assert modifier.model_dump()["damp"] == float(best["damp"])
    document = json.loads(Path("runs/mine-tune/tune.json").read_text())
    assert document["pruner"] == "obd"
    assert 0 <= document["accuracy"]["best"] <= 1
    dense = result.stdout.partition("validation images: dense ")[2].partition(",")[0]
    assert dense == f"{document['accuracy']['dense']:.2%}"


def test_random_weights_are_told(ovit: Ovit) -> None:
    Path("mine.yaml").write_text(RECIPE)
    result = ovit("oneshot", "--recipe", "mine.yaml", "--data", "digits", "--sparsity", "0.5", "--compare", "magnitude")
    assert result.exit_code == 0
    assert "the weights are random, so accuracies say nothing: did you mean --checkpoint or" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "0.5", "--compare", "obret"], "no pruner 'obret' to compare; did you mean 'obert'?"),
        (["--compare", "ovit"], "no sparsity was given: name one or several, such as 0.5,0.75,0.9"),
        (["--sparsity", "0.5", "--recipe", "dense.yaml"], "recipe 'dense' has no pruner to run one-shot; it has cyc"),
        (
            ["--sparsity", "0.5", "--tune", "--compare", "magnitude"],
            "magnitude has no damp, gradients or block to tune",
        ),
        (["--sparsity", "0.5", "--model", "vit_tinny"], "timm has no model 'vit_tinny'"),
        (["--sparsity", "0.5", "--checkpoint", "no.pt"], "no checkpoint 'no.pt'"),
        (["--sparsity", "0.5", "--data", "photos"], "no data 'photos'"),
        (["--sparsity", "0.5", "--output", "dense.yaml"], "'dense.yaml' is a file: --output names the folder"),
    ],
)
def test_errors_are_one_line_and_leave_no_results(oneshot: Ovit, arguments: list[str], message: str) -> None:
    Path("dense.yaml").write_text("modifiers: [{cyclic_lr: {max: 1, min: 1}}]")
    result = oneshot(*arguments)
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(Path("runs").glob("*/*.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "75"], "sparsity 75 is not in [0, 1): did you mean 0.75?"),
        (["--sparsity", "1"], "sparsity 1 is not in [0, 1)"),
        (["--sparsity", "half"], "'half' is not a list of sparsities such as 0.5,0.75,0.9"),
        (["--sparsity", "nan"], "sparsity nan is not in [0, 1)"),
        (["--pretrained"], "weights come from --checkpoint or --pretrained, not both"),
        (["--targets", "x"], "--targets goes without --recipe, whose pruner names its own"),
        (["--tune", "--compare", "ovit,obert"], "--tune is for one pruner"),
        (["--tune", "--sparsity", "0.5,0.6"], "--tune compares settings at one sparsity"),
    ],
)
def test_a_wrong_call_is_a_usage_error(oneshot: Ovit, arguments: list[str], message: str) -> None:
    result = oneshot(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr


def test_neither_recipe_nor_targets(ovit: Ovit) -> None:
    result = ovit("oneshot", "--data", "digits", "--sparsity", "0.5")
    assert result.exit_code == 2
    assert "give --recipe, or the weights to prune with --targets" in result.stderr
