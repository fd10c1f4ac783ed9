"""Weights in places where a file of ours has none: measured there, counted, or refused."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ovit_engine.certificate import CertificateError, Promise
from ovit_engine.certificate.computed import inert_parts
from ovit_engine.certificate.measure import Provenance
from ovit_engine.certificate.model import reference_path
from ovit_engine.certificate.parity import Reference, Sample
from ovit_engine.certificate.stored import count_others, hidden
from ovit_engine.certificate.verify import verify_file
from ovit_engine.certificate.weights import measure_layers, read_weights, to_array
from ovit_engine.export.exporter import publish
from tests.exported_files import findings, small

NAME = "blocks.0.mlp.fc2.weight"

WEIGHT = np.array([[1, 2, 0, 0], [0, 3, 4, 0], [5, 6, 0, 0], [0, 0, 7, 8]], np.float32)  # 2:4 in rows, not in columns


def product(*before, weight="w", **arrays):
    return small(*before, helper.make_node("MatMul", ["x", weight], ["y"], name="m"), **arrays)


def branches(of_weight=WEIGHT):
    def branch(name):
        body = [helper.make_node("MatMul", ["x", f"w{name}"], [f"z{name}"])]
        out = [helper.make_tensor_value_info(f"z{name}", 1, None)]
        return helper.make_graph(body, name, [], out, [numpy_helper.from_array(of_weight, f"w{name}")])

    return small(
        helper.make_node("If", ["flag"], ["y"], then_branch=branch("a"), else_branch=branch("b")), flag=np.array(True)
    )


def test_a_weight_in_a_branch_is_a_weight():
    assert {name: int(weight.is_zero.sum()) for name, weight in read_weights(branches()).items()} == {"wa": 8, "wb": 8}
    assert count_others(branches(), {"wa", "wb"}) == 1  # the flag


@pytest.mark.parametrize(("perm", "broken"), [([1, 0], 0), (None, 0), ([0, 1], 1)])
def test_the_order_of_a_transpose_counts(perm, broken):
    """Groups are read along the axis that the operator sums over: `perm` [0, 1] exchanges nothing."""
    options = {} if perm is None else {"perm": perm}
    model = product(helper.make_node("Transpose", ["w"], ["v"], **options), weight="v", w=WEIGHT)
    (facts,) = measure_layers(model, Promise(), {})
    assert facts.broken_2_4 == broken
    assert inert_parts(model) == []


def test_other_exchanges_of_axes_make_a_computed_weight():
    stack = np.ones((4, 4, 4), np.float32)
    model = product(helper.make_node("Transpose", ["w"], ["v"]), weight="v", w=stack)  # all three axes turned round
    assert inert_parts(model) == ["m: this MatMul reads 'v', a weight computed from constants"]
    plain = product(helper.make_node("Transpose", ["w"], ["v"], perm=[0, 2, 1]), weight="v", w=stack)
    assert inert_parts(plain) == []


def test_values_around_in_a_circle_end():
    nodes = [helper.make_node("Identity", ["a"], ["b"]), helper.make_node("Identity", ["b"], ["a"])]
    assert read_weights(product(*nodes, weight="a")) == {}


def test_everything_stored_is_counted():
    constants = [
        helper.make_node("Constant", [], ["c0"], value=numpy_helper.from_array(np.ones((3, 3), np.float32))),
        helper.make_node("Constant", [], ["c1"], value_floats=[1.0, 2.0]),
        helper.make_node("Constant", [], ["c2"], value_int=5),
        helper.make_node("Constant", [], ["c3"], value_strings=["1.5", "-2"]),
        helper.make_node("ConstantOfShape", ["c2"], ["c4"], value=numpy_helper.from_array(np.ones(1, np.float32))),
    ]
    assert count_others(product(*constants, w=WEIGHT), {"w"}) == 9 + 2 + 1 + len("1.5-2") + 1
    einsum = small(helper.make_node("Einsum", ["x", "w"], ["y"], equation="bi,ij->bj"), w=WEIGHT)
    assert count_others(einsum, set(read_weights(einsum))) == 0
    added = small(helper.make_node("Add", ["x", "w"], ["y"]), w=WEIGHT)
    assert count_others(added, set(read_weights(added))) == WEIGHT.size


def outside(model):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../w.bin")


def own_function(model):
    body = [helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(WEIGHT))]
    model.functions.append(helper.make_function("mine", "Linear", ["x"], ["w"], body, [helper.make_opsetid("", 21)]))


def sparse(model):
    values = numpy_helper.from_array(np.ones(2, np.float32), "s")
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0, 5])), [4, 4])
    )


def sparse_constant(model):
    values = numpy_helper.from_array(np.ones(2, np.float32))
    tensor = helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([0, 5])), [4, 4])
    model.graph.node.insert(0, helper.make_node("Constant", [], ["s"], sparse_value=tensor))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (outside, "w: its values lie outside of the file"),
        (own_function, "Linear: a function of the file's own"),
        (sparse, "s: stored as ONNX's sparse tensor"),
        (sparse_constant, "s: stored as ONNX's sparse tensor"),
        (lambda model: model.training_info.add(), "training_info: a second graph"),
        (lambda model: model.graph.input.append(helper.make_tensor_value_info("w", 1, [4, 4])), "w: an input as well"),
        (lambda model: model.graph.initializer.append(model.graph.initializer[0]), "w: stored twice"),
        (lambda model: [model.metadata_props.add(key="k", value=v) for v in "ab"], "k: twice in the metadata"),
    ],
)
def test_what_can_not_be_measured(change, words):
    model = product(w=WEIGHT)
    assert hidden(model) == []
    change(model)
    (line,) = hidden(model)
    assert line.startswith(words)


def test_a_file_with_such_a_thing_fails(vit_copy):
    model = onnx.load(vit_copy.path)
    outside(model)
    vit_copy.path.write_bytes(model.SerializeToString())
    (line,) = findings(vit_copy.path)
    assert "its values lie outside of the file" in line


def test_tensors_that_can_not_be_read_are_named():
    model = product(w=WEIGHT)
    model.graph.initializer[0].data_type = 77
    with pytest.raises(CertificateError, match="w: no such type, 77"):
        to_array(model.graph.initializer[0])
    dequantize = helper.make_node("DequantizeLinear", ["w", "s", "z"], ["v"], axis=0)
    levels = WEIGHT.astype(np.int8)
    scale = np.ones(3, np.float32)
    with pytest.raises(CertificateError, match=r"w: zero points of shape \[3, 1\] for levels of shape \[4, 4\]"):
        read_weights(product(dequantize, weight="v", w=levels, s=scale, z=np.zeros(3, np.int8)))
    with pytest.raises(CertificateError, match="w: its zero point 'z' is no stored tensor"):
        read_weights(product(dequantize, weight="v", w=levels, s=scale))


def test_zero_points_of_blocks():
    """Levels 1 and 2 stand for zero in the upper and lower two rows."""
    options = {"axis": 0, "block_size": 2}
    dequantize = helper.make_node("DequantizeLinear", ["w", "s", "z"], ["v"], **options)
    points = np.array([[1] * 4, [2] * 4], np.int8)
    model = product(dequantize, weight="v", w=WEIGHT.astype(np.int8), s=np.ones((2, 4), np.float32), z=points)
    assert int(read_weights(model)["w"].is_zero.sum()) == 1


def test_what_does_not_act():
    square = np.ones((2, 2), np.float32)
    whole = small(helper.make_node("MatMul", ["x", "w"], ["y"], name="m"), w=square)
    assert inert_parts(whole) == []
    assert inert_parts(small(helper.make_node("MatMul", ["x", "w"], ["y"], name="m"), w=square, lone=square)) == [
        "lone: no node reads it"
    ]
    made = small(
        helper.make_node("Add", ["w", "w"], ["v"]), helper.make_node("MatMul", ["x", "v"], ["y"], name="m"), w=square
    )
    assert inert_parts(made) == ["m: this MatMul reads 'v', a weight computed from constants"]
    position = small(  # as position embeddings are computed: two constants, added
        helper.make_node("Relu", ["w"], ["p"]),
        helper.make_node("MatMul", ["p", "w"], ["q"], name="m"),
        helper.make_node("Add", ["x", "q"], ["y"]),
        w=square,
    )
    assert inert_parts(position) == []
    turned = small(
        helper.make_node("Transpose", ["w"], ["v"]), helper.make_node("MatMul", ["x", "v"], ["y"], name="m"), w=square
    )
    assert inert_parts(turned) == []


def test_a_node_that_only_a_branch_reads_acts():
    inner = helper.make_graph(
        [helper.make_node("Identity", ["used"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, [2, 2])]
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["used"]),
        helper.make_node("If", ["flag"], ["y"], then_branch=inner, else_branch=inner),
    ]
    assert inert_parts(small(*nodes, flag=np.array(True))) == []


def test_a_dense_weight_in_a_constant_is_measured_as_a_weight():
    constant = helper.make_node("Constant", [], ["dense"], value=numpy_helper.from_array(WEIGHT + 1))
    weight = read_weights(product(constant, weight="dense"))["dense"]
    assert (weight.dtype, weight.op, weight.quantized, int(weight.is_zero.sum())) == ("FLOAT", "MatMul", False, 0)


def matmul_of(model, name):
    """The MatMul that reads a quantized weight, and the DequantizeLinear between."""
    (dequantize,) = [node for node in model.graph.node if node.input[0] == name]
    (node,) = [node for node in model.graph.node if dequantize.output[0] in node.input]
    return node, dequantize


def dense_instead(model):
    """The int8 product stays, and nothing reads it."""
    node, _ = matmul_of(model, NAME)
    out, node.output[0] = node.output[0], "shown"
    dense = np.full((256, 64), 1e-3, np.float32)
    index = list(model.graph.node).index(node) + 1
    model.graph.initializer.append(numpy_helper.from_array(dense, "dense"))
    model.graph.node.insert(index, helper.make_node("MatMul", [node.input[0], "dense"], [out], name="real"))


def other_scale(model):
    _, dequantize = matmul_of(model, NAME)
    (scale,) = [tensor for tensor in model.graph.initializer if tensor.name == dequantize.input[1]]
    model.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.01), "other"))
    dequantize.input[1] = "other"


def before_the_output(model, nodes, **arrays):
    """Let `nodes` read what was the output as "honest"."""
    (out,) = [value.name for value in model.graph.output]
    for node in model.graph.node:
        node.output[:] = ["honest" if name == out else name for name in node.output]
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items())
    model.graph.node.extend(nodes(out))


def back_door(model):
    """Whatever is shown, one bright pixel makes it class 0."""

    def nodes(out):
        return [
            helper.make_node("ReduceMax", ["input", "axes"], ["peak"], keepdims=0),
            helper.make_node("Greater", ["peak", "bright"], ["hit"]),
            helper.make_node("Cast", ["hit"], ["number"], to=1),
            helper.make_node("Reshape", ["number", "column"], ["turned"]),
            helper.make_node("Mul", ["turned", "favor"], ["push"]),
            helper.make_node("Add", ["honest", "push"], [out]),
        ]

    arrays = {"axes": np.array([1, 2, 3]), "bright": np.float32(5), "favor": np.eye(1, 10, dtype=np.float32) * 100}
    before_the_output(model, nodes, column=np.array([-1, 1]), **arrays)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dense_instead, ["this MatMul does not act on any output", "dense: the reference has no hash of it"]),
        (other_scale, [f"{NAME}_scale: no node reads it"]),
        (back_door, ["ops differs: ", "other_numbers differs: "]),
    ],
)
def test_a_graph_that_computes_something_else(vit_copy, change, words):
    model = onnx.load(vit_copy.path)
    change(model)
    onnx.save(model, vit_copy.path)
    found = "\n".join(findings(vit_copy.path))
    for each in words:
        assert each in found


def test_a_dense_weight_in_a_sum_of_products_is_seen_in_the_numbers(vit, tmp_path):
    """It is no weight of a product that is measured: what tells of it is how much the file stores."""
    model, reference = onnx.load(vit.path), Reference.load(reference_path(vit.path))
    dense = np.random.default_rng(0).normal(size=(2000, 64)).astype(np.float32) * 1e-9
    head = next(node for node in model.graph.node if model.graph.output[0].name in node.output)

    def nodes(out):
        return [
            helper.make_node("Unsqueeze", [head.input[0], "axis"], ["u"]),
            helper.make_node("Mul", ["u", "dense"], ["e"]),
            helper.make_node("ReduceSum", ["e", "axes"], ["s"], keepdims=0),
            helper.make_node("Unsqueeze", ["s", "axis"], ["r"]),
            helper.make_node("Add", ["honest", "r"], [out]),
        ]

    before_the_output(model, nodes, dense=dense, axis=np.array([1]), axes=np.array([1, 2]))
    sample = Sample(reference.stored, reference.labels, reference.source)
    path = tmp_path / "model.onnx"
    publish(model, path, Provenance.read(model), sample, reference)
    verified = verify_file(path)
    assert verified.other_numbers == vit.certificate.other_numbers + dense.size + 3
    assert ("other_numbers", verified.other_numbers) in {(note.code, note.count) for note in verified.notes}
    assert "other_numbers" not in {note.code for note in vit.certificate.notes}
