"""The selectors of the tests of learned scorers."""

from typing import Any

import torch
from torch import Tensor, nn

from ovit_engine import Engine
from ovit_engine.tokens.samplers import Sampler, TopTokens
from ovit_engine.tokens.selector import SelectorHooks
from tests.tokens import training

PLAIN = "dynamic_vit: {keep: 0.7}"


class Best(Sampler):
    """What inference does: the best tokens, no noise, and no gradient of having chosen them."""

    choices = 1

    def __call__(self, scores: Tensor, noise: Tensor, keep: int, before: Tensor | None) -> Tensor:
        return TopTokens(1.0)(scores, torch.zeros_like(noise), keep, before).detach()


def prepared(options: str = PLAIN, *, steps: int = 4, **model: Any) -> tuple[Any, Engine, SelectorHooks]:
    """A model under a recipe, its predictors drawn anew so that scores differ."""
    built, engine, hooks = training.prepared(options, steps=steps, drawn=True, **model)
    assert isinstance(hooks, SelectorHooks)
    return built, engine, hooks


def predictors(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if "token_predictor" in name}
