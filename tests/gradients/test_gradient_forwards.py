"""Which forwards are followed with many gradients in one pass, and all that must be refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.gradients.gradient_ways import MATRICES, Doubled, Forward, compare, images


def twice(m: Forward, x: Tensor) -> Tensor:
    return m.head(m.second(m.second(m.first(x)).tanh()).tanh())


def linear_function(m: Forward, x: Tensor) -> Tensor:
    return m.head(F.linear(m.first(x), m.second.weight).tanh())


def padded(m: Forward, x: Tensor) -> Tensor:
    x = F.conv2d(x.view(-1, 1, 8, 8), m.first.weight.view(12, 1, 8, 8), padding="same")  # not the parameter itself
    return m.head(m.second(x.flatten(2).mean(2)))


@pytest.mark.parametrize("forward", [twice, linear_function])
def test_what_can_be_followed_is(
    forward: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    assert compare(Forward(forward), MATRICES, images(8, 8), caplog, monkeypatch).startswith("up to")


def test_tied_weights_are_followed(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Forward(lambda m, x: m.head(m.second(m.third(m.first(x)).tanh())))
    model.third = nn.Linear(12, 12)
    model.third.weight = model.second.weight
    assert compare(model, MATRICES, images(8, 8), caplog, monkeypatch).startswith("up to")


def custom(m: Forward, x: Tensor) -> Tensor:
    return m.head(Doubled.apply(m.first(x), m.second.weight))


def custom_besides(m: Forward, x: Tensor) -> Tensor:
    return m.head(Doubled.apply(m.second(m.first(x)), m.second.weight))


def product(m: Forward, x: Tensor) -> Tensor:
    return m.head(m.first(x) @ m.second.weight)


def penalised(m: Forward, x: Tensor) -> Tensor:
    return m.head(m.second(m.first(x))) + m.second.weight.square().sum() * torch.arange(5)


def standardised(m: Forward, x: Tensor) -> Tensor:
    weight = m.second.weight
    return m.head(F.linear(m.first(x), weight / weight.std()) + m.second(x[:, :12]))


def normed_over_images(m: Forward, x: Tensor) -> Tensor:
    x = m.first(x).view(-1, 3, 4)
    return m.head(m.second(F.batch_norm(x, None, None, training=True).flatten(1)))


def centred(m: Forward, x: Tensor) -> Tensor:
    x = m.first(x)
    return m.head(m.second((x - x.mean(0)).relu()))


def recurrent_over_images(m: Forward, x: Tensor) -> Tensor:
    """The well-known slip: time first and images first are mixed up, so each image sees those before it."""
    return m.head(m.second(m.first(x).cumsum(0).tanh()))


def images_second(m: Forward, x: Tensor) -> Tensor:
    x = x.view(-1, 4, 16).transpose(0, 1)  # [4, images, 16]
    return m.head(m.second(F.linear(x, m.first.weight[:, :16].contiguous())).tanh().mean(0))


def images_second_direct(m: Forward, x: Tensor) -> Tensor:
    x = m.first(x)[:, None].repeat(1, 4, 1).mul(torch.arange(4)[:, None]).transpose(0, 1)
    return m.head(m.second(x).tanh().mean(0))


def shuffled(m: Forward, x: Tensor) -> Tensor:
    return m.head(m.second(m.first(x).flip(0).tanh()).flip(0))


def noisy(m: Forward, x: Tensor) -> Tensor:
    x = m.first(x)
    return m.head(m.second(x + torch.rand_like(x)))


def three_images_only(m: Forward, x: Tensor) -> Tensor:
    return m.head(m.second(m.first(x).view(3, 12)))


def first_left_out(m: Forward, x: Tensor) -> Tensor:
    x = m.first(x)
    return m.head(torch.cat([x[:1], m.second(x[1:])]))


def checkpointed(m: Forward, x: Tensor) -> Tensor:
    return m.head(torch.utils.checkpoint.checkpoint(m.second, m.first(x), use_reentrant=False))  # type: ignore[no-any-return]


def scalar_besides(m: Forward, x: Tensor) -> Any:
    y = m.head(m.second(m.first(x)))
    return y, y.square().mean()


def pair_loss(outputs: Any, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], targets) + outputs[1]


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "custom autograd function": (custom, "no other way"),
    "custom autograd function besides": (custom_besides, "second.weight would be"),
    "matrix product": (product, "no other way"),
    "penalty": (penalised, "second.weight would be"),
    "standardised weight besides": (standardised, "second.weight would be"),
    "batch-norm over images": (normed_over_images, "would be"),
    "mean over images": (centred, "would be"),
    "recurrence over images": (recurrent_over_images, "would be"),
    "images in the second dimension": (images_second_direct, "second.weight would be"),
    "part of a weight, images second": (images_second, "no other way"),
    "images in another order": (shuffled, "second.weight would be"),
    "noise": (noisy, "would be"),
    "a number of images written in": (three_images_only, "does not take one image"),
    "a layer that leaves out the first image": (first_left_out, "no other way"),
    "a view of a weight": (padded, "no other way"),
    "a number besides the outputs": (scalar_besides, "no other way"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_all_else_is_taken_one_by_one(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    forward, words = REFUSED[name]
    loss = pair_loss if forward is scalar_besides else F.cross_entropy
    chosen = compare(Forward(forward), MATRICES, images(8, 8), caplog, monkeypatch, loss)
    assert chosen.startswith("one gradient a backward pass")
    assert words in chosen


def test_checkpointing_is_followed(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    assert compare(Forward(checkpointed), MATRICES, images(8, 8), caplog, monkeypatch).startswith("up to")
