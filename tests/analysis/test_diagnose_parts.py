"""The parts that `diagnose` is made of, each by itself: the search, ranges, weights of two files."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovit_engine.analysis.diagnose import _bisect, is_pruned, match_weights
from ovit_engine.analysis.qdq import LayerWeight, QdqLayer, find_layers, quantizer_range, rewrite
from ovit_engine.analysis.qdq_errors import weight_errors
from ovit_engine.certificate.kernels import open_session, run_outputs


@given(st.lists(st.sampled_from([0.0, 0.001, 0.5, 1.0, 7.0]), min_size=1, max_size=40))
def test_bisection_finds_every_layer_that_makes_much(noises: list[float]) -> None:
    """Errors add up: layers above a twentieth are found with their own error, the others are 0."""
    names = [str(index) for index in range(len(noises))]
    total = sum(noises)
    calls = []

    def noise_of(group: list[str]) -> float:
        calls.append(group)
        return sum(noises[int(name)] for name in group)

    found = _bisect(names, noise_of, 0.05 * total)
    assert found == {
        name: noise if noise and noise >= 0.05 * total else 0.0 for name, noise in zip(names, noises, strict=True)
    }
    assert len(calls) <= 2 * len(names)


def test_bisection_costs_few_runs_where_one_layer_is_to_blame() -> None:
    calls = []

    def noise_of(group: list[str]) -> float:
        calls.append(group)
        return float("37" in group)

    assert _bisect([str(i) for i in range(48)], noise_of, 1.0)["37"] == 1
    assert len(calls) <= 1 + 2 * 6


def test_ranges_by_hand() -> None:
    values = np.array([-1.0, 0.0, 3.0])
    scale, zero = quantizer_range(values, np.array(7, np.uint8), "min_max")
    assert scale == pytest.approx(4 / 255)
    assert zero == 64  # 1 / (4 / 255) = 63.75
    scale, zero = quantizer_range(values, np.array(0, np.int8), "min_max")
    assert (scale, zero) == (pytest.approx(3 / 127), 0)
    scale, zero = quantizer_range(np.array([]), np.array(7, np.uint8), "mse")
    assert np.isfinite(scale)
    assert zero == 0
    many = np.append(np.linspace(0, 1, 100_000), 1e5)
    assert quantizer_range(many, np.array(7, np.uint8), "percentile")[0] == pytest.approx(1 / 255, rel=1e-2)


def test_least_error_beats_the_extremes() -> None:
    values = np.append(np.random.default_rng(0).standard_normal(50_000), 30.0)

    def error(observer: str) -> float:
        scale, zero = quantizer_range(values, np.array(7, np.uint8), observer)
        levels = np.clip(np.rint(values / scale) + int(zero), 0, 255)
        return float(np.square((levels - int(zero)) * scale - values).sum())

    assert error("mse") < 0.95 * error("min_max")


def layer(name: str, values: np.ndarray, level: float | None = None) -> QdqLayer:
    levels = None if level is None else np.full(values.shape, level, np.float32)
    weight = LayerWeight(f"{name}.weight", 1, values.astype(np.float32), levels)
    return QdqLayer(name, name, "MatMul", f"{name}.out", weight, ())


def test_weights_are_matched_by_name_then_by_order() -> None:
    one, two = np.arange(6.0).reshape(2, 3), np.ones((3, 4))
    layers = [layer("a", one), layer("b", two)]
    found = match_weights(layers, [layer("b", two * 2), layer("a", one * 2)])
    assert isinstance(found, dict)
    np.testing.assert_array_equal(found["a.out"], one * 2)
    np.testing.assert_array_equal(found["b.out"], two * 2)
    found = match_weights(layers, [layer("x", one * 3), layer("y", two)])
    assert isinstance(found, dict)
    np.testing.assert_array_equal(found["a.out"], one * 3)
    assert match_weights(layers, [layer("a", one)]) == "missing layer"
    assert match_weights(layers, [layer("a", two), layer("b", two)]) == "other shape"


INTEGERS = np.array([[3, -2, 0], [1, 127, -128]], np.int8)  # [out 2, in 3]
SCALES = np.array([0.5, 0.25], np.float32)


def product_file(*, transposed: bool, quantized: bool) -> onnx.ModelProto:
    """x [1, 3] by a weight stored as [out, in], which a Gemm reads as it is and a MatMul through a Transpose."""
    stored = INTEGERS if quantized else INTEGERS.astype(np.float32)
    arrays = {"m.weight": stored, "scale": SCALES, "zero": np.array([1, 0], np.int8)}
    nodes, weight = [], "m.weight"
    if quantized:
        nodes.append(onnx.helper.make_node("DequantizeLinear", [weight, "scale", "zero"], ["float"], axis=0))
        weight = "float"
    if transposed:
        nodes.append(onnx.helper.make_node("Transpose", [weight], ["turned"], perm=[1, 0]))
        nodes.append(onnx.helper.make_node("MatMul", ["x", "turned"], ["y"]))
    else:
        nodes.append(onnx.helper.make_node("Gemm", ["x", weight], ["y"], transB=1))
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, s]) for n, s in (("x", 3), ("y", 2)))
    constants = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], constants)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("quantized", [True, False])
def test_weights_are_read_in_out_and_dequantized(transposed: bool, quantized: bool, tmp_path: Path) -> None:
    model = product_file(transposed=transposed, quantized=quantized)
    (found,) = find_layers(model)
    assert (found.name, found.output) == ("m", "y")
    assert found.weight is not None
    expected = INTEGERS.T.astype(np.float32)
    if quantized:
        expected = (expected - [1, 0]) * SCALES
        np.testing.assert_array_equal(found.weight.level, np.broadcast_to(SCALES, (3, 2)))
    else:
        assert found.weight.level is None
    np.testing.assert_array_equal(found.weight.values, expected)
    doubled = rewrite(model, float_inputs=[], weights={"y": found.weight.values * 2}, layers=[found])
    onnx.save(doubled, tmp_path / "doubled.onnx")
    x = np.array([[1.0, -2.0, 0.5]], np.float32)
    np.testing.assert_allclose(run_outputs(open_session(tmp_path / "doubled.onnx"), [x]), 2 * x @ expected)


def test_weight_errors_by_hand() -> None:
    """20 log10(|float| / |float - dequantized|)."""
    found = weight_errors(
        [layer("a", np.array([[3.0, 4.5]])), layer("b", np.ones((2, 2)))], {"a.out": np.array([[3.0, 4.0]])}
    )
    assert found == {"a.out": pytest.approx(20.0)}


def test_a_small_value_that_rounded_to_zero_is_not_pruned() -> None:
    weight = layer("a", np.array([[0.0, 0.0, 0.1]]), level=0.1).weight
    assert weight
    np.testing.assert_array_equal(is_pruned(weight, np.array([[0.05, 0.06, 0.1]])), [[False, True, False]])
    weight = layer("a", np.array([[0.0, 0.0]])).weight
    assert weight
    np.testing.assert_array_equal(is_pruned(weight, np.array([[1e-9, 0.0]])), [[True, False]])
