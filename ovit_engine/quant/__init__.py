"""Int8 in training and after it: fake quantizers, quantized layers, their deployed form. Imports torch only."""

from ovit_engine.quant.attention import QuantAttention, attention_modules
from ovit_engine.quant.bake import BakedConv2d, BakedLinear, QuantizeDequantize, bake
from ovit_engine.quant.batch_norm import freeze_batch_norm, unfreeze_batch_norm
from ovit_engine.quant.bias_correction import correct_biases
from ovit_engine.quant.calibrate import calibrate, disable_unobserved
from ovit_engine.quant.fake_quantizer import FakeQuantize
from ovit_engine.quant.functional import (
    INT7_SYMMETRIC,
    INT8_ACTIVATION,
    INT8_SYMMETRIC,
    UINT8_AFFINE,
    IntegerGrid,
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
)
from ovit_engine.quant.layers import QuantConv2d, QuantLinear
from ovit_engine.quant.observers import (
    CurrentLeastError,
    CurrentMinMax,
    LeastError,
    MinMax,
    MovingAverageMinMax,
    Observer,
    Percentile,
)
from ovit_engine.quant.prepare import (
    Prepared,
    dense_state_dict,
    prepare_quantization,
    quantizers,
    set_enabled,
    set_observing,
    unquantized,
    unrounded_outputs,
)
from ovit_engine.quant.range_search import extremes, least_error_range, percentile_range
from ovit_engine.quant.ranges import share_ranges
from ovit_engine.quant.scheme import CPU, GPU, Scheme
from ovit_engine.quant.sensitivity import layer_sensitivity
from ovit_engine.quant.smoothing import Smoothed, smooth

__all__ = [
    "CPU",
    "GPU",
    "INT7_SYMMETRIC",
    "INT8_ACTIVATION",
    "INT8_SYMMETRIC",
    "UINT8_AFFINE",
    "BakedConv2d",
    "BakedLinear",
    "CurrentLeastError",
    "CurrentMinMax",
    "FakeQuantize",
    "IntegerGrid",
    "LeastError",
    "MinMax",
    "MovingAverageMinMax",
    "Observer",
    "Percentile",
    "Prepared",
    "QuantAttention",
    "QuantConv2d",
    "QuantLinear",
    "QuantizeDequantize",
    "Scheme",
    "Smoothed",
    "attention_modules",
    "bake",
    "calibrate",
    "choose_qparams",
    "correct_biases",
    "dense_state_dict",
    "dequantize",
    "disable_unobserved",
    "extremes",
    "fake_quantize",
    "freeze_batch_norm",
    "layer_sensitivity",
    "least_error_range",
    "percentile_range",
    "prepare_quantization",
    "quantize",
    "quantizers",
    "set_enabled",
    "set_observing",
    "share_ranges",
    "smooth",
    "unfreeze_batch_norm",
    "unquantized",
    "unrounded_outputs",
]
