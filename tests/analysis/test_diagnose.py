"""`diagnose` names the layer that was broken on purpose, and what it proposes brings the accuracy back."""

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ovit_engine import Recipe
from ovit_engine.analysis.diagnose import diagnose_file
from ovit_engine.analysis.diagnosis import Diagnosis
from ovit_engine.analysis.qdq import QdqLayer, find_layers, rewrite
from ovit_engine.certificate import Promise
from ovit_engine.certificate.kernels import open_session, run_outputs
from ovit_engine.cli import main
from ovit_engine.export.exporter import export_model
from ovit_engine.post_training.ptq import calibration_batches, ptq
from ovit_engine.training.digits import split_digits

ROOT = Path(__file__).parents[2]
TRAIN, VAL, PREPROCESSING = split_digits((1, 8, 8), None)
NAMES = ("a", "b", "c", "d")


class Net(nn.Module):
    """Four layers; the last one is read by a Gemm in a float file."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = nn.Linear(64, 48), nn.Linear(48, 48), nn.Linear(48, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in (self.a, self.b, self.c):
            x = torch.relu(layer(x))
        return self.d(x)


def data() -> DataLoader:
    return DataLoader(VAL, batch_size=64)


@pytest.fixture(scope="module")
def trained() -> Net:
    torch.manual_seed(0)
    model = Net()
    images, classes = map(torch.stack, zip(*((image, torch.tensor(label)) for image, label in TRAIN), strict=True))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        batch = torch.randint(0, len(images), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), classes[batch]).backward()
        optimizer.step()
    with torch.no_grad():  # the first input of c is 0, and c does not read it
        model.b.weight[0] = 0.0
        model.b.bias[0] = 0.0
        model.c.weight[:, 0] = 0.0
    return model.eval()


def with_outlier(model: Net) -> Net:
    """The same function, with an input of c that is 8000 on every image: rounding leaves nothing of the others."""
    broken = copy.deepcopy(model)
    broken.b.bias.data[0] = 8000.0
    return broken


def edited(path: Path, to: Path, **arrays: np.ndarray) -> Path:
    """A file with other initializers, as c__weight for c.weight."""
    model = onnx.load(path)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, values in arrays.items():
        name = name.replace("__", ".")
        assert list(tensors[name].dims) == list(values.shape), name
        tensors[name].CopyFrom(numpy_helper.from_array(values, name))
    onnx.save(model, to)
    return to


def stored(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def scale_names(path: Path, name: str) -> tuple[str, str]:
    """Names of the scales of a layer's weight and input."""
    model = onnx.load(path)
    nodes = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "MatMul" and nodes[node.input[1]].input[0] == f"{name}.weight":
            return nodes[node.input[1]].input[1], nodes[node.input[0]].input[1]
    raise AssertionError(name)


def written(model: nn.Module, path: Path, options: str = "") -> tuple[float, float]:
    """The int8 file of a model; (float accuracy, its accuracy)."""
    recipe = Recipe.parse(f"modifiers: [{{quantize: {{targets: [a, b, c, d]{options}}}}}]")
    compared = ptq(
        copy.deepcopy(model),
        recipe,
        calibration_batches(TRAIN, 128),
        path,
        example_inputs=torch.zeros(1, 1, 8, 8),
        data=data(),
        preprocessing=PREPROCESSING,
    )
    assert compared.float_accuracy is not None
    assert compared.int8_accuracy is not None
    return compared.float_accuracy, compared.int8_accuracy


@pytest.fixture(scope="module")
def broken(trained: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bad.onnx, good.onnx (without the outlier), and the float files that both were made from."""
    folder = tmp_path_factory.mktemp("broken")
    model = with_outlier(trained)
    float_accuracy, accuracy = written(model, folder / "bad.onnx")
    assert float_accuracy > 0.85
    assert accuracy < 0.7
    float_file = folder / "float.onnx"
    export_model(model, float_file, torch.zeros(2, 1, 8, 8), promise=Promise(), data=data())
    edited(float_file, folder / "dense.onnx", b__bias=trained.b.bias.detach().numpy())
    written(trained, folder / "good.onnx")
    return folder


@pytest.fixture(scope="module")
def found(broken: Path) -> Diagnosis:
    return diagnose_file(broken / "bad.onnx", data(), reference=broken / "float.onnx")


def shares(diagnosis: Diagnosis) -> dict[str, float]:
    return {layer.name: layer.share or 0.0 for layer in diagnosis.layers}


def test_the_broken_layer_is_named_and_leaving_it_in_float_restores_the_accuracy(
    broken: Path, found: Diagnosis, trained: Net, tmp_path: Path
) -> None:
    assert found.whole.agreement < 0.8
    assert shares(found)["c"] > 0.9
    assert all(share < 0.2 for name, share in shares(found).items() if name != "c")
    (layer,) = [layer for layer in found.layers if layer.name == "c"]
    assert layer.gain is not None
    assert layer.gain > 0.2
    change = found.changes[0]
    assert (change.layers, change.observer) == (("c",), None)
    assert change.recipe() == "quantize: {exclude: [c]}"
    # as proposed, on the model itself
    float_accuracy, accuracy = written(with_outlier(trained), tmp_path / "excluded.onnx", ", exclude: [c]")
    assert accuracy >= float_accuracy - 0.01
    assert change.score.accuracy == pytest.approx(accuracy, abs=0.03)  # of the first 256 images


def test_parts_are_told_apart_with_a_reference(broken: Path, found: Diagnosis) -> None:
    parts = {part.name: part for part in found.parts}
    assert set(parts) == {"activations", "weights"}
    assert parts["activations"].alone.agreement < 0.8
    assert parts["activations"].without.agreement > 0.9
    assert parts["weights"].alone.agreement > 0.9
    assert parts["weights"].without.agreement < 0.8
    without = diagnose_file(broken / "bad.onnx", data())
    assert [part.name for part in without.parts] == ["activations"]
    assert without.parts[0].without.agreement == 1
    assert without.changes[0].layers == ("c",)
    assert without.not_compared == "no reference"
    assert "--reference float.onnx" in without.advice()[-1]


def test_a_good_file_needs_no_change(broken: Path) -> None:
    good = diagnose_file(broken / "good.onnx", data())
    assert good.whole.agreement >= 0.99
    assert not good.changes
    assert "nothing to change" in good.advice()[0]
    assert [layer.name for layer in good.layers] == list(NAMES)


def test_rounded_weights_are_named_as_the_part(broken: Path, trained: Net, tmp_path: Path) -> None:
    """Levels of c that are as wide as its largest weights: what they round to zero is not sparsity."""
    good = broken / "good.onnx"
    scale = np.full(32, 0.8, np.float32)
    levels = np.rint(trained.c.weight.detach().numpy().T / scale).astype(np.int8)
    edited(good, tmp_path / "bad.onnx", c__weight=levels, **{scale_names(good, "c")[0]: scale})
    found = diagnose_file(tmp_path / "bad.onnx", data(), reference=broken / "dense.onnx")
    parts = {part.name: part for part in found.parts}
    assert set(parts) == {"activations", "weights"}
    assert parts["weights"].alone.agreement < 0.8
    assert parts["weights"].without.agreement > 0.95
    assert parts["activations"].alone.agreement > 0.95
    assert found.changes[0].layers == ("c",)
    assert found.changes[0].score.agreement >= 0.99


def test_sparsity_is_named_as_the_part(broken: Path, tmp_path: Path) -> None:
    good = broken / "good.onnx"
    levels = stored(good)["a.weight"].copy()
    levels[::2] = 0
    edited(good, tmp_path / "bad.onnx", a__weight=levels)
    found = diagnose_file(tmp_path / "bad.onnx", data(), reference=broken / "dense.onnx")
    parts = {part.name: part for part in found.parts}
    assert set(parts) == {"activations", "weights", "sparsity"}
    assert parts["sparsity"].alone.agreement < 0.9
    assert parts["sparsity"].without.agreement > 0.98
    assert parts["weights"].alone.agreement > 0.98
    assert parts["weights"].without.agreement < 0.9
    assert found.changes[0].layers == ("a",)


def test_ranges_that_are_too_wide_are_helped_by_another_observer(broken: Path, tmp_path: Path) -> None:
    good = broken / "good.onnx"
    name = scale_names(good, "c")[1]
    edited(good, tmp_path / "bad.onnx", **{name: stored(good)[name] * np.float32(400)})
    found = diagnose_file(tmp_path / "bad.onnx", data())
    assert found.whole.agreement < 0.9
    assert shares(found)["c"] > 0.9
    agreements = [change.score.agreement for change in found.changes]
    assert agreements == sorted(agreements, reverse=True)
    observers = {change.observer: change for change in found.changes}
    assert observers["mse"].score.agreement >= 0.98
    assert observers["mse"].layers == ("c",)
    assert observers["mse"].recipe() == "quantize: {activations: {observer: mse}}"


def test_a_reference_of_other_weights_is_not_compared_weight_by_weight(broken: Path, tmp_path: Path) -> None:
    bias = np.full(48, 2.0, np.float32)
    other = edited(broken / "dense.onnx", tmp_path / "other.onnx", a__bias=bias)
    found = diagnose_file(broken / "good.onnx", data(), reference=other)
    assert [part.name for part in found.parts] == ["activations"]
    assert found.not_compared == "other outputs"
    assert found.layers[0].weight_sqnr is None


def test_a_reference_of_before_more_training_is_not_compared_weight_by_weight(broken: Path, tmp_path: Path) -> None:
    """Biases alone would tell: the logits of both may be near each other all the same."""
    weight = stored(broken / "dense.onnx")["a.weight"]
    noise = np.random.default_rng(0).normal(size=weight.shape).astype(np.float32) * np.abs(weight).max() / 50
    other = edited(broken / "dense.onnx", tmp_path / "other.onnx", a__weight=weight + noise)
    found = diagnose_file(broken / "good.onnx", data(), reference=other)
    assert [part.name for part in found.parts] == ["activations"]
    assert found.not_compared == "other weights"


def levels_and_scales(model: onnx.ModelProto, name: str) -> tuple[np.ndarray, np.ndarray]:
    """float64 weight [in, out] of an int8 layer, read without the code under test."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    (node,) = [n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] == f"{name}.weight"]
    return tensors[f"{name}.weight"].astype(np.float64) * tensors[node.input[1]].astype(np.float64), tensors


def rounded(x: np.ndarray, model: onnx.ModelProto, name: str, tensors: dict[str, np.ndarray]) -> np.ndarray:
    """float64 Q/DQ of the input of a layer."""
    nodes = {output: node for node in model.graph.node for output in node.output}
    (product,) = [
        node
        for node in model.graph.node
        if node.op_type == "MatMul" and nodes[node.input[1]].input[0] == f"{name}.weight"
    ]
    _, scale, zero = (tensors.get(value) for value in nodes[product.input[0]].input)
    assert scale is not None
    assert zero is not None
    levels = np.clip(np.rint(x / scale) + int(zero), 0, 255)
    return (levels - int(zero)) * np.float64(scale)


def decibels(signal: np.ndarray, noisy: np.ndarray) -> float:
    return float(10 * np.log10(np.square(signal).sum() / max(np.square(noisy - signal).sum(), 1e-300)))


@pytest.mark.parametrize("kept", [(), ("c",), ("a", "d"), NAMES])
def test_variants_compute_what_numpy_computes(kept: tuple[str, ...], broken: Path, trained: Net) -> None:
    """Float but for the layers in `kept`, against a forward of our own in float64."""
    path = broken / "good.onnx"
    model = onnx.load(path)
    images = np.stack([VAL[index][0].numpy() for index in range(64)])
    x = exact = images.reshape(64, -1).astype(np.float64)
    ratios, totals = {}, {}
    for name in NAMES:
        weight, tensors = levels_and_scales(model, name)
        read = rounded(x, model, name, tensors) if name in kept else x
        ratios[name], totals[name] = decibels(x[:8], read[:8]), decibels(exact[:8], read[:8])
        bias = getattr(trained, name).bias.detach().numpy()
        x, exact = read @ weight + bias, exact @ weight + bias
        x, exact = (x, exact) if name == "d" else (np.maximum(x, 0), np.maximum(exact, 0))
    layers = find_layers(model)
    spared = [layer for layer in layers if layer.name not in kept]
    weights = {layer.output: layer.weight.values for layer in spared if layer.weight}
    variant = rewrite(model, float_inputs=[layer.output for layer in spared], weights=weights, layers=layers)
    assert sum(node.op_type == "QuantizeLinear" for node in variant.graph.node) == len(kept)
    onnx.checker.check_model(variant)
    onnx.save(variant, broken / "variant.onnx")
    found = run_outputs(open_session(broken / "variant.onnx"), [images])
    # a level that falls the other way shows as 1e-3; a layer rounded or not as more
    np.testing.assert_allclose(found, x, atol=2e-2 if kept else 1e-4)
    if kept == NAMES:
        for layer in diagnose_file(path, [images]).layers:
            assert layer.input_sqnr == pytest.approx(ratios[layer.name], abs=0.2)
            assert layer.total_sqnr == pytest.approx(totals[layer.name], abs=0.2)


def test_errors_say_what_is_wrong(broken: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file: .*lost.onnx"):
        diagnose_file(tmp_path / "lost.onnx", data())
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ValueError, match="is not an ONNX file"):
        diagnose_file(tmp_path / "text.onnx", data())
    with pytest.raises(ValueError, match=r"float.onnx rounds no activations: give the float file with --reference"):
        diagnose_file(broken / "float.onnx", data())
    operators = onnx.helper.make_graph([onnx.helper.make_node("QLinearMatMul", list("abcdefgh"), ["y"])], "g", [], [])
    with pytest.raises(ValueError, match="the file has QLinearMatMul: only QuantizeLinear"):
        find_layers(onnx.helper.make_model(operators))


def test_the_command_prints_the_table_and_the_recipe_lines(broken: Path) -> None:
    arguments = ["diagnose", broken / "bad.onnx", "--data", "digits", "--reference", broken / "float.onnx"]
    done = CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": None})
    assert done.exit_code == 0, done.output
    assert "  - quantize: {exclude: [c]}" in done.output
    assert "share of the error" in done.output
    assert "with float.onnx, whose accuracy is" in done.output
    done = CliRunner().invoke(main, ["diagnose", str(broken / "lost.onnx"), "--data", "digits"])
    assert done.exit_code == 1
    assert "no such file" in done.output


def without_rounding(model: onnx.ModelProto, layers: list[QdqLayer]) -> onnx.ModelProto:
    """All in float, in which no rounding may be left."""
    weights = {layer.output: layer.weight.values for layer in layers if layer.weight}
    floated = rewrite(model, float_inputs=[layer.output for layer in layers], weights=weights, layers=layers)
    onnx.checker.check_model(floated)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in floated.graph.node}
    return floated


def test_convolutions_and_a_vit_are_taken_apart(convnet: Any, vit: Any) -> None:
    """Every rounding goes with the layer that reads it, that of a convolution's output with the convolution."""
    for file in (convnet, vit):
        model = onnx.load(file.path)
        layers = find_layers(model)
        promised = {layer.name.removesuffix(".weight") for layer in file.promise.layers if layer.quantized}
        assert promised == {layer.name for layer in layers if layer.roundings}
        for layer in layers:
            own = [each for each in layer.roundings if each.reader == layer.output]
            assert len(own) == (layer.name in promised), layer
            assert layer.op == "Conv" or len(layer.roundings) == len(own)
        without_rounding(model, layers)
    assert any(len(layer.roundings) > 1 for layer in find_layers(onnx.load(convnet.path)))


def test_products_of_attention_and_layer_norms_are_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2, num_classes=10
    )
    for module in model.modules():  # equal tensors are stored once, under one name
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.1)
    text = "modifiers: [{quantize: {groups: [linear, attention, layer_norm]}}]"
    batches = calibration_batches(TRAIN, 32)
    ptq(model, Recipe.parse(text), batches, tmp_path / "a.onnx", example_inputs=batches[0][0][:1], data=data())
    layers = find_layers(onnx.load(tmp_path / "a.onnx"))
    rounded_ones = [layer for layer in layers if layer.roundings]
    assert [layer.recipe_name for layer in rounded_ones] == [
        "blocks.0.norm1",
        "blocks.0.attn.qkv",
        "blocks.0.attn",
        "blocks.0.attn",
        "blocks.0.attn.proj",
        "blocks.0.norm2",
        "blocks.0.mlp.fc1",
        "blocks.0.mlp.fc2",
        "norm",
    ]
    assert [len(layer.roundings) for layer in rounded_ones if layer.recipe_name == "blocks.0.attn"] == [2, 2]
    without_rounding(onnx.load(tmp_path / "a.onnx"), layers)
    found = diagnose_file(tmp_path / "a.onnx", data())
    assert found.parts[0].without.agreement == 1
    assert sum(layer.input_sqnr is not None for layer in found.layers) == len(rounded_ones)


def test_pytorch_is_not_needed(broken: Path) -> None:
    images = np.stack([VAL[index][0].numpy() for index in range(64)])
    np.savez(broken / "images.npz", images=images, labels=np.array([VAL[index][1] for index in range(64)]))
    code = (
        "import sys\nfor name in ('torch', 'timm', 'onnxscript'): sys.modules[name] = None\n"
        "import numpy as np\nfrom ovit_engine.analysis.diagnose import diagnose_file\n"
        "data = np.load('images.npz')\n"
        "print(diagnose_file('bad.onnx', [(data['images'], data['labels'])]).changes[0].recipe())"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=broken, env=environment, capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout == "quantize: {exclude: [c]}\n"
