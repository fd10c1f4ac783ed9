"""What a model is rounded to: grids and observers of weights, activations and second operands."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ovit_engine.quant.fake_quantizer import FakeQuantize
from ovit_engine.quant.functional import INT8_ACTIVATION, INT8_SYMMETRIC, UINT8_AFFINE, IntegerGrid
from ovit_engine.quant.observers import (
    CurrentLeastError,
    CurrentMinMax,
    LeastError,
    MinMax,
    MovingAverageMinMax,
    Observer,
    Percentile,
)

WeightObserver = Literal["min_max", "mse"]
ActivationObserver = Literal["min_max", "moving_average", "percentile", "mse"]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the tensors of a model are rounded. `CPU` and `GPU` are what the two kinds of kernels take."""

    # one scale an output channel, or one for the whole weight
    per_channel: bool = True
    weights: IntegerGrid = INT8_SYMMETRIC
    weight_observer: WeightObserver = "min_max"
    activations: IntegerGrid = UINT8_AFFINE
    activation_observer: ActivationObserver = "moving_average"
    percentile: float = 99.99
    # weight of the newest batch in a moving average
    momentum: float = 0.05

    def weight_quantizer(self, weight: Tensor) -> FakeQuantize:
        """Of a parameter [out, ...]; always symmetric, so that zeros stay zero."""
        observer = CurrentMinMax() if self.weight_observer == "min_max" else CurrentLeastError(self.weights)
        channels = {"axis": 0, "channels": weight.shape[0]} if self.per_channel else {}
        return FakeQuantize(self.weights, observer, device=weight.device, **channels)

    def activation_quantizer(self, device: torch.device | None = None) -> FakeQuantize:
        """Of a layer's input or output: one scale; zero is held exactly (padding and ReLU need it)."""
        return FakeQuantize(self.activations, self._observer(self.activations), device=device)

    def operand_quantizer(self, device: torch.device | None = None) -> FakeQuantize:
        """Of an activation in the place of a weight (keys and values): int8, symmetric, as kernels take weights."""
        return FakeQuantize(INT8_ACTIVATION, self._observer(INT8_ACTIVATION), device=device)

    def _observer(self, grid: IntegerGrid) -> Observer:
        known: dict[ActivationObserver, Observer] = {
            "min_max": MinMax(),
            "moving_average": MovingAverageMinMax(self.momentum),
            "percentile": Percentile(self.momentum, self.percentile),
            "mse": LeastError(self.momentum, grid),
        }
        return known[self.activation_observer]


# int8 weights x uint8 activations: x86 with VNNI, ONNX Runtime
CPU = Scheme()
# int8 x int8, zero points 0: TensorRT
GPU = replace(CPU, activations=INT8_ACTIVATION)
