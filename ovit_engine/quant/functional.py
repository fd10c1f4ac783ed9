"""Affine int8 arithmetic as pure functions of tensors, and as the two operators of an exported program.

One formula for training, evaluation and the exported file: `round_half_even(x / scale) + zero_point`, saturated, as
ONNX `QuantizeLinear` computes it. (`torch.fake_quantize_*` multiplies by 1/scale and rounds after adding the
zero point; it can differ by one level, and then the file differs from the model that was trained.)
Jacob et al., 2018, https://arxiv.org/abs/1712.05877.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class IntegerGrid:
    """The integers a tensor is rounded to."""

    # smallest and largest level, both used
    low: int
    high: int
    # symmetric grids have zero point 0 and a range of +-max(|x|)
    symmetric: bool
    dtype: torch.dtype


# of weights: without -128 a channel can change its sign (a folded batch-norm)
INT8_SYMMETRIC = IntegerGrid(low=-127, high=127, symmetric=True, dtype=torch.int8)

# of weights for AVX2 and AVX512 without VNNI, which add two uint8 x int8 products in 16 bits: 2 * 255 * 63 still fits
INT7_SYMMETRIC = IntegerGrid(low=-63, high=63, symmetric=True, dtype=torch.int8)

# of activations: saturates where ONNX QuantizeLinear does
INT8_ACTIVATION = IntegerGrid(low=-128, high=127, symmetric=True, dtype=torch.int8)

UINT8_AFFINE = IntegerGrid(low=0, high=255, symmetric=False, dtype=torch.uint8)


def choose_qparams(minimum: Tensor, maximum: Tensor, grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    """Scale (float32) and zero point (int32) that cover [minimum, maximum] and hold zero exactly.

    Element by element, so that one call serves per-tensor (0-d) and per-channel (1-d) ranges. A range that is empty
    (a channel of zeros) gets scale 1, never 0 or NaN.
    """
    low, high = minimum.float().clamp(max=0.0), maximum.float().clamp(min=0.0)
    width = torch.maximum(-low, high) / grid.high if grid.symmetric else (high - low) / (grid.high - grid.low)
    # the smallest normal float: below it x / scale overflows or is flushed on some devices
    scale = torch.where(width > 0, width.clamp(min=torch.finfo(torch.float32).tiny), torch.ones_like(width))
    if grid.symmetric:
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    zero_point = torch.round(grid.low - low / scale).clamp(grid.low, grid.high)
    return scale, zero_point.to(torch.int32)


def along(values: Tensor, like: Tensor, axis: int | None) -> Tensor:
    """`values` (0-d, or 1-d a channel) shaped to broadcast over `like` along `axis`."""
    if axis is None or values.dim() == 0:
        return values
    shape = [1] * like.dim()
    shape[axis] = -1
    return values.view(shape)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, grid: IntegerGrid, axis: int | None = None) -> Tensor:
    """Return the integer levels of `x`, same shape, dtype `grid.dtype`."""
    levels = torch.round(x.float() / along(scale, x, axis)) + along(zero_point, x, axis)
    return levels.clamp(grid.low, grid.high).to(grid.dtype)


def dequantize(levels: Tensor, scale: Tensor, zero_point: Tensor, axis: int | None = None) -> Tensor:
    """Return the float32 values that the integer `levels` stand for."""
    return (levels.float() - along(zero_point, levels, axis)) * along(scale, levels, axis)


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize; the gradient passes where the value was not saturated (straight-through estimator)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, scale: Tensor, zero_point: Tensor, active: Tensor, low: int, high: int
    ) -> tuple[Tensor, Tensor]:
        levels = torch.round(x / scale) + zero_point
        passes = (levels >= low) & (levels <= high) | ~active
        return torch.where(active, (levels.clamp(low, high) - zero_point) * scale, x), passes

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (passes,) = ctx.saved_tensors
        return gradients[0] * passes, None, None, None, None, None


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    grid: IntegerGrid,
    *,
    axis: int | None = None,
    active: Tensor | None = None,
) -> Tensor:
    """`dequantize(quantize(x))` with a straight-through gradient; float32 in and out.

    Where `active` (0-d bool tensor) is false `x` passes unchanged: a tensor and not a Python bool, so that a
    compiled graph does not compile again when quantization starts.
    """
    if active is None:
        active = torch.ones((), dtype=torch.bool, device=x.device)
    result: Tensor = _FakeQuantize.apply(
        x, along(scale, x, axis), along(zero_point, x, axis), active, grid.low, grid.high
    )[0]
    return result


@torch.library.custom_op("ovit_engine::quantize_linear", mutates_args=())
def quantize_linear(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Levels of `x` in the dtype of `zero_point` (int8 or uint8); one scale for the whole tensor."""
    limits = torch.iinfo(zero_point.dtype)
    return quantize(
        x, scale, zero_point, IntegerGrid(low=limits.min, high=limits.max, symmetric=False, dtype=zero_point.dtype)
    )


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=zero_point.dtype)


@torch.library.custom_op("ovit_engine::dequantize_linear", mutates_args=())
def dequantize_linear(levels: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    """float32 values of `levels`; a 1-d `scale` runs along `axis`, a 0-d one covers the tensor."""
    return dequantize(levels, scale, zero_point, axis)


@dequantize_linear.register_fake
def _(levels: Tensor, scale: Tensor, zero_point: Tensor, axis: int) -> Tensor:
    return torch.empty_like(levels, dtype=torch.float32)


# what stands in an exported program, for the exporter's table of translations
QUANTIZE_OVERLOAD = torch.ops.ovit_engine.quantize_linear.default

DEQUANTIZE_OVERLOAD = torch.ops.ovit_engine.dequantize_linear.default
