"""Post-training static quantization: ranges from some batches, no training."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ovit_engine.quant.attention import OPERANDS, QuantAttention
from ovit_engine.quant.fake_quantizer import FakeQuantize
from ovit_engine.quant.layers import QuantConv2d, QuantLinear
from ovit_engine.quant.observers import Averaged
from ovit_engine.quant.prepare import quantizers, set_enabled


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> tuple[str, ...]:
    """Take every range of a prepared model from `batches`, then freeze it and start rounding.

    The model is in eval mode and computes in float meanwhile. Averages over batches weigh each batch the same.

    Args:
        batches: positional arguments of the model, one tuple a batch.

    Returns:
        names of layers that no batch came to: they stay float.

    Raises:
        ValueError: no batches, or one with NaN or infinity.
    """
    model.eval()
    set_enabled(model, False)
    for layer in model.modules():
        if isinstance(layer, (QuantLinear, QuantConv2d)):
            watch_weight(layer)
    activations = [quantizer for _, quantizer in quantizers(model) if quantizer.observer.only_in_training]
    count = 0
    with _watching(activations):
        for batch in batches:
            count += 1
            _check_finite(batch, count)
            for quantizer in activations:
                if isinstance(quantizer.observer, Averaged):
                    quantizer.observer = replace(quantizer.observer, momentum=1.0 / count)
            model(*batch)
    if not count:
        raise ValueError("no batches to take ranges from")
    set_enabled(model, True)
    return disable_unobserved(model)


def _check_finite(batch: tuple[Any, ...], number: int) -> None:
    for part in batch:
        if isinstance(part, torch.Tensor) and part.is_floating_point() and not torch.isfinite(part).all():
            bad = [row for row in range(len(part)) if not torch.isfinite(part[row]).all()]
            raise ValueError(f"calibration batch {number} holds NaN or infinity, first in its item {bad[0]}")


def watch_weight(layer: QuantLinear | QuantConv2d) -> None:
    """Take the range of a layer's weight as it is now, and hold it."""
    layer.weight_quantizer.observing.fill_(True)
    layer.weight_quantizer.observe(layer.weight)
    layer.weight_quantizer.observing.fill_(False)


def disable_unobserved(model: nn.Module) -> tuple[str, ...]:
    """Let layers stay float whose input was never seen; returns their names."""
    unseen = []
    for name, module in model.named_modules():
        if isinstance(module, (QuantLinear, QuantConv2d)):
            seen = bool(module.input_quantizer.observed)
        elif isinstance(module, QuantAttention):
            seen = all(bool(module.get_submodule(operand).observed) for operand in OPERANDS)
        else:
            continue
        if not seen:
            set_enabled(module, False)
            unseen.append(name)
    for _, quantizer in quantizers(model):
        if not quantizer.observed:  # of an output, behind a layer that was not called
            quantizer.enabled.fill_(False)
    return tuple(unseen)


@contextmanager
def _watching(activations: list[FakeQuantize]) -> Iterator[None]:
    """Observe, in eval mode too; each observer is as it was afterwards."""
    observers = [quantizer.observer for quantizer in activations]
    for quantizer in activations:
        quantizer.train()
        quantizer.observing.fill_(True)
        quantizer.observed.fill_(False)
    try:
        yield
    finally:
        for quantizer, observer in zip(activations, observers, strict=True):
            quantizer.eval()
            quantizer.observing.fill_(False)
            quantizer.observer = observer
