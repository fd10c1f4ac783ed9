"""On an accelerator: every modifier, resumed with states saved there, and exported from there."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ovit_engine import Calibration, Engine
from tests.devices import ACCELERATOR
from tests.loops import X, Y, recipe
from tests.modifiers.test_contract import NAMES, SETTINGS, model_for

pytestmark = pytest.mark.gpu


def started(name: str, device: str) -> tuple[nn.Module, torch.optim.Optimizer, Engine]:
    model = model_for(name).to(device)
    engine = Engine(model, recipe(f"{name}: {SETTINGS[name]}"), steps_per_epoch=10, epochs=1).prepare()
    return model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), engine


def attach(engine: Engine, optimizer: torch.optim.Optimizer) -> None:
    data = torch.utils.data.TensorDataset(X, Y)
    engine.attach(optimizer, calibration=Calibration(data, nn.functional.mse_loss))


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


@pytest.mark.parametrize("name", NAMES)
def test_a_modifier_trains_resumes_and_exports(name: str, tmp_path: Path) -> None:
    model, engine = unbroken(name, ACCELERATOR)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {ACCELERATOR}
    for key in engine.run.masks.names():
        mask = engine.run.masks.get(key)
        assert mask is not None
        assert mask.device.type == ACCELERATOR
    for place in (ACCELERATOR, "cpu"):
        again, optimizer, other = started(name, ACCELERATOR)
        attach(other, optimizer)
        steps(4, again, optimizer, other, ACCELERATOR)
        file = io.BytesIO()
        torch.save([part.state_dict() for part in (again, optimizer, other)], file)
        again, optimizer, other = started(name, ACCELERATOR)
        states = torch.load(io.BytesIO(file.getvalue()), weights_only=True, map_location=place)
        for part, state in zip((again, optimizer, other), states, strict=True):
            part.load_state_dict(state)  # type: ignore[attr-defined]
        attach(other, optimizer)
        steps(6, again, optimizer, other, ACCELERATOR)
        other.detach()
        equal(again, model)
    engine.export(tmp_path / "model.onnx", X[:1].to(ACCELERATOR), data=[(X, Y)])


def test_what_the_engine_saves_lies_in_main_memory() -> None:
    """So that a checkpoint can be read where there is no such device."""
    for name in NAMES:
        model, optimizer, engine = started(name, ACCELERATOR)
        attach(engine, optimizer)
        steps(4, model, optimizer, engine, ACCELERATOR)
        leaves: list[Any] = tree_leaves(engine.state_dict())
        places = {leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)}
        assert places <= {"cpu"}, name
