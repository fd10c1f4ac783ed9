"""Files of strangers: each damage is one clear line, soon and in little memory."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ovit_engine.analysis.diagnose import diagnose_file
from ovit_engine.certificate import Certificate, parity
from ovit_engine.certificate.arrays import read_arrays
from ovit_engine.certificate.model import read_pattern
from ovit_engine.certificate.stored import load_onnx
from ovit_engine.certificate.verify import verify_file
from ovit_engine.cli.group import describe
from ovit_engine.cli.lint import of_file
from tests.post_training.test_ptq_onnx import images, network, quantize


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An int8 file with its certificate and reference."""
    quantize(network(), tmp_path)
    return tmp_path / "int8.onnx"


@pytest.mark.parametrize(
    "pattern", ["2:0", "0:4", "5:4", "2:" + "9" * 5000, {"block": [0, 0]}, {"block": [4, -1]}, {"block": [1]}, ":"]
)
def test_impossible_patterns_are_refused(pattern: str | dict[str, list[int]]) -> None:
    with pytest.raises(ValueError, match="unknown pattern in a promise") as caught:
        read_pattern(pattern)
    assert len(str(caught.value)) < 200


def axis_of_seven(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "DequantizeLinear" and attribute.name == "axis":
                attribute.i = 7


@pytest.mark.parametrize("read", [of_file, lambda file: diagnose_file(file, [images(32, 3)])], ids=["lint", "diagnose"])
def test_scales_along_an_axis_that_is_not_there(file: Path, read: Callable[[Path], object]) -> None:
    model = onnx.load(file)
    axis_of_seven(model)
    onnx.save(model, file)
    with pytest.raises(ValueError, match="along axis 7 of a tensor of 4 axes"):
        read(file)


def huge_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**40


def long_metadata(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="more", value="x" * 2**25)


def loop(model: onnx.ModelProto) -> None:
    model.graph.node.extend(helper.make_node("Identity", [a], [b]) for a, b in (("p1", "p2"), ("p2", "p1")))


def written_twice(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["x"], ["y"]))


def no_inputs(model: onnx.ModelProto) -> None:
    del next(node for node in model.graph.node if node.op_type == "MatMul").input[1:]


def negative_shape(model: onnx.ModelProto) -> None:
    model.graph.initializer[0].dims[0] = -1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (huge_batch, "takes batches of 1099511627776 only; 1 to 1024 are run"),
        (long_metadata, "its metadata have more than 16,777,216 characters"),
        (loop, "'p2' is computed from itself, or twice"),
        (written_twice, "'y' is computed from itself, or twice"),
        (no_inputs, "has 1 inputs of 2"),
        (negative_shape, r"has the shape \[-1"),
    ],
)
def test_a_hostile_graph(file: Path, change: Callable[[onnx.ModelProto], None], told: str) -> None:
    model = onnx.load(file)
    change(model)
    onnx.save(model, file)
    with pytest.raises(ValueError, match=told):
        verify_file(file)
    if change is not huge_batch:
        with pytest.raises(ValueError, match=told):
            load_onnx(file)


def test_a_reference_that_unpacks_to_more_than_the_bound_is_not_unpacked(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many zeros in little, with the hash that the certificate names."""
    assert parity._LARGEST <= 2**30
    monkeypatch.setattr(parity, "_LARGEST", 2**24)
    reference = file.with_name("int8.reference.npz")
    np.savez_compressed(reference, logits=np.zeros(2**24, np.uint8))
    path = file.with_name("int8.certificate.json")
    stated = Certificate.from_json(path.read_text())
    digest = hashlib.sha256(reference.read_bytes()).hexdigest()
    path.write_text(stated.model_copy(update={"reference_sha256": digest}).to_json())
    with pytest.raises(ValueError, match=r"int8.reference.npz can't be read: it unpacks to 16,777,344 bytes"):
        verify_file(file)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_arrays(tmp_path / "pipe.npz", 1000)
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_onnx(tmp_path / "pipe.onnx")


def test_a_path_of_5000_characters_is_shortened() -> None:
    with pytest.raises(OSError, match="too long") as caught:
        load_onnx(Path("x" * 5000))
    assert len(describe(caught.value)) < 400


def test_old_operators_have_the_inputs_of_their_time(tmp_path: Path) -> None:
    """Squeeze has had axes as an input since opset 13 only; Dropout's ratio is one since 12."""
    nodes = [
        helper.make_node("Unsqueeze", ["x"], ["u"], axes=[1]),
        helper.make_node("MatMul", ["u", "w"], ["m"]),
        helper.make_node("Squeeze", ["m"], ["y"], axes=[1]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 4]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], [numpy_helper.from_array(np.eye(4, dtype="f4"), "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 11)], ir_version=8), tmp_path / "a.onnx")
    assert len(load_onnx(tmp_path / "a.onnx").graph.node) == 3


def test_names_that_are_not_text(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "a.onnx")
    content = (tmp_path / "a.onnx").read_bytes()
    (tmp_path / "a.onnx").write_bytes(content.replace(b"MatMul", b"MatM\xff\xfe"))
    with pytest.raises(ValueError, match=r"a name in it is not UTF-8|is not an ONNX file"):
        load_onnx(tmp_path / "a.onnx")


def test_a_layer_of_no_type(file: Path) -> None:
    model = onnx.load(file)
    next(tensor for tensor in model.graph.initializer if tensor.name == "f1").data_type = 0
    onnx.save(model, file)
    for read in (of_file, lambda path: diagnose_file(path, [images(32, 3)])):
        with pytest.raises(ValueError, match="f1"):
            read(file)
