"""Learning rates of all but the predictors, and the groups of parameters that they ask for."""

from typing import Any

import pytest
import torch

from ovit_engine import Engine, RecipeError
from ovit_engine.tokens import param_groups
from tests.loops import recipe
from tests.tokens.models import vit
from tests.tokens.selecting import prepared
from tests.tokens.training import train

SLOW = "dynamic_vit: {keep: 0.7, backbone_lr_scale: 0.25, freeze: 2st}"


def test_the_backbone_is_frozen_and_then_slow() -> None:
    model, engine, _ = prepared(SLOW)
    optimizer = torch.optim.AdamW(param_groups(model, weight_decay=0.05), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    engine.attach(optimizer)
    seen: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([group["lr"] for group in optimizer.param_groups]))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for step in range(4):
        train(engine, optimizer, 1)
        assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()  # as it left them
        scheduler.step()
        for name, parameter in model.named_parameters():
            moved = not torch.equal(parameter, start[name])
            assert moved == (step >= 2 or "token_predictor" in name), (step, name)
            assert parameter.requires_grad
    factors = [[rate * (1 + step) / 1e-2 for rate in rates] for step, rates in enumerate(seen)]
    for found, backbone in zip(factors, (0, 0, 0.25, 0.25), strict=True):
        assert found == pytest.approx([backbone, backbone, 1, 1])
    engine.detach()


def test_it_comes_after_whoever_writes_learning_rates() -> None:
    model = vit()
    both = recipe(SLOW, "cyclic_lr: {max: 0.1, min: 0.01, period: 4st, warmup: 1st}")
    engine = Engine(model, both, steps_per_epoch=4, epochs=1).prepare()
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
    engine.attach(optimizer)
    seen: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append([group["lr"] for group in optimizer.param_groups]))
    train(engine, optimizer, 4)
    assert [rates[0] / rates[-1] for rates in seen] == pytest.approx([0, 0, 0.25, 0.25])
    assert [rates[-1] for rates in seen] == pytest.approx([0.1, 0.0775, 0.055, 0.0325])


def test_a_rate_that_is_a_tensor_is_scaled_in_place() -> None:
    model, engine, _ = prepared(SLOW)
    rate = torch.tensor(1e-2)
    optimizer = torch.optim.AdamW(param_groups(model), lr=rate, capturable=False, foreach=False)
    engine.attach(optimizer)
    before = [group["lr"] for group in optimizer.param_groups]
    train(engine, optimizer, 1)
    after = [group["lr"] for group in optimizer.param_groups]
    assert all(a is b and float(a) == pytest.approx(1e-2) for a, b in zip(before, after, strict=True))


def test_a_step_that_raised_leaves_no_rate_behind() -> None:
    model, engine, _ = prepared("dynamic_vit: {keep: 0.7, backbone_lr_scale: 0.25}")
    optimizer = torch.optim.SGD(param_groups(model), lr=1e-2)
    engine.attach(optimizer)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        train(engine, optimizer, 1)
    handle.remove()
    seen: list[float] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
    train(engine, optimizer, 3)
    assert seen == [0.25e-2] * 3
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2] * 4


def test_an_exception_in_a_frozen_step_leaves_the_rates_as_they_were() -> None:
    model, engine, _ = prepared(SLOW)
    optimizer = torch.optim.SGD(param_groups(model), lr=1e-2)
    engine.attach(optimizer)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt), engine:
        train(engine, optimizer, 1)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2] * 4


def test_groups_that_mix_predictors_with_the_rest_are_refused() -> None:
    model, engine, _ = prepared(SLOW)
    with pytest.raises(RecipeError, match=r"r.yaml:2:\d+: dynamic_vit.freeze: a parameter group .* param_groups"):
        engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    model, engine, _ = prepared("dynamic_vit: {keep: 0.7, backbone_lr_scale: 0.5}")
    with pytest.raises(RecipeError, match=r"dynamic_vit.backbone_lr_scale: a parameter group"):
        engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    model, engine, _ = prepared()
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))  # one rate for all needs no groups


def test_groups_hold_every_parameter_once_and_decay_matrices_only() -> None:
    model, _, _ = prepared()
    groups = param_groups(model, weight_decay=0.1)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in groups:
        members = [names[id(parameter)] for parameter in group["params"]]
        assert len({"token_predictor" in name for name in members}) == 1
        for name in members:
            plain = name.endswith("bias") or "norm" in name or name in ("cls_token", "pos_embed") or ".local.0." in name
            assert (group["weight_decay"] == 0.0) == plain, name
