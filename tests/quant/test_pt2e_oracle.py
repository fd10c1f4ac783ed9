"""torchao's PT2E path as the oracle of our quantizer: the same ranges, scales and zero points, outputs that agree."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchao.quantization.pt2e import MinMaxObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationSpec
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import QuantizationConfig, X86InductorQuantizer

from ovit_engine import quant


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Linear(8, 16)
        self.two = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.two(torch.tanh(self.one(torch.tanh(self.conv(x)).mean((2, 3)))))
        return found


def oracle(model: nn.Module, batches: list[Tensor], per_channel: bool, symmetric: bool) -> nn.Module:
    """The model as torchao quantizes it, with min-max observers on our grids."""
    weight_scheme = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
    weight = QuantizationSpec(
        dtype=torch.int8,
        quant_min=-127,
        quant_max=127,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver if per_channel else MinMaxObserver,
        ch_axis=0 if per_channel else None,
        qscheme=weight_scheme,
    )
    activation = QuantizationSpec(
        dtype=torch.int8 if symmetric else torch.uint8,
        quant_min=-127 if symmetric else 0,
        quant_max=127 if symmetric else 255,
        observer_or_fake_quant_ctr=MinMaxObserver,
        qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
    )
    quantizer = X86InductorQuantizer()
    quantizer.set_global(
        QuantizationConfig(input_activation=activation, output_activation=None, weight=weight, bias=None)
    )
    exported = torch.export.export(model, (batches[0],), strict=True).module()
    prepared = prepare_pt2e(exported, quantizer)
    for batch in batches:
        prepared(batch)
    return convert_pt2e(prepared, fold_quantize=True)


def parameters_of(graph: Any) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """layer -> {"input", "weight"} -> (scale, zero point) of what a converted graph dequantizes."""
    found = {}
    state = {**dict(graph.named_parameters()), **dict(graph.named_buffers())}

    def value(argument: Any) -> Tensor:
        return state[argument.target] if isinstance(argument, torch.fx.Node) else torch.tensor(argument)

    for node in graph.graph.nodes:
        if node.target in (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default):
            name = list(node.meta["nn_module_stack"].values())[-1][0]
            found[name] = {
                kind: (value(argument.args[1]), value(argument.args[2]))
                for kind, argument in zip(("input", "weight"), node.args[:2], strict=True)
            }
    return found


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_and_outputs_are_torchaos(per_channel: bool, symmetric: bool) -> None:
    torch.manual_seed(0)
    model = Small().eval()
    batches = [torch.randn(16, 3, 6, 6) * (1 + index) for index in range(3)]
    theirs = oracle(copy.deepcopy(model), batches, per_channel, symmetric)
    expected = parameters_of(theirs)
    scheme = quant.Scheme(
        per_channel=per_channel,
        activations=quant.IntegerGrid(low=-127, high=127, symmetric=True, dtype=torch.int8)
        if symmetric
        else quant.UINT8_AFFINE,
        activation_observer="min_max",
    )
    ours = copy.deepcopy(model)
    quant.prepare_quantization(ours, ["conv", "one", "two"], scheme=scheme)
    quant.calibrate(ours, [(batch,) for batch in batches])
    assert set(expected) == {"conv", "one", "two"}
    for name, operands in expected.items():
        layer = ours.get_submodule(name)
        for kind, (scale, zero_point) in operands.items():
            quantizer = layer.get_submodule(f"{kind}_quantizer")
            torch.testing.assert_close(quantizer.scale, scale.float(), rtol=1e-5, atol=0)
            assert torch.equal(quantizer.zero_point.long(), zero_point.long()), (name, kind)
    ours.conv.output_quantizer.enabled.fill_(False)  # ours besides: their fusion is Inductor's
    images = torch.randn(16, 3, 6, 6)
    with torch.no_grad():
        found, wanted, exact = ours(images), theirs(images), model(images)
    # they multiply by the inverse scale, which may move a value by a level
    assert (found - wanted).abs().max() < 0.25 * (wanted - exact).abs().max()


@pytest.mark.parametrize("layer", ["one", "two", "conv"])
def test_sensitivity_is_the_error_of_one_rounded_layer(layer: str) -> None:
    """Against a forward of our own with that layer's weight and input rounded by hand."""
    torch.manual_seed(1)
    model = Small().eval().double().float()
    images = torch.randn(8, 3, 6, 6)
    prepared = copy.deepcopy(model)
    quant.prepare_quantization(prepared, ["conv", "one", "two"], scheme=quant.Scheme(activation_observer="min_max"))
    quant.calibrate(prepared, [(images,)])
    before = [bool(quantizer.enabled) for _, quantizer in quant.quantizers(prepared)]
    found = quant.layer_sensitivity(prepared, [(images[:4],), (images[4:],)])
    assert [bool(quantizer.enabled) for _, quantizer in quant.quantizers(prepared)] == before
    assert all(before)

    def on_grid(x: Tensor, low: float, high: float, reach: tuple[int, int]) -> Tensor:
        scale = (max(high, 0) - min(low, 0)) / 255 if reach == (0, 255) else max(-low, high) / 127
        zero = round(-min(low, 0) / scale) if reach == (0, 255) else 0
        return ((x / scale).round() + zero).clamp(*reach).sub(zero) * scale

    changed = copy.deepcopy(model).double()
    target = changed.get_submodule(layer)
    for row in target.weight.data:  # a scale for each output channel
        row.copy_(on_grid(row, -row.abs().max().item(), row.abs().max().item(), (-127, 127)))
    ranges: dict[str, tuple[float, float]] = {}

    def note(kind: str, x: Tensor) -> Tensor:
        ranges.setdefault(kind, (x.min().item(), x.max().item()))
        return on_grid(x, *ranges[kind], (0, 255))

    target.register_forward_pre_hook(lambda module, inputs: (note("input", inputs[0]),))
    if layer == "conv":
        seen = model.conv(images).detach()
        ranges["output"] = (seen.min().item(), seen.max().item())
        target.register_forward_hook(lambda module, inputs, output: note("output", output))
    with torch.no_grad():
        exact = model.double()(images.double())
        noise = (changed(images.double()) - exact).square().sum() / exact.square().sum()
    assert found[layer] == pytest.approx(noise.item(), rel=0.05)


def test_sensitivity_needs_batches() -> None:
    with pytest.raises(ValueError, match="no batches to measure the sensitivity"):
        quant.layer_sensitivity(Small(), [])
