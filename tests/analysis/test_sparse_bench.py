"""2:4 on a GPU: what is asked, what is concluded, the file; and one real run where there is a GPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from ovit_engine.analysis import sparse_bench as module
from ovit_engine.analysis.layer_shapes import LayerShape, count_shapes, linear_shapes, onnx_shapes
from ovit_engine.analysis.paired_timing import measure_rounds, self_noise
from ovit_engine.analysis.sparse_bench import bench_sparse, two_of_four
from ovit_engine.analysis.sparse_table import ProductRow, SparseTable, read_table, write_table
from ovit_engine.certificate.ratio import Ratio
from ovit_engine.export.writer import write_onnx

FASTER, SLOWER = Ratio(median=1.5, low=1.4, high=1.6), Ratio(median=0.5, low=0.4, high=0.6)
NOISE = Ratio(median=1.0, low=0.9, high=1.1)


def row(rows: int, ratio: Ratio | None, dtype: str = "int8", out: int = 64, reason: str | None = None) -> ProductRow:
    return ProductRow(dtype=dtype, out_features=out, in_features=32, rows=rows, ratio=ratio, unsupported=reason)


def table(*rows: ProductRow) -> SparseTable:
    return SparseTable(
        device="Abacus",
        capability=(8, 0),
        backend="cusparselt",
        versions={"torch": "2.11"},
        date="2026-01-02T03:04:05+00:00",
        repeats=50,
        rows=rows,
    )


class Net(nn.Module):
    """Tokens of a patch convolution, two Linear layers of one shape, a head, a product of two activations."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 2, 2)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = self.second(self.first(x) @ x.transpose(1, 2) @ x)
        return self.head(x.mean(1))


NET = (
    LayerShape(out_features=8, in_features=8, rows=16, layers=2),
    LayerShape(out_features=3, in_features=8, rows=1),
)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_model_tells_its_layers_and_is_left_as_it_was(device):
    model = Net().to(device).train()
    assert linear_shapes(model, torch.zeros(1, 1, 8, 8, device=device)) == NET
    assert model.training
    assert not model.first._forward_hooks
    with pytest.raises(ValueError, match="ReLU runs no Linear layer"):
        linear_shapes(nn.ReLU(), torch.zeros(1))


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_onnx_file_tells_the_same(tmp_path, dynamic):
    write_onnx(Net().eval(), torch.zeros(2, 1, 8, 8), tmp_path / "n.onnx", dynamic_batch=dynamic)
    assert onnx_shapes(tmp_path / "n.onnx") == NET


def test_quantized_weights_count_and_products_of_activations_do_not(tmp_path):
    """x [2 (fixed), 5, 4] by a weight behind DequantizeLinear and Transpose, then by itself."""
    initializers = [
        numpy_helper.from_array(np.zeros((6, 4), np.int8), "w"),
        numpy_helper.from_array(np.float32(0.1), "s"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["wd"]),
        helper.make_node("Transpose", ["wd"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "wt"], ["y"]),
        helper.make_node("Transpose", ["y"], ["yt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["yt", "y"], ["z"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 5, 4])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [2, 6, 6])],
        initializers,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), tmp_path / "q.onnx")
    assert onnx_shapes(tmp_path / "q.onnx") == (LayerShape(out_features=6, in_features=4, rows=5),)


def test_what_has_no_layers_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.onnx"):
        onnx_shapes(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no protobuf at all")
    with pytest.raises(ValueError, match=r"bad\.onnx' is not an ONNX file"):
        onnx_shapes(tmp_path / "bad.onnx")
    write_onnx(nn.ReLU(), torch.zeros(2, 3), tmp_path / "relu.onnx")
    with pytest.raises(ValueError, match="no MatMul or Gemm that reads a stored weight"):
        onnx_shapes(tmp_path / "relu.onnx")


def test_shapes_are_counted_largest_first():
    shapes = [LayerShape(out_features=4, in_features=8, rows=2), LayerShape(out_features=4, in_features=8, rows=4)]
    assert count_shapes([*shapes, shapes[0]]) == (shapes[1], replace(shapes[0], layers=2))


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([torch.float16, torch.int8]))
def test_two_of_four_keeps_the_two_largest_of_each_group(rows, groups, seed, dtype):
    values = np.random.default_rng(seed).integers(-3, 4, (rows, groups, 4))
    kept = two_of_four(torch.from_numpy(values.reshape(rows, -1)).to(dtype)).reshape(rows, groups, 4)
    for was, now in zip(values.reshape(-1, 4), kept.reshape(-1, 4).tolist(), strict=True):
        assert sum(value != 0 for value in now) <= 2
        assert all(after in (0, before) for before, after in zip(was, now, strict=True))
        assert sum(map(abs, now)) == sum(sorted(map(abs, was))[2:])
    with pytest.raises(ValueError, match="6 inputs are no multiple of 4"):
        two_of_four(torch.zeros(2, 6))


@given(st.dictionaries(st.integers(1, 100), st.sampled_from([FASTER, SLOWER, NOISE]), min_size=1))
def test_break_even_is_the_least_number_above_which_nothing_is_slow(known):
    (even,) = table(*(row(count, ratio) for count, ratio in known.items())).break_even
    good = [count for count in known if all(known[other] is FASTER for other in known if other >= count)]
    assert even.rows == min(good, default=None)
    assert even.measured == tuple(sorted(known))


def test_weights_and_types_are_apart_and_failures_are_no_verdict():
    known = table(row(8, FASTER), row(8, SLOWER, "float16"), row(8, FASTER, out=128), row(9, None))
    found = known.break_even
    assert [(even.dtype, even.out_features, even.rows) for even in found] == [
        ("int8", 64, 8),
        ("float16", 64, None),
        ("int8", 128, 8),
    ]
    assert found[0].describe() == "2:4 is faster from 8 rows on (8 to 8 rows were measured)"
    assert found[1].describe().startswith("2:4 did not pay")


def test_other_shapes_and_types_have_no_verdict():
    known = table(row(10, SLOWER), row(100, FASTER))
    even = known.find(64, 32, "int8")
    assert even is not None
    assert (even.rows, even.measured) == (100, (10, 100))
    assert known.find(32, 64, "int8") is known.find(64, 32, "float16") is None


def test_the_file_reads_back_and_shows_its_conclusions(tmp_path, capsys):
    known = table(row(10, NOISE), row(100, FASTER), row(7, None, reason="(7, 32) is not supported"))
    write_table(known, tmp_path / "t.json")
    assert read_table(tmp_path / "t.json") == known
    content = json.loads((tmp_path / "t.json").read_text())
    assert content["break_even"][0]["rows"] == 100
    assert content["rows"][0]["verdict"] == "within noise"
    known.render()
    shown = capsys.readouterr().out
    assert "(7, 32) is not supported" in shown
    assert "2:4 is faster from 100 rows on (10 to 100 rows were measured)" in shown
    assert "CUDA graph" not in shown
    table(replace(known.rows[0], launch="eager"), replace(known.rows[1], launch="graph")).render()
    assert "1 of 2 products took no CUDA graph: their times include the launch by Python" in capsys.readouterr().out
    for wrong in ("[]", "{", json.dumps({**content, "rows": [{"dtype": 1}]})):
        (tmp_path / "t.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"t\.json' is damaged, or no table"):
            read_table(tmp_path / "t.json")
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "none.json")


def test_rounds_time_each_once_and_as_long():
    """A clock of our own: timers that say how often they ran."""
    calls: list[tuple[str, int]] = []

    def timer(name, seconds):
        return lambda loops: calls.append((name, loops)) or seconds

    seen = []
    seconds = measure_rounds(
        [timer("slow", 0.002), timer("fast", 0.0005)],
        6,
        np.random.default_rng(0),
        lambda *done: seen.append(done),
        min_seconds=0.004,
    )
    assert np.array_equal(seconds, [[0.002] * 6, [0.0005] * 6])
    timed = calls[-12:]
    assert {loops for name, loops in timed if name == "slow"} == {2}
    assert {loops for name, loops in timed if name == "fast"} == {8}
    rounds = [tuple(name for name, _ in timed[i : i + 2]) for i in range(0, 12, 2)]
    assert set(rounds) == {("slow", "fast"), ("fast", "slow")}
    assert seen[-1] == (6, 6)


def test_what_differs_from_itself_sets_the_noise():
    generator = np.random.default_rng(0)
    one = np.full(40, 1.0)
    assert self_noise(one, one, generator) == 0.03
    assert self_noise(one, one / 1.2, generator) == pytest.approx(0.2)
    assert self_noise(one, one * 1.2, generator) == pytest.approx(0.2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path):
    with pytest.raises(ValueError, match="torch finds no GPU here"):
        bench_sparse(NET)
    script, python = Path(__file__).parents[2] / "scripts" / "gpu", {**os.environ, "PYTHON": sys.executable}
    for arguments, line in (
        ([tmp_path / "out"], f"error: torch finds no CUDA device here ({sys.executable})"),
        ([], "error: scripts/gpu takes one folder, into which it writes; 0 arguments were given"),
    ):
        done = subprocess.run([script, *arguments], env=python, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"{line}\n")
    assert not (tmp_path / "out").exists()


def test_every_product_is_warmed_up_measured_and_named(monkeypatch):
    """On a GPU of our own: no int8, and 2:4 takes half the time from 64 rows on."""
    runs = []

    def timers(product):
        if product.dtype == "int8":
            raise NotImplementedError
        seconds = [1e-3, 0.5e-3 if product.rows >= 64 else 2e-3, 1e-3]
        return [lambda loops, each=each: runs.append((product.rows, loops)) or each for each in seconds], "graph"

    monkeypatch.setattr(module, "_timers", timers)
    monkeypatch.setattr(module, "_WARM_UP_SECONDS", 0.01)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    abacus = SimpleNamespace(name="Abacus", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: abacus)
    twice = [replace(NET[0], rows=32), replace(NET[0], rows=64)]  # each product is measured once
    found = bench_sparse(twice, batch_sizes=[2, 1], dtypes=["float16", "int8"], repeats=5)
    assert (found.device, found.capability, found.versions["torch"]) == ("Abacus", (9, 0), version("torch"))
    assert [(row.dtype, row.rows, row.ratio and row.ratio.verdict, row.unsupported) for row in found.rows] == [
        ("float16", 32, "slower", None),
        ("float16", 64, "faster", None),
        ("float16", 128, "faster", None),
        *(("int8", rows, None, "NotImplementedError") for rows in (32, 64, 128)),
    ]
    assert (found.rows[1].dense, found.rows[1].sparse, found.rows[1].ratio.median) == (1e-3, 0.5e-3, 2.0)
    assert [even.rows for even in found.break_even] == [64]
    before = [loops for rows, loops in runs if rows == 64][: -3 * 5]  # what was run before the five rounds
    assert before.count(1) > 3 * 5


def test_bad_requests():
    with pytest.raises(ValueError, match="no type 'int4'; did you mean 'int8'"):
        bench_sparse(NET, dtypes=["int4"])
    with pytest.raises(ValueError, match="need repeats >= 5"):
        bench_sparse(NET, repeats=4)
    with pytest.raises(ValueError, match="need repeats >= 5"):
        bench_sparse(NET, batch_sizes=[])


@pytest.mark.gpu
def test_a_gpu_measures_every_type(tmp_path):
    shapes = [
        LayerShape(out_features=1536, in_features=384, rows=197),
        LayerShape(out_features=30, in_features=50, rows=7),
    ]
    found = bench_sparse(shapes, batch_sizes=[1, 8], repeats=5)
    assert {row.dtype for row in found.rows} == {"float16", "bfloat16", "int8"}
    large = [row for row in found.rows if row.in_features == 384]
    assert [row.unsupported for row in large] == [None] * 6
    assert all(row.dense > 0 and row.sparse > 0 and row.launch for row in large)
    assert all(row.unsupported for row in found.rows if row.in_features == 50)
    write_table(found, tmp_path / "t.json")
    assert read_table(tmp_path / "t.json") == found
