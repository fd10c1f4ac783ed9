"""A copy of a model computes with its own weights, whatever its code calls them through."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovit_engine.utils.copying import copy_model


class Calls(nn.Module):
    """Its forward calls something that holds its layer."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        layer, layers = self.layer, {"one": [self.layer]}
        inner = lambda x: layer(x)  # noqa: E731
        weight, bound = self.layer.weight, self.layer.forward
        self.call: Any = {
            "closure": lambda x: layer(x),
            "default": lambda x, layer=layer: layer(x),
            "container": lambda x: layers["one"][0](x),
            "nested": lambda x: inner(x),
            "parameter": lambda x: x @ weight,
            "method": lambda x: bound(x),
            "list": [layer],
        }[kind]

    def forward(self, x: Tensor) -> Any:
        return self.call[0](x) if isinstance(self.call, list) else self.call(x)


@pytest.mark.parametrize("kind", ["closure", "default", "container", "nested", "parameter", "method", "list"])
def test_closures_of_the_copy_call_the_copy(kind: str) -> None:
    model, x = Calls(kind), torch.ones(2, 3)
    before, copied = model(x), copy_model(model)
    torch.testing.assert_close(copied(x), before)
    with torch.no_grad():
        copied.layer.weight.zero_()
    assert not torch.equal(copied(x), before)
    assert torch.equal(model(x), before)
    with torch.no_grad():
        model.layer.weight.mul_(2)
    assert not torch.equal(copied(x), model(x))


def test_hooks_that_are_closures_call_the_copy() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    other = model[1]
    model[0].register_forward_hook(lambda module, inputs, output: output + other.bias.sum())
    copied = copy_model(model)
    with torch.no_grad():
        copied[1].bias.fill_(100.0)
    assert (copied[0](torch.zeros(1, 2)) > 50).all()
    assert (model[0](torch.zeros(1, 2)) < 50).all()


def test_plain_functions_stay_the_same_objects() -> None:
    model = nn.Module()
    model.act, model.none = F.relu, lambda x: x
    copied = copy_model(model)
    assert copied.act is F.relu
    assert copied.none is model.none


def test_a_function_that_holds_itself() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    layer = model[0]

    def deep(x: Tensor, depth: int = 2) -> Any:
        return deep(layer(x), depth - 1) if depth else x

    model.deep = deep
    copied = copy_model(model)
    with torch.no_grad():
        copied[0].weight.zero_()
        copied[0].bias.fill_(3.0)
    assert torch.equal(copied.deep(torch.ones(1, 2)), torch.full((1, 2), 3.0))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("change", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight_norm", "spectral_norm"])
def test_weights_that_an_old_hook_computes(change: Any) -> None:
    model = nn.Sequential(change(nn.Linear(4, 4)))
    model(torch.ones(1, 4))
    with pytest.raises(RuntimeError):
        copy.deepcopy(model)
    copied, x = copy_model(model.eval()), torch.randn(2, 4)
    torch.testing.assert_close(copied(x), model(x))
