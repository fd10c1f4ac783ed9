"""Gradients taken in both ways, and models of which they are taken."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from ovit_engine import Calibration, Slot
from ovit_engine.gradients import backward as gradient_pass
from ovit_engine.masking.targets import find_slots
from ovit_engine.quant import prepare_quantization, set_enabled, set_observing

COUNT = 18


def images(*shape: int, count: int = 80, classes: int = 5) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(
        torch.randn(count, *shape, generator=generator), torch.randint(classes, (count,), generator=generator)
    )


def collect(model: nn.Module, slots: list[Slot], data: Any, loss: Any, **options: Any) -> list[Tensor]:
    """All gradients of each slot, [count, *shape]."""
    settings = {"count": COUNT, "images_per_gradient": 3, "chunk": 7, **options}
    chunks = [[part.clone() for part in chunk] for chunk in Calibration(data, loss).gradients(model, slots, **settings)]
    return [torch.cat(parts) for parts in zip(*chunks, strict=True)]


def way(caplog: pytest.LogCaptureFixture) -> str:
    """The line that says which way was taken."""
    return next(m for m in reversed(caplog.messages) if "a backward pass" in m)


def compare(
    model: nn.Module,
    targets: list[str],
    data: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    loss: Any = F.cross_entropy,
    **options: Any,
) -> str:
    """Assert that gradients equal those of one backward pass each to 1e-5; return which way they were taken."""
    torch.manual_seed(1)
    slots = find_slots(model, targets)
    caplog.set_level(logging.DEBUG, logger=gradient_pass.__name__)
    caplog.clear()
    found = collect(model, slots, data, loss, **options)
    chosen = way(caplog)
    with monkeypatch.context() as patch:
        patch.setattr(gradient_pass, "ACTIVATIONS", 0)
        expected = collect(model, slots, data, loss, **options)
        assert "one gradient a backward pass" in way(caplog)
    for slot, rows, singles in zip(slots, found, expected, strict=True):
        for row, single in zip(rows, singles, strict=True):
            largest = float(single.abs().max())
            assert largest > 0, slot.name
            assert float((row - single).abs().max()) <= 1e-5 * largest, slot.name
    return chosen


def vit(**options: Any) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=5,
        embed_dim=32,
        depth=2,
        num_heads=2,
        **options,
    )


def quantized(observed: bool) -> nn.Module:
    model = vit()
    prepare_quantization(model, ["blocks.0.mlp.fc1", "blocks.1.attn.qkv"])
    if observed:
        set_observing(model, True)
        model(torch.randn(8, 1, 8, 8))
        set_observing(model, False)
        set_enabled(model, True)
    return model


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(inplace=True), nn.Linear(16, 5))


BLOCKS = [r"re:.*(qkv|proj|fc1|fc2)\.weight"]
MATRICES = [r"re:.*weight"]


class Forward(nn.Module):
    """Two layers in a way that each test writes."""

    def __init__(self, forward: Callable[..., Tensor], width: int = 64) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 12), nn.Linear(12, 12)
        self.head = nn.Linear(12, 5)
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x.flatten(1))


class Doubled(torch.autograd.Function):
    """A linear layer with a gradient of its own making."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return dy @ weight, 2 * dy.T @ x
