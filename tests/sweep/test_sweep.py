"""A sweep in a user's own loop: which model of each sparsity is kept, and that none is lost."""

import logging
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from ovit_engine import Engine, Modifier, Recipe, RecipeError, Run, load_point
from ovit_engine.distributed.comm import Comm
from ovit_engine.sweep.folder import FOLDER, INDEX, read_index, weigh
from ovit_engine.utils.files import atomic_write
from tests.loops import PRUNE, X, mlp, recipe
from tests.sweep.sweeping import RISING, SWEEP, Training, kept, same, steps

LOSS = f"{PRUNE[:-1]}, sweep: {{sparsity: [0.25, 0.5], metric: loss, best: min}}}}"


def test_without_a_metric_the_model_before_the_next_pruning_step_is_kept(tmp_path: Path) -> None:
    training = Training(tmp_path).attach().train(0, 40)
    training.engine.detach()
    assert steps(tmp_path) == {0.25: 20, 0.375: 30, 0.5: 40}
    for name, step, zeros in (("0.25", 20, 32), ("0.375", 30, 48), ("0.5", 40, 64)):
        content = kept(tmp_path, name)
        assert same(content["model"], training.film[step])
        assert int((content["model"]["0.weight"] == 0).sum()) == zeros
        assert content["engine"]["finished"] is True
    index = read_index(tmp_path / FOLDER)
    assert (index.finished, index.metric, index.best, index.asked) == (True, "accuracy", "max", (0.25, 0.375, 0.5))
    assert [point.measured for point in index.points] == [0.25, 0.375, 0.5]
    assert [point.parameters_left for point in index.points] == [161 - 32, 161 - 48, 161 - 64]
    assert [point.metric for point in index.points] == [None, None, None]
    assert [point.epoch for point in index.points] == [2.0, 3.0, 4.0]
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["0.25.pt", "0.375.pt", "0.5.pt", INDEX]


def test_the_best_model_of_each_point_by_what_is_reported(tmp_path: Path) -> None:
    training = Training(tmp_path).attach().train(0, 40, RISING)
    assert steps(tmp_path) == {0.25: 14, 0.375: 20, 0.5: 40}
    training.engine.detach()
    assert steps(tmp_path) == {0.25: 14, 0.375: 20, 0.5: 40}
    assert same(kept(tmp_path, "0.25")["model"], training.film[14])  # 20 is past the next pruning step
    assert kept(tmp_path, "0.375")["point"]["metric"] == 0.9
    just_pruned = kept(tmp_path, "0.375")["model"]
    assert int((just_pruned["0.weight"] == 0).sum()) == 48
    assert not same(just_pruned, training.film[20])
    assert kept(tmp_path, "0.25")["engine"]["history"][-1] == [14, "accuracy", 0.8]
    assert [point.metric for point in read_index(tmp_path / FOLDER).points] == [0.8, 0.9, 0.3]


def test_the_best_may_be_the_lowest_of_another_metric(tmp_path: Path) -> None:
    training = Training(tmp_path, LOSS).attach().train(0, 12, RISING, "loss")
    training.engine.metric("accuracy", -1.0)
    training.train(12, 25, RISING, "loss").train(25, 40).engine.detach()
    assert steps(tmp_path) == {0.25: 10, 0.5: 40}
    assert [point.metric for point in read_index(tmp_path / FOLDER).points] == [0.5, None]


def test_a_metric_may_come_after_detach(tmp_path: Path) -> None:
    training = Training(tmp_path).attach().train(0, 40, {35: 0.5})
    training.engine.detach()
    training.engine.metric("accuracy", 0.6)
    training.engine.metric("accuracy", 0.55)
    point = read_index(tmp_path / FOLDER).points[-1]
    assert (point.metric, point.step) == (0.6, 40)
    other = Training(tmp_path / "2").attach().train(0, 40)
    other.engine.detach()
    other.engine.metric("accuracy", 0.1)  # better than none
    assert read_index(tmp_path / "2" / FOLDER).points[-1].metric == 0.1


def dropping() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 1))


def test_evaluate_measures_each_point_before_it_ends_and_changes_nothing(tmp_path: Path) -> None:
    seen = []

    def evaluate(model: nn.Module) -> float:
        assert not torch.is_grad_enabled()
        model.eval()
        torch.rand(3)
        seen.append(int((model[0].weight == 0).sum()))  # type: ignore[index]
        return len(seen) / 10

    results = []
    for modifier, options in ((PRUNE, {}), (SWEEP, {"evaluate": evaluate})):
        training = Training(tmp_path, modifier, model=dropping(), **options)  # type: ignore[arg-type]
        torch.manual_seed(1)
        training.attach().train(0, 40, {12: 0.05})
        training.engine.detach()
        assert training.model.training
        results.append(training.model.state_dict())
    assert same(*results)
    assert seen == [32, 48, 64]
    points = read_index(tmp_path / FOLDER).points
    assert [(point.metric, point.step) for point in points] == [(0.1, 20), (0.2, 30), (0.3, 40)]
    assert (20, "accuracy", 0.1) in training.engine.run.history


def test_a_point_at_the_first_step(tmp_path: Path) -> None:
    text = "magnitude_prune: {sparsity: 0.5, targets: [0.weight], sweep: [0.5]}"
    Training(tmp_path, text).attach().train(0, 40, {7: 0.5}).engine.detach()
    assert steps(tmp_path) == {0.5: 7}


def test_other_pruners_and_quantization_end_a_point(tmp_path: Path) -> None:
    other = "magnitude_prune: {start: 15st, sparsity: 0.5, targets: [2.weight]}"
    Training(tmp_path, SWEEP, other, "quantize: {start: 35st}").attach().train(0, 40, {38: 0.9}).engine.detach()
    assert steps(tmp_path) == {0.25: 15, 0.375: 30, 0.5: 35}
    points = read_index(tmp_path / FOLDER).points
    assert [point.metric for point in points] == [None, None, None]
    assert [point.measured for point in points] == [0.25, 0.375, 0.5]  # of the sweep's own pruner
    assert points[1].parameters_left == 161 - 48 - 8


def test_phases_of_acdc_end_a_point(tmp_path: Path) -> None:
    acdc = "acdc: {start: 12st, every: 4st, end: 36st, sparsity: 0.5, targets: [2.weight]}"
    Training(tmp_path, SWEEP, acdc).attach().train(0, 40).engine.detach()
    assert steps(tmp_path)[0.25] == 12


class Meddle(Modifier):
    """Changes masks and tells nobody."""

    name: ClassVar[str] = "meddle"

    def step_end(self, run: Run) -> None:
        if run.step == 15:
            mask = run.masks.get("0.weight")
            assert mask is not None
            slot = run.masks._slots["0.weight"]
            run.masks.set(slot, mask & (torch.arange(8) > 0))


def test_a_model_with_other_masks_than_the_points_is_not_kept(tmp_path: Path) -> None:
    training = Training(tmp_path)
    read = Recipe("r", (*recipe(SWEEP).modifiers, Meddle()))
    training.engine = Engine(training.model, read, steps_per_epoch=10, epochs=4, output=tmp_path)
    training.attach().train(0, 20, {12: 0.5, 17: 0.9})
    assert steps(tmp_path) == {0.25: 12}


# --- folders, errors ---
def test_a_sweep_needs_a_folder_when_training_starts() -> None:
    training = Training(None)
    with pytest.raises(RecipeError, match=r"^r.yaml:2:\d+: magnitude_prune.sweep: .*Engine\(.*output='runs/x'\)"):
        training.attach()
    Training(None, PRUNE).attach()


def test_the_folder_of_another_training_is_left_alone(tmp_path: Path) -> None:
    Training(tmp_path).attach().train(0, 20).engine.metric("accuracy", 1.0)
    with pytest.raises(FileExistsError, match="holds the sweep of another training: load its state"):
        Training(tmp_path).attach()
    other = Training(tmp_path / "2", SWEEP.replace("0.375", "0.4")).attach().train(0, 5).save()
    with pytest.raises(FileExistsError, match=r"0.25.pt' is of another training: choose another output"):
        Training(tmp_path, SWEEP.replace("0.375", "0.4")).load(other).attach()
    assert kept(tmp_path, "0.25")["point"]["step"] == 20


@pytest.mark.parametrize(
    ("evaluate", "words"),
    [(0.5, "evaluate must be a function of the model, not float"), (lambda model: (1, 2), "one number, not tuple")],
)
def test_what_is_no_measure(tmp_path: Path, evaluate: Any, words: str) -> None:
    training = Training(tmp_path, evaluate=evaluate)
    with pytest.raises(TypeError, match=words):
        training.attach().train(0, 20)


def test_one_process_of_several_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Comm, "is_main", False)
    training = Training(tmp_path).attach().train(0, 40, RISING)
    training.engine.detach()
    assert list(tmp_path.iterdir()) == []
    assert training.engine.sweep is not None
    assert {s: point.step for s, point in training.engine.sweep.points.items()} == {0.25: 14, 0.375: 20, 0.5: 40}


def test_an_index_that_is_none(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    with pytest.raises(FileNotFoundError, match="no sweep in"):
        read_index(tmp_path / FOLDER)
    for text in ("{", "[]", "{}", '{"points": [{"sparsity": 1}]}'):
        (tmp_path / FOLDER / INDEX).write_text(text)
        with pytest.raises(ValueError, match="is damaged, or no index of a sweep"):
            read_index(tmp_path / FOLDER)


# --- reading points back ---
def test_an_averaged_copy_is_kept_beside_the_model(tmp_path: Path) -> None:
    model = mlp()
    ema = torch.optim.swa_utils.AveragedModel(model)
    Training(tmp_path, model=model, ema=ema).attach().train(0, 15, {14: 0.5})
    content = kept(tmp_path, "0.25")
    assert content["ema"].keys() == content["model"].keys()
    assert int((content["ema"]["0.weight"] == 0).sum()) == 32
    assert not same(content["ema"], content["model"])


def test_a_point_is_loaded_with_its_own_masks(tmp_path: Path) -> None:
    trained = Training(tmp_path).attach().train(0, 40)
    trained.engine.detach()
    model = mlp(seed=5)
    engine = load_point(model, tmp_path / FOLDER / "0.25.pt")
    assert engine.finished
    assert engine.run.masks.sparsity() == 0.25
    assert same(dict(model.state_dict()), trained.film[20])


def test_a_point_of_a_run_that_is_quantized_later_exports_float(tmp_path: Path) -> None:
    text = f"{PRUNE[:-1]}, sweep: [0.25, 0.5]}}"
    trained = Training(tmp_path, text, "quantize: {start: 32st, freeze_observers: 35st}", model=wide()).attach()
    trained.train(0, 40).engine.detach()
    engine = load_point(wide(), tmp_path / FOLDER / "0.25.pt")
    certificate = engine.export(tmp_path / "m.onnx", X[:1])
    assert [(layer.name, layer.zeros) for layer in certificate.promise.layers] == [("0.weight", 32)]
    assert not any(layer.quantized for layer in certificate.promise.layers)


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4), nn.Linear(4, 1))


def test_what_is_no_point_or_of_another_model(tmp_path: Path) -> None:
    Training(tmp_path).attach().train(0, 20)
    with pytest.raises(ValueError, match=r"0.25.pt' does not fit the model: .*0\.weight"):
        load_point(nn.Sequential(nn.Linear(8, 17), nn.Tanh(), nn.Linear(17, 1)), tmp_path / FOLDER / "0.25.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_point(mlp(), tmp_path / "none.pt")
    atomic_write(tmp_path / "x.pt", b"x")
    with pytest.raises(ValueError, match="is damaged, or no checkpoint"):
        load_point(mlp(), tmp_path / "x.pt")
    torch.save({"model": {}}, tmp_path / "y.pt")
    with pytest.raises(ValueError, match="is no point of a sweep"):
        load_point(mlp(), tmp_path / "y.pt")


# --- sizes and the plot ---
def test_sizes_are_those_of_gzip() -> None:
    import gzip

    tensors = [torch.arange(1000.0), torch.zeros(500), torch.tensor(3), torch.ones(7, dtype=torch.bfloat16)]
    raw, packed = weigh(tensors)
    assert raw == 4000 + 2000 + 8 + 14
    content = b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors)
    assert len(content) == raw
    assert abs(packed - len(gzip.compress(content, compresslevel=6))) <= 32


def test_the_plot_of_accuracy_over_size(tmp_path: Path) -> None:
    Training(tmp_path).attach().train(0, 40, RISING).engine.detach()
    assert {"accuracy_over_size.svg", "accuracy_over_size.png"} <= {p.name for p in (tmp_path / FOLDER).iterdir()}


def test_onnx_in_a_loop_of_ones_own_says_how(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = f"{PRUNE[:-1]}, sweep: {{sparsity: [0.5], onnx: true}}}}"
    with caplog.at_level(logging.WARNING):
        Training(tmp_path, text).attach().train(0, 40).engine.detach()
    assert "here: load_point(model, file).export(...)" in caplog.text
