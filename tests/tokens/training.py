"""Tiny models whose tokens a recipe reduces, and the loop that trains them."""

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ovit_engine import Engine
from ovit_engine.tokens import hooks_of
from tests.loops import recipe
from tests.tokens.models import IMAGES, randomised, vit

LABELS = torch.arange(len(IMAGES)) % 5


def prepared(*lines: str, steps: int = 8, drawn: bool = False, **model: Any) -> tuple[Any, Engine, Any]:
    """A model under a recipe, the engine, and what reduces tokens; `drawn`: scorers drawn anew, so that scores differ.

    Where they are drawn, all weights are: those of `vit(seed=1)`.
    """
    built = vit(**model)
    engine = Engine(built, recipe(*lines), steps_per_epoch=steps, epochs=1).prepare()
    if drawn:
        randomised(built, seed=1)
    hooks = hooks_of(built)
    assert hooks is not None
    return built, engine, hooks


def loss_of(engine: Engine, images: Tensor = IMAGES, network: Any = None) -> Tensor:
    """The loss of a forward pass in training, terms and all."""
    network = engine.model if network is None else network
    return engine.loss(cross_entropy(network(images), LABELS[: len(images)]))


def train(engine: Engine, optimizer: torch.optim.Optimizer, steps: int, network: Any = None) -> list[float]:
    """Losses of so many steps; `network` is what the loop calls, where it is not the model itself."""
    engine.model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(engine, network=network)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def attached(*lines: str, rate: float = 1e-3, momentum: float = 0.0, **options: Any) -> tuple[Any, Engine, Any]:
    """A model under a recipe, its engine attached, and the optimizer."""
    model, engine, _ = prepared(*lines, **options)
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=momentum)
    engine.attach(optimizer)
    return model, engine, optimizer


def trained(*lines: str, steps: int, cut: int | None = None, **options: Any) -> dict[str, Tensor]:
    """Weights after a training that was stopped after `cut` steps, saved, and gone on with in another model."""
    model, engine, optimizer = attached(*lines, steps=steps, rate=0.05, momentum=0.9, **options)
    if cut is not None:
        train(engine, optimizer, cut)
        states = [copy.deepcopy(part.state_dict()) for part in (model, optimizer, engine)]
        model, engine, _ = prepared(*lines, steps=steps, seed=9, **options)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for part, state in zip((model, optimizer, engine), states, strict=True):
            part.load_state_dict(state)
        engine.attach(optimizer)
    train(engine, optimizer, steps - (cut or 0))
    engine.detach()
    found: dict[str, Tensor] = model.state_dict()
    return found


def widths(model: Any, images: Tensor = IMAGES) -> list[int]:
    """Tokens that come into the attention and into the MLP of each block, prefix and all."""
    seen: list[int] = []
    handles = [
        norm.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
        for block in model.blocks
        for norm in (block.norm1, block.norm2)
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return seen


def coming(model: Any) -> list[Tensor]:
    """Where the patch tokens lie that a forward comes with into the first block, and into the last norm.

    Of one more prefix token than the class token; LayerScale is zero, so that blocks add nothing.
    """
    for block in model.blocks:
        block.ls1.gamma.data.fill_(0.0)
        block.ls2.gamma.data.fill_(0.0)
    seen: list[Tensor] = []
    for module in (model.blocks[0], model.norm):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 2:].detach()))
    return seen
