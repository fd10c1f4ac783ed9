"""Latency in a certificate: measured on request, with spread and verdict; `verify` does not measure it again."""

import shutil

import pytest

from ovit_engine.analysis.certified_latency import add_latency
from ovit_engine.certificate.html import to_html
from ovit_engine.certificate.model import Certificate, certificate_path, page_path
from ovit_engine.certificate.verify import verify_file
from tests.exported_files import table_of


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
        assert (row.verdict is None) is (row.ratio is None) is (row.baseline is None)
        if row.ratio is not None:
            assert row.verdict == row.ratio.verdict
            assert row.ratio.low <= row.ratio.median <= row.ratio.high
    words = table_of(certificate)
    assert "against dense-int8.onnx" in words
    assert "images/s, 1 thread(s)" in words
    verified = verify_file(vit_copy.path)
    assert verified.latency == ()
    assert verified.notes[-1].code == "latency_not_measured"


def test_it_needs_a_baseline_and_a_certificate(vit_copy, tmp_path):
    with pytest.raises(ValueError, match="name a baseline"):
        add_latency(vit_copy.path, [])
    with pytest.raises(FileNotFoundError, match=r"none\.onnx"):
        add_latency(vit_copy.path, [tmp_path / "none.onnx"])
    certificate_path(vit_copy.path).unlink()
    with pytest.raises(FileNotFoundError, match=r"certificate\.json"):
        add_latency(vit_copy.path, [vit_copy.path])
