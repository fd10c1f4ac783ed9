"""Weights that a layer computes or packs are plain weights in the file, with the zeros that were promised."""

import copy
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.export.test_layers_in_use import INT8, assert_same, pruned, trained


class Standardized(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean(1, keepdim=True)


def net(change: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 5))
    for index in (0, 3):
        change(model[index])
    return model


CHANGES = {
    "weight_norm": (nn.utils.weight_norm, "weight_v"),
    "spectral_norm": (nn.utils.spectral_norm, "weight_orig"),
    "new weight_norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "new spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "prune": (lambda layer: prune.random_unstructured(layer, "weight", 0.25), "weight_orig"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:quantize")
@pytest.mark.parametrize("lines", [(), (INT8,)], ids=["float", "int8"])
@pytest.mark.parametrize(("change", "attribute"), CHANGES.values(), ids=CHANGES)
def test_zeros_of_what_is_scaled_are_those_of_the_weight(
    change: Any, attribute: str, lines: Any, tmp_path: Any
) -> None:
    x = torch.randn(64, 3, 4, 4)
    engine = trained(net(change), x, pruned(f"['0.{attribute}', '3.{attribute}']"), *lines)
    certificate = assert_same(engine, x, tmp_path / "m.onnx")
    facts = {layer.name: layer for layer in certificate.layers}
    promised = {layer.name: layer.zeros for layer in certificate.promise.layers if layer.pruned}
    assert promised.keys() == {"0.weight", "3.weight"}
    assert sum(promised.values()) == (8 * 27 + 32 * 16) // 2
    assert all(facts[name].zeros >= zeros for name, zeros in promised.items())
    with torch.no_grad():  # the model in training is as it was
        assert all(bool(value.isfinite().all()) for value in engine.model(x))


@pytest.mark.parametrize("change", [parametrizations.orthogonal, None], ids=["orthogonal", "own"])
def test_other_parametrizations_export_as_their_values(change: Any, tmp_path: Any) -> None:
    change = change or (lambda layer: parametrize.register_parametrization(layer, "weight", Standardized()))
    model, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(64, 8)
    change(model[2])
    kinds = {name: type(module) for name, module in model.named_modules()}
    engine = trained(model, x, pruned("['0.weight']"))
    assert_same(engine, x, tmp_path / "m.onnx")
    (weight,) = (t for t in onnx.load(tmp_path / "m.onnx").graph.initializer if t.name == "2.weight")
    torch.testing.assert_close(torch.tensor(numpy_helper.to_array(weight)), model[2].weight.detach())
    assert {name: type(module) for name, module in model.named_modules()} == kinds


class Mixed(nn.Module):
    """Learned queries attend to the input; the inputs to each other."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 3, 8))
        self.own = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.cross = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, 0.0, batch_first=batch_first), 1)
        self.head, self.batch_first = nn.Linear(8, 5), batch_first

    def forward(self, x: Tensor) -> Any:
        queries = self.queries.expand(x.shape[0], -1, -1)
        if not self.batch_first:
            x, queries = x.transpose(0, 1), queries.transpose(0, 1)
        x = self.own(x, x, x, need_weights=False)[0]
        y = self.cross(key=x, value=x + 1, query=queries, need_weights=False)[0]
        return self.head(self.decoder(y, x).mean(1 if self.batch_first else 0))


PARTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@pytest.mark.filterwarnings("ignore:quantize")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("pattern", ["", ", pattern: '2:4'"])
def test_projections_of_cross_attention_are_promised_in_parts(pattern: str, batch_first: bool, tmp_path: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 7, 8)
    line = f"magnitude_prune: {{start: 1st, sparsity: 0.5, targets: ['re:.*in_proj_weight']{pattern}}}"
    engine = trained(Mixed(batch_first), x, line, INT8)
    state = copy.deepcopy(engine.model.state_dict())
    certificate = assert_same(engine, x, tmp_path / "m.onnx")
    layer = "decoder.layers.0"
    mixed = [f"{name}.{part}" for name in ("cross", f"{layer}.multihead_attn") for part in PARTS]
    packed = ["own.in_proj_weight", f"{layer}.self_attn.in_proj_weight"]
    promised = {each.name: each for each in certificate.promise.layers if each.pruned}
    assert promised.keys() == {*mixed, *packed}
    assert sum(each.zeros for each in promised.values()) == 4 * 3 * 8 * 8 // 2
    facts = {each.name: each for each in certificate.layers}
    assert all(facts[name].shape == (8, 8) for name in mixed)
    if pattern:
        assert all(facts[name].broken_groups == 0 for name in promised)
    assert engine.model.state_dict().keys() == state.keys()


def test_cross_attention_exports_under_an_empty_recipe_without_a_word(tmp_path: Any, capfd: Any) -> None:
    model, x = Mixed(), torch.randn(64, 7, 8)
    engine = trained(model, x, pruned("['head.weight']"))
    assert_same(engine, x, tmp_path / "m.onnx")
    assert "Split" not in capfd.readouterr().err
