"""Put quantizers into a model, find and switch them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ovit_engine.quant.attention import OPERANDS, QuantAttention
from ovit_engine.quant.conv_outputs import find_conv_outputs
from ovit_engine.quant.fake_quantizer import FakeQuantize
from ovit_engine.quant.layers import QuantConv2d, QuantLinear, quantize_output
from ovit_engine.quant.scheme import CPU, Scheme

_QUANTIZER_NAMES = ("input_quantizer", "weight_quantizer", "output_quantizer", *OPERANDS)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What `prepare_quantization` did."""

    # layers that are now quantized, in the order asked
    layers: tuple[str, ...]
    # layer -> why it stays float; for the caller to show or to refuse
    skipped: dict[str, str]
    # convolution -> batch-norm that bake folds into it
    folded: dict[str, str]
    # convolutions of which no graph shows what follows: a batch-norm behind them stays as it is
    untraced: tuple[str, ...]


def prepare_quantization(
    model: nn.Module,
    names: Iterable[str],
    *,
    scheme: Scheme = CPU,
    attention: Iterable[str] = (),
    outputs: Iterable[str] = (),
) -> Prepared:
    """Give the layers `names` their quantizers, disabled: the model computes what it did before.

    Layers are converted in place (see `layers`). `model` must be the bare module, before DDP, FSDP or compile.
    Layers of other classes are not converted but named in `Prepared.skipped`. `attention` names modules whose two
    products (Q·K, A·V) are rounded, `outputs` modules whose output is (LayerNorm).

    Raises:
        ValueError: a name that is not in the model, or a layer that has quantizers already.
    """
    names, attention, outputs = (list(dict.fromkeys(group)) for group in (names, attention, outputs))
    modules = dict(model.named_modules())
    unknown = [name for name in (*names, *attention, *outputs) if name not in modules]
    if unknown:
        raise ValueError(f"no such layer in the model: {', '.join(map(repr, unknown))}")
    if "" in names:
        raise ValueError("the model itself cannot be converted, only layers inside it: wrap it in a module")
    again = [name for name in (*names, *attention, *outputs) if _is_prepared(modules[name])]
    if again:
        raise ValueError(f"already prepared for quantization: {', '.join(again)}")
    skipped = {name: reason for name in names if (reason := _why_not_quantized(modules[name])) is not None}
    layers = [name for name in names if name not in skipped]
    convs = [name for name in layers if type(modules[name]) is nn.Conv2d]
    follow = find_conv_outputs(model, convs, layers) if convs else {}
    for name in layers:
        module = modules[name]
        if isinstance(module, nn.Linear):
            QuantLinear.from_float(module, scheme=scheme)
        elif isinstance(module, nn.Conv2d):
            output = follow[name]
            conv = QuantConv2d.from_float(module, scheme=scheme, output=output.rounded_at == name)
            conv.norm = output.norm
            if output.rounded_at not in (None, name):
                _round_output(modules[str(output.rounded_at)], conv.weight.device, scheme)
    for name in attention:
        QuantAttention.from_float(modules[name], scheme=scheme)
    for name in outputs:
        _round_output(modules[name], _device_of(modules[name]), scheme)
    _leave_fast_path(model)
    folded = {name: output.norm for name, output in follow.items() if output.norm is not None}
    untraced = tuple(name for name, output in follow.items() if not output.traced)
    return Prepared(layers=tuple(layers), skipped=skipped, folded=folded, untraced=untraced)


def unquantized(model: nn.Module) -> list[str]:
    """Names of modules of torch whose own weights are those of products, and which have no quantized form."""
    kinds = (nn.MultiheadAttention, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.Bilinear)
    return [n for n, m in model.named_modules() if isinstance(m, kinds) and not isinstance(m, nn.Conv2d)]


def quantizers(model: nn.Module) -> Iterator[tuple[str, FakeQuantize]]:
    """Return every fake quantizer of `model` with its name."""
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize):
            yield name, module


def rounding_layers(model: nn.Module) -> dict[str, QuantLinear | QuantConv2d]:
    """Return the layers of `model` whose weights are rounded, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (QuantLinear, QuantConv2d)) and layer.weight_quantizer.enabled
    }


def run_watched(model: nn.Module, batches: Iterable[tuple[Any, ...]], handles: Sequence[RemovableHandle]) -> None:
    """Run `model` on batches of positional arguments, then remove the hooks that watch it."""
    try:
        for batch in batches:
            model(*batch)
    finally:
        for handle in handles:
            handle.remove()


def set_enabled(model: nn.Module, enabled: bool) -> None:
    """Start or stop rounding; in place in the buffers, so that no compiled graph compiles again."""
    for _, quantizer in quantizers(model):
        quantizer.enabled.fill_(enabled)


def set_observing(model: nn.Module, observing: bool) -> None:
    """Start or stop (freeze) the ranges; in place in the buffers."""
    for _, quantizer in quantizers(model):
        quantizer.observing.fill_(observing)


def unrounded_outputs(model: nn.Module) -> list[str]:
    """Modules that have lost the hook which rounds their output, as `convert_sync_batchnorm` makes new ones."""
    return [
        name
        for name, module in model.named_modules()
        if "output_quantizer" in module._modules
        and not isinstance(module, QuantConv2d)
        and quantize_output not in module._forward_hooks.values()
    ]


def dense_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` without quantizer entries: loads with `strict=True` into the model before surgery.

    The other direction needs nothing: a prepared model accepts a dense checkpoint with `strict=True`.
    """
    return {
        key: value for key, value in state_dict.items() if not any(part in _QUANTIZER_NAMES for part in key.split("."))
    }


def _is_prepared(module: nn.Module) -> bool:
    return isinstance(module, (QuantLinear, QuantConv2d, QuantAttention)) or "output_quantizer" in module._modules


def _device_of(module: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in module.parameters()), None)


def _round_output(module: nn.Module, device: torch.device | None, scheme: Scheme) -> None:
    module.add_module("output_quantizer", scheme.activation_quantizer(device).train(module.training))
    # stays for the life of the training model: bake removes it on the copy that is exported
    module.register_forward_hook(quantize_output)


def _leave_fast_path(model: nn.Module) -> None:
    """In eval mode torch's encoder layer hands its float weights to one fused kernel, past its quantized layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which it decided when it was made, and only that kernel takes
        if isinstance(module, nn.TransformerEncoderLayer) and any(
            isinstance(inner, (QuantLinear, QuantConv2d)) for inner in module.modules()
        ):
            module.activation_relu_or_gelu = 0  # the only use of this attribute is to ask for that kernel


def _why_not_quantized(module: nn.Module) -> str | None:
    if type(module) in (nn.Linear, nn.Conv2d):
        return None
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        return f"{kind} has a forward of its own; only nn.Linear and nn.Conv2d themselves are converted"
    return f"{kind} is neither nn.Linear nor nn.Conv2d"
