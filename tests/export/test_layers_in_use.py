"""Models whose code reads layers, holds them elsewhere, or leaves some out when it is exported."""

import logging
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovit_engine import Engine, Recipe
from ovit_engine.certificate.kernels import open_session, run_outputs
from ovit_engine.certificate.verify import verify_file

INT8 = "quantize: {start: 1st}"


def pruned(targets: str) -> str:
    return f"magnitude_prune: {{start: 1st, sparsity: 0.5, targets: {targets}}}"


def trained(model: nn.Module, x: Tensor, *lines: str) -> Engine:
    torch.manual_seed(0)
    recipe = Recipe.parse(f"modifiers: [{', '.join('{' + line + '}' for line in lines)}]")
    engine = Engine(model, recipe, steps_per_epoch=3, epochs=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    engine.attach(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        outputs = model.train()(x)
        sum(each.square().mean() for each in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
        optimizer.step()
    engine.detach()
    return engine


def assert_same(engine: Engine, x: Tensor, path: Any) -> Any:
    """Export, compare with PyTorch, verify; returns the certificate."""
    certificate = engine.export(path, x[:1], data=[(x, torch.zeros(len(x)))])
    with torch.no_grad():
        expected = engine.model.eval()(x).numpy()
    np.testing.assert_allclose(
        run_outputs(open_session(path), [x.numpy()]), expected, atol=0.03 * np.abs(expected).max()
    )
    verify_file(path)
    return certificate


class ReadsLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.conv.note = 2

    def forward(self, x: Tensor) -> Any:
        if not isinstance(self.conv, nn.Conv2d) or not isinstance(self.head, nn.Linear):
            raise TypeError
        k = self.conv.kernel_size[0] // self.conv.note
        x = self.norm(self.conv(F.pad(x, (0, k, 0, k)))).mean((2, 3))
        return self.head(x.reshape(-1, self.norm.num_features)) * self.head.in_features / self.conv.stride[0]


def test_baked_layers_have_type_and_attributes_of_those_they_replace(tmp_path: Any) -> None:
    x = torch.randn(64, 3, 8, 8)
    certificate = assert_same(trained(ReadsLayers(), x, INT8), x, tmp_path / "m.onnx")
    assert {layer.name: layer.dtype for layer in certificate.layers} == {"conv.weight": "INT8", "head.weight": "INT8"}


class CallsThrough(nn.Module):
    """Its layers are called by a closure, or from a plain list."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.mlp = nn.ModuleDict({"a": nn.Linear(16, 32), "b": nn.Linear(32, 16)})
        mlp, a, b = self.mlp, self.mlp["a"], self.mlp["b"]
        self.call: Any = {
            "dict": lambda x: mlp["b"](mlp["a"](x).relu()),
            "layers": lambda x: b(a(x).relu()),
            "list": [a, nn.ReLU(), b],
        }[kind]

    def forward(self, x: Tensor) -> Any:
        for call in self.call if isinstance(self.call, list) else [self.call]:
            x = call(x)
        return x


@pytest.mark.parametrize("kind", ["dict", "layers", "list"])
def test_layers_that_a_closure_or_a_list_holds_are_exported_as_trained_and_baked(kind: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 16)
    engine = trained(CallsThrough(kind), x, pruned("['re:.*weight']"), INT8)
    certificate = assert_same(engine, x, tmp_path / "m.onnx")
    assert {layer.name: layer.dtype for layer in certificate.layers} == {"mlp.a.weight": "INT8", "mlp.b.weight": "INT8"}
    assert certificate.sparsity >= 0.5


class WithHeads(nn.Module):
    """`aux` and `thrown_away` play no part in eval mode; the embedding is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a, self.h = nn.Linear(8, 20), nn.Linear(20, 8), nn.Linear(8, 20, bias=False)
        self.aux, self.thrown_away = nn.Linear(8, 5), nn.Linear(8, 5)
        self.h.weight = self.e.weight

    def forward(self, x: Tensor) -> Any:
        features = self.a(self.e(x).relu())
        other = self.thrown_away(features)
        return (self.h(features), self.aux(features) + other) if self.training else self.h(features)


@pytest.mark.parametrize("lines", [(INT8,), (pruned("['re:.*weight']"),), (pruned("['re:.*weight']"), INT8)])
def test_heads_for_training_only_are_named_and_not_promised(lines: Any, tmp_path: Any, caplog: Any) -> None:
    x = torch.randn(64, 8)
    engine = trained(WithHeads(), x, *lines)
    with caplog.at_level(logging.WARNING):
        certificate = assert_same(engine, x, tmp_path / "m.onnx")
    assert "does not use 'aux.weight', 'thrown_away.weight'" in caplog.text
    assert {layer.name for layer in certificate.promise.layers} >= {"a.weight", "e.weight"}
    assert not {"aux.weight", "thrown_away.weight"} & {layer.name for layer in certificate.promise.layers}
    stored = {tensor.name for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
    assert not any("aux" in name or "thrown" in name for name in stored)
