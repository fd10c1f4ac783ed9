"""Packed files: the same bytes again, smaller where there are zeros, and damage is noticed."""

import gzip
import json
import math
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ovit_engine.export import load_packed
from ovit_engine.export.pack import pack, pack_file, unpack

DTYPES = ["int8", "uint8", "int16", "float16", "float32", "float64", "int64", "bool"]


def model_of(*arrays):
    tensors = [numpy_helper.from_array(array, f"w{index}") for index, array in enumerate(arrays)]
    return helper.make_model(helper.make_graph([], "g", [], [], tensors)).SerializeToString()


@st.composite
def weights(draw):
    """A weight of any type and sparsity, its background not always zero, with -0.0 and NaN among floats."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(st.lists(st.integers(0, 40), min_size=1, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    array = rng.integers(0, 256, (math.prod(shape), dtype.itemsize), dtype=np.uint8).view(dtype).reshape(shape)
    if dtype.kind == "b":
        array = rng.random(shape) > 0.5
    background = draw(st.sampled_from([0, 1, 7]))
    array[rng.random(shape) < draw(st.sampled_from([0.0, 0.3, 0.5, 0.75, 0.99, 1.0]))] = background
    if dtype.kind == "f" and array.size:
        array.reshape(-1)[rng.integers(array.size)] = draw(st.sampled_from([-0.0, np.nan, np.inf, 0.0]))
    return array


@settings(max_examples=150, deadline=None)
@given(st.lists(weights(), min_size=0, max_size=4))
def test_unpacked_is_the_same_file(arrays):
    content = model_of(*arrays)
    assert unpack(pack(content)) == content


def test_equal_tensors_and_tensors_that_repeat_the_names_of_others():
    sparse = np.zeros((64, 64), np.int8)
    sparse[::7] = 3
    content = model_of(sparse, sparse, sparse[:, :32].copy(), sparse)
    packed = pack(content)
    assert unpack(packed) == content
    assert len(packed) < len(content) / 8


def header_of(packed):
    length = int.from_bytes(packed[8:12], "little")
    return json.loads(zlib.decompress(packed[12 : 12 + length])), 12 + length


def test_a_sparse_weight_costs_a_bit_each_and_its_values():
    rng = np.random.default_rng(0)
    levels = rng.integers(1, 100, 4096, dtype=np.int8)
    levels[rng.permutation(4096)[:3072]] = 0
    content = model_of(levels.reshape(64, 64))
    header, _ = header_of(pack(content))
    sizes = {stream["name"]: stream["bytes"] for stream in header["streams"]}
    assert sizes == {"rest": len(content) - 4096, "mask": 512, "values": 1024}


def test_the_bitmask_of_a_two_of_four_weight_is_read_along_its_groups():
    """log2(6) bits a group of four, plus what Huffman's whole bits cost, where row by row it would take 4."""
    rng = np.random.default_rng(0)
    kept = rng.permuted(np.tile([True, True, False, False], (256 * 64, 1)), axis=1).reshape(256, 256)
    levels = np.where(kept, rng.integers(1, 100, kept.shape), 0).astype(np.int8)
    for stored in (levels, levels.T.copy()):
        content = model_of(stored)
        header, _ = header_of(pack(content))
        (mask,) = [stream for stream in header["streams"] if stream["name"] == "mask"]
        assert mask["bytes"] == 256 * 256 // 8
        assert math.log2(6) / 4 < mask["stored"] / mask["bytes"] < 0.68
        assert unpack(pack(content)) == content


def test_a_dense_weight_stays_as_it_is():
    content = model_of(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32))
    header, _ = header_of(pack(content))
    assert header["tensors"] == []
    assert len(pack(content)) < len(content) + 400


def test_the_digits_vit_is_smaller_than_by_gzip_and_runs_from_the_packed_file(vit, digits, tmp_path):
    output = tmp_path / "small.packed"
    sizes = pack_file(vit.path, output)
    content = vit.path.read_bytes()
    assert load_packed(output) == content
    assert sizes.raw == len(content)
    assert sizes.packed == output.stat().st_size
    assert sizes.gzip == len(gzip.compress(content, 9, mtime=0))
    assert sizes.bound < sizes.packed < sizes.gzip < sizes.raw
    images = {"input": digits[0][:4].numpy()}
    ours, theirs = (onnxruntime.InferenceSession(file).run(None, images)[0] for file in (load_packed(output), vit.path))
    np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def packed():
    array = np.zeros((32, 32), np.float32)
    array[3] = 1.5
    return pack(model_of(array, np.arange(64, dtype=np.float32)))


def test_any_changed_byte_is_noticed(packed):
    for position in range(0, len(packed), 7):
        damaged = bytearray(packed)
        damaged[position] ^= 0x55
        with pytest.raises(ValueError, match="packed file"):
            unpack(bytes(damaged))


def test_any_cut_is_noticed(packed):
    for length in range(0, len(packed), 5):
        with pytest.raises(ValueError, match="packed file"):
            unpack(packed[:length])
    with pytest.raises(ValueError, match="packed file"):
        unpack(packed + b"x")


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["tensors"][0].__setitem__(1, 10**9),
        lambda header: header["tensors"][0].__setitem__(1, -5),
        lambda header: header["tensors"][0].__setitem__(4, 10**12),
        lambda header: header["tensors"][0].__setitem__(2, 3),
        lambda header: header["streams"][0].update(bytes=10**15),
        lambda header: header["streams"][0].update(stored=-1),
        lambda header: header["streams"].pop(),
        lambda header: header.pop("sha256"),
        lambda header: header.update(sha256="0" * 64),
        lambda header: header.update(tensors=5),
    ],
)
def test_a_header_that_lies_is_an_error_and_no_crash(packed, change):
    header, begin = header_of(packed)
    change(header)
    text = zlib.compress(json.dumps(header).encode())
    with pytest.raises(ValueError, match="a damaged packed file"):
        unpack(packed[:8] + len(text).to_bytes(4, "little") + text + packed[begin:])


def test_a_stream_that_inflates_without_end_is_cut_off(packed):
    header, _ = header_of(packed)
    bomb = zlib.compress(bytes(50_000_000))
    header["streams"][0].update(stored=len(bomb), deflated=True)
    text = zlib.compress(json.dumps(header).encode())
    size = header["streams"][0]["bytes"]
    with pytest.raises(ValueError, match=f"{size + 1} of {size} bytes in stream 'rest'"):
        unpack(packed[:8] + len(text).to_bytes(4, "little") + text + bomb)


def test_other_files_are_refused_by_name(tmp_path):
    path = tmp_path / "x.packed"
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"x\.packed': not a packed file of ovit-engine"):
        load_packed(path)
    with pytest.raises(ValueError, match="no ONNX file"):
        pack_file(path)
    with pytest.raises(FileNotFoundError):
        load_packed(tmp_path / "y")


def test_loading_needs_numpy_only(tmp_path, packed):
    path = tmp_path / "x.packed"
    path.write_bytes(packed)
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime'): sys.modules[name] = None\n"
        f"from ovit_engine.export import load_packed; print(len(load_packed({str(path)!r})))"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert int(result.stdout) == len(unpack(packed))


def sparse_initializer_model(levels):
    """The same weight as an ONNX sparse initializer, behind DequantizeLinear."""
    where = np.flatnonzero(levels).astype(np.int64)
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(levels.reshape(-1)[where], "w"), numpy_helper.from_array(where, "where"), levels.shape
    )
    constants = [numpy_helper.from_array(np.array(0.01, np.float32), "s"), numpy_helper.from_array(np.int8(0), "z")]
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"]),
        helper.make_node("MatMul", ["x", "f"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", len(levels)]) for name in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], constants, sparse_initializer=[sparse])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def test_why_not_sparse_initializers():
    """ONNX Runtime takes them, and at 75 % they are twice as large as the dense int8 weight."""
    rng = np.random.default_rng(0)
    levels = rng.integers(-99, 99, (128, 128)).astype(np.int8)
    levels[rng.random((128, 128)) < 0.75] = 0
    content = sparse_initializer_model(levels)
    (output,) = onnxruntime.InferenceSession(content).run(None, {"x": np.eye(128, dtype=np.float32)})
    np.testing.assert_allclose(output, levels * np.float32(0.01), rtol=1e-4)
    assert len(content) > 2 * levels.size
    assert len(pack(onnx.load_model_from_string(model_of(levels)).SerializeToString())) < levels.size
