"""On an accelerator: every modifier, resumed with states saved there, and exported from there."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ovit_engine import Calibration, Engine
from ovit_engine.masking.parameters import parameter_slots
from ovit_engine.post_training.oneshot import oneshot
from ovit_engine.post_training.setup import set_up
from ovit_engine.training.api import SILENT, train
from ovit_engine.training.runs import restore
from tests.devices import ACCELERATOR
from tests.loops import X, Y, recipe
from tests.modifiers.test_contract import NAMES, SETTINGS, model_for
from tests.training.conftest import tiny_recipe

pytestmark = pytest.mark.gpu


def started(name: str, device: str) -> tuple[nn.Module, torch.optim.Optimizer, Engine]:
    model = model_for(name).to(device)
    engine = Engine(model, recipe(f"{name}: {SETTINGS[name]}"), steps_per_epoch=10, epochs=1).prepare()
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), engine


def calibration() -> Calibration:
    return Calibration(torch.utils.data.TensorDataset(X, Y), nn.functional.mse_loss)


def attach(engine: Engine, optimizer: torch.optim.Optimizer) -> None:
    engine.attach(optimizer, calibration=calibration())


def steps(count: int, model: nn.Module, optimizer: torch.optim.Optimizer, engine: Engine, device: str) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        engine.loss(nn.functional.mse_loss(model(X.to(device)), Y.to(device))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def unbroken(name: str, device: str) -> tuple[nn.Module, Engine]:
    model, optimizer, engine = started(name, device)
    attach(engine, optimizer)
    steps(10, model, optimizer, engine, device)
    engine.detach()
    return model, engine


def equal(one: nn.Module, other: nn.Module) -> None:
    for (key, ours), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


def saved(name: str, count: int, place: str) -> Any:
    """The states of model, optimizer and engine after so many steps, read to `place`."""
    model, optimizer, engine = started(name, ACCELERATOR)
    attach(engine, optimizer)
    steps(count, model, optimizer, engine, ACCELERATOR)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, engine)], file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True, map_location=place)


def masks_of(engine: Engine) -> list[Tensor]:
    masks = [engine.run.masks.get(name) for name in engine.run.masks.names()]
    return [mask for mask in masks if mask is not None]


@pytest.mark.parametrize("name", NAMES)
def test_a_modifier_trains_resumes_and_exports(name: str, tmp_path: Path) -> None:
    model, engine = unbroken(name, ACCELERATOR)
    assert {tensor.device.type for tensor in (*model.state_dict().values(), *masks_of(engine))} == {ACCELERATOR}
    again, optimizer, other = started(name, ACCELERATOR)
    for part, state in zip((again, optimizer, other), saved(name, 4, ACCELERATOR), strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    attach(other, optimizer)
    steps(6, again, optimizer, other, ACCELERATOR)
    other.detach()
    equal(again, model)
    engine.export(tmp_path / "model.onnx", X[:1].to(ACCELERATOR), data=[(X, Y)])


@pytest.mark.parametrize("count", [4, 6])  # within the window of each modifier that records one, and in soft pruning
@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_moves_there_once_the_state_is_loaded(name: str, count: int) -> None:
    trained, _ = unbroken(name, ACCELERATOR)
    model = model_for(name)
    engine = Engine(model, recipe(f"{name}: {SETTINGS[name]}"), steps_per_epoch=10, epochs=1)
    weights, momenta, state = saved(name, count, "cpu")
    engine.load_state_dict(state)
    model.load_state_dict(weights)
    model.to(ACCELERATOR)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    optimizer.load_state_dict(momenta)
    attach(engine, optimizer)
    steps(10 - count, model, optimizer, engine, ACCELERATOR)
    engine.detach()
    equal(model, trained)


@pytest.mark.parametrize("name", NAMES)
def test_an_average_kept_in_main_memory_follows(name: str) -> None:
    model, optimizer, engine = started(name, ACCELERATOR)
    average = ModelEmaV3(model, decay=0.5, device="cpu")
    engine.attach(optimizer, calibration=calibration(), ema=average)
    for _ in range(10):
        steps(1, model, optimizer, engine, ACCELERATOR)
        average.update(model)
    engine.detach()
    theirs = dict(average.module.named_parameters())
    for key, mask in zip(engine.run.masks.names(), masks_of(engine), strict=True):
        assert not theirs[key][~mask.cpu()].any(), key
    for (key, ours), other in zip(model.named_buffers(), average.module.buffers(), strict=True):
        assert ours.dtype != torch.bool or torch.equal(ours.cpu(), other), key


@pytest.fixture
def by_default() -> Iterator[None]:
    """As `torch.set_default_device` of a user."""
    torch.set_default_device(ACCELERATOR)
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("by_default")
@pytest.mark.parametrize("name", NAMES)
def test_where_all_tensors_are_made_there(name: str, tmp_path: Path) -> None:
    _, engine = unbroken(name, ACCELERATOR)
    engine.export(tmp_path / "model.onnx", X[:1], data=[(X, Y)])


class Noise(nn.Module):
    """Draws in every mode: calibration switches dropout off."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_calibration_leaves_the_random_numbers_of_the_device_alone() -> None:
    model = nn.Sequential(nn.Linear(8, 16), Noise(), nn.Linear(16, 1)).to(ACCELERATOR)
    torch.manual_seed(0)
    expected = torch.rand(4, device=ACCELERATOR)
    torch.manual_seed(0)
    for _ in calibration().gradients(model, parameter_slots(model), count=2, images_per_gradient=4, chunk=2):
        pass
    assert torch.rand(4, device=ACCELERATOR).equal(expected)


PRUNE = r"start: 1ep, end: 2ep, every: 1ep, sparsity: {from: 0.3, to: 0.5}, targets: ['re:blocks.*(qkv|fc1)\.weight']"
MODIFIERS = f"""
  - ovit_prune: {{{PRUNE}, block: 16, gradients: 8, images_per_gradient: 4}}
  - cyclic_lr: {{max: 2.0e-3, min: 1.0e-5, period: 1ep}}
  - quantize: {{start: 1.5ep, freeze_observers: 2.5ep}}
"""


class InterruptedRunError(Exception):
    pass


@pytest.mark.parametrize("extra", ["clip_grad: 0.5", "augmentation: noise, ema: 0.9"])
@pytest.mark.parametrize("amp", [False, True])
def test_the_trainer_resumes_and_exports(extra: str, amp: bool, tmp_path: Path) -> None:
    def begin(epoch: int, epochs: int, steps: int) -> None:
        if epoch == 3:
            raise InterruptedRunError

    training: dict[str, Any] = {"data": "digits", "device": ACCELERATOR, "amp": amp}
    recipe = tiny_recipe(MODIFIERS, epochs=3, extra=f"batch_size: 256, lr: 1.0e-3, {extra}")
    unbroken = train(recipe, output=tmp_path / "unbroken", **training)
    with pytest.raises(InterruptedRunError):
        train(recipe, output=tmp_path / "broken", progress=replace(SILENT, begin=begin), **training)
    resumed = train(recipe, output=tmp_path / "broken", resume=tmp_path / "broken", **training)
    equal(resumed.model, unbroken.model)
    assert {tensor.device.type for tensor in resumed.model.state_dict().values()} == {ACCELERATOR}
    assert resumed.engine.run.masks.sparsity() == pytest.approx(0.5, abs=1e-3)
    images = DataLoader(resumed.data.val, 64)
    certificate = resumed.engine.export(tmp_path / "m.onnx", torch.zeros(1, 1, 8, 8), data=images)
    assert certificate.accuracy is not None
    assert certificate.accuracy.file == pytest.approx(resumed.metrics[-1].accuracy, abs=0.02)
    # what was trained there is read where there is no such device
    assert {tensor.device.type for tensor in restore(tmp_path / "broken").model.state_dict().values()} == {"cpu"}


def test_a_one_shot_run(caplog: pytest.LogCaptureFixture) -> None:
    recipe = tiny_recipe(MODIFIERS, epochs=3)
    bench = set_up(recipe, data="digits", device=ACCELERATOR)
    assert "the weights are random" in caplog.text
    found = oneshot(
        bench.model,
        recipe,
        calibration=bench.calibration,
        evaluate=bench.evaluate,
        sparsities=(0.5,),
        example_inputs=bench.example_inputs,
    )
    assert [point.sparsity for point in found.points] == [pytest.approx(0.5, abs=1e-3)]
