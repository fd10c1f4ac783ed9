"""Weights whose zeros or patterns could not be checked in the file are refused by name at PREPARE."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from ovit_engine import Engine, Recipe
from ovit_engine.core.errors import RecipeError


class Conv1D(nn.Module):
    """Stores its weight as [in, out], as GPT-2's layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def halved(layer: nn.Module) -> nn.Module:
    return parametrize.register_parametrization(layer, "weight", Halved())


def prepare(layer: nn.Module, target: str, pattern: str) -> None:
    recipe = f"modifiers: [{{magnitude_prune: {{sparsity: 0.5, targets: ['{target}'], pattern: {pattern}}}}}]"
    Engine(nn.Sequential(layer), Recipe.parse(recipe), steps_per_epoch=2, epochs=1).prepare()


FREE = "unstructured"


@pytest.mark.parametrize(
    ("layer", "target", "pattern", "words"),
    [
        (nn.GRU(4, 4), "0.weight_ih_l0", FREE, "the file packs weights of nn.GRU"),
        (nn.LSTM(4, 4), "0.weight_hh_l0", FREE, "the file packs weights of nn.LSTM"),
        (nn.RNN(4, 4), "0.weight_hh_l0", FREE, "the file packs weights of nn.RNN"),
        (nn.Bilinear(4, 4, 4), "0.weight", FREE, "the file rearranges the weight of nn.Bilinear"),
        (halved(nn.Linear(4, 4)), "0.parametrizations.weight.original", FREE, "computed from it by Halved"),
        (
            parametrizations.weight_norm(nn.Linear(4, 4)),
            "0.parametrizations.weight.original0",
            FREE,
            "computed from it by WeightNorm",
        ),
        (Conv1D(), "0.weight", "'2:4'", "belongs to Conv1D, which may store it as"),
        (Conv1D(), "0.weight", "{block: [1, 4]}", "belongs to Conv1D, which may store it as"),
        (nn.ParameterList([nn.Parameter(torch.randn(8, 8))]), "0.0", "'2:4'", "belongs to ParameterList"),
    ],
)
def test_refused_at_prepare(layer: nn.Module, target: str, pattern: str, words: str) -> None:
    with pytest.raises(RecipeError, match=f"'{target}'.*{words}"):
        prepare(layer, target, pattern)


@pytest.mark.parametrize(
    ("layer", "target", "pattern"),
    [
        (Conv1D(), "0.weight", FREE),
        (nn.LSTMCell(4, 4), "0.weight_ih", "'2:4'"),
        (nn.MultiheadAttention(8, 2), "0.in_proj_weight", "'2:4'"),
        (parametrizations.weight_norm(nn.Linear(4, 4)), "0.parametrizations.weight.original1", "'2:4'"),
    ],
)
def test_accepted(layer: Any, target: str, pattern: str) -> None:
    prepare(layer, target, pattern)
