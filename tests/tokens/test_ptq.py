"""`ovit ptq` of an ONNX file whose tokens are reduced: what chooses them stays float."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from ovit_engine.post_training.ptq_onnx import ptq_onnx, weighted_nodes
from tests.tokens.test_export import exported, run, tops

LINE = "dynamic_vit: {keep: 0.5, blocks: [0, 2]}"


def test_an_int8_file_keeps_the_tokens_that_the_float_one_keeps(tmp_path: Path) -> None:
    """All of the first stage, whose tokens are float in both, and 98 % of the second."""
    _, exact = exported(tmp_path / "own.onnx", LINE, depth=3)
    scorers = 0
    for tensor in exact.graph.initializer:  # another tool's file may name them anything
        scorers += "token_predictor" in tensor.name and len(tensor.dims) > 1
        for node in exact.graph.node:
            node.input[:] = [name.replace("token_predictor", "neck") for name in node.input]
        tensor.name = tensor.name.replace("token_predictor", "neck")
    onnx.save(exact, tmp_path / "float.onnx")
    images = torch.randn(128, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    data = [(images, torch.zeros(128, dtype=torch.int64))]
    done = ptq_onnx(tmp_path / "float.onnx", tmp_path / "int8.onnx", [images[:64].numpy()], data=data)
    assert done.parity.agreement == 1.0
    rounded = onnx.load(tmp_path / "int8.onnx")
    kinds = {each.name: each.data_type for each in rounded.graph.initializer if len(each.dims) > 1}
    assert [kinds[name] for name in kinds if "neck" in name] == [TensorProto.FLOAT] * scorers
    assert len([kind for kind in kinds.values() if kind == TensorProto.INT8]) == 3 * 4
    places = []
    for proto in (exact, rounded):
        for node in tops(proto):
            proto.graph.output.append(helper.make_tensor_value_info(node.output[1], TensorProto.INT64, None))
        places.append(run(proto, images)[1:])
    first, second = (
        np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(ours, theirs, strict=True)])
        for ours, theirs in zip(*places, strict=True)
    )
    assert first == 1.0
    assert second > 0.98


def graph(outputs: list[str], top: onnx.NodeProto | None = None) -> onnx.ModelProto:
    """A network whose classes are also put in order, a scorer behind it that only chooses, and the head."""
    top = top or helper.make_node("TopK", ["scores", "two"], ["best", "places"], name="top")
    weights = {name: np.ones((4, 4), np.float32) for name in ("body", "score", "head", "last")}
    nodes = [
        helper.make_node("MatMul", ["x", "body"], ["hidden"], name="body"),
        helper.make_node("MatMul", ["hidden", "score"], ["scores"], name="score"),
        top,
        helper.make_node("Identity", ["places"], ["labels"]),
        helper.make_node("Clip", ["wide", "", "one"], ["held"]),
        helper.make_node("MatMul", ["hidden", "head"], ["wide"], name="head"),
        helper.make_node("GatherElements", ["held", "places"], ["chosen"], axis=1),
        helper.make_node("MatMul", ["wide", "last"], ["logits"], name="last"),
    ]
    return helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [
                *(numpy_helper.from_array(value, name) for name, value in weights.items()),
                numpy_helper.from_array(np.array([2]), "two"),
                numpy_helper.from_array(np.float32(1), "one"),
            ],
        )
    )


def test_scores_whose_values_are_used_are_no_choice() -> None:
    assert weighted_nodes(graph(["logits", "chosen"])) == ["body", "head"]
    assert weighted_nodes(graph(["logits", "chosen", "best"])) == ["body", "score", "head"]


def test_a_choice_without_values_is_one_too() -> None:
    """Beside an operator whose optional input is left out: its name is that of the values, none."""
    for node in (
        helper.make_node("TopK", ["scores", "two"], ["", "places"], name="top"),
        helper.make_node("ArgMax", ["scores"], ["places"], axis=1),
    ):
        assert weighted_nodes(graph(["logits", "chosen"], node)) == ["body", "head"]


def test_where_the_choice_is_the_result_its_scores_are_rounded() -> None:
    assert weighted_nodes(graph(["logits", "places"])) == ["body", "score", "head"]
    assert weighted_nodes(graph(["places"])) == ["body"]
    assert weighted_nodes(graph(["labels"])) == ["body", "score", "head"]
