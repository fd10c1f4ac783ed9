"""What is in the file: integer weights, integer kernels, nothing of the exporter."""

import copy
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import nn

from ovit_engine.certificate import ExportError
from ovit_engine.export.writer import build_onnx, write_onnx


def initializers(path):
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


def optimized_ops(path, tmp_path):
    """Independent of ovit_engine.certificate.kernels."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


def test_every_block_linear_of_the_vit_runs_as_an_integer_kernel(vit, tmp_path):
    ops = optimized_ops(vit.path, tmp_path)
    assert ops["MatMulIntegerToFloat"] == 8
    assert ops["DequantizeLinear"] == 0
    assert vit.certificate.integer_kernels == 8
    assert vit.certificate.runtime_ops == dict(ops)


def test_every_convolution_and_the_linear_run_as_integer_kernels(convnet, tmp_path):
    ops = optimized_ops(convnet.path, tmp_path)
    assert ops["QLinearConv"] == 3
    assert ops["MatMulIntegerToFloat"] == 1
    assert ops["BatchNormalization"] == ops["Conv"] == ops["FusedConv"] == ops["Gemm"] == 0


def test_quantized_weights_are_int8_under_their_own_names_and_have_no_float_copy(vit):
    tensors = initializers(vit.path)
    for layer in vit.promise.layers:
        weight = vit.model.get_parameter(layer.name)
        assert tensors[layer.name].data_type == TensorProto.INT8
        assert tuple(tensors[layer.name].dims) == tuple(weight.shape[::-1])
    large = {name for name, tensor in tensors.items() if np.prod(tensor.dims) >= 4096}
    assert large == {layer.name for layer in vit.promise.layers}
    biases = [tensor for name, tensor in tensors.items() if name.endswith("qkv.bias")]
    assert [tensor.data_type for tensor in biases] == [TensorProto.FLOAT] * 2


def test_levels_times_scale_are_the_fake_quantized_weights(vit):
    tensors = {name: numpy_helper.to_array(tensor) for name, tensor in initializers(vit.path).items()}
    layer = vit.model.blocks[1].mlp.fc1
    expected = layer.weight_quantizer(layer.weight).detach().numpy()
    name = "blocks.1.mlp.fc1.weight"
    np.testing.assert_array_equal((tensors[name] * tensors[f"{name}_scale"]).T, expected)


def test_no_debris_of_the_exporter(vit):
    content = vit.path.read_bytes()
    for word in (b"stack_trace", b"pkg.torch", b"site-packages", b"/home", b"/work", b".py", b"namespace"):
        assert word not in content
    model = onnx.load(vit.path)
    assert model.producer_name == "ovit-engine"
    assert len(model.graph.value_info) == 0
    assert {entry.key.split(".")[0] for entry in model.metadata_props} == {"ovit"}
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    onnx.checker.check_model(model, full_check=True)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_any_batch_size(vit, batch, digits):
    session = onnxruntime.InferenceSession(str(vit.path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["input"]
    assert [value.name for value in session.get_outputs()] == ["logits"]
    images = digits[0][:batch]
    (logits,) = session.run(None, {"input": images.numpy()})
    with torch.no_grad():
        expected = vit.model(images).numpy()
    assert logits.shape == (batch, 10)
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


def test_opset_and_metadata(vit):
    model = onnx.load(vit.path)
    assert model.opset_import[0].version >= 21
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["ovit.recipe"].startswith("\nname: tiny\n")
    assert '"interpolation": "bilinear"' in metadata["ovit.preprocessing"]
    assert '"torch"' in metadata["ovit.versions"]


def test_float_weights_that_the_exporter_transposed_get_their_names_back():
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))
    proto, shared, _ = build_onnx(model, torch.randn(2, 3, 8))
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    np.testing.assert_array_equal(tensors["0.weight"], model[0].weight.detach().numpy().T)
    np.testing.assert_array_equal(tensors["2.weight"], model[2].weight.detach().numpy().T)
    assert shared == {}


def test_equal_weights_stored_once_are_found_under_both_names():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
    model[2].weight.data.copy_(model[0].weight.data)
    proto, shared, _ = build_onnx(model, torch.randn(2, 3, 4))
    stored = {tensor.name for tensor in proto.graph.initializer}
    assert {"0.weight", "2.weight"} <= stored | set(shared)
    assert set(shared.values()) <= stored


def test_several_inputs_and_outputs_are_numbered(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, a, b):
            return {"sum": self.linear(a + b), "difference": a - b}

    write_onnx(Two(), (torch.randn(1, 3), torch.randn(1, 3)), tmp_path / "two.onnx", metadata={"who": "me"})
    session = onnxruntime.InferenceSession(str(tmp_path / "two.onnx"), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == ["input_0", "input_1"]
    assert [value.name for value in session.get_outputs()] == ["output_0", "output_1"]
    assert session.get_modelmeta().custom_metadata_map == {"who": "me"}
    assert [file.name for file in tmp_path.iterdir()] == ["two.onnx"]


def test_one_example_does_not_fix_the_batch():
    class SpecialCase(nn.Module):
        def forward(self, x):
            return x + 1 if x.shape[0] == 1 else x * 2

    proto, _, _ = build_onnx(SpecialCase(), torch.randn(1, 3))
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


def test_a_fixed_batch_on_request():
    proto, _, _ = build_onnx(nn.Linear(3, 2), torch.randn(5, 3), dynamic_batch=False)
    assert [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim] == [5, 3]


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ((), ValueError, "empty"),
        (("x",), TypeError, "got str"),
        ((torch.zeros(()),), ValueError, "batch dimension"),
        ((torch.zeros(0, 3),), ValueError, r"\(0, 3\)"),
    ],
)
def test_bad_example_inputs(inputs, error, message):
    with pytest.raises(error, match=message):
        build_onnx(nn.Linear(3, 2), inputs)


def test_an_old_opset_is_refused():
    with pytest.raises(ValueError, match="21 or newer, got 20"):
        build_onnx(nn.Linear(3, 2), torch.randn(2, 3), opset=20)


def test_a_model_that_cannot_be_traced_is_one_clear_error(tmp_path, capfd):
    class Branches(nn.Module):
        def forward(self, x):
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(ExportError, match=r"torch\.onnx cannot export the model"):
        write_onnx(Branches(), torch.randn(2, 3), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_the_writer_is_quiet_and_leaves_the_model_in_eval_mode(capfd):
    model = copy.deepcopy(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))).train()
    build_onnx(model, torch.randn(2, 3))
    assert not model.training
    assert capfd.readouterr() == ("", "")
