"""The 2:4 linter: rules by hand, what it reads out of files and recipes, and TensorRT's log."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ovit_engine.analysis.sparse_table import ProductRow, SparseTable, write_table
from ovit_engine.certificate.ratio import Ratio
from ovit_engine.certificate.sparse_cores import (
    SparseLayer,
    blockers,
    doubts,
    read_trt_log,
    readiness_row,
    trtexec_line,
)
from ovit_engine.cli import main
from ovit_engine.cli.lint import UNMEASURED, of_file
from tests.exported_files import table_of


def layer(**facts):
    standard = {"name": "w", "out": 384, "k": 384, "weight": "INT8", "activation": "INT8", "broken": 0}
    return SparseLayer(**{**standard, "groups": 384 * 96, **facts})


def test_a_layer_that_meets_every_rule():
    assert blockers(layer()) == doubts(layer()) == ()
    assert readiness_row(layer()) == ("w", "384", "384", "int8 x int8", "100.0% of groups", "can be")


def test_one_broken_group_of_many_is_not_rounded_away():
    *_, share, verdict = readiness_row(layer(broken=1))
    assert (share, verdict) == ("99.9% of groups", "no: not 2:4")


@pytest.mark.parametrize(
    ("facts", "reasons"),
    [
        ({"broken": 12}, ["not 2:4"]),
        ({"k": 27, "broken": None}, ["K 27 is no multiple of 4", "K 27 is no multiple of 32 (int8)"]),
        ({"k": 48}, ["K 48 is no multiple of 32 (int8)"]),
        ({"out": 1000}, ["out 1000 is no multiple of 32 (int8)"]),
        ({"weight": "UINT8"}, ["weight not symmetric int8"]),
        ({"weight_symmetric": False}, ["weight not symmetric int8"]),
        ({"activation": None}, ["activation float: both operands must be int8"]),
        ({"activation": "UINT8"}, ["activation uint8 is not symmetric int8"]),
        ({"activation_symmetric": False}, ["activation int8 is not symmetric int8"]),
        ({"weight": "FLOAT"}, ["activation int8, weight float"]),
        ({"weight": "FLOAT", "activation": None, "k": 48, "out": 272}, []),
        ({"weight": "FLOAT", "activation": None, "k": 40}, ["K 40 is no multiple of 16 (fp16)"]),
    ],
)
def test_each_rule_has_its_reason(facts, reasons):
    assert list(blockers(layer(**facts))) == reasons


def test_small_layers_are_a_doubt_and_no_verdict():
    small = layer(k=192, out=256)
    assert blockers(small) == ()
    assert doubts(small) == ("K 192 and out 256: dense often wins up to 256",)
    assert doubts(layer(k=192, broken=1)) == ()


@given(st.integers(1, 512), st.integers(1, 512), st.sampled_from(["INT8", "FLOAT"]))
def test_shapes_are_those_that_pytorch_takes_for_cusparselt(out, k, kind):
    """PyTorch's own table, as this PyTorch has it."""
    table = torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS
    rule = table[torch.int8 if kind == "INT8" else torch.float16]
    fits = out % rule.sparse_min_rows == 0 and k % rule.sparse_min_cols == 0
    broken = 0 if k % 4 == 0 else None
    found = blockers(layer(out=out, k=k, weight=kind, activation=kind if kind == "INT8" else None, broken=broken))
    assert (found == ()) is fits


def write(path, weight, *, zero_point, activation=np.int8, shift=0, op="MatMul"):
    """x -> Q/DQ -> [Unsqueeze] -> op with a quantized weight, written by hand."""
    constants = {
        "w": weight, "s": np.array(0.02, np.float32), "z": np.array(zero_point, weight.dtype),
        "xs": np.array(0.1, np.float32), "xz": np.array(shift, activation), "axes": np.array([0], np.int64),
    }  # fmt: skip
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["wf"]),
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xf"]),
        helper.make_node("Unsqueeze", ["xf", "axes"], ["x3"]),
        helper.make_node(op, ["x3" if op == "MatMul" else "xf", "wf"], ["y"], name="reader"),
    ]
    rank = 2 if op == "MatMul" else 4
    value = helper.make_tensor_value_info(
        "x", TensorProto.FLOAT, ["n", *[weight.shape[0 if rank == 2 else 1]] * (rank - 1)]
    )
    graph = helper.make_graph(
        nodes, "g", [value], [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    return path


def two_of_four(rows, columns):
    """[rows, columns] int8, two zeros in each four neighbours of a row."""
    weight = np.arange(1, rows * columns + 1).reshape(rows, columns).astype(np.int8) | 1
    weight.reshape(-1, 4)[:, 1:3] = 0
    return weight


def test_a_linear_is_read_along_its_inputs(tmp_path):
    """Stored [in, out], the groups run down the columns."""
    weight = two_of_four(64, 32)
    (right,), inputs = of_file(write(tmp_path / "a.onnx", weight.T.copy(), zero_point=0))
    assert blockers(right) == ()
    assert (right.out, right.k, right.node, inputs) == (64, 32, "reader", {"x": ("n", 32)})
    (wrong,), _ = of_file(write(tmp_path / "b.onnx", weight, zero_point=0))
    assert wrong.broken == 256  # two of four columns are full, all the way down
    assert "not 2:4" in blockers(wrong)


def test_a_convolution_is_read_along_input_channels(tmp_path):
    weight = np.moveaxis(two_of_four(32, 9 * 64).reshape(32, 3, 3, 64), -1, 1).copy()
    (right,), _ = of_file(write(tmp_path / "a.onnx", weight, zero_point=0, op="Conv"))
    assert (right.k, right.out, blockers(right)) == (64, 32, ())
    along_outputs = weight[:, :32].swapaxes(0, 1).copy()
    (wrong,), _ = of_file(write(tmp_path / "b.onnx", along_outputs, zero_point=0, op="Conv"))
    assert wrong.broken == 9 * 16 * 8  # of four input channels all or none, at each place of the kernel


def test_operands_are_read_from_the_zero_points(tmp_path):
    weight = two_of_four(32, 32)
    for name, options, reason in (
        ("a", {"zero_point": 3}, "weight not symmetric int8"),
        ("b", {"zero_point": 0, "activation": np.uint8, "shift": 128}, "activation uint8 is not symmetric int8"),
        ("c", {"zero_point": 0, "shift": 4}, "activation int8 is not symmetric int8"),
    ):
        (found,), _ = of_file(write(tmp_path / f"{name}.onnx", weight.T.copy(), **options))
        assert reason in blockers(found)


LOG = """
[07/19/2022-11:58:02] [I] [TRT] Detected 1 inputs and 1 output network tensors.
[07/19/2022-11:58:20] [I] [TRT] (Sparsity) Layers eligible for sparse math: node_conv + node_relu, node_matmul, Gemm_725
[07/19/2022-11:58:20] [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: node_matmul
[07/19/2022-11:58:21] [I] Engine built in 18.2 sec.
"""


def test_the_log_of_trtexec():
    chosen = read_trt_log(LOG)
    assert chosen.eligible == {"node_conv", "node_relu", "node_matmul", "Gemm_725"}
    assert [chosen.of(node) for node in ("node_matmul", "node_relu", "other")] == [
        "sparse",
        "dense was faster",
        "not eligible",
    ]


def test_a_log_of_empty_lists():
    """As in pytorch/TensorRT issue 1340: nothing follows the colons, and the next line is another's."""
    chosen = read_trt_log(LOG.replace(" node_conv + node_relu, node_matmul, Gemm_725", "").replace(" node_matmul", ""))
    assert chosen.eligible == chosen.picked == frozenset()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[I] Engine built", "begins with"),
        ("[I] [TRT] (Sparsity) Something new: a", "there is 'Something new'"),
        (LOG.replace("picked", "likes"), "which layers are picked"),
    ],
)
def test_a_log_that_says_nothing_of_it(text, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        read_trt_log(text)


def test_the_trtexec_line():
    assert trtexec_line("m.onnx", {"input": ("batch", 3, 224, 224)}, int8=True) == (
        "trtexec --onnx=m.onnx --int8 --sparsity=enable --verbose --shapes=input:1x3x224x224"
    )
    assert (
        trtexec_line("m.onnx", {"x": (8, 3)}, int8=False) == "trtexec --onnx=m.onnx --fp16 --sparsity=enable --verbose"
    )


def lint(*arguments):
    result = CliRunner().invoke(main, ["lint", *map(str, arguments)], env={"COLUMNS": None})
    assert result.exit_code == 0, result.output
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def test_the_command_on_a_file_with_a_log(vit, tmp_path):
    (tmp_path / "trt.log").write_text(LOG)
    lines = lint(vit.path, "--trt-log", tmp_path / "trt.log")
    assert lines[0] == "weight out K operands 2:4 TensorRT on sparse tensor cores"
    row = next(line for line in lines if line.startswith("blocks.0.mlp.fc1.weight"))
    assert row.startswith("blocks.0.mlp.fc1.weight 256 64 int8 x uint8 100.0% of groups not eligible no: activation")
    assert len([line for line in lines if " sparse no: " in line]) == 1  # the node called node_matmul
    assert UNMEASURED in lines
    assert lines[-1].endswith(" --int8 --sparsity=enable --verbose --shapes=input:1x1x8x8")


RECIPE = """
name: g
training: {model: vit_tiny_patch16_224, epochs: 2, model_args: {depth: 1, img_size: 32, num_classes: 10}}
modifiers:
  - magnitude_prune: {pattern: "2:4", targets: ["re:blocks.*(qkv|proj).weight"]}
  - magnitude_prune: {sparsity: 0.9, targets: ["re:blocks.*fc1.weight"]}
  - quantize: {start: 1ep, targets: ["re:blocks.*qkv"]}
"""


def test_the_command_on_a_recipe(tmp_path):
    (tmp_path / "g.yaml").write_text(RECIPE)
    lines = lint(tmp_path / "g.yaml")
    assert lines[1:7] == [
        "patch_embed.proj.weight 192 3 float x float - no: K 3 is no multiple of 4; K 3 is no multiple of 16 (fp16)",
        "blocks.0.attn.qkv.weight 576 192 int8 x uint8 100.0% of groups no: activation uint8 is not symmetric int8",
        "blocks.0.attn.proj.weight 192 192 float x float 100.0% of groups "
        "can be (K 192 and out 192: dense often wins up to 256)",
        "blocks.0.mlp.fc1.weight 768 192 float x float 0.0% of groups no: not 2:4",
        "blocks.0.mlp.fc2.weight 192 768 float x float 0.0% of groups no: not 2:4",
        "head.weight 10 192 float x float 0.0% of groups no: not 2:4; out 10 is no multiple of 16 (fp16)",
    ]
    assert lines[7] == "1 of 6 layers can run on sparse tensor cores, 6.2% of their weights"
    assert lines[8] == UNMEASURED


def test_the_command_with_what_was_measured_on_a_gpu(tmp_path):
    """Of the shape and type that were measured it says from where on 2:4 pays; of others nothing."""
    (tmp_path / "g.yaml").write_text(RECIPE)
    shape = {"dtype": "float16", "out_features": 192, "in_features": 192}
    ratios = {64: Ratio(median=0.5, low=0.4, high=0.6), 4096: Ratio(median=1.5, low=1.4, high=1.6)}
    rows = tuple(ProductRow(**shape, rows=count, ratio=ratio) for count, ratio in ratios.items())
    known = {"capability": (9, 0), "backend": "cusparselt", "versions": {}, "date": "", "repeats": 5}
    write_table(SparseTable(device="Abacus", rows=rows, **known), tmp_path / "t.json")
    lines = lint(tmp_path / "g.yaml", "--measured", tmp_path / "t.json")
    assert lines[0] == "weight out K operands 2:4 measured on Abacus on sparse tensor cores"
    found = {line.split()[0]: line for line in lines[1:7]}
    assert (
        "groups 2:4 is faster from 4096 rows on (64 to 4096 rows were measured) can be"
        in found["blocks.0.attn.proj.weight"]
    )
    assert [name for name, line in found.items() if "is faster" in line] == ["blocks.0.attn.proj.weight"]
    assert UNMEASURED not in lines


def test_what_goes_wrong_is_one_line(tmp_path, vit):
    (tmp_path / "bad.onnx").write_bytes(b"nonsense")
    (tmp_path / "trt.log").write_text("nothing")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y")]
    alone = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", values[:1], values[1:])
    onnx.save(helper.make_model(alone), tmp_path / "none.of.it.onnx")
    for arguments, words in (
        ([tmp_path / "none.onnx"], "no such file"),
        ([tmp_path / "bad.onnx"], "is not an ONNX file"),
        ([vit.path, "--trt-log", tmp_path / "trt.log"], "trt.log': no line of it begins with (Sparsity)"),
        ([tmp_path / "none.of.it.onnx"], "has no MatMul, Gemm or Conv that reads a weight"),
        ([vit.path, "--measured", tmp_path / "trt.log"], "trt.log"),
        (["r.yaml", "--trt-log", tmp_path / "trt.log"], "goes with the ONNX file"),
    ):
        result = CliRunner().invoke(main, ["lint", *map(str, arguments)])
        assert result.exit_code != 0
        assert words in result.stderr
        assert result.stderr.count("\n") == 1


def test_the_certificate_shows_it(vit):
    assert "on sparse tensor cores" in table_of(vit.certificate)
    assert "100.0% of groups no: activation uint8 is not" in table_of(vit.certificate)
    page = Path(vit.path.with_name("model.certificate.html")).read_text()
    assert "2:4 on sparse tensor cores" in page
    assert "Only a measurement on a GPU shows" in page
