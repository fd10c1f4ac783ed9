"""The options of `quantize`: presets, groups, observers, and quantization without training."""

import re

import pytest
import timm
import torch
from torch import Tensor, nn

from ovit_engine import Engine, Recipe, RecipeError
from ovit_engine.modifiers.quantize import Quantize
from ovit_engine.quant import QuantAttention, QuantConv2d, QuantLinear, quantizers
from ovit_engine.quant.observers import CurrentLeastError, LeastError, MinMax, MovingAverageMinMax, Percentile

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3)).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": 32,
        "depth": 1,
        "num_heads": 2,
    }
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **sizes)
    return model.eval()


def quantize(options: str) -> Quantize:
    recipe = Recipe.parse(f"modifiers:\n  - quantize: {options}\n", file="r.yaml")
    found = recipe.modifiers[0].fresh_copy()
    assert isinstance(found, Quantize)
    return found


def prepared(model: nn.Module, options: str) -> nn.Module:
    recipe = Recipe.parse(f"modifiers:\n  - quantize: {options}\n", file="r.yaml")
    Engine(model, recipe, steps_per_epoch=4, epochs=1).prepare()
    return model


LINEAR = ["blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]


@pytest.mark.parametrize(
    ("groups", "layers", "attention", "outputs"),
    [
        ("[linear, conv]", LINEAR, [], []),
        ("[conv, patch_embed]", ["patch_embed.proj"], [], []),
        ("[linear, head]", [*LINEAR, "head"], [], []),
        ("[linear, attention]", LINEAR, ["blocks.0.attn"], []),
        ("[head, layer_norm]", ["head"], [], ["blocks.0.norm1", "blocks.0.norm2", "norm"]),
    ],
)
def test_groups_are_what_is_quantized(groups: str, layers: list[str], attention: list[str], outputs: list[str]) -> None:
    model = prepared(vit(), f"{{groups: {groups}}}")
    found = dict(model.named_modules())
    assert [name for name, m in found.items() if isinstance(m, (QuantLinear, QuantConv2d))] == layers
    assert [name for name, m in found.items() if isinstance(m, QuantAttention)] == attention
    assert [
        name for name, m in found.items() if isinstance(m, nn.LayerNorm) and hasattr(m, "output_quantizer")
    ] == outputs


def test_exclude_spares_attention_too() -> None:
    model = prepared(vit(), "{groups: [linear, attention], exclude: ['blocks.0.attn']}")
    assert not any(isinstance(m, QuantAttention) for m in model.modules())
    assert isinstance(model.get_submodule("blocks.0.attn.qkv"), QuantLinear)


@pytest.mark.parametrize(
    ("options", "inputs", "weights", "shape"),
    [
        ("{}", MovingAverageMinMax, (-127, 127), (16,)),
        ("{weights: {bits: 7}, activations: {observer: min_max}}", MinMax, (-63, 63), (16,)),
        ("{weights: {per: tensor}, activations: {observer: percentile, percentile: 99}}", Percentile, (-127, 127), ()),
        ("{weights: {observer: mse}, activations: {observer: mse}}", LeastError, (-127, 127), (16,)),
    ],
)  # fmt: skip
def test_options_choose_grids_and_observers(
    options: str, inputs: type, weights: tuple[int, int], shape: tuple[int, ...]
) -> None:
    layer = prepared(mlp(), options)[0]  # type: ignore[index]
    assert type(layer.input_quantizer.observer) is inputs
    assert (layer.weight_quantizer.grid.low, layer.weight_quantizer.grid.high) == weights
    assert layer.weight_quantizer.scale.shape == shape
    assert (type(layer.weight_quantizer.observer) is CurrentLeastError) == ("weights: {observer: mse}" in options)
    if inputs is Percentile:
        assert layer.input_quantizer.observer.percentile == 99


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ("{}", torch.uint8),
        ("{preset: gpu}", torch.int8),
        ("{preset: gpu, activations: {symmetric: false}}", torch.uint8),
        ("{preset: cpu, activations: {symmetric: true}}", torch.int8),
    ],
)
def test_presets_choose_the_type_of_activations(options: str, dtype: torch.dtype) -> None:
    model = prepared(mlp(), options)
    kinds = {q.grid.dtype for name, q in quantizers(model) if name.endswith("input_quantizer")}
    assert kinds == {dtype}


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_training_and_export_with_attention(preset: str, per: str, tmp_path) -> None:
    """QAT and PTQ share one quantizer: the same options train."""
    model = vit()
    text = f"{{preset: {preset}, weights: {{per: {per}}}, groups: [linear, head, attention], freeze_observers: 2st}}"
    engine = Engine(model, Recipe.parse(f"modifiers:\n  - quantize: {text}\n"), steps_per_epoch=3, epochs=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    engine.attach(optimizer)
    model.train()
    images = torch.randn(3, 16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for batch in images:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
    engine.detach()
    certificate = engine.export(tmp_path / "m.onnx", images[0], data=[(batch, None) for batch in images])
    assert certificate.integer_kernels == 7  # four layers, the head, two products
    assert certificate.int8_share > 0.95


def test_without_training_the_model_comes_close_to_itself() -> None:
    model = mlp()
    exact = model(X).detach()
    assert quantize("{start: 16ep}").quantize(model, [(X[:16],), (X[16:],)]) == ()  # times play no part
    assert {(bool(q.enabled), bool(q.observing)) for _, q in quantizers(model)} == {(True, False)}
    error = (model(X).detach() - exact).norm() / exact.norm()
    assert 0 < error < 0.05
    assert type(model[0].input_quantizer.observer) is LeastError


def test_smoothing_and_bias_correction_are_told() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.norm(x))

    notes = quantize("{ptq: {smooth: 0.5, bias_correction: true}}").quantize(Net(), [(X,)])
    assert re.fullmatch(r"smoothed 1 layers behind 1 LayerNorms, float outputs equal to \de-\d\d", notes[0])
    assert notes[1] == "bias correction: 1 layers"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{groups: [linear, nope]}", "r.yaml:2:33: quantize.groups.1: input should be 'linear', 'conv', 'patch_embed'"),
        ("{groups: [linear, attention]}", "r.yaml:2:24: quantize.groups: 'attention': Sequential has nothing"),
        ("{groups: [linear, head], targets: ['0']}", "quantize.groups: 'targets' name the layers already"),
        ("{preset: tpu}", "quantize.preset: input should be 'cpu' or 'gpu'"),
        ("{ptq: {smooth: 1.5}}", "quantize.ptq.smooth: input should be less than 1"),
        ("{activations: {observer: percentile, percentile: 40}}", "percentile: input should be greater than 50"),
    ],
)  # fmt: skip
def test_bad_options_say_where(options: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        prepared(mlp(), options)


def test_smoothing_a_model_without_layer_norms_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(8, 3))
    with pytest.raises(RecipeError, match=r"r\.yaml:2:.*quantize.ptq.*: no LayerNorm to smooth"):
        quantize("{ptq: {smooth: 0.5}}").quantize(model, [(X,)])


def test_options_for_no_training_are_refused_in_training() -> None:
    model = mlp()
    recipe = Recipe.parse("modifiers:\n  - quantize: {ptq: {smooth: 0.5}}\n", file="r.yaml")
    engine = Engine(model, recipe, steps_per_epoch=4, epochs=1)
    with pytest.raises(RecipeError, match=r"r.yaml:2:\d+: quantize.ptq: .* run ovit ptq, or leave them out"):
        engine.attach(torch.optim.SGD(model.parameters(), 0.1))


def test_attention_that_training_never_calls_stays_float() -> None:
    class Twin(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = vit(), vit()

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x)

    model = Twin()
    notes = quantize("{groups: [linear, attention], exclude: ['re:.*head']}").quantize(
        model, [(torch.randn(8, 1, 8, 8),)]
    )
    assert notes[0].startswith("two.blocks.0.attn, two.blocks.0.attn.qkv")
