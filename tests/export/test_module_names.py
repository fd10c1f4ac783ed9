"""Weights of foreign files are called after their modules, as both of PyTorch's exporters tell them."""

import io
import warnings

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from ovit_engine.certificate.weights import read_weights
from ovit_engine.cli.lint import of_file
from ovit_engine.export.module_names import name_by_module
from tests.exported_files import small

MATRIX = np.ones((2, 2), np.float32)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.fc2(torch.relu(self.fc1(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(x)


@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
def test_names_of_both_exporters(dynamo, tmp_path):
    net, x = Net().eval(), torch.randn(2, 3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        if dynamo:
            torch.onnx.export(net, (x,), dynamo=True, verbose=False).save(tmp_path / "net.onnx")
        else:
            stream = io.BytesIO()
            torch.onnx.export(net, (x,), stream, dynamo=False)
            (tmp_path / "net.onnx").write_bytes(stream.getvalue())
    model = onnx.load(tmp_path / "net.onnx")
    wanted = {f"blocks.{block}.fc{part}.weight" for block in (0, 1) for part in (1, 2)}
    assert not wanted & set(read_weights(model))
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    name_by_module(model)
    onnx.checker.check_model(model, full_check=True)
    assert set(read_weights(model)) == wanted
    for tensor in model.graph.initializer:
        if tensor.name in wanted:
            assert np.array_equal(numpy_helper.to_array(tensor), net.get_parameter(tensor.name).detach().T)
        else:
            assert tensor.name in values
    assert {layer.name for layer in of_file(tmp_path / "net.onnx")[0]} == wanted


def named(node_name="", scopes=None, **arrays):
    node = helper.make_node("MatMul", ["x", next(iter(arrays))], ["y"], name=node_name)
    if scopes is not None:
        node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)
    model = small(node, **arrays)
    name_by_module(model)
    return next(iter(read_weights(model)))


def test_names_that_are_kept():
    assert named(scopes="['', 'a', 'a.b', 'linear']", val_3=MATRIX) == "a.b.weight"
    assert named(scopes="['', 'a', 'a.b', 'linear']", mine=MATRIX) == "mine"
    assert named(scopes="['linear']", val_3=MATRIX) == "val_3"
    assert named(scopes="['', 'linear']", val_3=MATRIX) == "val_3"  # the model itself has no name
    assert named(scopes="__import__('os')", val_3=MATRIX) == "val_3"
    assert named("node_MatMul_3", val_3=MATRIX) == "val_3"
    assert named("/a/a.1/fc/MatMul", **{"onnx::MatMul_3": MATRIX}) == "a.1.fc.weight"
    assert named("/MatMul", **{"onnx::MatMul_3": MATRIX}) == "onnx::MatMul_3"
    taken = {"val_3": MATRIX, "a.weight": MATRIX}
    assert named("/a/MatMul", **taken) == "val_3"


def test_a_weight_that_two_nodes_read_keeps_its_name():
    nodes = [
        helper.make_node("MatMul", ["x", "val_1"], ["z"], name="/a/MatMul"),
        helper.make_node("MatMul", ["z", "val_1"], ["y"], name="/b/MatMul"),
    ]
    model = small(*nodes, val_1=MATRIX)
    name_by_module(model)
    assert set(read_weights(model)) == {"val_1"}
