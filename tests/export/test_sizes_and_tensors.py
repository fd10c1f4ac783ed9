"""Sizes, intervals and hashes of tensors against references that share no code with them."""

import gzip
import itertools
import math
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper
from torch import nn

from ovit_engine.certificate import Promise
from ovit_engine.certificate.parity import wilson
from ovit_engine.certificate.sizes import entropy_bits, gzip_size, position_bits, zstd_size
from ovit_engine.certificate.tensors import changed_tensors, hash_tensors
from ovit_engine.export.exporter import export_model


@given(st.integers(1, 5000), st.data())
def test_both_ends_of_the_interval_solve_its_equation(count, data):
    share = data.draw(st.integers(0, count)) / count
    low, high = wilson(share, count)
    assert 0 <= low <= share <= high <= 1
    for end in (low, high):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / count), rel=1e-4)


def test_intervals_known_from_tables():
    assert wilson(1.0, 256) == pytest.approx((0.98522, 1.0), abs=1e-4)
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)


SHAPES = hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=9)
ARRAYS = st.one_of(
    hnp.arrays(np.int8, SHAPES, elements=st.sampled_from([0, 0, 0, 1, -1, 5, 127])),
    hnp.arrays(np.float32, SHAPES, elements=st.sampled_from([0.0, 0.0, -0.0, 1.5, -3.25])),
)


def code_length(symbols):
    """Bits of a sequence by how often each symbol occurs."""
    counts = Counter(symbols)
    return -sum(count * math.log2(count / len(symbols)) for count in counts.values())


@given(ARRAYS)
def test_the_bound_is_positions_plus_values(array):
    """Positions of the most frequent pattern and the entropy of the others, each worked out for itself."""
    items = [value.tobytes() for value in array.reshape(-1)]
    if not items:
        assert entropy_bits(array) == 0
        return
    most = max(Counter(items).values())
    found = entropy_bits(array)
    ways = []
    for background in [item for item, count in Counter(items).items() if count == most]:
        is_other = np.array([item != background for item in items]).reshape(array.shape)
        positions = [code_length(is_other.reshape(-1).tolist())]
        for axis, size in enumerate(array.shape):
            if size % 4 == 0:
                lines = [line.tolist() for line in np.moveaxis(is_other, axis, -1).reshape(-1, size)]
                positions.append(code_length([tuple(line[i : i + 4]) for line in lines for i in range(0, size, 4)]))
        ways.append(min(positions) + code_length([item for item in items if item != background]))
    assert any(found == pytest.approx(way, rel=1e-9, abs=1e-9) for way in ways)


def test_positions_of_two_of_four_take_the_logarithm_of_six_a_group():
    kept = np.array([group for group in itertools.product([True, False], repeat=4) if sum(group) == 2])
    assert position_bits(kept) == pytest.approx(6 * math.log2(6))
    assert position_bits(kept.T.copy()) == pytest.approx(6 * math.log2(6))
    assert position_bits(np.zeros((4, 4), bool)) == 0


def test_gzip_and_zstd_are_the_real_ones():
    content = b"abc" * 1000
    assert gzip_size(content) == len(gzip.compress(content, 6, mtime=0))
    zstandard = pytest.importorskip("zstandard")
    assert zstd_size(content) == len(zstandard.ZstdCompressor(level=12).compress(content))


def test_without_zstandard_there_is_no_number(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    assert zstd_size(b"abc") is None


def model_of(**arrays):
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    return onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors))


@settings(max_examples=60)
@given(
    hnp.arrays(np.int8, hnp.array_shapes(max_dims=4, max_side=9), elements=st.integers(-99, 99)),
    st.data(),
)
def test_any_changed_level_is_found_and_an_equal_tensor_is_not(array, data):
    model = model_of(w=array)
    kept = hash_tensors(model, {"w": array})
    assert changed_tensors(model, kept) == []
    where = tuple(data.draw(st.integers(0, size - 1)) for size in array.shape)
    other = array.copy()
    other[where] += 1
    assert changed_tensors(model_of(w=other), kept) == ["w: differs from PyTorch's tensor"]


def test_a_transposed_weight_is_pytorchs_and_a_folded_one_is_left_out():
    weight = np.arange(6, dtype=np.float32).reshape(2, 3)
    square = np.arange(4, dtype=np.float32).reshape(2, 2)
    model = model_of(turned=weight.T.copy(), square=square.T.copy(), folded=weight * 2, unknown=weight)
    kept = hash_tensors(model, {"turned": weight, "square": square, "folded": weight, "elsewhere": weight})
    assert set(kept) == {"turned", "square"}
    assert changed_tensors(model, kept) == []


def test_missing_reshaped_and_nan_tensors_are_named():
    scale = np.array([1.0, 2.0, 4.0], dtype=np.float32)
    weight = np.ones((2, 3), dtype=np.float32)
    arrays = {"s": scale, "w": weight, "gone": scale, "z": scale}
    kept = hash_tensors(model_of(**arrays), arrays)
    broken = np.array([[1, 1, np.nan], [1, 1, 1]], dtype=np.float32)
    assert changed_tensors(model_of(s=scale, w=broken, z=scale[:2]), kept) == [
        "gone: PyTorch's model has it, the file has not",
        "w: differs from PyTorch's tensor",
        "z: differs from PyTorch's tensor",
    ]


def test_a_second_output_is_told_not_to_be_compared(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x), x.sum(1)

    torch.manual_seed(0)
    certificate = export_model(
        Two(), tmp_path / "m.onnx", torch.randn(2, 4), promise=Promise(), data=[torch.randn(64, 4)]
    )
    name = next(iter(certificate.outputs))
    (note,) = [note for note in certificate.notes if note.code == "first_output"]
    assert (note.names, note.total) == ((name,), 2)
