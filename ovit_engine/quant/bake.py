"""From training form to deployed form: int8 weights, explicit quantize/dequantize, batch-norm folded."""

import torch
from torch import Tensor, nn

from ovit_engine.quant.attention import OPERANDS, QuantAttention
from ovit_engine.quant.batch_norm import fold_factors, has_activation
from ovit_engine.quant.fake_quantizer import FakeQuantize
from ovit_engine.quant.functional import dequantize_linear, quantize, quantize_linear
from ovit_engine.quant.layers import QuantConv2d, QuantLinear, copy_attributes, has_hooks, keep_hooks, quantize_output
from ovit_engine.quant.prepare import quantizers

_MAX_BIAS = 2**30  # half of int32: sums are added to the bias


class QuantizeDequantize(nn.Module):
    """A frozen activation quantizer: the Q/DQ pair of the file."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: FakeQuantize) -> None:
        super().__init__()
        self.register_buffer("scale", quantizer.scale.detach().float().clone())
        self.register_buffer("zero_point", quantizer.zero_point.detach().to(quantizer.grid.dtype))

    def forward(self, x: Tensor) -> Tensor:
        levels = quantize_linear(x, self.scale, self.zero_point)
        values: Tensor = dequantize_linear(levels, self.scale, self.zero_point, 0)
        return values


class _BakedLayer(nn.Module):
    """Int8 levels and scales of a weight, as buffers; the bias stays float.

    It has the type and the attributes of the layer that it replaces, since the model's code may read them.
    """

    axis: int  # of the output channels, in `levels`
    weight_scale: Tensor
    weight_zero_point: Tensor
    bias: Tensor | None

    def __init__(self, layer: QuantLinear | QuantConv2d) -> None:
        nn.Module.__init__(self)
        copy_attributes(layer, self)
        self.input = QuantizeDequantize(layer.input_quantizer)
        quantizer, weight = layer.weight_quantizer, layer.weight.detach()
        quantizer.observe(weight)  # a live range belongs to the weight of this moment; a frozen one stays
        zero_point = quantizer.zero_point
        levels = quantize(weight, quantizer.scale, zero_point, quantizer.grid, quantizer.axis)
        self._buffers["weight"] = levels  # not registered: that refuses the name of a property
        self.register_buffer("weight_scale", quantizer.scale.detach().float().clone())
        self.register_buffer("weight_zero_point", torch.zeros_like(zero_point, dtype=quantizer.grid.dtype))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach().float().clone())
        keep_hooks(layer, self)

    @property
    def levels(self) -> Tensor:
        """The int8 weight as the file holds it, under its old name."""
        levels = self._buffers["weight"]
        assert levels is not None
        return levels

    @levels.setter
    def levels(self, levels: Tensor) -> None:
        self._buffers["weight"] = levels

    @property
    def weight(self) -> Tensor:
        """The weight in float: models ask a layer for its type, and Hugging Face's ViT casts images to it."""
        values: Tensor = dequantize_linear(self.levels, self.weight_scale, self.weight_zero_point, self.axis)
        return values


class BakedLinear(_BakedLayer, nn.Linear):  # type: ignore[misc]
    """The weight is stored as ONNX MatMul reads it, [in, out]: no transpose in the graph, one kernel a layer."""

    axis = 1

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__(layer)
        self.levels = self.levels.t().contiguous()

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return super().weight.t()

    def forward(self, x: Tensor) -> Tensor:
        weight = super().weight
        # ONNX Runtime makes MatMul + bias of rank 2 a Gemm, which it runs in float when the bias is float
        flat = x.dim() < 3
        y: Tensor = self.input(x.unsqueeze(0) if flat else x) @ weight
        y = y if self.bias is None else y + self.bias
        return y.squeeze(0) if flat else y


class BakedConv2d(_BakedLayer, nn.Conv2d):  # type: ignore[override]
    """Int8 convolution between explicit Q/DQ pairs."""

    axis = 0

    def __init__(self, layer: QuantConv2d) -> None:
        super().__init__(layer)
        self.output: nn.Module = nn.Identity()
        if layer.output_quantizer is not None:
            self.output = QuantizeDequantize(layer.output_quantizer)

    def fold(self, norm: nn.Module) -> None:
        """Take over a batch-norm: exact, because every output channel has a scale of its own (from here on at least).

        A negative factor flips the levels' sign ([-127, 127] is symmetric), a factor of zero makes a channel of zeros.
        """
        factor, bias = fold_factors(norm, self.bias)
        sign = torch.sign(factor).to(self.levels.dtype)
        self.levels = self.levels * sign.view(-1, 1, 1, 1)
        scale = (self.weight_scale.double() * factor.abs()).float()
        self.weight_scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        self.weight_zero_point = torch.zeros_like(scale, dtype=self.levels.dtype)
        self.bias = bias.float()

    def fit_bias(self) -> None:
        """Raise the weight's scale where ONNX Runtime's int32 bias, in units of input times weight, would overflow.

        What the weights of such a channel lose is less than a millionth of its bias.
        """
        if self.bias is None:
            return
        least = self.bias.double().abs() / (self.input.scale.double() * _MAX_BIAS)
        least = least if self.weight_scale.dim() else least.max()
        scale = torch.maximum(self.weight_scale, least.float())
        ratio = (self.weight_scale.double() / scale.double()).view(-1, 1, 1, 1)
        self.levels = torch.round(self.levels.double() * ratio).to(self.levels.dtype)
        self.weight_scale = scale

    def forward(self, x: Tensor) -> Tensor:
        rounded: Tensor = self.output(self._conv_forward(self.input(x), self.weight, self.bias))
        return rounded


def bake(model: nn.Module) -> nn.Module:
    """Turn a prepared model into its deployed form, in place: call it on a copy. Returns the model.

    The result computes in eval mode what the fake-quantized model computes, runs in eager mode, and exports to int8
    initializers. Layers whose quantizers were never enabled become plain float layers again.

    Raises:
        ValueError: an enabled quantizer that has seen no data, or a layer that is quantized by half.
    """
    model.eval()
    _check_ready(model)
    norms: dict[str, nn.Module] = {}
    for layer in list(model.modules()):
        if isinstance(layer, (QuantLinear, QuantConv2d)) and not layer.weight_quantizer.enabled:
            _make_float(layer)
        elif isinstance(layer, QuantLinear):
            _become(layer, BakedLinear(layer))
        elif isinstance(layer, QuantConv2d):
            # quantized inside a wrapper (DataParallel) that is gone: names were its own
            norm = None if layer.norm is None else layer.norm.removeprefix("module.")
            _become(layer, BakedConv2d(layer))
            if norm is not None and not has_hooks(layer) and not has_hooks(model.get_submodule(norm)):
                norms[norm] = layer
        elif isinstance(layer, QuantAttention):
            _bake_attention(layer)
    # deepest first: a quantizer inside a batch-norm (in timm's `drop`) is baked before the batch-norm goes
    for name, module in reversed(list(model.named_modules())):
        _bake_follower(module, norms.get(name))
    for module in model.modules():
        if isinstance(module, BakedConv2d):
            module.fit_bias()
    return model


def _bake_follower(module: nn.Module, conv: nn.Module | None) -> None:
    """Bake what follows a convolution: fold the batch-norm if `conv` owns it, make its quantizer explicit."""
    stages: list[nn.Module] | None = None
    if conv is not None:
        assert isinstance(conv, BakedConv2d)
        conv.fold(module)
        stages = [module.get_submodule("drop"), module.get_submodule("act")] if has_activation(module) else []
    quantizer = module._modules.pop("output_quantizer", None)
    if quantizer is not None:
        assert isinstance(quantizer, FakeQuantize)
        for key in [key for key, hook in module._forward_hooks.items() if hook is quantize_output]:
            del module._forward_hooks[key]
        if quantizer.enabled:
            stages = [_moved(module)] if stages is None else stages
            stages.append(QuantizeDequantize(quantizer))
    if stages is not None:
        _become(module, copy_attributes(module, nn.Sequential(*stages)))


def _bake_attention(layer: QuantAttention) -> None:
    """Make the quantizers of the products explicit, or undo `from_float` where they were never enabled."""
    found = {name: layer.get_submodule(name) for name in OPERANDS}
    if not all(isinstance(child, FakeQuantize) and child.enabled for child in found.values()):
        layer.to_float()
        return
    for name, child in found.items():
        assert isinstance(child, FakeQuantize)
        layer._modules[name] = QuantizeDequantize(child)


def _check_ready(model: nn.Module) -> None:
    unseen = [name for name, quantizer in quantizers(model) if quantizer.enabled and not quantizer.observed]
    if unseen:
        raise ValueError(f"quantizers that never saw data, train with them observing first: {', '.join(unseen)}")
    for name, layer in model.named_modules():
        if isinstance(layer, (QuantLinear, QuantConv2d, QuantAttention)):
            states = {
                child: bool(quantizer.enabled)
                for child, quantizer in layer.named_children()
                if isinstance(quantizer, FakeQuantize)
            }
            if len(set(states.values())) > 1:
                raise ValueError(f"{name} is quantized by half: enabled = {states}")


def _make_float(layer: QuantLinear | QuantConv2d) -> None:
    """Undo `from_float`."""
    for child in [child for child, module in layer.named_children() if isinstance(module, FakeQuantize)]:
        delattr(layer, child)
    if isinstance(layer, QuantConv2d):
        layer.__dict__.pop("output_quantizer", None)
        layer.__dict__.pop("norm")
        layer.__class__ = nn.Conv2d  # type: ignore[assignment]
    else:
        layer.__class__ = nn.Linear  # type: ignore[assignment]


def _moved(module: nn.Module) -> nn.Module:
    """Return a new object that is all that `module` was, which may then become another."""
    copied = module.__class__.__new__(module.__class__)
    copied.__dict__ = dict(module.__dict__)
    return copied


def _become(old: nn.Module, new: nn.Module) -> None:
    """Make `old` itself what `new` is: parents, lists and closures of the model's code may all refer to it."""
    old.__class__ = new.__class__
    old.__dict__ = new.__dict__
