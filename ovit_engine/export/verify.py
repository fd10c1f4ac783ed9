"""``verify_file``: measure a file again, with NumPy, onnx and onnxruntime alone, and compare with its certificate."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ovit_engine.export.certificate import Accuracy, Certificate, Parity, certificate_path, reference_path
from ovit_engine.export.errors import CertificateError, VerificationError
from ovit_engine.export.measure import Origin, input_types, measure_file
from ovit_engine.export.parity import Reference, accuracy, compare, find_stored, take_sample
from ovit_engine.export.promise import check
from ovit_engine.export.runtime import open_session, run_outputs

# facts that are the same on every machine
_EXACT = (
    "file",
    "sha256",
    "bytes",
    "opset",
    "inputs",
    "outputs",
    "recipe_name",
    "recipe_sha256",
    "promise",
    "preprocessing",
    "layers",
    "ops",
    "reference_sha256",
)
# other machines round a level here and there the other way
_TOLERANCE = 0.01


def verify_file(path: str | Path, *, data: Any = None) -> Certificate:
    """Measure everything in the certificate again; returns the new certificate.

    Without ``data`` parity is measured on the images stored in the reference. With it (as for ``export_model``) on
    those of its images that the certificate was measured on.

    Raises:
        FileNotFoundError: there is no such ONNX file.
        VerificationError: something is missing, differs from the certificate, or breaks the file's own promise;
            ``violations`` names each.
        ValueError: ``data`` does not fit the model or holds none of the images.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    stated = _read_certificate(certificate_path(path))
    reference, digest = _read_reference(reference_path(path))
    try:
        model = onnx.load(path)
    except DecodeError:
        raise VerificationError(f"{path.name} fails", ["not a readable ONNX file"]) from None
    origin = Origin.read(model)
    try:
        parity, part, hits = _measure_parity(path, model, reference, stated, data)
        measured = measure_file(path, origin, reference_sha256=digest, parity=parity, parity_stored=part, accuracy=hits)
    except CertificateError as error:
        raise VerificationError(f"{path.name} fails", error.violations) from error
    violations = check(measured, origin.promise) + differences(stated, measured)
    if violations:
        raise VerificationError(f"{path.name} fails", list(dict.fromkeys(violations)))
    return measured


def differences(stated: Certificate, measured: Certificate) -> list[str]:
    """Where a measurement differs from the certificate, a line each."""
    found = []
    for name in _EXACT:
        before, now = getattr(stated, name), getattr(measured, name)
        if before == now:
            continue
        if name == "layers":
            old, new = ({layer.name: layer for layer in layers} for layers in (before, now))
            changed = sorted(key for key in old | new if old.get(key) != new.get(key))
            found.append(f"layers differ from the certificate: {', '.join(changed)}")
        else:
            found.append(f"{name} differs: the certificate says {_short(before)}, the file {_short(now)}")
    same_runtime = stated.machine == measured.machine and _runtime(stated) == _runtime(measured)
    if same_runtime and stated.runtime_ops != measured.runtime_ops:
        found.append("the runtime chooses other kernels than the certificate says")
    for kind in ("parity", "parity_stored"):
        found += _parity_differences(kind, getattr(stated, kind), getattr(measured, kind))
    hits, again = stated.accuracy, measured.accuracy
    if hits and again and hits.images == again.images and abs(hits.file - again.file) > _TOLERANCE:
        found.append(f"accuracy differs: the certificate says {hits.file:.4f}, measured {again.file:.4f}")
    return found


def _parity_differences(kind: str, stated: Parity | None, measured: Parity | None) -> list[str]:
    if measured is None or stated is None or measured.images != stated.images:
        return []
    found = []
    for name in ("agreement", "cosine", "max_error"):
        before, now = getattr(stated, name), getattr(measured, name)
        if abs(before - now) > _TOLERANCE:
            found.append(f"{kind}.{name} differs: the certificate says {before:.4f}, measured {now:.4f}")
    return found


def _measure_parity(
    path: Path, model: onnx.ModelProto, reference: Reference, stated: Certificate, data: Any
) -> tuple[Parity, Parity | None, Accuracy | None]:
    """Parity on all images, parity on the stored ones if these are fewer, accuracy."""
    session = open_session(path)
    if data is not None:
        sample, reference = find_stored(take_sample(data, *input_types(model)), reference)
        logits = run_outputs(session, sample.inputs)
        parity = compare(logits, reference.logits, sample.source)
        return parity, None, accuracy(logits, reference.logits, reference.labels)
    stored = len(reference.stored[0])
    logits, expected = run_outputs(session, reference.stored), reference.logits[:stored]
    parity = compare(logits, expected, reference.source)
    if stored == len(reference.logits):
        return parity, None, accuracy(logits, expected, reference.labels)
    # too large to be stored whole: the full numbers stand as stated, the stored part is measured
    return stated.parity, parity, stated.accuracy


def _read_certificate(path: Path) -> Certificate:
    if not path.is_file():
        raise VerificationError("cannot verify", [f"no certificate beside the file: {path.name} is missing"])
    try:
        return Certificate.from_json(path.read_text())
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise VerificationError("cannot verify", [f"{path.name} is not a certificate: {reason}"]) from error


def _read_reference(path: Path) -> tuple[Reference, str]:
    if not path.is_file():
        raise VerificationError("cannot verify", [f"no PyTorch reference beside the file: {path.name} is missing"])
    try:
        return Reference.load(path), hashlib.sha256(path.read_bytes()).hexdigest()
    except ValueError as error:
        raise VerificationError("cannot verify", [str(error)]) from error


def _runtime(certificate: Certificate) -> str | None:
    return certificate.versions.get("onnxruntime")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
