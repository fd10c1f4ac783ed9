"""ONNX ``QuantizeLinear`` and ``DequantizeLinear`` as PyTorch operators.

Real operators and not ``torch.onnx.ops.symbolic``: a baked model runs in eager mode too, and the exporter, which does
not know what they compute, cannot fold int8 weights back to float. ``export`` gives it the translation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ovit_engine.quant.functional import along


@torch.library.custom_op("ovit_engine::quantize_linear", mutates_args=())
def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Levels of ``x`` in the dtype of ``zero_point`` (int8 or uint8); one scale for the whole tensor."""
    limits = torch.iinfo(zero_point.dtype)
    levels = torch.round(x / scale) + zero_point.float()
    return levels.clamp(limits.min, limits.max).to(zero_point.dtype)


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("ovit_engine::dequantize_linear", mutates_args=())
def dequantize_linear(levels: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """float32 values of ``levels``; a 1-d ``scale`` runs along ``axis``, a 0-d one covers the tensor."""
    return (levels.float() - along(zero_point, levels, axis).float()) * along(scale, levels, axis)


@dequantize_linear.register_fake
def _(levels: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(levels, dtype=torch.float32)


# what stands in an exported program, for the exporter's table of translations
QUANTIZE_OVERLOAD = torch.ops.ovit_engine.quantize_linear.default
DEQUANTIZE_OVERLOAD = torch.ops.ovit_engine.dequantize_linear.default
