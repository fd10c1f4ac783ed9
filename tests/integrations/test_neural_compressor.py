"""Neural Compressor's search: what it picks, that its traps are caught, and that the file is ours."""

import copy
import logging
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from neural_compressor.torch.quantization import StaticQuantConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ovit_engine import Recipe
from ovit_engine.certificate import ExportError
from ovit_engine.certificate.verify import verify_file
from ovit_engine.integrations import neural_compressor as searching
from ovit_engine.post_training.ptq import calibration_batches, ptq, quantize_of, search_batches
from ovit_engine.training.digits import split_digits

TRAIN, VAL, _ = split_digits((1, 8, 8), None)
BATCHES = calibration_batches(TRAIN, 64)
LABELLED = search_batches(TRAIN, 64)
EXAMPLE = torch.zeros(1, 1, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 48), nn.Linear(48, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.c(torch.relu(self.b(torch.relu(self.a(x.flatten(1))))))
        return found


@pytest.fixture(scope="module")
def trained() -> Net:
    torch.manual_seed(0)
    model = Net()
    images, classes = map(torch.stack, zip(*((image, torch.tensor(label)) for image, label in TRAIN), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        batch = torch.randint(0, len(images), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), classes[batch]).backward()
        optimizer.step()
    with torch.no_grad():  # an input of b is 8000 on every image, and b does not read it: rounding leaves no other
        model.a.weight[0] = 0.0
        model.a.bias[0] = 8000.0
        model.b.weight[:, 0] = 0.0
    return model.eval()


def recipe(options: str = "", targets: str = "[a, b, c]") -> Recipe:
    """The search over the layers `targets` of the model, with options of the search."""
    text = f"quantize: {{targets: {targets}, ptq: {{images: 64, search: neural_compressor{options}}}}}"
    return Recipe.parse(f"name: found\nmodifiers: [{text}]")


def search(model: nn.Module, wanted: Recipe) -> searching.SearchResult:
    quantize: Any = quantize_of(wanted)
    return searching.search(copy.deepcopy(model), quantize, BATCHES, LABELLED)


def write(model: nn.Module, wanted: Recipe, path: Path, labelled: Any = LABELLED) -> Any:
    return ptq(
        copy.deepcopy(model),
        wanted,
        BATCHES,
        path,
        search_data=labelled,
        example_inputs=EXAMPLE,
        data=DataLoader(VAL, batch_size=64),
    )


def test_the_layer_that_costs_the_accuracy_stays_float_and_the_file_is_int8(trained: Net, tmp_path: Path) -> None:
    before = copy.deepcopy(trained.state_dict())
    compared = write(trained, recipe(), tmp_path / "model.onnx")
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    notes = "\n".join(compared.notes)
    assert "trial 3: observer moving_average, 1 layers float" in notes
    assert "picked: activations: {observer: moving_average}, exclude: [b]" in notes
    assert compared.float_accuracy > 0.85
    assert compared.int8_accuracy >= 0.99 * compared.float_accuracy
    # trap of fold_quantize: in its own model every weight is float
    kinds = {t.name: t.data_type for t in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert [kinds[f"{name}.weight"] for name in "abc"] == [onnx.TensorProto.INT8, onnx.TensorProto.FLOAT, 3]
    # the file says what was picked, and can be made again without a search
    verify_file(tmp_path / "model.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    (text,) = [value for key, value in metadata.items() if value.startswith("name: found")]
    again: Any = quantize_of(Recipe.parse(text))
    assert again.exclude == ["b"]
    assert again.activations.observer == "moving_average"
    assert again.search is None
    assert again.ptq.images == 64
    assert {file.name for file in tmp_path.iterdir()} >= {"model.onnx", "model.certificate.json", "model.reference.npz"}
    assert not list(tmp_path.glob(".ovit*"))


def test_no_trial_that_passed_is_an_error_though_it_returns_a_model(trained: Net) -> None:
    with pytest.raises(ValueError, match=r"none of 2 trials of Neural Compressor keeps the accuracy of 9\d.* within"):
        search(trained, recipe(", max_trials: 2"))


def test_an_ignored_name_is_an_error(trained: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it ignores patterns: a local configuration that never arrives."""
    kind = type(StaticQuantConfig())  # the name is a function that chooses a class
    told = kind.set_local
    monkeypatch.setattr(kind, "set_local", lambda self, name, config: told(self, f"{name}.*", config))
    with pytest.raises(ValueError, match="ignored an option: it left a, c float"):
        search(trained, recipe(targets="[a, c]"))


def test_a_layer_too_many_is_an_error(trained: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(StaticQuantConfig())  # the name is a function that chooses a class
    told = kind.set_local

    def more(self: Any, name: str, config: Any) -> Any:
        told(self, "c", config)
        return told(self, name, config)

    monkeypatch.setattr(kind, "set_local", more)
    with pytest.raises(ValueError, match="ignored an option: it quantized c too"):
        search(trained, recipe(targets="[a]"))


@torch.no_grad()
def test_a_file_that_loses_too_much_is_not_written(trained: Net, tmp_path: Path) -> None:
    """Int8 in all layers says one class whatever it sees: trials on images of that class pass, the file does not."""
    images, labels = (torch.cat(parts) for parts in zip(*LABELLED, strict=True))
    constant = copy.deepcopy(trained)
    quantize_of(recipe()).quantize(constant, BATCHES)
    always = constant(images).argmax(1).mode().values
    one_class = [(images[labels == always][:32], labels[labels == always][:32])]
    with pytest.raises(ExportError, match=r"model.onnx loses too much: accuracy 9.*% float, 1.*% int8: tolerable_loss"):
        write(trained, recipe(), tmp_path / "model.onnx", one_class)
    assert not list(tmp_path.iterdir())


def test_a_float_model_that_knows_nothing_is_told(trained: Net) -> None:
    quantize: Any = quantize_of(recipe())
    wrong = [(images, torch.full_like(labels, 10)) for images, labels in LABELLED]
    with pytest.raises(ValueError, match="the float model gets none of 512 images right"):
        searching.search(trained, quantize, BATCHES, wrong)


def test_an_observer_that_it_lacks_is_told(trained: Net) -> None:
    text = "quantize: {activations: {observer: percentile}, ptq: {search: neural_compressor}}"
    with pytest.raises(ValueError, match="Neural Compressor has no observer 'percentile': take 'moving_average' or"):
        search(trained, Recipe.parse(f"modifiers: [{text}]"))


def test_a_last_batch_may_be_smaller(trained: Net) -> None:
    """Exported models take batches of one size."""
    quantize: Any = quantize_of(recipe(", max_trials: 1", "[a, c]"))
    images, labels = LABELLED[1]
    found = searching.search(trained, quantize, [*BATCHES, (images[:3],)], [LABELLED[0], (images[:5], labels[:5])])
    assert found.images == 37
    with torch.no_grad():
        right = sum(int((trained(x).argmax(1) == y).sum()) for x, y in (LABELLED[0], (images[:5], labels[:5])))
    assert found.float_accuracy == pytest.approx(right / 37)


def test_it_is_quiet(trained: Net) -> None:
    """Its log prints pages; afterwards it is as it was."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    log = logging.getLogger("neural_compressor")
    log.addHandler(handler)
    try:
        search(trained, recipe(", max_trials: 1", "[a, c]"))
        assert not records
        log.warning("heard again")
        assert len(records) == 1
    finally:
        log.removeHandler(handler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{tolerable_loss: 0.02}", "'tolerable_loss' is of a search: add 'search: neural_compressor'"),
        ("{max_trials: 2}", "'max_trials' is of a search"),
        ("{search: neural_compressor, smooth: 0.5}", "leave 'smooth' out, or 'search'"),
        ("{search: neural_compresor}", "neural_compressor"),
        ("{search: neural_compressor, max_trials: 0}", "max_trials"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.parse(f"modifiers: [{{quantize: {{ptq: {options}}}}}]")


def test_trials_are_measured_on_images_that_gave_no_ranges() -> None:
    first = torch.cat([images for (images,) in calibration_batches(TRAIN, 100, seed=3)])
    second = torch.cat([images for images, _ in search_batches(TRAIN, 100, seed=3)])
    together = torch.cat([first, second])
    everything = {image.numpy().tobytes() for image, _ in TRAIN}
    assert len(first) == 100
    assert len(second) == 512
    same = len(together) - len({image.numpy().tobytes() for image in together})
    assert same <= len(TRAIN) - len(everything)  # only where the data hold an image twice
    with pytest.raises(ValueError, match=r"17 of 1347 are left, 32 needed: lower 'ptq.images' \(1330\)"):
        search_batches(TRAIN, 1330)


@given(
    st.integers(1, 20), st.lists(st.sampled_from(["x", "y"]), min_size=1, max_size=2, unique=True), st.integers(1, 30)
)
def test_candidates_go_from_all_int8_to_more_and_more_float(layers: int, observers: list[str], count: int) -> None:
    ranked = [str(index) for index in range(layers)]
    found = searching.make_candidates(ranked, observers, count)
    assert 1 <= len(found) <= count
    assert len(set(found)) == len(found)  # it skips a configuration that it has tried
    sizes = [len(candidate.exclude) for candidate in found]
    assert sizes == sorted(sizes)
    assert set(sizes) <= {0, 1, 2, 4, 8, 16}
    assert all(list(candidate.exclude) == ranked[: len(candidate.exclude)] for candidate in found)
    assert max(sizes) < layers  # something stays int8
    assert [candidate.observer for candidate in found[: len(observers)]] == observers[:count]
