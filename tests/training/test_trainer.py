"""The bundled trainer: resuming, checkpoints, and what it refuses."""

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ovit_engine import Recipe, RecipeError
from ovit_engine.training.api import SILENT, Trained, make_model, train, with_training
from ovit_engine.training.checkpoint import LAST, load_checkpoint, load_weights
from ovit_engine.training.images import UnreadableImageError
from ovit_engine.training.runs import restore
from tests.training.conftest import tiny_recipe

ALL = r"""
  - magnitude_prune:
      {start: 1ep, end: 3ep, every: 1ep, sparsity: {from: 0.3, to: 0.6}, targets: ["re:blocks.*(qkv|fc1)\\.weight"]}
  - cyclic_lr: {max: 2.0e-3, min: 1.0e-5, period: 1.5ep}
  - quantize: {start: 1.5ep, freeze_observers: 3ep}
"""


class InterruptedRunError(Exception):
    pass


def run(recipe: Recipe, output: Path, *, stop_before: int | None = None, **options: Any) -> Trained:
    def begin(epoch: int, epochs: int, steps: int) -> None:
        if epoch == stop_before:
            raise InterruptedRunError

    options.setdefault("data", "digits")
    return train(recipe, output=output, device="cpu", progress=replace(SILENT, begin=begin), **options)


def rows(trained: Trained) -> list[Any]:
    return [replace(metrics, seconds=0.0) for metrics in trained.metrics]


def test_calibration_is_seeded_as_training_is(tmp_path: Path) -> None:
    trained = run(tiny_recipe(epochs=1, extra="batch_size: 256, seed: 7"), tmp_path)
    assert trained.engine.run.calibration is not None
    assert trained.engine.run.calibration.seed == 7


@pytest.mark.parametrize("optimizer", ["optimizer: adamw", "optimizer: sgd, clip_grad: 0.5"])
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(tmp_path: Path, optimizer: str) -> None:
    recipe = tiny_recipe(
        ALL, epochs=4, extra=f"batch_size: 256, augmentation: noise, label_smoothing: 0.1, {optimizer}"
    )
    unbroken = run(recipe, tmp_path / "unbroken")
    with pytest.raises(InterruptedRunError):
        run(recipe, tmp_path / "broken", stop_before=3)
    assert load_checkpoint(tmp_path / "broken")["epoch"] == 2
    resumed = run(recipe, tmp_path / "broken", resume=tmp_path / "broken")
    assert rows(resumed) == rows(unbroken)
    assert len({metrics.sparsity for metrics in resumed.metrics}) > 1
    for (name, ours), theirs in zip(
        resumed.model.state_dict().items(), unbroken.model.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    assert resumed.engine.run.masks.sparsity() == pytest.approx(0.6, abs=1e-3)


def test_a_seed_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    recipe = tiny_recipe(epochs=1)
    first, again = run(recipe, tmp_path / "1"), run(recipe, tmp_path / "2")
    other = run(with_training(recipe, seed=1), tmp_path / "3")
    assert rows(first) == rows(again)
    assert rows(first) != rows(other)


def test_it_learns(tmp_path: Path) -> None:
    args = {**tiny_recipe().training.model_args, "drop_rate": 0.0, "embed_dim": 32, "weight_init": "jax"}
    recipe = with_training(tiny_recipe(epochs=4, extra="batch_size: 32, lr: 5.0e-3"), model_args=args)
    assert run(recipe, tmp_path).metrics[-1].accuracy > 0.6


def test_a_line_an_epoch_and_a_checkpoint_that_gives_the_run_back(tmp_path: Path) -> None:
    recipe = tiny_recipe('[{magnitude_prune: {start: 1ep, sparsity: 0.5, targets: ["re:.*qkv\\\\.weight"]}}]')
    trained = run(recipe, tmp_path / "out" / "run")
    lines = (tmp_path / "out" / "run" / "metrics.csv").read_text().splitlines()
    assert lines[0] == "epoch,loss,accuracy,lr,sparsity,seconds"
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2"]
    back = restore(tmp_path / "out" / "run")
    assert (back.epoch, back.data, back.engine.finished) == (2, "digits", True)
    assert back.preprocessing["size"] == [1, 8, 8]
    for ours, theirs in zip(back.model.state_dict().values(), trained.model.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert back.engine.run.masks.sparsity() == 0.5
    assert back.engine.recipe.training.model_args["num_classes"] == 10  # from the data


def test_second_order_pruning_has_its_calibration(tmp_path: Path) -> None:
    options = 'sparsity: 0.5, targets: ["re:.*qkv\\\\.weight"], block: 16, gradients: 8, images_per_gradient: 4'
    trained = run(tiny_recipe(f"[{{ovit_prune: {{{options}}}}}]", epochs=1), tmp_path)
    assert trained.metrics[0].sparsity == 0.5


def test_weights_of_another_run_to_start_from(tmp_path: Path) -> None:
    first = run(tiny_recipe("[{quantize: {}}]", epochs=1), tmp_path / "1")
    model = make_model(
        with_training(tiny_recipe(), seed=5, model_args=first.engine.recipe.training.model_args).training
    )
    load_weights(model, tmp_path / "1")
    trained = dict(first.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, trained[name])
    second = run(tiny_recipe(epochs=1), tmp_path / "2", checkpoint=tmp_path / "1" / LAST)
    assert second.metrics[0].loss < first.metrics[0].loss


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    run(tiny_recipe(epochs=1), tmp_path / "1")
    wide = with_training(tiny_recipe(), model_args={**tiny_recipe().training.model_args, "embed_dim": 32})
    with pytest.raises(
        ValueError, match=r"does not fit the model: cls_token is \[1, 1, 16\], the model has \[1, 1, 32\]"
    ):
        run(wide, tmp_path / "2", checkpoint=tmp_path / "1")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        run(tiny_recipe(), tmp_path / "2", checkpoint=tmp_path / "none.pt")
    assert not (tmp_path / "2").exists()


def test_a_run_is_not_overwritten_nor_resumed_when_over_or_of_another_recipe(tmp_path: Path) -> None:
    recipe = tiny_recipe(epochs=2)
    with pytest.raises(InterruptedRunError):
        run(recipe, tmp_path, stop_before=2)
    with pytest.raises(FileExistsError, match="holds a run already: resume it"):
        run(recipe, tmp_path)
    with pytest.raises(ValueError, match=r"of another recipe: training.lr is 0\.001 there, 0\.1 here"):
        run(with_training(recipe, lr=0.1), tmp_path, resume=tmp_path)
    run(recipe, tmp_path, resume=tmp_path)
    with pytest.raises(ValueError, match="finished: all 2 epochs are done"):
        run(recipe, tmp_path, resume=tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": "vit_tinny_patch16_224"},
            "timm has no model 'vit_tinny_patch16_224'; did you mean 'vit_tiny_patch16_",
        ),
        ({"model_args": {"in_chans": 1, "num_classes": 3}}, "the model has 3 classes, 'digits' has 10"),
        ({"lr": -1.0}, "greater than 0"),
    ],
)
def test_what_does_not_fit_is_said_before_training(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(with_training(tiny_recipe(), **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_no_model_and_no_such_device(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name one with --model"):
        run(Recipe.parse("modifiers: []"), tmp_path)
    with pytest.raises(ValueError, match="no device 'gpu'"):
        train(tiny_recipe(), data="digits", output=tmp_path, device="gpu")


def test_a_model_with_no_matching_layer(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="matches no parameter of VisionTransformer; did you mean"):
        run(tiny_recipe("[{magnitude_prune: {sparsity: 0.5, targets: [conv.weight]}}]"), tmp_path)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        "[{cyclic_lr: {start: 1ep, max: 1.0e+30, min: 1.0e+30}}]", epochs=3, extra="batch_size: 256, optimizer: sgd"
    )
    with pytest.raises(ValueError, match=r"loss of epoch 2 is (nan|inf).* the last checkpoint before that is '"):
        run(recipe, tmp_path)
    state = load_checkpoint(tmp_path)
    assert state["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


FOLDER_MODEL = {"img_size": 8, "patch_size": 2, "in_chans": 3, "embed_dim": 16, "depth": 1, "num_heads": 2}


def test_an_image_folder_with_an_unreadable_image(
    image_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = image_folder()
    cut = folder / "train" / "cat" / "0.png"
    cut.write_bytes(b"no image")
    recipe = with_training(tiny_recipe(), model_args=FOLDER_MODEL)
    trained = run(recipe, tmp_path / "run", data=folder)
    assert str(cut) in caplog.text
    assert "1 unreadable images in all" in caplog.text
    assert trained.engine.recipe.training.model_args["num_classes"] == 2
    for workers in (0, 1):
        with pytest.raises(UnreadableImageError) as caught:
            run(recipe, tmp_path / "strict", data=folder, strict=True, workers=workers)
        assert str(caught.value) == f"'{cut}' is unreadable: no image format is known in it"


# --- checkpoints that something happens to


WRITE = """
import os, resource, signal, sys
from pathlib import Path
import torch
from ovit_engine.training import checkpoint

path = Path({path!r})
state = dict.fromkeys(checkpoint.KEYS, 0) | {{"epoch": 2, "model": {{"w": torch.zeros(300_000)}}}}
{accident}
checkpoint.save_checkpoint(path, state)
"""
KILL = """
def killed(state, stream):
    stream.write(b"half of a checkpoint")
    stream.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = killed
"""
FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"  # the kernel refuses the rest of the file


@pytest.mark.parametrize("accident", [KILL, FULL], ids=["kill", "full disk"])
def test_the_old_checkpoint_survives(tmp_path: Path, accident: str) -> None:
    run(tiny_recipe(epochs=1), tmp_path)
    before = (tmp_path / LAST).read_bytes()
    code = WRITE.format(path=str(tmp_path / LAST), accident=accident)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if accident == KILL:
        assert done.returncode == -signal.SIGKILL, done.stderr
    else:
        assert done.stderr.splitlines()[-1].startswith("OSError: [Errno 27] File too large"), done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == [LAST, "metrics.csv"]
    assert (tmp_path / LAST).read_bytes() == before
    assert restore(tmp_path).epoch == 1


class Evil:
    def __reduce__(self) -> Any:
        return print, ("code of a stranger",)


def test_damaged_and_foreign_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny_recipe(epochs=1), tmp_path)
    file = tmp_path / "cut.pt"
    file.write_bytes((tmp_path / LAST).read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut\.pt' is damaged, or no checkpoint"):
        restore(file)
    torch.save({"model": Evil()}, file)
    with pytest.raises(ValueError, match="is damaged, or no checkpoint"):
        restore(file)
    assert "stranger" not in capsys.readouterr().out
    torch.save({"model": {}}, file)
    with pytest.raises(ValueError, match="is no checkpoint of ovit train: it lacks"):
        restore(file)
    torch.save([1, 2], file)
    with pytest.raises(ValueError, match="holds no weights by name"):
        run(tiny_recipe(), tmp_path / "new", checkpoint=file)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        restore(tmp_path / "none")
