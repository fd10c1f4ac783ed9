"""Multiply-adds and tokens of a file, from shapes alone."""

import copy
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ovit_engine.certificate.render import macs_text
from ovit_engine.certificate.token_counts import TokenCounts, counts_after
from ovit_engine.certificate.work import measure_work
from ovit_engine.flops import count_flops
from ovit_engine.quant import bake

FLOAT, UINT8 = TensorProto.FLOAT, TensorProto.UINT8
sizes = st.integers(1, 5)


def graph(nodes: list[onnx.NodeProto], x: Any, arrays: dict[str, np.ndarray] | None = None, kind: int = FLOAT) -> Any:
    """A model from x to y; nothing is said of y's shape."""
    tensors = [numpy_helper.from_array(array, name) for name, array in (arrays or {}).items()]
    inputs = [helper.make_tensor_value_info("x", kind, x)]
    outputs = [helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)]
    outputs[0].type.tensor_type.elem_type = FLOAT
    made = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    return helper.make_model(
        made, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)], ir_version=9
    )


def ones_through(model: onnx.ModelProto, x: np.ndarray) -> int:
    """Products and sums of ones add up to the number of products, as long as nothing is padded."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return int(session.run(None, {"x": x})[0].astype(np.int64).sum())


def check(op: str, x: tuple[int, ...], w: tuple[int, ...], kind: int = FLOAT, **attributes: Any) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    arrays = {"w": np.ones(w, dtype)}
    inputs = ["x", "w"]
    if op.startswith("QLinear"):
        arrays |= {"s": np.float32(1), "z": np.uint8(0)}
        inputs = ["x", "s", "z", "w", "s", "z", "s", "z"]
    model = graph([helper.make_node(op, inputs, ["y"], **attributes)], list(x), arrays, kind)
    model.graph.output[0].type.tensor_type.elem_type = kind if op.startswith("QLinear") or kind == FLOAT else 6
    work = measure_work(model)
    assert work.unknown == ""
    assert work.macs is not None
    assert abs(work.macs * x[0] - ones_through(model, np.ones(x, dtype))) <= x[0] / 2  # of one image


@settings(deadline=None, max_examples=30)
@given(sizes, sizes, sizes, sizes, sizes, st.sampled_from([FLOAT, UINT8]))
def test_products(batch: int, heads: int, rows: int, inner: int, out: int, kind: int) -> None:
    op = "MatMul" if kind == FLOAT else "MatMulInteger"
    check(op, (batch, heads, rows, inner), (inner, out), kind)
    check(op, (batch, heads, rows, inner), (1, heads, inner, out), kind)
    if kind == UINT8:
        check("QLinearMatMul", (batch, rows, inner), (inner, out), kind)
    else:
        check("Gemm", (batch, inner), (out, inner), transB=1)
        check("Gemm", (batch, inner), (inner, out))


@settings(deadline=None, max_examples=30)
@given(sizes, st.integers(1, 3), sizes, sizes, st.integers(1, 3), st.integers(1, 2), st.integers(0, 4))
def test_convolutions(batch: int, groups: int, into: int, out: int, kernel: int, stride: int, more: int) -> None:
    image, weight = (batch, groups * into, kernel + more, kernel + 1), (groups * out, into, kernel, 1)
    check("Conv", image, weight, strides=[stride, stride], group=groups)
    check("QLinearConv", image, weight, UINT8, strides=[stride, stride], group=groups)
    check("ConvInteger", image, weight, UINT8, strides=[stride, stride], group=groups)
    check("ConvTranspose", image, (groups * into, out, kernel, 2), strides=[stride, stride], group=groups)


def test_a_turned_left_operand() -> None:
    nodes = [helper.make_node("Gemm", ["x", "w"], ["y"], transA=1)]
    assert measure_work(graph(nodes, [1, 7], {"w": np.ones((1, 3), np.float32)})).macs == 21


def test_a_free_batch_is_one_image_and_a_fixed_one_is_divided() -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    weight = {"w": np.ones((3, 4), np.float32)}
    assert measure_work(graph(nodes, ["batch", 5, 3], weight)).macs == 60
    assert measure_work(graph(nodes, [8, 5, 3], weight)).macs == 60
    assert measure_work(graph(nodes, [None, 5, 3], weight)).macs == 60


def branch(op: str) -> list[onnx.NodeProto]:
    inner = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["z"], name="inner")],
        "b",
        [],
        [helper.make_tensor_value_info("z", FLOAT, [1, 3])],
    )
    return [helper.make_node("If", ["flag"], ["y"], name="if", then_branch=inner, else_branch=inner)]


@pytest.mark.parametrize(
    ("nodes", "x", "words"),
    [
        ([helper.make_node("Einsum", ["x", "w"], ["y"], name="e", equation="ab,bc->ac")], [1, 3], "what Einsum 'e'"),
        (
            [helper.make_node("FusedMatMul", ["x", "w"], ["y"], name="f", domain="com.microsoft")],
            [1, 3],
            "what FusedMatMul 'f' computes",
        ),
        (branch("MatMul"), [1, 3], "MatMul 'inner' inside If 'if' may run often"),
        ([helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], [1, "tokens", 3], "the shape of 'x' at MatMul 'm'"),
        ([helper.make_node("MatMul", ["x", "w"], ["y"], name="m")], [1, 4], "the shape of 'y' at MatMul 'm'"),
    ],
)
def test_what_can_not_be_counted_is_said(nodes: list[onnx.NodeProto], x: Any, words: str) -> None:
    work = measure_work(graph(nodes, x, {"w": np.ones((3, 3), np.float32), "flag": np.array(True)}))
    assert work.macs is None
    assert words in work.unknown


def test_a_graph_that_onnx_refuses_is_said() -> None:
    model = graph([helper.make_node("MatMul", ["x", "w"], ["y"])], [1, 3], {"w": np.ones((3, 3), np.float32)})
    del model.opset_import[:]
    work = measure_work(model)
    assert (work.macs, work.tokens) == (None, None)
    assert "onnx can't infer its shapes: " in work.unknown


def test_a_branch_without_products_counts_as_nothing() -> None:
    assert (
        measure_work(graph(branch("Add"), [1, 3], {"w": np.ones((1, 3), np.float32), "flag": np.array(True)})).macs == 0
    )


def test_files_of_the_tests_do_the_work_that_pytorch_does(vit: Any, convnet: Any, digits: Any) -> None:
    for file, image in ((vit, digits[0][:1]), (convnet, digits[0][:1])):
        dense = count_flops(bake(copy.deepcopy(file.model)), image).dense
        assert file.certificate.macs == dense / 2
    assert vit.certificate.tokens == TokenCounts(entering=17, attention=(17, 17), leaving=17)
    assert convnet.certificate.tokens is None


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        (counts_after(17, 2, [], within=False), "17 in all 2 blocks"),
        (counts_after(17, 3, [(1, 12), (2, 9)], within=False), "17 -> 12, 9 before the attention of blocks 1, 2"),
        (counts_after(17, 3, [(0, 12)], within=False), "17 -> 12 before the attention of block 0"),
        (
            counts_after(17, 3, [(1, 12), (2, 9)], within=True),
            "17 -> 12 before the attention of block 2; 9 out of the last",
        ),
        (counts_after(17, 1, [(0, 9)], within=True), "17 -> 9 out of the last"),
        (
            counts_after(9, 5, [(i, 8 - i) for i in range(5)], within=False),
            "9 -> 8, 7, 6, 5, 4 before the attention of blocks 0 to 4",
        ),
    ],
)
def test_counts_in_words(counts: TokenCounts, words: str) -> None:
    assert str(counts) == words
    assert counts.reduced == ("->" in words)


def test_large_counts_in_words() -> None:
    assert [macs_text(count) for count in (599_352, 1_254_000, 4_598_882_304)] == ["599,352", "1.25 M", "4.60 G"]


def attention(*counts: int, width: int = 8, heads: int = 2, leaving: int = 0) -> Any:
    """Blocks that do nothing but look like attention on so many tokens: scores from slices of constants."""
    nodes, arrays = [], {"start": np.array([0]), "axis": np.array([1])}
    current, before = "x", 0
    for i, count in enumerate([*counts, leaving or counts[-1]]):
        arrays |= {f"n{i}": np.array([count]), f"s{i}": np.array([0, 0, heads, width // heads])}
        if current == "x" or count <= before:
            nodes.append(helper.make_node("Slice", [current, "start", f"n{i}", "axis"], [f"t{i}"]))
        else:
            nodes.append(helper.make_node("Concat", [current, current], [f"t{i}"], axis=1))
        before = count
        if i < len(counts):
            nodes += [
                helper.make_node("Reshape", [f"t{i}", f"s{i}"], [f"h{i}"]),
                helper.make_node("Transpose", [f"h{i}"], [f"q{i}"], perm=[0, 2, 1, 3]),
                helper.make_node("Transpose", [f"h{i}"], [f"k{i}"], perm=[0, 2, 3, 1]),
                helper.make_node("MatMul", [f"q{i}", f"k{i}"], [f"a{i}"]),
                helper.make_node("Softmax", [f"a{i}"], [f"p{i}"]),
            ]
        nodes.append(helper.make_node("Add", [f"t{i}", f"t{i}"], [f"r{i}"]))
        current = f"r{i}"
    nodes.append(helper.make_node("Slice", [current, "start", "axis", "axis"], ["y"]))  # the class token
    return graph(nodes, ["batch", counts[0], width], arrays)


def test_tokens_of_a_graph() -> None:
    assert measure_work(attention(9, 9, 5)).tokens == TokenCounts(entering=9, attention=(9, 9, 5), leaving=5)
    assert measure_work(attention(9, 7, leaving=3)).tokens == TokenCounts(entering=9, attention=(9, 7), leaving=3)
    work = measure_work(attention(9, 5))
    assert work.macs == 8 * (9 * 9 + 5 * 5)


def test_tokens_that_grow_are_no_count() -> None:
    work = measure_work(attention(5, 10))
    assert work.macs == 8 * (5 * 5 + 10 * 10)
    assert work.tokens is None
    assert work.no_tokens == "they grow along the graph: 5, 5, 10, 10"


def test_attention_in_windows_is_no_count_of_tokens() -> None:
    """36 tokens in four windows of 9, which a slice makes 9 in the end: none was dropped before the attention."""
    model = attention(9, 9)
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("image", FLOAT, [1, 36, 8]))
    model.graph.node.insert(0, helper.make_node("Relu", ["image"], ["stream"]))
    model.graph.node.insert(1, helper.make_node("Reshape", ["stream", "windows"], ["x"]))
    last = model.graph.node[-1]
    model.graph.node.extend(
        [
            helper.make_node("Reshape", [last.input[0], "whole"], ["joined"]),
            helper.make_node("Slice", ["joined", "start", "n0", "axis"], ["some"]),
            helper.make_node("Add", ["some", "some"], ["sum"]),
            helper.make_node("Slice", ["sum", "start", "axis", "axis"], ["y"]),
        ]
    )
    model.graph.node.remove(last)
    for name, shape in (("windows", [4, 9, 8]), ("whole", [1, 36, 8])):
        model.graph.initializer.append(numpy_helper.from_array(np.array(shape), name))
    assert measure_work(model).macs == 2 * 4 * 8 * 81
    assert measure_work(model).tokens is None
    assert measure_work(model).no_tokens == "attention is that of windows, not of an image"


def test_attention_as_one_operator_is_told_with_the_way_out() -> None:
    model = attention(9, 9)
    model.graph.node[0].op_type = "Attention"
    assert "export at opset 21, where it is written out" in measure_work(model).no_tokens


def test_weights_are_not_looked_at() -> None:
    """Shapes alone are handed to onnx: a gigabyte of weights is not copied."""
    model = graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], ["batch", 5, 64], {"w": np.ones((64, 64), np.float32)}
    )
    before = model.SerializeToString()
    assert measure_work(model).macs == 5 * 64 * 64
    assert model.SerializeToString() == before
    model.graph.initializer[0].ClearField("raw_data")
    assert measure_work(model).macs == 5 * 64 * 64
