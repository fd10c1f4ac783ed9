"""``verify_file``: measure a file again, with NumPy, onnx and onnxruntime alone, and compare with its certificate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ovit_engine.certificate.check import check, no_tokens
from ovit_engine.certificate.computed import unread
from ovit_engine.certificate.errors import CertificateError, VerificationError
from ovit_engine.certificate.fingerprint import altered
from ovit_engine.certificate.html import to_html
from ovit_engine.certificate.inconsistencies import inconsistencies
from ovit_engine.certificate.kernels import open_session, run_outputs
from ovit_engine.certificate.machine import NO_VNNI
from ovit_engine.certificate.measure import Origin, input_types, measure_file, notes_of
from ovit_engine.certificate.model import (
    FORMAT,
    TOKENS_UNKNOWN,
    Accuracy,
    Certificate,
    LayerFacts,
    Parity,
    certificate_path,
    page_path,
    reference_path,
)
from ovit_engine.certificate.parity import Reference, accuracy, compare, find_stored, take_sample
from ovit_engine.certificate.stated import contradictions, left_out
from ovit_engine.certificate.stored import hidden
from ovit_engine.certificate.strict_json import first_faults
from ovit_engine.certificate.tensors import changed

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
    "reference_sha256",
)

# facts that older certificates do not state, and the format since which they do
_SINCE = {"macs": 3, "tokens": 3, "other_numbers": 4}

# older certificates have notes of other wording, and say of no weight that it was pruned and left dense
_STRICT_SINCE = 4

# other machines round a level here and there the other way
_TOLERANCE = 0.01

# builds of a compressor differ a little in what they make of the same bytes
_SIZE_TOLERANCE = 0.02


def verify_file(path: str | Path, *, data: Any = None) -> Certificate:
    """Measure everything in the certificate again; returns the new certificate.

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
    reference, digest = _read_reference(reference_path(path))
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except DecodeError:
        raise VerificationError(f"{path.name} fails", [_unreadable("not a readable ONNX file", path, stated)]) from None
    if not model.metadata_props:  # a file that is cut between two fields can still be read
        raise VerificationError(f"{path.name} fails", [_unreadable("no ovit-engine metadata", path, stated)])
    unmeasurable = hidden(model)
    if unmeasurable:
        raise VerificationError(f"{path.name} fails", unmeasurable)
    origin = Origin.read(model)
    tampered = _tampered(model, reference)
    try:
        parity, part, hits = _measure_parity(path, model, reference, data)
        measured = measure_file(path, origin, reference_sha256=digest, parity=parity, parity_stored=part, accuracy=hits)
    except CertificateError as error:
        raise VerificationError(f"{path.name} fails", [*tampered, *error.violations]) from error
    whole = measured.model_copy(update={"parity": stated.parity}) if part is not None else measured
    violations = [
        *_page_violations(path, stated),
        *check(whole, origin.promise),
        *tampered,
        *contradictions(origin.recipe_text, origin.promise, measured.layers, measured.tokens, no_tokens(measured)),
        *differences(stated, measured),
        *inconsistencies(stated, reference),
        *(left_out(origin.recipe_text, origin.promise, measured.layers) if stated.format >= _STRICT_SINCE else ()),
        *_note_differences(stated, measured, origin.recipe_text),
        *origin.contradictions(measured.layers),
    ]
    if violations:
        raise VerificationError(f"{path.name} fails", list(dict.fromkeys(violations)))
    notes = [*measured.notes, *_not_measured(stated, measured, len(reference.logits))]
    if stated.format < FORMAT and page_path(path).is_file():
        notes.append(f"{page_path(path).name} was made by an older ovit-engine: it is not checked")
    return measured.model_copy(update={"notes": tuple(notes)})


def _not_measured(stated: Certificate, measured: Certificate, images: int) -> Iterator[str]:
    """What the certificate states and this verification could not measure, a note each."""
    if measured.parity.images < images:
        yield (
            f"measured again on {measured.parity.images} of the {images} images, which the reference holds: "
            "what the certificate says of the others needs the data"
        )
    if stated.kernels != measured.kernels or stated.runtime_ops != measured.runtime_ops:
        yield f"the certificate states the kernels of {stated.machine.cpu}; those above are of this machine"
    if stated.latency:
        yield f"latency stays as its maker measured it on {stated.machine.cpu}: ovit bench measures it here"
    if stated.zstd_bytes is not None and measured.zstd_bytes is None:
        yield f"zstd_bytes {stated.zstd_bytes} is as stated: the package zstandard is not installed here"


def differences(stated: Certificate, measured: Certificate) -> list[str]:
    """Where a measurement differs from the certificate, a line each."""
    found = []
    for name in _EXACT:
        before, now = getattr(stated, name), getattr(measured, name)
        if before is None and stated.format < _SINCE.get(name, 0):
            continue
        if before != now or (name == "preprocessing" and json.dumps(before) != json.dumps(now)):  # True == 1.0
            found.append(f"{name} differs: the certificate says {_short(before)}, the file {_short(now)}")
    found += _layer_differences(stated.layers, measured.layers)
    for name in ("gzip_bytes", "zstd_bytes"):
        before, now = getattr(stated, name), getattr(measured, name)
        if before is not None and now is not None and abs(before - now) > _SIZE_TOLERANCE * now:
            found.append(f"{name} differs: the certificate says {before}, the file {now}")
    same_runtime = stated.machine == measured.machine and _runtime(stated) == _runtime(measured)
    if same_runtime and (stated.runtime_ops, stated.kernels) != (measured.runtime_ops, measured.kernels):
        found.append("the runtime chooses other kernels than the certificate says")
    for kind in ("parity", "parity_stored"):
        found += _parity_differences(kind, getattr(stated, kind), getattr(measured, kind))
    hits, again = stated.accuracy, measured.accuracy
    if hits and again and hits.images == again.images and abs(hits.file - again.file) > _TOLERANCE:
        found.append(f"accuracy differs: the certificate says {hits.file:.4f}, measured {again.file:.4f}")
    return found


def _layer_differences(stated: Sequence[LayerFacts], measured: Sequence[LayerFacts]) -> list[str]:
    """Weights of which the certificate states something else, a line each."""
    old, new = ({layer.name: layer for layer in layers} for layers in (stated, measured))
    found = [f"{name}: in the certificate, not in the file" for name in sorted(old.keys() - new.keys())]
    found += [f"{name}: in the file, not in the certificate" for name in sorted(new.keys() - old.keys())]
    for name in sorted(old.keys() & new.keys()):
        before, now = old[name].model_dump(), new[name].model_dump()
        facts = [f"{key} {before[key]} (the file: {now[key]})" for key in before if before[key] != now[key]]
        if facts:
            found.append(f"{name}: the certificate says {', '.join(facts)}")
    return found


def _tampered(model: onnx.ModelProto, reference: Reference) -> list[str]:
    """Tensors that are not those which PyTorch had, parts that do not act, parts that were changed since."""
    if not reference.tensors:
        return ["the reference holds none of PyTorch's tensors"]
    if not reference.prints:
        return ["the reference holds no fingerprints of the file's parts"]
    try:
        found = [*changed(model, reference.tensors), *unread(model)]
    except CertificateError as error:
        return list(error.violations)
    named = {line.partition(":")[0] for line in found}
    return found + [f"{name}: {what}" for name, what in altered(model, reference.prints).items() if name not in named]


def _unreadable(what: str, path: Path, stated: Certificate) -> str:
    size = path.stat().st_size
    if size < stated.bytes:
        what += f", truncated: {size} of the {stated.bytes} bytes that the certificate states"
    return f"{path.name}: {what}"


def _page_violations(path: Path, stated: Certificate) -> list[str]:
    page = page_path(path)
    if stated.format == FORMAT and page.is_file() and page.read_text(errors="replace") != to_html(stated):
        return [f"{page.name} is not the page of its certificate"]
    return []


def _note_differences(stated: Certificate, measured: Certificate, recipe_text: str) -> list[str]:
    """Notes that do not follow from what the certificate states, and those that do and were left out."""
    if stated.format < _STRICT_SINCE:
        return []
    work = {note for note in measured.notes if note.startswith(("multiply-adds", TOKENS_UNKNOWN))}
    follow = work | set(notes_of(stated, recipe_text))
    # whether that of VNNI does depends on the kind of processor, which a certificate does not state
    added, left_out = set(stated.notes) - follow - {NO_VNNI}, follow - set(stated.notes) - {NO_VNNI}
    found = [f"a note that does not follow from the certificate: {_short(note)}" for note in sorted(added)]
    return found + [f"a note is missing: {_short(note)}" for note in sorted(left_out)]


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
    path: Path, model: onnx.ModelProto, reference: Reference, data: Any
) -> tuple[Parity, Parity | None, Accuracy | None]:
    """Parity and accuracy on the images at hand; the same parity again where only a part of the images is stored."""
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


def _read_certificate(path: Path) -> Certificate:
    if not path.is_file():
        raise VerificationError("cannot verify", [f"no certificate beside the file: {path.name} is missing"])
    try:
        return Certificate.from_json(path.read_text())
    except ValueError as error:
        reason = first_faults(error)
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
