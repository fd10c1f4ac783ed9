"""``verify_file``: measure a file again, with NumPy, onnx and onnxruntime alone, and compare with its certificate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ovit_engine.certificate.check import check
from ovit_engine.certificate.computed import inert_parts
from ovit_engine.certificate.errors import CertificateError, VerificationError, first_faults
from ovit_engine.certificate.kernels import open_session, run_outputs
from ovit_engine.certificate.measure import Provenance, input_types, measure_file
from ovit_engine.certificate.model import (
    Accuracy,
    Certificate,
    LayerFacts,
    Parity,
    certificate_path,
    reference_path,
)
from ovit_engine.certificate.notes import Note
from ovit_engine.certificate.parity import Reference, accuracy, compare, find_stored, take_sample
from ovit_engine.certificate.stored import hidden, malformed
from ovit_engine.certificate.tensors import changed_tensors

# facts that are the same on every machine
_EXACT = (
    "sha256",
    "bytes",
    "opset",
    "inputs",
    "outputs",
    "macs",
    "tokens",
    "recipe_name",
    "recipe_sha256",
    "promise",
    "manifest",
    "preprocessing",
    "reference",
    "weight_bytes",
    "weight_entropy_bytes",
    "other_numbers",
    "ops",
)

# facts that depend on the runtime and the machine
_OF_RUNTIME = ("runtime_ops", "kernels")

# other machines round a level here and there the other way
_TOLERANCE = 0.01

# bytes; those of the largest models have 2 MB
_LARGEST_CERTIFICATE = 64 * 2**20

# builds of a compressor differ a little in what they make of the same bytes
_SIZE_TOLERANCE = 0.02


def verify_file(path: str | Path, *, data: Any = None) -> Certificate:
    """Measure everything in the certificate again and return the new certificate.

    Without ``data`` parity and accuracy are measured on the images stored in the reference. With it (as for
    ``export_model``) on those of its images that the certificate was measured on. Where these are not all, the returned
    certificate speaks of fewer images, and a note says so.

    Raises:
        FileNotFoundError: there is no such ONNX file.
        VerificationError: something is missing, differs from the certificate, or breaks the file's own promise;
            ``violations`` names each.
        ValueError: ``data`` does not fit the model or holds none of the images.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder: name the ONNX file" if path.is_dir() else f"no such file: {path}")
    stated = _read_certificate(certificate_path(path))
    reference = _read_reference(reference_path(path), stated.reference_sha256)
    model = _read_model(path, stated)
    origin = Provenance.read(model)
    violations: list[str] = []
    try:
        violations += [*changed_tensors(model, reference.tensors), *inert_parts(model)]
        parity, part, hits = _measure_parity(path, model, reference, data)
        measured = measure_file(
            path,
            origin,
            reference_sha256=stated.reference_sha256,
            parity=parity,
            parity_stored=part,
            accuracy=hits,
        )
    except CertificateError as error:
        raise VerificationError(f"{path.name} fails", [*violations, *error.violations]) from error
    whole = measured.model_copy(update={"parity": stated.parity}) if part is not None else measured
    violations = [
        *check(whole, origin.promise),
        *violations,
        *certificate_differences(stated, measured),
        *_reference_differences(stated, reference),
        *([] if part is None else _beyond_the_part(stated, part)),
        *_without_hash(origin, measured, reference),
        *origin.manifest.contradictions({layer.name: layer.shape for layer in measured.layers}),
    ]
    if violations:
        raise VerificationError(f"{path.name} fails", list(dict.fromkeys(violations)))
    return measured.model_copy(
        update={"notes": (*measured.notes, *_not_measured(stated, measured, len(reference.logits)))}
    )


def _not_measured(stated: Certificate, measured: Certificate, images: int) -> Iterator[Note]:
    """Yield a note for each fact of the certificate that this verification could not measure."""
    cpu = (stated.machine.cpu,)
    if measured.parity.images < images:
        yield Note(code="partly_measured", count=measured.parity.images, total=images)
    if any(getattr(stated, name) != getattr(measured, name) for name in _OF_RUNTIME):
        yield Note(code="other_kernels", names=cpu)
    if stated.latency:
        yield Note(code="latency_not_measured", names=cpu)
    if stated.zstd_bytes is not None and measured.zstd_bytes is None:
        yield Note(code="no_zstandard", count=stated.zstd_bytes)


def certificate_differences(stated: Certificate, measured: Certificate) -> list[str]:
    """Return a line for each fact of the certificate that a measurement contradicts."""
    found = []
    for name in _EXACT:
        before, now = getattr(stated, name), getattr(measured, name)
        if before != now or (name == "preprocessing" and json.dumps(before) != json.dumps(now)):  # True == 1.0
            found.append(f"{name} differs: the certificate says {_short(before)}, the file {_short(now)}")
    found += _layer_differences(stated.layers, measured.layers)
    for name in ("gzip_bytes", "zstd_bytes"):
        before, now = getattr(stated, name), getattr(measured, name)
        if before is not None and now is not None and abs(before - now) > _SIZE_TOLERANCE * now:
            found.append(f"{name} differs: the certificate says {before}, the file {now}")
    same_runtime = (stated.machine, _runtime(stated)) == (measured.machine, _runtime(measured))
    if same_runtime and any(getattr(stated, name) != getattr(measured, name) for name in _OF_RUNTIME):
        found.append("the runtime chooses other kernels than the certificate says")
    for kind in ("parity", "parity_stored"):
        found += _parity_differences(kind, getattr(stated, kind), getattr(measured, kind))
    hits, again = stated.accuracy, measured.accuracy
    if hits and again and hits.images == again.images and abs(hits.file - again.file) > _TOLERANCE:
        found.append(f"accuracy differs: the certificate says {hits.file:.4f}, measured {again.file:.4f}")
    return found


def _layer_differences(stated: Sequence[LayerFacts], measured: Sequence[LayerFacts]) -> list[str]:
    """Return a line for each weight of which the certificate states something else."""
    old, new = ({layer.name: layer for layer in layers} for layers in (stated, measured))
    found = [f"{name}: in the certificate, not in the file" for name in sorted(old.keys() - new.keys())]
    found += [f"{name}: in the file, not in the certificate" for name in sorted(new.keys() - old.keys())]
    for name in sorted(old.keys() & new.keys()):
        before, now = old[name].model_dump(), new[name].model_dump()
        facts = [f"{key} {before[key]} (the file: {now[key]})" for key in before if before[key] != now[key]]
        if facts:
            found.append(f"{name}: the certificate says {', '.join(facts)}")
    return found


def _parity_differences(kind: str, stated: Parity | None, measured: Parity | None) -> list[str]:
    if measured is None or stated is None or measured.images != stated.images:
        return []
    found = []
    for name in ("agreement", "agreement_low", "agreement_high", "cosine", "max_error"):
        before, now = getattr(stated, name), getattr(measured, name)
        if abs(before - now) > _TOLERANCE:
            found.append(f"{kind}.{name} differs: the certificate says {before:.4f}, measured {now:.4f}")
    return found


def _reference_differences(stated: Certificate, reference: Reference) -> list[str]:
    """Return a line for each fact on all images that the reference contradicts, which holds the logits of all."""
    found = []
    images, of = len(reference.logits), stated.parity
    if (of.images, of.source) != (images, reference.source):
        found.append(f"parity differs: the certificate speaks of {of.images} images, the reference holds {images}")
    known = accuracy(reference.logits, reference.logits, reference.labels)
    facts, again = (None if hits is None else (hits.images, hits.pytorch) for hits in (stated.accuracy, known))
    if facts != again:
        found.append(f"accuracy of {stated.reference} differs: the certificate says {facts}, the reference {again}")
    return found


def _without_hash(origin: Provenance, measured: Certificate, reference: Reference) -> list[str]:
    """Return a line for each weight that no hash covers: it was written with one."""
    names = {origin.shared_weights.get(layer.name, layer.name) for layer in measured.layers}
    return [f"{name}: the reference has no hash of it" for name in sorted(names - reference.tensors.keys())]


def _beyond_the_part(stated: Certificate, part: Parity) -> list[str]:
    """Return a line where what is said of all images can't be, given what is said of the stored ones."""
    of, stored = stated.parity, stated.parity_stored
    if stored is None or stored.images != part.images:
        return [f"parity_stored differs: the certificate says {_short(stored)}, {part.images} images are stored"]
    agreeing, among = of.agreement * of.images, stored.agreement * stored.images
    if among - 0.5 < agreeing < among + of.images - stored.images + 0.5:  # half an image for rounding
        return []
    share = f"{of.agreement:.2%} of {of.images} images can't agree"
    return [f"parity: {share} where {stored.agreement:.2%} of the {stored.images} stored ones do"]


def _measure_parity(
    path: Path, model: onnx.ModelProto, reference: Reference, data: Any
) -> tuple[Parity, Parity | None, Accuracy | None]:
    """Measure parity and accuracy on the images at hand; parity a second time if only a part of them is stored."""
    session = open_session(path)
    if data is not None:
        sample, reference = find_stored(take_sample(data, *input_types(model)), reference)
        logits = run_outputs(session, sample.inputs)
        parity = compare(logits, reference.logits, sample.source)
        return parity, None, accuracy(logits, reference.logits, reference.labels)
    stored = len(reference.stored[0])
    logits, expected = run_outputs(session, reference.stored), reference.logits[:stored]
    parity = compare(logits, expected, reference.source)
    labels = None if reference.labels is None else reference.labels[:stored]
    return parity, None if stored == len(reference.logits) else parity, accuracy(logits, expected, labels)


def _read_model(path: Path, stated: Certificate) -> onnx.ModelProto:
    """Read the graph. Raises VerificationError where it can't be read or measured as a whole."""
    fault = "not a readable ONNX file"
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except DecodeError:
        model = None
    if model is not None:
        fault = "" if model.metadata_props else "no ovit-engine metadata"  # a cut between two fields can still be read
    if model is None or fault:
        if (size := path.stat().st_size) < stated.bytes:
            fault += f", truncated: {size} of the {stated.bytes} bytes that the certificate states"
        raise VerificationError(f"{path.name} fails", [f"{path.name}: {fault}"])
    if wrong := malformed(model):
        raise VerificationError(f"{path.name} fails", [f"{path.name}: not a valid ONNX file: {wrong}"])
    if unmeasurable := hidden(model):
        raise VerificationError(f"{path.name} fails", unmeasurable)
    return model


def _read_certificate(path: Path) -> Certificate:
    if not path.is_file():
        raise VerificationError("cannot verify", [f"no certificate beside the file: {path.name} is missing"])
    if path.stat().st_size > _LARGEST_CERTIFICATE:
        raise VerificationError("cannot verify", [f"{path.name} has more than {_LARGEST_CERTIFICATE:,} bytes"])
    try:
        return Certificate.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise VerificationError("cannot verify", [f"{path.name} can't be read: {first_faults(error)}"]) from error


def _read_reference(path: Path, digest: str) -> Reference:
    """Read the reference that the certificate names by its SHA-256."""
    if not path.is_file():
        raise VerificationError("cannot verify", [f"no PyTorch reference beside the file: {path.name} is missing"])
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != digest:
        what = f"{path.name}: reference_sha256 differs: the certificate says {digest}, the file {found}"
        raise VerificationError("cannot verify", [what])
    try:
        return Reference.load(path)
    except ValueError as error:
        raise VerificationError("cannot verify", [str(error)]) from error


def _runtime(certificate: Certificate) -> str | None:
    return certificate.versions.get("onnxruntime")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
