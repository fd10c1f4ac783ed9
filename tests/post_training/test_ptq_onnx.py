"""Post-training quantization of trained ONNX files as other tools write them: each becomes the int8 file it should."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from ovit_engine.certificate.verify import verify_file
from ovit_engine.post_training.onnx_graph import data_shapes, read
from ovit_engine.post_training.ptq import Compared
from ovit_engine.post_training.ptq_onnx import ptq_onnx

RNG = np.random.default_rng(0)

# images of ten kinds, which any network tells apart by far more than rounding changes
KINDS = 2 * RNG.standard_normal((10, 3, 16, 16))


def images(count: int, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((count, 3, 16, 16))
    return (KINDS[np.arange(count) % 10] + 0.05 * noise).astype(np.float32)


def weight(*shape: int) -> np.ndarray:
    return (RNG.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)


WEIGHTS = {"c1": weight(16, 3, 3, 3), "c2": weight(32, 16, 3, 3), "f1": weight(1568, 64) / 3, "f2": weight(64, 10)}


def network(opset: int = 17, batch: Any = "batch", size: Any = 16, dtype: int = TensorProto.FLOAT) -> onnx.ModelProto:
    """Two convolutions and two linear layers; the last of them stays float."""
    nodes = [
        helper.make_node("Conv", ["x", "c1"], ["a"], pads=[1, 1, 1, 1], name="first"),
        helper.make_node("Relu", ["a"], ["ar"]),
        helper.make_node("Conv", ["ar", "c2"], ["d"], strides=[2, 2], name="second"),
        helper.make_node("Relu", ["d"], ["dr"]),
        helper.make_node("Flatten", ["dr"], ["fl"]),
        helper.make_node("MatMul", ["fl", "f1"], ["m"], name="hidden"),
        helper.make_node("Relu", ["m"], ["mr"]),
        helper.make_node("MatMul", ["mr", "f2"], ["y"], name="head"),
    ]
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("x", dtype, [batch, 3, size, size])],
        [helper.make_tensor_value_info("y", dtype, [batch, 10])],
        [numpy_helper.from_array(each.astype(kind), name) for name, each in WEIGHTS.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def trained_head() -> np.ndarray:
    """The last layer, solved so that each kind has a score of 1 and the others 0."""
    model = network()
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("mr", TensorProto.FLOAT, ["batch", 64]))
    del model.graph.node[-1]
    (hidden,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": images(200, 3)})
    return np.linalg.lstsq(hidden, np.eye(10)[np.arange(200) % 10])[0].astype(np.float32)


WEIGHTS["f2"] = trained_head()


def quantize(model: onnx.ModelProto, folder: Path, **options: Any) -> Compared:
    onnx.save(model, folder / "float.onnx")
    kind = helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
    seen = images(64, 1).astype(kind)
    data = [(images(64, 2).astype(kind), None)]
    return ptq_onnx(folder / "float.onnx", folder / "int8.onnx", [seen[:32], seen[32:]], data=data, **options)


def int8_weights(path: Path) -> set[str]:
    return {tensor.name for tensor in onnx.load(path).graph.initializer if tensor.data_type == TensorProto.INT8} & {
        "c1",
        "c2",
        "f1",
        "f2",
    }


def stored(model: onnx.ModelProto, name: str) -> np.ndarray:
    return numpy_helper.to_array(next(tensor for tensor in model.graph.initializer if tensor.name == name))


def replaced(model: onnx.ModelProto, name: str, tensor: onnx.TensorProto | None, *nodes: onnx.NodeProto) -> None:
    model.graph.initializer.remove(next(each for each in model.graph.initializer if each.name == name))
    model.graph.initializer.extend([] if tensor is None else [tensor])
    for node in reversed(nodes):
        model.graph.node.insert(0, node)


def constants(model: onnx.ModelProto) -> None:
    for tensor in list(model.graph.initializer):
        replaced(model, tensor.name, None, helper.make_node("Constant", [], [tensor.name], value=tensor))


def half_behind_cast(model: onnx.ModelProto) -> None:
    half = numpy_helper.from_array(stored(model, "f1").astype(np.float16), "half")
    replaced(model, "f1", half, helper.make_node("Cast", ["half"], ["f1"], to=TensorProto.FLOAT))


def batch_of_minus_one(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1


@pytest.mark.parametrize("change", [constants, half_behind_cast, batch_of_minus_one])
def test_the_same_network_written_differently_has_the_same_int8_layers(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    model = network()
    change(model)
    done = quantize(model, tmp_path)
    assert done.parity.cosine > 0.999
    assert len(done.certificate.quantized) == 3
    verify_file(tmp_path / "int8.onnx")


@pytest.mark.parametrize("opset", [9, 11, 12, 13, 18])
def test_an_older_opset_is_converted_first(tmp_path: Path, opset: int) -> None:
    done = quantize(network(opset), tmp_path)
    assert done.parity.agreement == 1
    assert int8_weights(tmp_path / "int8.onnx") == {"c1", "c2", "f1"}
    assert done.certificate.opset == max(opset, 13)
    verify_file(tmp_path / "int8.onnx")


def test_a_half_precision_file_keeps_the_types_of_its_inputs_and_outputs(tmp_path: Path) -> None:
    done = quantize(network(dtype=TensorProto.FLOAT16), tmp_path)
    assert done.parity.agreement == 1
    assert int8_weights(tmp_path / "int8.onnx") == {"c1", "c2", "f1"}
    session = onnxruntime.InferenceSession(tmp_path / "int8.onnx")
    assert [value.type for value in (*session.get_inputs(), *session.get_outputs())] == ["tensor(float16)"] * 2
    verify_file(tmp_path / "int8.onnx")


def test_external_data_and_a_fixed_batch_of_one(tmp_path: Path) -> None:
    onnx.save(network(batch=1), tmp_path / "one.onnx", save_as_external_data=True, location="one.bin", size_threshold=0)
    done = ptq_onnx(tmp_path / "one.onnx", tmp_path / "int8.onnx", [images(40, 1)], data=[(images(64, 2), None)])
    assert done.parity.agreement == 1
    assert int8_weights(tmp_path / "int8.onnx") == {"c1", "c2", "f1"}
    verify_file(tmp_path / "int8.onnx")


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (0.5, 1.0), (1.0, 2.0), (0.5, -3.0)])
def test_factors_of_gemm_are_folded_into_weight_and_bias(tmp_path: Path, alpha: float, beta: float) -> None:
    model = network()
    bias = np.linspace(-0.5, 0.5, 64).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(bias, "bias"))
    gemm = helper.make_node("Gemm", ["fl", "f1", "bias"], ["m"], alpha=alpha, beta=beta)
    index = next(index for index, node in enumerate(model.graph.node) if node.name == "hidden")
    model.graph.node[index].CopyFrom(gemm)
    done = quantize(model, tmp_path, search=False)
    assert done.parity.max_error < 0.03
    assert done.certificate.integer_kernels == 3
    folded = read(tmp_path / "float.onnx")
    np.testing.assert_allclose(stored(folded, "f1"), alpha * stored(model, "f1"))
    np.testing.assert_allclose(stored(folded, "bias"), beta * bias)


def test_a_weight_that_two_gemms_share_is_folded_for_one_of_them_only(tmp_path: Path) -> None:
    model = network()
    square = weight(64, 64)
    model.graph.initializer.append(numpy_helper.from_array(square, "square"))
    index = next(index for index, node in enumerate(model.graph.node) if node.name == "head")
    for node in (
        helper.make_node("Gemm", ["mr", "square"], ["g1"], alpha=0.5),
        helper.make_node("Gemm", ["g1", "square"], ["g2"], alpha=1.0),
    ):
        model.graph.node.insert(index, node)
        index += 1
    model.graph.node[index].input[0] = "g2"
    done = quantize(model, tmp_path)
    assert done.parity.cosine > 0.99
    np.testing.assert_array_equal(stored(read(tmp_path / "float.onnx"), "square"), square)


def test_free_height_and_width_need_a_shape(tmp_path: Path) -> None:
    model = network(size="side")
    with pytest.raises(ValueError, match=r"'x' free \(\[\?, 3, \?, \?\]\): give them, --shape x=1,3,SIZE,SIZE"):
        quantize(model, tmp_path)
    done = quantize(model, tmp_path, shapes={"x": (1, 3, 16, 16)})
    assert done.parity.agreement == 1
    assert done.certificate.inputs["x"][0] == "batch"
    verify_file(tmp_path / "int8.onnx")


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ({"y": (1, 3, 16, 16)}, "no input 'y'"),
        ({"x": (1, 3, 16)}, r"--shape x=1,3,16: f takes \[\?, 3, 16, 16\]"),
        ({"x": (1, 4, 16, 16)}, r"--shape x=1,4,16,16: f takes"),
    ],
)
def test_shapes_that_do_not_fit(shapes: dict[str, Sequence[int]], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        data_shapes(network(), shapes, "f")


def test_several_inputs(tmp_path: Path) -> None:
    model = network()
    model.graph.input.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, ["batch", 1]))
    index = next(index for index, node in enumerate(model.graph.node) if node.name == "hidden")
    model.graph.node[index].input[0] = "scaled"
    model.graph.node.insert(index, helper.make_node("Mul", ["fl", "scale"], ["scaled"]))
    onnx.save(model, tmp_path / "float.onnx")
    scale = np.linspace(1, 2, 64, dtype=np.float32)[:, None]
    done = ptq_onnx(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        [(images(64, 1), scale)],
        data=[((images(64, 2), scale), None)],
    )
    assert done.parity.agreement == 1
    verify_file(tmp_path / "int8.onnx")


def refused(model: onnx.ModelProto, folder: Path, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        quantize(model, folder)
    assert not (folder / "int8.onnx").exists()


def test_what_can_not_be_quantized_is_refused_with_the_reason(tmp_path: Path) -> None:
    quantize(network(), tmp_path)
    quantized = onnx.load(tmp_path / "int8.onnx")
    (tmp_path / "int8.onnx").unlink()
    refused(quantized, tmp_path, r"float.onnx is quantized already \(QuantizeLinear\): give the float file")
    refused(network(batch=2**40), tmp_path, "takes batches of 1099511627776 only: 1024 at most")
    classes = network()
    classes.graph.node[-1].output[0] = "scores"
    classes.graph.node.append(helper.make_node("ArgMax", ["scores"], ["y"], axis=1, keepdims=0))
    classes.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.INT64, ["batch"]))
    refused(classes, tmp_path, "'y', holds INT64")
    rates = network()
    rates.graph.input.append(helper.make_tensor_value_info("rate", TensorProto.INT64, []))
    refused(rates, tmp_path, "input 'rate' of float.onnx is a single number")


def test_excluded_layers_stay_float(tmp_path: Path) -> None:
    quantize(network(), tmp_path, exclude=["re:c.*"])
    assert int8_weights(tmp_path / "int8.onnx") == {"f1"}
    with pytest.raises(ValueError, match=r"target 'c3' matches no layer of float.onnx; did you mean 'c[12]'"):
        quantize(network(), tmp_path, exclude=["c3"])


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_observers_narrow_the_ranges(tmp_path: Path, observer: str) -> None:
    """One value of ten thousand that is far from all others."""

    def width(found: Compared) -> float:
        model = onnx.load(tmp_path / "int8.onnx")
        node = next(node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "ar")
        return 255 * float(stored(model, node.input[1]))

    model = network()
    outlier = stored(model, "c1").copy()
    outlier[0] *= 20
    replaced(model, "c1", numpy_helper.from_array(outlier, "c1"))
    wide = width(quantize(model, tmp_path, observer="min_max", search=False))
    narrow = width(quantize(model, tmp_path, observer=observer, search=False))
    assert 0 < narrow < 0.99 * wide


def test_the_search_leaves_layers_float_that_rounding_breaks(tmp_path: Path) -> None:
    """Channels far apart, in an activation of one range: the small ones are rounded to nothing."""
    model = network()
    spread = np.geomspace(1e-4, 1e4, 32).astype(np.float32)
    c2 = stored(model, "c2") * spread[:, None, None, None]
    f1 = stored(model, "f1") / np.repeat(spread, 49)[:, None]
    replaced(model, "c2", numpy_helper.from_array(c2, "c2"))
    replaced(model, "f1", numpy_helper.from_array(f1, "f1"))
    with pytest.raises(ValueError, match="breaks its promise"):
        quantize(model, tmp_path, search=False)
    done = quantize(model, tmp_path)
    assert done.parity.agreement == 1
    assert int8_weights(tmp_path / "int8.onnx") == {"c1"}
    assert "left in float: " in done.notes[0]
