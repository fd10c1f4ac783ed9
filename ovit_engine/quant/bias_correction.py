"""Bias correction: rounding shifts the mean of a layer's outputs, and the bias can take the shift back.

Nagel et al., 2019, §4.2, https://arxiv.org/abs/1906.04721; here with the shift measured on images, each layer for the
input that it really gets in the quantized model.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovit_engine.quant.layers import QuantConv2d, QuantLinear
from ovit_engine.quant.prepare import rounding_layers, run_watched


def mean_shift(rounded: Tensor, exact: Tensor, channel_axis: int) -> Tensor:
    """Return the mean of `rounded - exact` for each channel, float64 [channels]."""
    difference = (rounded.double() - exact.double()).transpose(0, channel_axis).flatten(1)
    return difference.mean(dim=1)


@torch.no_grad()
def correct_biases(model: nn.Module, batches: Iterable[tuple[Any, ...]]) -> int:
    """Take the mean shift of every rounding layer out of its bias, in place; returns how many layers there are.

    A layer without a bias gets one; a convolution before a batch-norm that is folded hands the shift to its mean.
    Batches weigh by the number of their outputs.
    """
    model.eval()
    layers = rounding_layers(model)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    handles = [layer.register_forward_hook(partial(_add_shift, name, sums, counts)) for name, layer in layers.items()]
    run_watched(model, batches, handles)
    for name, layer in layers.items():
        if name in sums:
            _take_back(model, layer, sums[name] / counts[name])
    return len(sums)


def _add_shift(
    name: str,
    sums: dict[str, Tensor],
    counts: dict[str, int],
    layer: nn.Module,
    inputs: tuple[Tensor, ...],
    out: Tensor,
) -> None:
    x = inputs[0]
    if isinstance(layer, QuantLinear):
        shift, values = mean_shift(out, F.linear(x, layer.weight, layer.bias), out.dim() - 1), out.numel()
    else:
        assert isinstance(layer, QuantConv2d)
        # before the output is rounded: what saturates there is no shift that a bias could mend
        rounded = layer._conv_forward(layer.input_quantizer(x), layer.weight_quantizer(layer.weight), layer.bias)
        shift, values = (
            mean_shift(rounded, layer._conv_forward(x, layer.weight, layer.bias), rounded.dim() - 3),
            out.numel(),
        )
    sums[name] = sums.get(name, torch.zeros_like(shift)) + shift * values
    counts[name] = counts.get(name, 0) + values


def _take_back(model: nn.Module, layer: QuantLinear | QuantConv2d, shift: Tensor) -> None:
    norm = layer.norm if isinstance(layer, QuantConv2d) else None
    if norm is not None:
        mean = model.get_submodule(norm).running_mean
        assert isinstance(mean, Tensor)
        mean.add_(shift.to(mean.dtype))
    elif layer.bias is None:
        layer.bias = nn.Parameter(-shift.to(layer.weight.dtype))
    else:
        layer.bias.sub_(shift.to(layer.bias.dtype))
