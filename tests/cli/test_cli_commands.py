"""Each command on a tiny model of the digits."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import Result

from ovit_engine.core.recipe import shipped_recipes

Ovit = Callable[..., Result]


def ok(result: Result) -> list[str]:
    """The lines that a command printed, each with single spaces."""
    assert result.exit_code == 0, result.output
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_help_names_the_commands_in_the_order_of_work(ovit: Ovit) -> None:
    lines = ovit("--help").stdout.splitlines()
    entries = [line for line in lines[lines.index("Commands:") + 1 :] if not line.startswith("   ")]  # wrapped ones
    commands = [line.split()[0] for line in entries]
    assert commands == [
        "validate",
        "show",
        "lint",
        "oneshot",
        "train",
        "sweep",
        "ptq",
        "export",
        "verify",
        "verify-resume",
        "diagnose",
        "bench",
        "report",
        "recipes",
    ]


def test_validate_counts_what_targets_match(ovit: Ovit) -> None:
    assert ok(ovit("validate", "tiny.yaml")) == [
        "modifier targets tensors weights",
        r"magnitude_prune re:blocks.*(qkv|proj|fc1|fc2)\.weight 4 3,072",
        "quantize (its own choice) 4 3,072",
        "tiny: ok on vit_tiny_patch16_224",
    ]


def test_validate_on_another_model(ovit: Ovit) -> None:
    lines = ok(ovit("validate", "tiny.yaml", "--model", "deit_small_patch16_224", "--model-arg", "depth=2"))
    assert lines[1].endswith(" 8 3,538,944")  # 2 blocks of 12 * 384^2
    assert lines[-1] == "tiny: ok on deit_small_patch16_224"


def test_validate_without_a_model(ovit: Ovit) -> None:
    Path("free.yaml").write_text("modifiers: [{cyclic_lr: {max: 1, min: 1}}]")
    assert ok(ovit("validate", "free.yaml")) == ["free: ok; --model NAME checks its targets"]


def test_show_prints_the_timeline(ovit: Ovit) -> None:
    lines = ok(ovit("show", "tiny.yaml", "--epochs", 4, "--steps-per-epoch", 10, "--var", "sparsity=0.9"))
    assert lines == [
        "tiny: 4 epochs of 10 steps",
        "training: vit_tiny_patch16_224, adamw, batches of 256, augmentation none, weight decay 0.05",
        "epoch step what value",
        "0 0 learning rate 0.0005 (constant, of the training section)",
        "0 0 sparsity 90.00% unstructured (magnitude_prune)",
        "1 10 quantization int8 fake-quantization starts",
        "2.5 25 quantization observers freeze",
        "4 40 end",
    ]


def test_show_assumes_a_length_and_says_so(ovit: Ovit) -> None:
    lines = ok(ovit("show", "digits_vit_dense"))
    assert lines[:2] == ["digits_vit_dense: 40 epochs of 100 steps", "assumed: 100 steps an epoch (--steps-per-epoch)"]
    assert not any("constant" in line for line in lines)


def test_show_invents_nothing_of_a_recipe_for_another_loop(ovit: Ovit) -> None:
    Path("own.yaml").write_text("modifiers: [{quantize: {start: 2ep}}]")
    lines = ok(ovit("show", "own.yaml"))
    assert lines[1] == "assumed: 10 epochs (--epochs), 100 steps an epoch (--steps-per-epoch)"
    assert not any("learning rate" in line for line in lines)


def test_recipes(ovit: Ovit, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ok(ovit("recipes"))
    assert [line.split()[0] for line in lines[1:]] == list(shipped_recipes())  # a line each where no terminal reads it
    assert not any(line.endswith(" ") for line in ovit("recipes").stdout.splitlines())
    monkeypatch.setenv("COLUMNS", "60")
    assert len(ok(ovit("recipes"))) > len(lines)
    printed = ovit("recipes", "digits_vit_dense").stdout
    assert yaml.safe_load(printed)["name"] == "digits_vit_dense"


@pytest.mark.parametrize("name", list(shipped_recipes()))
def test_every_recipe_of_ours_is_valid(ovit: Ovit, name: str) -> None:
    assert ok(ovit("validate", name))[-1].startswith(f"{name.rpartition('/')[2]}: ok on ")
    assert ok(ovit("show", name))[0].startswith(f"{name.rpartition('/')[2]}: ")


@pytest.mark.parametrize("command", ["show", "validate"])
def test_a_time_past_an_assumed_end_says_what_was_assumed(ovit: Ovit, command: str) -> None:
    Path("late.yaml").write_text("modifiers: [{quantize: {start: 14ep}}]")
    found = ovit(command, "late.yaml")
    assert found.exit_code == 1
    assert "'14ep' is step 1400, past the end of training" in found.stderr
    assert found.stderr.endswith("; 10 epochs are assumed: give --epochs\n")
    assert "assumed" not in ovit(command, "late.yaml", "--epochs", 12, "--steps-per-epoch", 100).stderr
    assert ovit(command, "late.yaml", "--epochs", 20).exit_code == 0


@pytest.mark.parametrize(
    ("modifier", "is_told"),
    [
        ("dynamic_vit: {keep: 0.7, freeze: 10ep}", True),
        ("quantize: {start: 10ep}", True),
        ("distill: {start: 10ep}", True),
        ("acdc: {targets: [x], sparsity: 0.5, start: 0ep, end: 10ep, every: 5ep}", True),
        ("svite: {targets: [x], sparsity: 0.5, every: 10ep, end: 10ep}", True),
        ("magnitude_prune: {targets: [x], sparsity: {1ep: 0.4, 11ep: 0.5}}", True),
        ("magnitude_prune: {targets: [x], sparsity: {1ep: 0.4, 1st: 0.5}}", False),
        ("quantize: {start: 5ep, start_observers: 6ep}", False),
    ],
)
def test_the_length_is_blamed_where_a_longer_one_would_do(ovit: Ovit, modifier: str, is_told: bool) -> None:
    Path("short.yaml").write_text(f"modifiers: [{{{modifier}}}]")
    found = ovit("show", "short.yaml")
    assert found.exit_code == 1
    assert found.stderr.startswith("ovit: error: short.yaml:1:")
    assert found.stderr.endswith("; 10 epochs are assumed: give --epochs\n") == is_told, found.stderr


def test_train_prints_a_line_an_epoch_and_overwrites_nothing(ovit: Ovit) -> None:
    def train(*more: object) -> Result:
        return ovit("train", "--recipe", "tiny.yaml", "--data", "digits", "--device", "cpu", *more)

    lines = ok(train("--epochs", 3, "--seed", 1))
    assert [line.split()[1] for line in lines[:3]] == ["1/3", "2/3", "3/3"]
    assert "sparsity 50.00%" in lines[2]
    assert lines[3] == "saved runs/tiny/last.pt; next: ovit export runs/tiny --output model.onnx"
    assert len(Path("runs/tiny/metrics.csv").read_text().splitlines()) == 4
    assert "'runs/tiny' holds a run already" in train().stderr
    finished = ok(train("--resume", "auto", "--epochs", 3, "--seed", 1))  # not an error: jobs are started until done
    assert finished[-1].startswith(
        "the run in 'runs/tiny/last.pt' is finished: all 3 epochs are done; next: ovit export"
    )
    assert "is finished: all 3 epochs are done" in ovit("train", "--resume", "runs/tiny").stderr
    fresh = train("--resume", "auto", "--output", "new", "--var", "sparsity=0.25")  # nothing to resume: it starts
    assert "sparsity 25.00%" in ok(fresh)[1]


def test_a_run_that_was_broken_off_needs_only_resume(ovit: Ovit, monkeypatch: pytest.MonkeyPatch) -> None:
    from ovit_engine.training.trainer import Trainer

    save = Trainer._save

    def break_off(trainer: Trainer, epoch: int) -> None:
        save(trainer, epoch)
        if epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save", break_off)
        broken = ovit("train", "--recipe", "tiny.yaml", "--data", "digits", "--device", "cpu", "--output", "run")
    assert broken.exit_code == 1
    export = ovit("export", "run", "--output", "m.onnx")
    assert "the run is at epoch 1 of 2: go on with ovit train --resume run" in export.stderr
    assert not Path("m.onnx").exists()
    longer = ovit("train", "--resume", "run", "--epochs", "4", "--device", "cpu")
    assert "a resumed run keeps its 2 epochs: to train its model further, begin a new run with" in longer.stderr
    refused = ovit("train", "--resume", "run", "--device", "cpu", "--amp")
    assert refused.stdout == ""  # not "going on"
    assert refused.stderr == "ovit: error: the run in 'run' began with no mixed precision\n"
    lines = ok(ovit("train", "--resume", "run", "--device", "cpu"))
    assert lines[0] == "going on from run"
    assert lines[1].startswith("epoch 2/2")
    assert lines[2].startswith("saved run/last.pt")


BENCH = ("--repeats", "5", "--batch", "1,4", "--output", "b.json")


def test_export_verify_and_bench(ovit: Ovit, finished_run: Path) -> None:
    exported = "\n".join(ok(ovit("export", finished_run, "--output", "model.onnx")))
    assert "50.0" in exported
    certificate = json.loads(Path("model.certificate.json").read_text())
    assert certificate["preprocessing"]["size"] == [1, 8, 8]
    assert certificate["parity"]["images"] == 450
    assert ok(ovit("verify", "model.onnx"))[-1] == "model.onnx is what its certificate says"
    assert ok(ovit("verify", "model.onnx", "--data", "digits"))[-1] == "model.onnx is what its certificate says"
    shutil.copy("model.onnx", "other.onnx")
    lines = ok(ovit("bench", "model.onnx", "--baseline", "other.onnx", *BENCH))
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["other.onnx", "1"],
        ["model.onnx", "1"],
        ["other.onnx", "4"],
        ["model.onnx", "4"],
    ]
    rows = json.loads(Path("b.json").read_text())["rows"]
    assert [(row["path"], row["batch_size"]) for row in rows[:2]] == [("other.onnx", 1), ("model.onnx", 1)]
    gone = ovit("export", finished_run, "--output", "new.onnx", "--baseline", "none.onnx")
    assert (gone.exit_code, gone.stderr) == (1, "ovit: error: no such file: none.onnx\n")
    assert not Path("new.onnx").exists()
    Path("model.certificate.json").unlink()
    gone = ovit("verify", "model.onnx")
    assert gone.exit_code == 1
    assert "no certificate beside the file" in gone.stderr


def test_a_file_that_was_changed_does_not_verify(ovit: Ovit, finished_run: Path) -> None:
    ok(ovit("export", finished_run, "--output", "model.onnx"))
    content = bytearray(Path("model.onnx").read_bytes())
    content[-1] ^= 1
    Path("model.onnx").write_bytes(content)
    result = ovit("verify", "model.onnx")
    assert result.exit_code == 1
    assert result.stderr.startswith("ovit: error: ")
    assert result.stderr.count("\n") == 1


def test_a_signed_file(ovit: Ovit, finished_run: Path) -> None:
    for command in (
        "ecparam -name prime256v1 -genkey -noout -out key.pem",
        "ec -in key.pem -pubout -out key.pub",
    ):
        subprocess.run(["openssl", *command.split()], check=True, capture_output=True)
    assert ok(ovit("export", finished_run, "--output", "model.onnx", "--sign", "key.pem"))[-1] == "signed: model.sig"
    check = ("verify", "model.onnx", "--signature", "model.sig", "--public-key", "key.pub")
    assert ok(ovit(*check))[-1] == "model.sig is a valid signature of it, its certificate and its reference"
    ok(ovit("export", finished_run, "--output", "model.onnx", "--data", "digits"))
    Path("model.reference.npz").write_bytes(Path("model.reference.npz").read_bytes() + b"\0")
    result = ovit(*check)
    assert result.exit_code == 1
    assert "model.reference.npz: changed since it was signed" in result.stderr


def test_validate_finds_what_train_would_refuse(ovit: Ovit) -> None:
    model = "model: vit_tiny_patch16_224, "
    for command, named in (("validate", model), ("validate", ""), ("show", "")):
        training = f"training: {{{named}scheduler: cosine, scheduler_args: {{min_lr: 0,\n  warmup: 1}}}}"
        Path("both.yaml").write_text(f"{training}\nmodifiers:\n  - cyclic_lr: {{max: 0.1, min: 0.01}}\n")
        done = ovit(command, "both.yaml")
        assert done.exit_code == 1
        expected = (
            "both.yaml:4:5: cyclic_lr: writes the learning rate, as scheduler 'cosine' of training does: keep one"
        )
        assert done.stderr == f"ovit: error: {expected}\n"
        Path("none.yaml").write_text(f"{training}\nmodifiers: []\n")
        expected = "none.yaml:2:3: training.scheduler_args.warmup: no such option; did you mean "
        assert ovit(command, "none.yaml").stderr.startswith(f"ovit: error: {expected}")
        Path("long.yaml").write_text(f"{training.replace('warmup:', 'cooldown_epochs:')}\nmodifiers: []\n")
        expected = "training.scheduler_args: the schedule takes 8 epochs, training 7"
        done = ovit(command, "long.yaml", "--epochs", 7)
        assert done.stderr.startswith("ovit: error: long.yaml:1:")
        assert done.stderr.endswith(f": {expected}\n")


@pytest.mark.parametrize(
    ("training", "modifiers", "message"),
    [
        ("augmentation: deit, batch_size: 20, accumulate: 4", "", "batch_size / accumulate must be even, not 5"),
        ("augmentation: light1, model_args: {in_chans: 1}", "", "'light1' is made for colour images"),
        ("teacher: {model: resnet5O}", "", "training.teacher: timm has no model 'resnet5O'; did you mean 'resnet50'"),
        (
            "seed: 1",
            "- magnitude_prune: {start: 0ep, end: 2ep, every: 1ep, sparsity: {from: 0.4, to: 0.6}, "
            "targets: ['re:blocks.*fc1.weight'], sweep: {sparsity: [0.6], metric: top5}}",
            "sweep by 'top5': the trainer measures 'accuracy' only",
        ),
    ],
)
def test_validate_refuses_options_as_train_does(ovit: Ovit, training: str, modifiers: str, message: str) -> None:
    text = f"training: {{model: vit_tiny_patch16_224, {training}}}\nmodifiers: [%s]\n"
    Path("one.yaml").write_text(text.replace("[%s]", f"\n  {modifiers}" if modifiers else "[]"))
    done = ovit("validate", "one.yaml")
    assert done.exit_code == 1
    assert message in done.stderr


@pytest.mark.rehearsed
@pytest.mark.parametrize("command", ["validate", "train"])
def test_what_cannot_be_exported_is_found_before_training(
    ovit: Ovit, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ovit_engine.certificate.errors import ExportError
    from ovit_engine.export import rehearsal

    def refuse(*args: object, **options: object) -> None:
        raise ExportError("cannot export", ["an operator"])

    monkeypatch.setattr(rehearsal, "try_write", refuse)
    options = ["--data", "digits", "--recipe"] if command == "train" else []
    result = ovit(command, *options, "tiny.yaml")
    assert result.exit_code == 1
    assert "cannot export: an operator" in result.output
    assert not list(Path("runs").glob("**/*.pt"))
