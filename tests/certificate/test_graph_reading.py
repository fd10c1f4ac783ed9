"""Weights are measured along the axis that the operator reads, whatever way the file stores them."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from ovit_engine.certificate import Promise, PromisedLayer
from ovit_engine.certificate.model import GroupRule, TileRule, read_pattern
from ovit_engine.certificate.weights import broken_groups, measure_layers, read_weights, tile_zeros

# [out, in]: each row keeps 2 of 4 inputs; columns 0 and 1 keep all of 4 outputs
ROWS = np.array([[1, 2, 0, 0]] * 4, dtype=np.float32)


def graph(nodes, **arrays):
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, None)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    return helper.make_model(helper.make_graph(nodes, "g", [x], [y], tensors))


def node(op, *inputs, **attributes):
    return helper.make_node(op, list(inputs), ["y"], **attributes)


def to(name, op, *inputs, **attributes):
    return helper.make_node(op, list(inputs), [name], **attributes)


@pytest.mark.parametrize(
    ("nodes", "stored"),
    [
        ([node("MatMul", "x", "w")], ROWS.T),
        ([node("MatMul", "w", "x")], ROWS),
        ([node("Gemm", "x", "w", transB=1)], ROWS),
        ([node("Gemm", "x", "w")], ROWS.T),
        ([to("t", "Transpose", "w", perm=[1, 0]), node("MatMul", "x", "t")], ROWS),
        ([node("Gemm", "w", "x")], ROWS),
        ([node("Gemm", "w", "x", transA=1)], ROWS.T),
        ([node("Conv", "x", "w")], ROWS[:, :, None, None]),
        ([node("Einsum", "x", "w", equation="ni,oi->no")], ROWS),
        ([node("Einsum", "x", "w", equation="bi, io -> bo")], ROWS.T),
        ([node("Einsum", "w", "x", equation="io,bi")], ROWS.T),
    ],
)
def test_two_of_four_is_checked_along_the_inputs(nodes, stored):
    promise = Promise(layers=(PromisedLayer(name="w", pattern="2:4"),))
    (facts,) = measure_layers(graph(nodes, w=stored), promise, {})
    assert facts.shape[:2] == (4, 4)
    assert (facts.zeros, facts.broken_groups) == (8, 0)
    (turned,) = measure_layers(graph(nodes, w=stored.swapaxes(0, 1).copy()), promise, {})
    assert (turned.zeros, turned.broken_groups) == (8, 2)


@pytest.mark.parametrize(
    ("reader", "shapes"),
    [
        (node("ConvTranspose", "x", "w"), {"w": (4, 2, 3, 3)}),
        (node("Einsum", "x", "w", equation="...i,io->...o"), {"w": (8, 4)}),
        (node("LSTM", "x", "w", "r", hidden_size=2), {"w": (1, 8, 3), "r": (1, 8, 2)}),
        (node("GRU", "x", "w", "r", hidden_size=2), {"w": (1, 6, 3), "r": (1, 6, 2)}),
        (node("RNN", "x", "w", "r", hidden_size=2), {"w": (1, 2, 3), "r": (1, 2, 2)}),
    ],
)
def test_each_weight_that_is_multiplied_with_counts_whether_promised_or_not(reader, shapes):
    arrays = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    arrays["w"].flat[0] = 0
    facts = {layer.name: layer for layer in measure_layers(graph([reader], **arrays), Promise(), {})}
    assert facts.keys() == shapes.keys()
    assert (facts["w"].op, facts["w"].zeros) == (reader.op_type, 1)
    assert all(facts[name].numel == arrays[name].size for name in shapes)
    assert facts["w"].broken_2_4 is None  # no sparse kernel reads its axes


def test_embeddings_are_no_weights_of_products():
    reads = [to("e", "Gather", "table", "x"), node("MatMul", "e", "w")]
    model = graph(reads, table=np.ones((7, 4), np.float32), w=ROWS.T)
    assert read_weights(model).keys() == {"w"}


def test_zero_is_what_the_zero_point_says():
    levels = np.array([[5, 0], [5, 7]], dtype=np.int8)
    scale = np.ones(2, np.float32)
    nodes = [to("f", "DequantizeLinear", "w", "s", "z", axis=1), node("MatMul", "x", "f")]
    weights = read_weights(graph(nodes, w=levels, s=scale, z=np.array([5, 0], np.int8)))
    assert weights["w"].is_zero.tolist() == [[True, True], [True, False]]
    assert (weights["w"].dtype, weights["w"].quantized) == ("INT8", True)
    weights = read_weights(
        graph([to("f", "DequantizeLinear", "w", "s", axis=1), node("MatMul", "x", "f")], w=levels, s=scale)
    )
    assert weights["w"].is_zero.sum() == 1


def test_int8_that_is_not_dequantized_is_not_called_quantized():
    weights = read_weights(graph([node("MatMul", "x", "w")], w=ROWS))
    assert (weights["w"].dtype, weights["w"].quantized) == ("FLOAT", False)


def test_a_matmul_of_activations_has_no_weight():
    assert read_weights(graph([node("MatMul", "x", "x")])) == {}


def test_weights_inside_an_if_are_found():
    inner = helper.make_graph([node("MatMul", "x", "w")], "i", [], [helper.make_tensor_value_info("y", 1, None)])
    assert read_weights(graph([node("If", "c", then_branch=inner, else_branch=inner)], w=ROWS)).keys() == {"w"}


def test_a_promised_weight_that_something_else_reads_is_measured_as_stored():
    model = graph([node("Mul", "x", "w")], w=ROWS)
    (facts,) = measure_layers(model, Promise(layers=(PromisedLayer(name="w", pattern="2:4"),)), {})
    assert (facts.op, facts.zeros, facts.broken_groups) == ("other", 8, 0)


def test_a_weight_stored_under_an_equal_ones_name():
    promise = Promise(layers=(PromisedLayer(name="twin"),))
    facts = measure_layers(graph([node("MatMul", "x", "w")], w=ROWS), promise, {"twin": "w"})
    assert [layer.name for layer in facts] == ["twin", "w"]


def test_convolutions_are_grouped_by_input_channel_not_by_pixel():
    zero = np.ones((1, 4, 1, 2), dtype=bool)
    zero[0, :2] = False  # two of four channels, at both pixels
    assert broken_groups(zero, GroupRule(2, 4)) == 0
    assert broken_groups(zero, GroupRule(1, 4)) == 2
    assert broken_groups(zero, GroupRule(2, 8)) is None


def test_only_zeros_in_whole_tiles_count_for_blocks():
    zero = np.array([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=bool)
    assert tile_zeros(zero, TileRule(1, 2)) == 4
    assert tile_zeros(zero, TileRule(2, 2)) == 4
    assert tile_zeros(zero, TileRule(1, 4)) == 0
    assert tile_zeros(zero, TileRule(1, 3)) == 0


def test_patterns_as_recipes_spell_them():
    assert read_pattern("unstructured") is None
    assert read_pattern("2:4") == GroupRule(2, 4)
    assert read_pattern({"block": [1, 4]}) == TileRule(1, 4)
    for wrong in ("2x4", {"tile": [1, 4]}, {"block": [4]}):
        with pytest.raises(ValueError, match="unknown pattern"):
            PromisedLayer(name="w", pattern=wrong)


def test_a_weight_that_is_read_both_ways_is_judged_by_the_worse():
    nodes = [to("a", "MatMul", "x", "w"), to("b", "MatMul", "w", "x")]
    for order in (nodes, nodes[::-1]):
        weight = read_weights(graph([*order, to("y", "Add", "a", "b")], w=ROWS))["w"]
        assert broken_groups(weight.is_zero, GroupRule(2, 4)) == 2


def test_a_stack_of_weights_is_read_along_its_inputs():
    stack = np.stack([ROWS.T, ROWS.T])
    (facts,) = measure_layers(graph([node("MatMul", "x", "w")], w=stack), Promise(), {})
    assert (facts.shape, facts.broken_2_4) == ((8, 4), 0)
    (turned,) = measure_layers(graph([node("MatMul", "x", "w")], w=np.stack([ROWS, ROWS])), Promise(), {})
    assert turned.broken_2_4 == 4


def test_weights_stand_in_the_order_of_their_blocks():
    nodes = [to(f"v{index}", "MatMul", "x", f"blocks.{index}.w") for index in (10, 9, 2)]
    arrays = {f"blocks.{index}.w": ROWS for index in (10, 9, 2)}
    names = [facts.name for facts in measure_layers(graph(nodes, **arrays), Promise(), {})]
    assert names == ["blocks.2.w", "blocks.9.w", "blocks.10.w"]


def test_a_pruned_vector_has_no_axis_of_inputs():
    promise = Promise(layers=(PromisedLayer(name="gain", zeros=2),))
    gain = np.array([0, 0, 1, 2], np.float32)
    model = graph([to("t", "Mul", "x", "gain"), node("MatMul", "t", "w")], gain=gain, w=ROWS)
    facts = {layer.name: layer for layer in measure_layers(model, promise, {})}["gain"]
    assert (facts.shape, facts.zeros, facts.broken_2_4) == ((4,), 2, None)
