"""The pruners that take gradients beside oViT: each is its method of `prune_tensors` on calibrated gradients."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from ovit_engine import Calibration, Engine, RecipeError
from ovit_engine.bases.gradient_pruner import chunk_size
from ovit_engine.masking.targets import find_slots
from ovit_engine.pruning import METHODS, estimate_memory, memory, prune_streamed, prune_tensors
from ovit_engine.pruning.problem import Options
from tests.loops import X, Y, mlp, plain, recipe, zeros

DATA = torch.utils.data.TensorDataset(X, Y)
mse = nn.functional.mse_loss
OPTIONS = {  # in the recipe, and the same for prune_tensors
    "obert_prune": ("block: 16, damp: 1.0e-4", {"method": "obert", "block": 16, "damp": 1e-4}),
    "obert_prune ": (
        "block: 16, damp: 1.0e-4, update: independent",
        {"method": "obert", "block": 16, "damp": 1e-4, "update": "independent"},
    ),
    "mfac_prune": ("block: 64, damp: 1.0e-4", {"method": "mfac", "block": 64, "damp": 1e-4}),
    "obd_prune": ("damp: 1.0e-4", {"method": "obd", "damp": 1e-4}),
    "grad_weight_prune": ("scope: layer", {"method": "grad_weight", "scope": "layer"}),
    "ovit_prune": ("block: 16, damp: 1.0e-4, scope: erk", {"block": 16, "damp": 1e-4, "scope": "erk"}),
}
DEFAULTS = {
    "ovit_prune": {"block": 192, "damp": 1e-8},
    "obert_prune": {"block": 192, "damp": 1e-6, "update": "joint"},
    "mfac_prune": {"block": 2048, "damp": 1e-6, "update": "joint"},
    "obd_prune": {"damp": 1e-6},
    "grad_weight_prune": {},
}


def started(name: str, options: str, calibrated: bool = True) -> tuple[Any, Any, Engine]:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    text = f"{name}: {{gradients: 8, images_per_gradient: 4, targets: [0.weight, 2.weight], {options}}}"
    engine = Engine(model, recipe(text), steps_per_epoch=10, epochs=1)
    engine.attach(optimizer, calibration=Calibration(DATA, mse) if calibrated else None)
    return model, optimizer, engine


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.6), ("2:4", None), ({"block": [1, 4]}, 0.5)])
def test_a_step_is_prune_tensors_on_calibrated_gradients(name: str, pattern: Any, sparsity: float | None) -> None:
    spelled, options = OPTIONS[name]
    dense = mlp()
    slots = find_slots(dense, ["0.weight", "2.weight"])
    calibrated = Calibration(DATA, mse).gradients(dense, slots, count=8, images_per_gradient=4, chunk=8, draw=0)
    gradients = [chunk.clone() for chunk in next(iter(calibrated))]
    weights = [slot.gather() for slot in slots]
    masks, expected = prune_tensors(weights, gradients, pattern=pattern, sparsity=sparsity, **options)  # type: ignore[arg-type]
    text = f"'{pattern}'" if isinstance(pattern, str) else "{block: [1, 4]}"
    amount = "" if sparsity is None else f", sparsity: {sparsity}"
    model, _, engine = started(name.strip(), f"pattern: {text}{amount}, {spelled}")
    for index, slot in enumerate(slots):
        found = engine.run.masks.get(slot.name)
        assert found is not None
        assert found.equal(masks[index])
        torch.testing.assert_close(model[2 * index].weight.detach(), expected[index])


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_of_the_papers(name: str) -> None:
    (modifier,) = recipe(f"{name}: {{sparsity: 0.5, targets: [a]}}").modifiers
    for option, value in {"gradients": 4096, "images_per_gradient": 16, **DEFAULTS[name]}.items():
        assert getattr(modifier, option) == value


@pytest.mark.parametrize("name", ["obert_prune", "mfac_prune", "obd_prune", "grad_weight_prune"])
def test_gradual_counts_are_exact_and_zeros_hold(name: str) -> None:
    model, optimizer, engine = started(name, "sparsity: {2st: 0.25, 4st: 0.5, 6st: 0.5, 8st: 0.75}, recomputations: 2")
    before = torch.zeros(128, dtype=torch.bool)
    with engine:
        for step in range(1, 11):
            plain(model, optimizer)
            share = 0 if step < 2 else 0.25 if step < 4 else 0.5 if step < 8 else 0.75
            assert zeros(model[0]) + zeros(model[2]) == round(share * 144)
            now = (model[0].weight == 0).flatten()
            assert bool((now | ~before).all())
            before = now


@pytest.mark.parametrize("name", ["obert_prune", "mfac_prune", "obd_prune", "grad_weight_prune"])
def test_without_calibration_the_gradients_of_training_serve(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name}: pruning at step 0 needs gradients"):
        started(name, "sparsity: 0.5", calibrated=False)
    with pytest.warns(UserWarning, match=f"{name}: no calibration was given, so the gradients of at most 8 training"):
        model, optimizer, _ = started(name, "sparsity: 0.5, start: 3st", calibrated=False)
    for _ in range(3):
        plain(model, optimizer)
    assert zeros(model[0]) + zeros(model[2]) == 72


def test_too_little_memory_is_said_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda device: 100)
    with pytest.raises(MemoryError, match="use fewer gradients, or leave it out of the targets"):
        started("mfac_prune", "sparsity: 0.5, start: 5st")
    with pytest.raises(MemoryError, match="use a smaller block, or leave it out of the targets"):
        started("obert_prune", "sparsity: 0.5, start: 5st")


def test_too_few_images_for_a_gradient_are_warned_of() -> None:
    model = mlp()
    options = "start: 1st, sparsity: 0.5, gradients: 4, images_per_gradient: 4096, block: 16"
    text = f"ovit_prune: {{{options}, targets: [0.weight]}}"
    engine = Engine(model, recipe(text), steps_per_epoch=10, epochs=1)
    message = rf"there are {len(DATA)} calibration images, and images_per_gradient is 4096: every gradient takes"
    with pytest.warns(UserWarning, match=message):
        engine.attach(torch.optim.SGD(model.parameters(), 0.1), calibration=Calibration(DATA, mse))


def test_memory_is_that_of_the_gradients_which_come() -> None:
    _, _, engine = started("mfac_prune", "sparsity: 0.5, start: 5st, block: 4")
    expected = estimate_memory([(16, 8), (1, 16)], method="mfac", block=4, gradients=8) / 2**30
    assert engine.run.history == [(0, "mfac_prune/memory_gib", expected)]
    with pytest.warns(UserWarning, match="at most 4 training steps"):
        _, _, engine = started("mfac_prune", "sparsity: 0.5, start: 5st, block: 4", calibrated=False)
    expected = (estimate_memory([(16, 8), (1, 16)], method="mfac", block=4, gradients=4) + 4 * 144 * 4) / 2**30
    assert engine.run.history == [(0, "mfac_prune/memory_gib", expected)]


@pytest.mark.parametrize("name", ["ovit_prune", "obert_prune", "mfac_prune"])
@pytest.mark.parametrize("is_calibrated", [True, False])
def test_less_memory_means_more_passes_and_the_same_result(
    name: str, is_calibrated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = name.removesuffix("_prune")
    shapes, count = [torch.Size((16, 8)), torch.Size((1, 16))], 8 if is_calibrated else 4
    need = METHODS[method].memory(shapes, Options(sparsity=0.5, block=4), count)
    limit = need.besides + max(need.held)
    window = 0 if is_calibrated else 4 * 144 * 4
    calls: list[int] = []

    class Counted(Calibration):
        def gradients(self, model: Any, slots: Any, **options: Any) -> Any:
            calls.append(len(slots))
            assert len(options["among"]) == 2  # so that groups come the way that all would
            return super().gradients(model, slots, **options)

    def trained(more: str) -> nn.Sequential:
        calls.clear()
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        text = f"{name}: {{gradients: 8, images_per_gradient: 4, targets: ['re:.*weight'], block: 4, {more}}}"
        reported: set[str] = set()
        engine = Engine(model, recipe(text), steps_per_epoch=10, epochs=1)
        engine.log_to(lambda values, step: reported.update(values))
        engine.attach(optimizer, calibration=Counted(DATA, mse) if is_calibrated else None)
        for _ in range(5):
            plain(model, optimizer)
        assert reported >= {f"{name}/{stage}_seconds" for stage in ("gradients", "fisher", "allocate")}
        return model

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no calibration was given")
        whole = trained("sparsity: 0.5, start: 5st").state_dict()
        assert calls == [2] * is_calibrated
        words = r"a pruning step needs 0\.0\d GiB, memory_limit is .* GiB: its targets are taken in 2 groups"
        with pytest.warns(UserWarning, match=words):
            few = trained(f"sparsity: 0.5, start: 5st, memory_limit: {(limit + 1) / 2**30:.20f}").state_dict()
        assert calls == [1, 1, 1] * is_calibrated
        monkeypatch.setattr(memory, "available_memory", lambda device: limit + window)
        words = r"more than is available: its targets are taken in 2 groups, and gradients 3 times"
        with pytest.warns(UserWarning, match=words):
            as_is = trained("sparsity: 0.5, start: 5st").state_dict()
    for key, tensor in whole.items():
        assert torch.equal(tensor, few[key])
        assert torch.equal(tensor, as_is[key])


@pytest.mark.parametrize(("value", "words"), [("0", "greater than 0"), ("'8GiB'", "valid number")])
def test_a_memory_limit_is_a_number_of_gib(value: str, words: str) -> None:
    with pytest.raises(RecipeError, match=f"ovit_prune.memory_limit.*{words}"):
        recipe(f"ovit_prune: {{sparsity: 0.5, targets: [a], memory_limit: {value}}}")


def parts_of(name: str, monkeypatch: pytest.MonkeyPatch, options: str) -> list[float]:
    """The share of zeros after each part of the pruning steps."""
    shares: list[float] = []

    def noting(*args: Any, **options: Any) -> Any:
        pruned = prune_streamed(*args, **options)
        shares.append(sum(int((~mask).sum()) for mask in pruned.masks) / 144)
        return pruned

    monkeypatch.setattr("ovit_engine.bases.gradient_pruner.prune_streamed", noting)
    model, optimizer, _ = started(name, options)
    for _ in range(3):
        plain(model, optimizer)
    return shares


def test_parts_of_mfac_go_by_density_and_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = parts_of("mfac_prune", monkeypatch, "sparsity: {0st: 0.5, 2st: 0.9}, recomputations: 4, block: 16")
    first = [1 - 0.5 ** (part / 4) for part in (1, 2, 3, 4)]
    start = round(0.5 * 144) / 144
    second = [1 - (1 - start) * (0.1 / (1 - start)) ** (part / 4) for part in (1, 2, 3, 4)]
    assert shares == [round(share * 144) / 144 for share in first + second]


@pytest.mark.parametrize("name", ["ovit_prune", "obert_prune", "obd_prune"])
def test_parts_of_the_others_are_linear_and_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = parts_of(name, monkeypatch, "sparsity: {0st: 0.4, 2st: 0.8}, recomputations: 2")
    start = round(0.4 * 144) / 144
    assert shares == [round(share * 144) / 144 for share in (0.2, 0.4, start + (0.8 - start) / 2, 0.8)]


def test_parts_stay_where_everything_is_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parts_of("mfac_prune", monkeypatch, "sparsity: {0st: 0.999, 2st: 0.9999}, recomputations: 2")[-1] == 1.0


def test_n_to_m_has_no_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    options = "pattern: '2:4', sparsity: 0.5, recomputations: 3, block: 16"
    assert parts_of("obert_prune", monkeypatch, options) == [0.5]


def test_a_run_hears_how_far_pruning_is() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    text = "ovit_prune: {sparsity: 0.5, gradients: 20, targets: [0.weight], block: 16, recomputations: 2}"
    engine = Engine(model, recipe(text), steps_per_epoch=10, epochs=1)
    told: list[tuple[str, int, int]] = []
    engine.run.progress = lambda what, done, total: told.append((what, done, total))
    engine.attach(optimizer, calibration=Calibration(DATA, mse))
    assert told[:4] == [
        ("ovit_prune (part 1 of 2): gradients", 0, 20),
        ("ovit_prune (part 1 of 2): gradients", 16, 20),
        ("ovit_prune (part 1 of 2): gradients", 20, 20),
        ("ovit_prune (part 1 of 2): eliminate", 128, 128),
    ]
    assert told[-1] == ("ovit_prune (part 2 of 2): move", 128, 128)


@pytest.mark.parametrize(
    ("weights", "count", "size"),
    [
        (196_608, 4096, 64),  # the digits ViT: many small gradients a backward pass
        (5_308_416, 4096, 16),  # DeiT-Tiny: 340 MB are enough
        (524_288, 4096, 32),  # never more than 64 MiB of them above sixteen
        (196_608, 256, 16),  # sixteen chunks stay for ranks to share
        (196_608, 5, 5),
        (10**9, 4096, 16),
    ],
)
def test_chunks_are_larger_for_small_models(weights: int, count: int, size: int) -> None:
    assert chunk_size(weights, count) == size
