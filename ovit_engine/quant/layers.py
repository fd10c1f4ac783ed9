"""Linear and Conv2d in training form: the same layer, its operands rounded.

Conversion changes the class of the layer object itself, as `torch.nn.utils.parametrize` does. Parameters, their
names, hooks, optimizer groups, masks and every reference to the layer stay valid; only children are added.
"""

from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

from ovit_engine.quant.fake_quantizer import FakeQuantize
from ovit_engine.quant.scheme import CPU, Scheme

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


class QuantLinear(nn.Linear):
    """`nn.Linear` with quantized input and weight; the output is float, as MatMulIntegerToFloat gives it."""

    input_quantizer: FakeQuantize
    weight_quantizer: FakeQuantize

    @classmethod
    def from_float(cls, layer: nn.Linear, *, scheme: Scheme = CPU) -> Self:
        """Turn `layer` itself into its quantized form (disabled) and return it.

        Raises:
            TypeError: `layer` is not exactly `nn.Linear`: a subclass may compute something else in its forward.
        """
        _require_exactly(layer, nn.Linear)
        layer.__class__ = cls
        assert isinstance(layer, cls)
        layer.input_quantizer = scheme.activation_quantizer(layer.weight.device)
        layer.weight_quantizer = scheme.weight_quantizer(layer.weight)
        layer.train(layer.training)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)


class QuantConv2d(nn.Conv2d):
    """`nn.Conv2d` (grouped and depthwise too) with quantized input, weight and output.

    ONNX Runtime fuses a convolution only between quantized tensors. Where a batch-norm or ReLU follows, the output is
    rounded after it and `output_quantizer` is None here; `norm` then names the batch-norm that bake folds in.
    """

    input_quantizer: FakeQuantize
    weight_quantizer: FakeQuantize
    output_quantizer: FakeQuantize | None
    norm: str | None

    @classmethod
    def from_float(cls, layer: nn.Conv2d, *, scheme: Scheme = CPU, output: bool = True) -> Self:
        """Turn `layer` itself into its quantized form (disabled) and return it.

        Raises:
            TypeError: `layer` is not exactly `nn.Conv2d`: a subclass (`Conv2dSame`, `StdConv2d`) computes
                something else in its forward.
        """
        _require_exactly(layer, nn.Conv2d)
        layer.__class__ = cls
        assert isinstance(layer, cls)
        device = layer.weight.device
        layer.input_quantizer = scheme.activation_quantizer(device)
        layer.weight_quantizer = scheme.weight_quantizer(layer.weight)
        layer.output_quantizer = scheme.activation_quantizer(device) if output else None
        layer.norm = None
        layer.train(layer.training)
        return layer

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self._conv_forward(self.input_quantizer(input), self.weight_quantizer(self.weight), self.bias)
        if self.output_quantizer is not None:
            output = self.output_quantizer(output)
        return output


def quantize_output(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """Forward hook: rounds the output of a module that has an `output_quantizer` child (batch-norm, ReLU)."""
    rounded: Tensor = module.get_submodule("output_quantizer")(output)
    return rounded


def has_hooks(module: nn.Module) -> bool:
    """Return whether something of the user's runs with the forward of `module`: hooks, or a method put in its place."""
    hooks = [hook for hook in module._forward_hooks.values() if hook is not quantize_output]
    return bool(hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def keep_hooks(old: nn.Module, new: nn.Module) -> None:
    """Let `new`, which stands in for `old`, run the user's forward hooks too."""
    for name in _HOOKS:
        new.__dict__[name] = old.__dict__[name]


def copy_attributes(old: nn.Module, new: nn.Module) -> nn.Module:
    """Give `new`, which stands in for `old`, the attributes that the model's code may read; returns `new`."""
    own = {*nn.Module().__dict__, "output_quantizer", "norm", "forward", "train"}
    new.__dict__.update({name: value for name, value in vars(old).items() if name not in own})
    return new


def _require_exactly(layer: nn.Module, kind: type[nn.Module]) -> None:
    if type(layer) is not kind:
        raise TypeError(f"expected exactly {kind.__name__}, got {type(layer).__module__}.{type(layer).__qualname__}")
