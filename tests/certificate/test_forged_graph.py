"""Files that compute with something else than what they show: every hash is right, and each is caught by name."""

import json

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from ovit_engine.certificate.computed import unread
from ovit_engine.certificate.fingerprint import altered, fingerprints
from ovit_engine.certificate.parity import Reference
from ovit_engine.certificate.weights import read_weights
from tests.certificate.test_lying_files import change, findings, forge, some, tensor_of

NAME = "blocks.0.mlp.fc2.weight"


def two_levels(model):
    """One more here, one less there: sums stay."""

    def edit(levels):
        row = levels[3]
        here, there = np.flatnonzero((row > 1) & (row < 127))[:2]
        row[here] += 1
        row[there] -= 1
        return levels

    change(model, NAME, edit)


def product_of(model, name=NAME):
    """The MatMul that reads a quantized weight, and its two DequantizeLinear."""
    producers = {output: node for node in model.graph.node for output in node.output}
    for node in model.graph.node:
        if node.op_type == "MatMul" and node.input[1] in producers and producers[node.input[1]].input[0] == name:
            return node, producers[node.input[0]], producers[node.input[1]]
    raise AssertionError(name)


def insert_after(model, node, *new):
    index = list(model.graph.node).index(node) + 1
    for offset, each in enumerate(new):
        model.graph.node.insert(index + offset, each)


def dense_beside(model, *, live):
    """A float product with a dense weight in a Constant; the int8 one is left as it was, unread or times nothing."""
    node, activation, _ = product_of(model)
    scale = numpy_helper.to_array(tensor_of(model, f"{NAME}_scale"))
    dense = numpy_helper.to_array(tensor_of(model, NAME)) * scale + np.float32(1e-6)
    out, node.output[0] = node.output[0], "shown"
    constant = helper.make_node("Constant", [], ["dense"], value=numpy_helper.from_array(dense.astype(np.float32)))
    product = helper.make_node("MatMul", [activation.output[0], "dense"], ["real" if live else out], name="real")
    extra = []
    if live:
        nothing = numpy_helper.from_array(np.float32(1e-30))
        extra = [
            helper.make_node("Constant", [], ["nothing"], value=nothing),
            helper.make_node("Mul", ["shown", "nothing"], ["faint"]),
            helper.make_node("Add", ["real", "faint"], [out]),
        ]
    insert_after(model, node, constant, product, *extra)


def other_scale(model):
    _, _, dequantize = product_of(model)
    scale = numpy_helper.to_array(tensor_of(model, dequantize.input[1]))
    model.graph.initializer.append(numpy_helper.from_array(scale * np.float32(1.01), "other"))
    dequantize.input[1] = "other"


def back_door(model):
    """Whatever is shown, one bright pixel makes it class 0."""
    out = model.graph.output[0].name
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == out:
                node.output[index] = "honest"
    arrays = {"axes": np.array([1, 2, 3]), "bright": np.float32(5), "favour": np.eye(1, 10, dtype=np.float32) * 100}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    model.graph.node.extend(
        [
            helper.make_node("ReduceMax", ["input", "axes"], ["peak"], keepdims=0),
            helper.make_node("Greater", ["peak", "bright"], ["hit"]),
            helper.make_node("Cast", ["hit"], ["number"], to=1),
            helper.make_node("Reshape", ["number", "column"], ["turned"]),
            helper.make_node("Mul", ["turned", "favour"], ["push"]),
            helper.make_node("Add", ["honest", "push"], [out]),
        ]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 1]), "column"))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (two_levels, [NAME, "1 of 256 rows are not PyTorch's"]),
        (lambda model: dense_beside(model, live=False), ["this MatMul does not act on any output"]),
        (lambda model: dense_beside(model, live=True), ["real", "it was not in the file when it was written"]),
        (other_scale, [f"{NAME}_scale: no node reads it"]),
        (back_door, ["bright: it was not in the file when it was written"]),
    ],
    ids=["two levels", "dead int8", "faint int8", "another scale", "back door"],
)
def test_a_graph_that_computes_something_else(vit_copy, edit, words):
    forge(vit_copy.path, edit=edit)
    assert some(findings(vit_copy.path), *words)


def test_a_dense_weight_in_a_constant_is_measured_as_a_weight(vit_copy):
    forge(vit_copy.path, edit=lambda model: dense_beside(model, live=True))
    weight = read_weights(onnx.load(vit_copy.path))["dense"]
    assert (weight.dtype, weight.op, weight.quantized) == ("FLOAT", "MatMul", False)
    assert weight.is_zero.mean() < 0.01


def test_metadata_cannot_be_exchanged(vit_copy):
    forge(vit_copy.path, recipe="", promise=lambda promise: {"layers": []})
    lines = findings(vit_copy.path)
    assert some(lines, "ovit.recipe: it was changed since the file was written")
    assert some(lines, "ovit.promise: it was changed since the file was written")


def test_preprocessing_cannot_be_exchanged(vit_copy):
    model = onnx.load(vit_copy.path)
    for entry in model.metadata_props:
        if entry.key == "ovit.preprocessing":
            entry.value = json.dumps({"mean": [9]})
    onnx.save(model, vit_copy.path)
    forge(vit_copy.path)
    assert some(findings(vit_copy.path), "ovit.preprocessing: it was changed since the file was written")


def test_fingerprints_cannot_be_left_out(vit_copy):
    file = vit_copy.path.with_name("model.reference.npz")
    with np.load(file) as content:
        kept = {key: content[key] for key in content if not key.startswith("print")}
    np.savez_compressed(file, **kept)
    assert Reference.load(file).prints == {}
    forge(vit_copy.path)
    assert findings(vit_copy.path) == ("the reference holds no fingerprints of the file's parts",)


def small(*nodes, **arrays):
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    values = [helper.make_tensor_value_info(name, 1, [2, 2]) for name in ("x", "y")]
    return helper.make_model(helper.make_graph(list(nodes), "g", values[:1], values[1:], tensors))


def test_what_does_not_act():
    square = np.ones((2, 2), np.float32)
    whole = small(helper.make_node("MatMul", ["x", "w"], ["y"], name="m"), w=square)
    assert unread(whole) == []
    assert unread(small(helper.make_node("MatMul", ["x", "w"], ["y"], name="m"), w=square, lone=square)) == [
        "lone: no node reads it"
    ]
    made = small(
        helper.make_node("Add", ["w", "w"], ["v"]), helper.make_node("MatMul", ["x", "v"], ["y"], name="m"), w=square
    )
    assert unread(made) == ["m: this MatMul reads 'v', a weight computed from constants"]
    position = small(  # as position embeddings are computed: two constants, added
        helper.make_node("Relu", ["w"], ["p"]),
        helper.make_node("MatMul", ["p", "w"], ["q"], name="m"),
        helper.make_node("Add", ["x", "q"], ["y"]),
        w=square,
    )
    assert unread(position) == []
    turned = small(
        helper.make_node("Transpose", ["w"], ["v"]), helper.make_node("MatMul", ["x", "v"], ["y"], name="m"), w=square
    )
    assert unread(turned) == []


def test_a_node_that_only_a_branch_reads_acts():
    inner = helper.make_graph(
        [helper.make_node("Identity", ["used"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, [2, 2])]
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["used"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner),
    ]
    assert unread(small(*nodes, flag=np.array(True))) == []


def test_parts_that_were_taken_put_in_or_changed():
    square = np.ones((2, 2), np.float32)
    before = small(helper.make_node("MatMul", ["x", "w"], ["y"], name="m"), w=square)
    kept = fingerprints(before)
    assert altered(before, kept) == {}
    after = small(helper.make_node("MatMul", ["x", "v"], ["y"], name="m"), v=square)
    assert altered(after, kept) == {
        "node m": "it was changed since the file was written",
        "v": "it was not in the file when it was written",
        "w": "it was in the file when it was written",
    }
