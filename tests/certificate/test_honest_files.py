"""What is written passes its own verification, or is not written: models that are built otherwise than most."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from ovit_engine import Engine, Recipe
from ovit_engine.certificate import ExportError, Promise
from ovit_engine.certificate.check import check
from ovit_engine.certificate.kernels import walk_graphs
from ovit_engine.certificate.measure import Provenance
from ovit_engine.certificate.model import LayerFacts, count_weights
from ovit_engine.certificate.parity import make_reference, random_sample
from ovit_engine.certificate.stored import count_others, hidden
from ovit_engine.certificate.tensors import hash_tensors
from ovit_engine.certificate.verify import verify_file
from ovit_engine.export.exporter import export_model, publish
from ovit_engine.post_training.onnx_graph import read
from tests.exported_files import small


def test_what_is_pruned_in_one_layer_is_so_in_the_layer_that_shares_it(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    model[2].weight = model[0].weight
    recipe = Recipe.parse(
        """
        modifiers:
        - magnitude_prune: {pattern: "2:4", targets: ["0.weight"]}
        - quantize: {start: 1st, freeze_observers: 2st, targets: ["re:[024]"]}
        """
    )
    engine = Engine(model, recipe, steps_per_epoch=2, epochs=1).prepare()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    engine.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    engine.detach()
    certificate = engine.export(tmp_path / "m.onnx", torch.randn(1, 16))
    verify_file(tmp_path / "m.onnx")
    assert {layer.name for layer in certificate.pruned} == {"0.weight", "2.weight"}
    assert certificate.sparsity == 0.5
    promised = {layer.name: layer for layer in certificate.promise.layers}
    assert promised["2.weight"].pattern == "2:4"
    assert promised["2.weight"].zeros == promised["0.weight"].zeros == 128


def test_of_a_shared_weight_one_counts_whichever_is_asked_for():
    options = {"shape": (2, 2), "op": "MatMul", "dtype": "FLOAT", "quantized": False, "numel": 4, "zeros": 1}
    first, second = LayerFacts(name="a", **options), LayerFacts(name="b", shared_with="a", **options)
    assert count_weights([first, second]) == count_weights([second]) == count_weights([first]) == 4


class Scaled(nn.Module):
    """A weight that is computed of two, too large for the exporter to do it beforehand."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1100, 1000) / 32)
        self.gain = nn.Parameter(torch.rand(1000))
        self.bias = nn.Parameter(torch.rand(1100))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.gain, self.bias)


def test_a_large_weight_that_is_computed_is_stored_as_it_is_used(tmp_path):
    certificate = export_model(Scaled(), tmp_path / "m.onnx", torch.randn(2, 1000), promise=Promise())
    (layer,) = certificate.layers
    assert layer.numel == 1_100_000
    verify_file(tmp_path / "m.onnx")


def origin_sample_reference(proto):
    sample = random_sample([(2, 2)], [np.dtype(np.float32)])
    logits = sample.inputs[0] @ numpy_helper.to_array(proto.graph.initializer[0])
    kept = hash_tensors(proto, {"w": numpy_helper.to_array(proto.graph.initializer[0])})
    return Provenance(recipe_name="", recipe_text="", promise=Promise()), sample, make_reference(sample, logits), kept


def test_a_file_that_would_fail_verification_is_not_written(tmp_path):
    weight = np.random.default_rng(0).normal(size=(2, 2)).astype(np.float32)
    proto = small(helper.make_node("MatMul", ["x", "w"], ["y"], name="m"), w=weight)
    proto.ir_version, proto.opset_import[0].version = 10, 21
    origin, sample, reference, kept = origin_sample_reference(proto)
    reference = replace(reference, tensors=kept)
    publish(proto, tmp_path / "good.onnx", origin, sample, reference)
    verify_file(tmp_path / "good.onnx")
    proto.graph.initializer.append(numpy_helper.from_array(weight, "spare"))
    with pytest.raises(ExportError, match="spare: no node reads it"):
        publish(proto, tmp_path / "bad.onnx", origin, sample, reference)
    proto.graph.initializer.pop()
    proto.training_info.add()
    with pytest.raises(ExportError, match="training_info: a second graph, which is not measured"):
        publish(proto, tmp_path / "bad.onnx", origin, sample, reference)
    assert not (tmp_path / "bad.onnx").exists()


def test_preprocessing_that_is_no_json_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        export_model(
            nn.Linear(4, 4),
            tmp_path / "m.onnx",
            torch.randn(2, 4),
            promise=Promise(),
            preprocessing={"mean": float("nan")},
        )


def test_foreign_files_that_list_their_weights_as_inputs_are_read(tmp_path):
    inputs = [
        helper.make_tensor_value_info("x", 1, ["n", 3, 8, 8]),
        helper.make_tensor_value_info("w", 1, [4, 3, 8, 8]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weight = numpy_helper.from_array(np.ones((4, 3, 8, 8), np.float32), "w")
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", inputs, [output], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=3)
    onnx.save(model, tmp_path / "old.onnx")
    found = read(tmp_path / "old.onnx")
    assert [value.name for value in found.graph.input] == ["x"]
    assert found.ir_version == 4
    assert hidden(found) == []


def test_parity_is_with_what_the_file_is_compared_with(vit):
    far = vit.certificate.parity.model_copy(update={"agreement": 0.5})
    certificate = vit.certificate.model_copy(update={"parity": far, "reference": "float.onnx"})
    assert any("images agree with float.onnx, 99% needed" in line for line in check(certificate, Promise()))


def test_a_constant_cannot_hide_behind_one_of_the_same_name():
    def branch(name, value):
        body = [helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(value))]
        body.append(helper.make_node("MatMul", ["x", "c"], [f"z{name}"]))
        return helper.make_graph(body, name, [], [helper.make_tensor_value_info(f"z{name}", 1, None)])

    node = helper.make_node(
        "If",
        ["flag"],
        ["y"],
        then_branch=branch("a", np.ones((4, 4), np.float32)),
        else_branch=branch("b", np.zeros((4, 4), np.float32)),
    )
    assert hidden(small(node, flag=np.array(True))) == ["c: stored twice"]


def test_tables_in_attributes_are_counted():
    table = helper.make_node("LabelEncoder", ["x"], ["y"], keys_int64s=list(range(20)), values_strings=["12345"])
    assert count_others(small(table), set()) == 25
    few = helper.make_node("Transpose", ["x"], ["y"], perm=[1, 0])
    assert count_others(small(few), set()) == 0


def test_looking_at_graphs_inside_makes_none():
    model = small(helper.make_node("Shape", ["x"], ["y"], end=1))
    for graph in walk_graphs(model.graph):
        graph.ClearField("doc_string")
        del graph.value_info[:]
    onnx.checker.check_model(model)
    (attribute,) = model.graph.node[0].attribute
    assert not attribute.HasField("g")
