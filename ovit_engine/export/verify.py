"""``verify_file``: measure a file again, with NumPy, onnx and onnxruntime alone, and compare with its certificate."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from pydantic import ValidationError

from ovit_engine.export.certificate import (
    Accuracy,
    Certificate,
    LayerFacts,
    Parity,
    certificate_path,
    page_path,
    reference_path,
)
from ovit_engine.export.errors import CertificateError, VerificationError
from ovit_engine.export.fingerprint import altered
from ovit_engine.export.measure import Origin, input_types, measure_file
from ovit_engine.export.page import to_html
from ovit_engine.export.parity import Reference, accuracy, compare, find_stored, take_sample, wilson
from ovit_engine.export.promise import check
from ovit_engine.export.runtime import INTEGER_KERNELS, open_session, run_outputs
from ovit_engine.export.stated import contradictions
from ovit_engine.export.tensors import changed
from ovit_engine.export.unread import unread

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
    "ops",
    "reference_sha256",
)
# facts that older certificates do not state, and the format since which they do
_SINCE = {"macs": 3, "tokens": 3}
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
        raise FileNotFoundError(f"no such file: {path}")
    stated = _read_certificate(certificate_path(path))
    reference, digest = _read_reference(reference_path(path))
    try:
        model = onnx.load(path)
    except DecodeError:
        raise VerificationError(f"{path.name} fails", [_unreadable("not a readable ONNX file", path, stated)]) from None
    if not model.metadata_props:  # a file that is cut between two fields can still be read
        raise VerificationError(f"{path.name} fails", [_unreadable("no ovit-engine metadata", path, stated)])
    origin = Origin.read(model)
    tampered = _tampered(model, reference)
    try:
        parity, part, hits = _measure_parity(path, model, reference, data)
        measured = measure_file(path, origin, reference_sha256=digest, parity=parity, parity_stored=part, accuracy=hits)
        if parity.images < len(reference.logits):
            note = (
                f"measured again on {parity.images} of the {len(reference.logits)} images, which the reference holds: "
            )
            note += "what the certificate says of the others needs the data"
            measured = measured.model_copy(update={"notes": (*measured.notes, note)})
        if stated.kernels != measured.kernels or stated.runtime_ops != measured.runtime_ops:
            note = f"the certificate states the kernels of {stated.machine.cpu}; those above are of this machine"
            measured = measured.model_copy(update={"notes": (*measured.notes, note)})
        if stated.latency:
            note = f"latency stays as its maker measured it on {stated.machine.cpu}: ovit bench measures it here"
            measured = measured.model_copy(update={"notes": (*measured.notes, note)})
    except CertificateError as error:
        raise VerificationError(f"{path.name} fails", [*tampered, *error.violations]) from error
    whole = measured.model_copy(update={"parity": stated.parity}) if part is not None else measured
    violations = [
        *_page_violations(path, stated),
        *check(whole, origin.promise),
        *tampered,
        *contradictions(origin.recipe_text, origin.promise, measured.layers, measured.tokens),
        *differences(stated, measured),
        *_inconsistencies(stated, reference),
        *origin.contradictions(measured.layers),
    ]
    if violations:
        raise VerificationError(f"{path.name} fails", list(dict.fromkeys(violations)))
    return measured


def differences(stated: Certificate, measured: Certificate) -> list[str]:
    """Where a measurement differs from the certificate, a line each."""
    found = []
    for name in _EXACT:
        before, now = getattr(stated, name), getattr(measured, name)
        if before is None and stated.format < _SINCE.get(name, 0):
            continue
        if before != now:
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


def _inconsistencies(stated: Certificate, reference: Reference) -> list[str]:
    """What a certificate says that its own reference, or another of its lines, denies."""
    found = []
    count = len(reference.logits)
    if stated.parity.images != count or stated.parity.source != reference.source:
        found.append(
            f"parity speaks of {stated.parity.images} {_kind(stated.parity.source)}images, "
            f"the reference holds {count} {_kind(reference.source)}images"
        )
    known = accuracy(reference.logits, reference.logits, reference.labels)
    hits = stated.accuracy
    if (hits is None) != (known is None):
        found.append("the certificate and the reference disagree on whether there are labels")
    elif hits is not None and known is not None:
        if hits.images != count or abs(hits.pytorch - known.pytorch) > 1e-9:
            found.append(
                f"accuracy of {stated.reference}: the certificate says {hits.pytorch:.4f}, "
                f"the reference {known.pytorch:.4f}"
            )
        if abs(hits.file - hits.pytorch) > 1 - stated.parity.agreement + 1e-9:
            found.append(
                f"accuracy {hits.file:.4f} can't be, with {hits.pytorch:.4f} of {stated.reference} "
                "and the agreement stated"
            )
    for kind in ("parity", "parity_stored"):
        parity = getattr(stated, kind)
        if parity is not None:
            low, high = wilson(parity.agreement, parity.images)
            if abs(parity.agreement_low - low) > 1e-6 or abs(parity.agreement_high - high) > 1e-6:
                found.append(
                    f"{kind}: the interval of {parity.agreement:.2%} of {parity.images} is {low:.2%}-{high:.2%}, "
                    f"the certificate says {parity.agreement_low:.2%}-{parity.agreement_high:.2%}"
                )
    found += _impossible_latencies(stated)
    kernels = sum(number for op, number in stated.runtime_ops.items() if op in INTEGER_KERNELS)
    if stated.integer_kernels != kernels:
        found.append(f"integer_kernels is {stated.integer_kernels}, runtime_ops has {kernels}")
    return found


def _page_violations(path: Path, stated: Certificate) -> list[str]:
    page = page_path(path)
    if page.is_file() and page.read_text(errors="replace") != to_html(stated):
        return [f"{page.name} is not the page of its certificate"]
    return []


def _impossible_latencies(stated: Certificate) -> list[str]:
    """Stated times that contradict themselves: they cannot be measured again on another machine."""
    found = []
    for row in stated.latency:
        where = f"latency of {row.file} at batch {row.batch_size}"
        if not 0 < row.low <= row.median <= row.high:
            found.append(
                f"{where}: the median {row.median} s does not lie within its quartiles {row.low} to {row.high}"
            )
        elif abs(row.throughput * row.median - row.batch_size) > 1e-6 * row.batch_size:
            found.append(f"{where}: {row.throughput} images/s is not what a median of {row.median} s gives")
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
        reason = _reason(error)
        raise VerificationError("cannot verify", [f"{path.name} is not a certificate: {reason}"]) from error


def _reason(error: ValueError) -> str:
    """What pydantic has against a text, in a line: the first fields it names."""
    if not isinstance(error, ValidationError):
        return str(error).splitlines()[0]
    faults = [(".".join(map(str, fault["loc"])), fault["msg"]) for fault in error.errors()]
    return "; ".join(f"{where}: {what}" if where else what for where, what in faults[:3])


def _read_reference(path: Path) -> tuple[Reference, str]:
    if not path.is_file():
        raise VerificationError("cannot verify", [f"no PyTorch reference beside the file: {path.name} is missing"])
    try:
        return Reference.load(path), hashlib.sha256(path.read_bytes()).hexdigest()
    except ValueError as error:
        raise VerificationError("cannot verify", [str(error)]) from error


def _runtime(certificate: Certificate) -> str | None:
    return certificate.versions.get("onnxruntime")


def _kind(source: str) -> str:
    return "random " if source == "random" else ""


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
