"""What would fail at export fails at attach, on a copy, and everything else is as if nothing had happened."""

import copy
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ovit_engine import Calibration, Engine, Recipe
from ovit_engine.certificate.errors import ExportError
from ovit_engine.core.recipe import shipped_recipes
from ovit_engine.training.models import make_model, rehearse, with_small_model
from ovit_engine.utils.random_states import seed_everything

SPARSITY = "sparsity: {from: 0.2, to: 0.5}, start: 1st, end: 8st, every: 1st"
PRUNE = f"ovit_prune: {{{SPARSITY}, targets: [conv.weight, head.weight], block: 8, gradients: 16}}"
STACKED = f"modifiers: [{{{PRUNE}}}, {{quantize: {{start: 9st}}}}]"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        self.drop = nn.Dropout(0.1)  # draws, also in a rehearsal

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))
        return y


class LoopsOverTheBatch(Net):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([super(LoopsOverTheBatch, self).forward(each[None])[0] for each in x])


def attach(model: nn.Module, example_inputs: Tensor | None, recipe: str = STACKED, **options: Any) -> Engine:
    engine = Engine(model, Recipe.parse(recipe), steps_per_epoch=12, epochs=1, **options)
    engine.prepare()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = torch.utils.data.TensorDataset(torch.randn(64, 3, 8, 8), torch.randint(5, (64,)))
    return engine.attach(optimizer, calibration=Calibration(data, cross_entropy), example_inputs=example_inputs)


def draws() -> tuple[list[float], float, float]:
    return torch.rand(3).tolist(), float(np.random.rand()), random.random()


def trained(example_inputs: Tensor | None) -> tuple[dict[str, Tensor], Any, tuple[list[float], float, float]]:
    seed_everything(0)
    model = Net()
    engine = attach(model, example_inputs)
    (optimizer,) = engine.run.optimizers
    for step in range(12):
        generator = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        cross_entropy(model(torch.randn(16, 3, 8, 8, generator=generator)), torch.arange(16) % 5).backward()
        optimizer.step()
    engine.detach()
    return copy.deepcopy(model.state_dict()), engine.run.history, draws()


def test_training_is_the_same_bit_for_bit_with_a_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain, rehearsed = trained(None), trained(torch.ones(8, 3, 8, 8))
    assert plain[0].keys() == rehearsed[0].keys()
    assert all(torch.equal(value, rehearsed[0][name]) for name, value in plain[0].items())
    assert plain[1:] == rehearsed[1:]
    assert not list(tmp_path.iterdir())


def test_what_export_would_refuse_is_refused_before_the_first_step() -> None:
    model = LoopsOverTheBatch()
    with pytest.raises(ExportError) as early:
        attach(model, torch.ones(4, 3, 8, 8), "modifiers: []")
    engine = Engine(LoopsOverTheBatch(), Recipe.parse("modifiers: []"), steps_per_epoch=1, epochs=1)
    with pytest.raises(ExportError) as late:
        engine.export("never.onnx", torch.ones(4, 3, 8, 8))
    assert str(early.value) == str(late.value)


def test_a_model_in_low_precision_may_be_exported_as_a_float_copy() -> None:
    attach(
        Net().bfloat16(),
        torch.ones(4, 3, 8, 8),
        recipe="modifiers: [{magnitude_prune: {sparsity: 0.5, targets: [conv.weight]}}]",
    )


def test_inputs_that_the_model_does_not_take() -> None:
    with pytest.raises(ValueError, match=r"does not take example_inputs of shape \[4, 1, 8, 8\]"):
        attach(Net(), torch.ones(4, 1, 8, 8))


def test_a_model_that_cannot_be_copied_is_trained_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    class NoCopy(Net):
        def __deepcopy__(self, memo: object) -> "NoCopy":
            raise TypeError("one of a kind")

    engine = attach(NoCopy(), torch.ones(4, 3, 8, 8), f"modifiers: [{{{PRUNE}}}]")
    assert engine.is_attached
    assert "not rehearsed: the model can't be copied: one of a kind" in caplog.text


def test_modifiers_are_silent_in_a_rehearsal(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        engine = attach(Net(), torch.ones(4, 3, 8, 8))
    assert [name for _, name, _ in engine.run.history] == ["ovit_prune/memory_gib"]
    assert sum("memory_gib" in message for message in caplog.messages) == 1
    assert any("rehearsed" in message for message in caplog.messages)


FAST = {"digits_vit_ovit_75_int8", "paper/table11_acdc", "svite/s2vite_deit_tiny"}
RECIPES = [name for name in shipped_recipes() if Recipe.load(name).training.model is not None]


@pytest.mark.filterwarnings("ignore::UserWarning")  # of a model that is made smaller
@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_every_recipe_of_ours_comes_through(name: str) -> None:
    recipe = with_small_model(Recipe.load(name), 100)
    model = make_model(recipe.training)
    engine = Engine(model, recipe, steps_per_epoch=100, epochs=recipe.training.epochs).prepare()
    before = copy.deepcopy(model.state_dict())
    rehearse(engine)
    assert engine.run.step == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
