"""Latency in a certificate: only when asked, with spread and verdict, and never a word of it from verify."""

import shutil

import pytest

from ovit_engine.analysis.latency import add_latency
from ovit_engine.certificate.errors import VerificationError
from ovit_engine.certificate.html import to_html
from ovit_engine.certificate.model import Certificate, certificate_path, page_path
from ovit_engine.certificate.verify import verify_file


def test_latency_against_two_files(vit_copy, tmp_path):
    for name in ("dense.onnx", "dense-int8.onnx"):
        shutil.copy(vit_copy.path, tmp_path / name)
    files = [tmp_path / "dense.onnx", tmp_path / "dense-int8.onnx"]
    certificate = add_latency(vit_copy.path, files, batch_sizes=(1, 2), repeats=5)
    assert certificate == Certificate.from_json(certificate_path(vit_copy.path).read_text())
    assert page_path(vit_copy.path).read_text() == to_html(certificate)
    assert [(row.file, row.baseline, row.batch_size) for row in certificate.latency] == [
        (file, baseline, size)
        for other in ("dense.onnx", "dense-int8.onnx")
        for size in (1, 2)
        for file, baseline in ((other, None), ("model.onnx", other))
    ]
    for row in certificate.latency:
        assert 0 < row.low <= row.median <= row.high
        assert row.throughput == pytest.approx(row.batch_size / row.median)
        assert (row.verdict is None) is (row.baseline is None)
    words = " ".join(str(certificate).split())
    assert "against dense-int8.onnx" in words
    assert "images/s, 1 thread(s)" in words
    verified = verify_file(vit_copy.path)
    assert verified.latency == ()
    assert "latency stays as its maker measured it" in verified.notes[-1]


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"throughput": 1e6}, "latency of model.onnx at batch 1: 1000000.0 images/s is not what a median of"),
        ({"median": 1e-9}, "latency of model.onnx at batch 1: the median 1e-09 s does not lie within its quartiles"),
    ],
)
def test_times_that_contradict_themselves(vit_copy, tmp_path, lie, message):
    shutil.copy(vit_copy.path, tmp_path / "dense.onnx")
    certificate = add_latency(vit_copy.path, [tmp_path / "dense.onnx"], batch_sizes=(1,), repeats=5)
    rows = [row.model_copy(update=lie if row.baseline else {}) for row in certificate.latency]
    forged = certificate.model_copy(update={"latency": tuple(rows)})
    certificate_path(vit_copy.path).write_text(forged.to_json())
    with pytest.raises(VerificationError, match=message):
        verify_file(vit_copy.path)


def test_it_needs_a_baseline_and_a_certificate(vit_copy, tmp_path):
    with pytest.raises(ValueError, match="name a baseline"):
        add_latency(vit_copy.path, [])
    with pytest.raises(FileNotFoundError, match=r"none\.onnx"):
        add_latency(vit_copy.path, [tmp_path / "none.onnx"])
    certificate_path(vit_copy.path).unlink()
    with pytest.raises(FileNotFoundError, match=r"certificate\.json"):
        add_latency(vit_copy.path, [vit_copy.path])
