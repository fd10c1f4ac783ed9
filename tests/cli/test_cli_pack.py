"""ovit pack and ovit unpack."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from click.testing import Result
from onnx import helper, numpy_helper

Ovit = Callable[..., Result]


def write(path: str) -> bytes:
    weight = np.zeros((128, 128), np.int8)
    weight[::4, 1] = 5
    graph = helper.make_graph([], "g", [], [], [numpy_helper.from_array(weight, "w")])
    content: bytes = helper.make_model(graph).SerializeToString()
    Path(path).write_bytes(content)
    return content


def test_there_and_back(ovit: Ovit) -> None:
    content = write("m.onnx")
    result = ovit("pack", "m.onnx")
    assert result.exit_code == 0, result.output
    rows = {line[:33].strip(): line[33:].split() for line in result.stdout.splitlines()}
    assert rows["ONNX file"] == [f"{len(content):,}", "100.0%"]
    assert int(rows["packed (deflated)"][0].replace(",", "")) == Path("m.onnx.packed").stat().st_size
    assert result.stdout.endswith("m.onnx.packed written\n")
    Path("m.onnx").unlink()
    assert ovit("unpack", "m.onnx.packed").stdout == f"m.onnx: {len(content):,} bytes, as they were packed\n"
    assert Path("m.onnx").read_bytes() == content
    assert ovit("unpack", "m.onnx.packed", "--output", "other.onnx").exit_code == 0
    assert Path("other.onnx").read_bytes() == content


def test_what_is_no_packed_file(ovit: Ovit) -> None:
    write("m.onnx")
    result = ovit("unpack", "m.onnx")
    assert (result.exit_code, result.stderr) == (1, "ovit: error: 'm.onnx': not a packed file of ovit-engine\n")
    ovit("pack", "m.onnx", "--output", "m.bin")
    assert "does not end in .packed: name the ONNX file with --output" in ovit("unpack", "m.bin").stderr
    assert "no such file: none.onnx" in ovit("pack", "none.onnx").stderr


def test_the_file_to_pack_is_never_overwritten(ovit: Ovit) -> None:
    content = write("m.onnx")
    result = ovit("pack", "m.onnx", "--output", "./m.onnx")
    assert "'m.onnx' is the file to pack: name another output" in result.stderr
    assert Path("m.onnx").read_bytes() == content


def test_what_is_no_onnx_file(ovit: Ovit) -> None:
    Path("empty").write_bytes(b"")
    Path("text").write_text("nonsense")
    for name in ("empty", "text"):
        assert f"'{name}': no ONNX file" in ovit("pack", name).stderr
