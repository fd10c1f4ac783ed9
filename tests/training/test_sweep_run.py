"""A sweep under the bundled trainer: files, resuming, ONNX, the recipe of the tail."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from ovit_engine import Recipe
from ovit_engine.certificate.verify import verify_file
from ovit_engine.sweep.folder import FOLDER, INDEX, read_index
from ovit_engine.training.api import SILENT, Trained, evaluate, make_model, train
from ovit_engine.training.checkpoint import load_checkpoint, load_weights
from ovit_engine.training.data import config_of, load_data
from ovit_engine.training.runs import restore
from ovit_engine.training.sweep_run import tail_recipe
from tests.training.conftest import tiny_recipe

PRUNE = r"magnitude_prune: {sparsity: {1ep: 0.3, 2ep: 0.6, 3ep: 0.8}, targets: ['re:blocks.*(qkv|fc1)\.weight']"
NAMES = ("0.3", "0.6", "0.8")


def swept(sweep: str = "[0.3, 0.6, 0.8]", *others: str, epochs: int = 4) -> Recipe:
    return tiny_recipe(f"[{{{PRUNE}, sweep: {sweep}}}}}{''.join(f', {each}' for each in others)}]", epochs=epochs)


class BrokenOffError(Exception):
    pass


def run(recipe: Recipe, output: Path, *, stop_before: int | None = None, **options: Any) -> Trained:
    def begin(epoch: int, epochs: int, steps: int) -> None:
        if epoch == stop_before:
            raise BrokenOffError

    return train(recipe, data="digits", output=output, device="cpu", progress=replace(SILENT, begin=begin), **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run with a sweep, from a dense checkpoint; read it only."""
    folder = tmp_path_factory.mktemp("swept")
    run(tiny_recipe(epochs=1), folder / "dense")
    return run(swept(), folder / "run", checkpoint=folder / "dense")


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_each_point_is_a_checkpoint_of_its_own_accuracy(finished: Trained) -> None:
    folder = finished.checkpoint.parent / FOLDER
    index = read_index(folder)
    assert [point.sparsity for point in index.points] == [0.3, 0.6, 0.8]
    assert index.finished
    assert index.baseline is not None
    images = load_data("digits", config=config_of(finished.data.preprocessing)).val
    for point in index.points:
        back = restore(folder / point.checkpoint)
        assert back.engine.finished
        assert back.engine.run.masks.sparsity() == point.measured == pytest.approx(point.sparsity, abs=1e-3)
        assert evaluate(back.model, DataLoader(images, 64), torch.device("cpu")) == point.metric
        fresh = make_model(back.engine.recipe.training)
        load_weights(fresh, folder / point.checkpoint)
        zeros = sum(int((p == 0).sum()) for n, p in fresh.named_parameters() if n in back.engine.run.masks.names())
        assert zeros == point.parameters - point.parameters_left
    reductions = [point.flop_reduction or 0 for point in index.points]
    assert 0 < reductions[0] < reductions[1] < reductions[2] < 1
    sizes = [point.gzip_bytes for point in index.points]
    assert sizes[0] > sizes[1] > sizes[2]


def test_the_points_are_measured_before_they_end(finished: Trained) -> None:
    """Under this recipe each evaluation of the loop sees a model that was pruned a moment ago."""
    points = read_index(finished.checkpoint.parent / FOLDER).points
    history = finished.engine.run.history
    measured = [(step, value) for step, name, value in history if name == "accuracy"]
    steps = finished.engine.run.steps_per_epoch
    assert [step for step, _ in measured] == [steps, 2 * steps, 2 * steps, 3 * steps, 3 * steps, 4 * steps, 4 * steps]
    for index, point in enumerate(points):
        assert point.metric == max(value for _, value in measured[2 * index : 2 * index + 2])


def test_onnx_in_the_recipe_leaves_verified_files(tmp_path: Path) -> None:
    run(swept("{sparsity: [0.6], onnx: true}", epochs=3), tmp_path)
    (point,) = read_index(tmp_path / FOLDER).points
    assert point.onnx == "0.6.onnx"
    certificate = verify_file(tmp_path / FOLDER / point.onnx, data=None)
    assert certificate.sparsity == pytest.approx(0.6, abs=1e-3)
    assert certificate.accuracy is not None
    assert certificate.accuracy.file == point.onnx_metric == pytest.approx(point.metric or 0, abs=0.005)
    assert (certificate.bytes, certificate.gzip_bytes) == (point.onnx_bytes, point.onnx_gzip_bytes)


def test_a_sweep_does_not_change_training(finished: Trained, tmp_path: Path) -> None:
    dense = finished.checkpoint.parent.parent / "dense"
    without = run(tiny_recipe(f"[{{{PRUNE}}}}}]", epochs=4), tmp_path / "run", checkpoint=dense)
    assert same(without.model.state_dict(), finished.model.state_dict())
    assert not (tmp_path / "run" / FOLDER).exists()


@pytest.mark.parametrize("stop_before", [2, 3, 4])
def test_a_resumed_run_leaves_the_same_points(finished: Trained, tmp_path: Path, stop_before: int) -> None:
    recipe = swept()
    unbroken = run(recipe, tmp_path / "unbroken") if stop_before == 2 else None
    with pytest.raises(BrokenOffError):
        run(recipe, tmp_path / "broken", stop_before=stop_before)
    resumed = run(recipe, tmp_path / "broken", resume=tmp_path / "broken")
    unbroken = unbroken or run(recipe, tmp_path / "unbroken")
    assert same(resumed.model.state_dict(), unbroken.model.state_dict())
    for name in NAMES:
        one, two = (load_checkpoint(tmp_path / each / FOLDER / f"{name}.pt") for each in ("unbroken", "broken"))
        assert same(one["model"], two["model"])
        assert one["point"] == two["point"]
    assert read_index(tmp_path / "broken" / FOLDER) == read_index(tmp_path / "unbroken" / FOLDER)


def test_a_run_broken_off_before_its_first_checkpoint_starts_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise BrokenOffError

    kind = "ovit_engine.training.trainer.save_checkpoint"
    with monkeypatch.context() as patch:
        patch.setattr(kind, full)
        with pytest.raises(BrokenOffError):
            run(swept(), tmp_path)
    assert (tmp_path / FOLDER / "0.3.pt").exists()
    with pytest.raises(FileExistsError, match="the sweep of another training"):  # of another recipe: left alone
        run(swept("[0.3, 0.6]"), tmp_path)
    run(swept(), tmp_path)
    assert read_index(tmp_path / FOLDER).finished
    for name in ("last.pt", "previous.pt"):
        (tmp_path / name).unlink()
    with pytest.raises(FileExistsError, match="the sweep of another training"):  # it was finished: left alone
        run(swept(), tmp_path)


def test_the_trainer_measures_accuracy_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sweep by 'top5': the trainer measures 'accuracy' only"):
        run(swept("{sparsity: [0.6], metric: top5}"), tmp_path)
    assert not (tmp_path / FOLDER / INDEX).exists()


def test_training_does_not_resume_from_a_point(finished: Trained, tmp_path: Path) -> None:
    point = finished.checkpoint.parent / FOLDER / "0.6.pt"
    with pytest.raises(ValueError, match="is a point of a sweep: ovit sweep DIR --continue SPARSITY goes on"):
        run(finished.engine.recipe, tmp_path, resume=point)


def test_the_tail_holds_the_zeros_and_lowers_the_rate(finished: Trained) -> None:
    tail = tail_recipe(finished.checkpoint.parent / FOLDER / "0.6.pt")
    assert tail.name == "tiny_0.6_tail"
    assert tail.training.epochs == 100
    assert tail.training.model_args == finished.engine.recipe.training.model_args
    assert [modifier.model_dump(exclude_unset=True) for modifier in tail.modifiers] == [
        {"targets": ["blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"]},
        {"max": 5e-5, "min": 1e-5, "curve": "cosine"},
    ]


def test_the_tail_of_a_quantized_point_is_quantized_from_its_start(tmp_path: Path) -> None:
    quantize = "{quantize: {start: 10st, freeze_observers: 12st, exclude: [head]}}"
    run(swept("[0.3, 0.6]", quantize, epochs=3), tmp_path)
    early, late = (tail_recipe(tmp_path / FOLDER / f"{name}.pt", 2) for name in ("0.3", "0.6"))
    assert [modifier.name for modifier in early.modifiers] == ["constant_mask", "cyclic_lr"]
    assert [modifier.name for modifier in late.modifiers] == ["constant_mask", "cyclic_lr", "quantize"]
    assert late.modifiers[2].model_dump(exclude_unset=True) == {"exclude": ["head"]}
    tail = run(late, tmp_path / "tail", checkpoint=tmp_path / FOLDER / "0.6.pt")
    assert tail.metrics[-1].sparsity == pytest.approx(0.6, abs=1e-3)


def test_the_tail_of_a_dense_point_holds_nothing(tmp_path: Path) -> None:
    prune = "magnitude_prune: {sparsity: {1st: 0.0, 1ep: 0.5}, targets: ['re:blocks.*qkv.weight'], sweep: [0.0, 0.5]}"
    run(tiny_recipe(f"[{{{prune}}}]", epochs=1), tmp_path)
    assert [modifier.name for modifier in tail_recipe(tmp_path / FOLDER / "0.pt").modifiers] == ["cyclic_lr"]
