"""Measuring one ONNX file, and what the file says about its own origin. Needs no PyTorch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper
from pydantic import TypeAdapter

from ovit_engine.certificate.errors import VerificationError, first_faults
from ovit_engine.certificate.kernels import count_ops, integer_kernels, runtime_graph
from ovit_engine.certificate.machine import may_saturate, this_machine, versions
from ovit_engine.certificate.manifest import Manifest, check_keys
from ovit_engine.certificate.model import Accuracy, Certificate, Parity, Promise, count_weights
from ovit_engine.certificate.notes import Note
from ovit_engine.certificate.parity import WANTED_IMAGES
from ovit_engine.certificate.sizes import gzip_size, weight_bytes, zstd_size
from ovit_engine.certificate.stored import count_others
from ovit_engine.certificate.weights import measure_layers
from ovit_engine.certificate.work import Work, measure_work

_FORMAT = "2"

# biases, norms, embeddings and scales of a transformer are a tenth of a tiny one's weights, and less of others'
_MANY = 0.25


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What a file knows about itself: it travels in the ONNX metadata."""

    recipe_name: str
    recipe_text: str
    promise: Promise
    # which heads and units of the model as it was made are left
    manifest: Manifest = field(default_factory=Manifest)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    # what the file is compared with: PyTorch's model, or the float ONNX file that it was made from
    reference: str = "PyTorch"
    # promised weight -> initializer, where an equal weight is stored once for both
    shared_weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def recipe_sha256(self) -> str:
        """Hash of the recipe's text."""
        return hashlib.sha256(self.recipe_text.encode()).hexdigest()

    def metadata(self) -> dict[str, str]:
        """Return the ONNX metadata."""
        return {
            "ovit.format": _FORMAT,
            "ovit.recipe_name": self.recipe_name,
            "ovit.recipe": self.recipe_text,
            "ovit.promise": self.promise.model_dump_json(),
            "ovit.manifest": self.manifest.model_dump_json(),
            "ovit.preprocessing": json.dumps(dict(self.preprocessing)),
            "ovit.reference": self.reference,
            "ovit.shared_weights": json.dumps(dict(self.shared_weights)),
            "ovit.versions": json.dumps(versions()),
        }

    @classmethod
    def read(cls, model: onnx.ModelProto) -> Provenance:
        """Read it back. Raises VerificationError if the file is not one of ours."""
        found = {entry.key: entry.value for entry in model.metadata_props}
        if "ovit.format" not in found:
            raise VerificationError("cannot verify", ["no ovit-engine metadata in the file: was it exported by us?"])
        if found["ovit.format"] != _FORMAT:
            other = f"the file's metadata have format {found['ovit.format']}, this ovit-engine reads format {_FORMAT}"
            raise VerificationError("cannot verify", [f"{other}: export the file again"])
        try:
            for key in ("ovit.promise", "ovit.manifest", "ovit.preprocessing", "ovit.shared_weights"):
                check_keys(found[key])
            return cls(
                recipe_name=found["ovit.recipe_name"],
                recipe_text=found["ovit.recipe"],
                promise=Promise.model_validate_json(found["ovit.promise"], strict=True),
                manifest=Manifest.model_validate_json(found["ovit.manifest"], strict=True),
                preprocessing=_OBJECT.validate_json(found["ovit.preprocessing"]),
                reference=found["ovit.reference"],
                shared_weights=_NAMES.validate_json(found["ovit.shared_weights"], strict=True),
            )
        except (KeyError, ValueError) as error:
            reason = f"without {error}" if isinstance(error, KeyError) else first_faults(error)
            raise VerificationError("cannot verify", [f"broken ovit-engine metadata: {reason}"]) from error


_OBJECT: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])

_NAMES: TypeAdapter[dict[str, str]] = TypeAdapter(dict[str, str])


def measure_file(
    path: Path,
    origin: Provenance,
    *,
    reference_sha256: str,
    parity: Parity,
    parity_stored: Parity | None,
    accuracy: Accuracy | None,
) -> Certificate:
    """Everything about the file at ``path`` from its bytes; parity is the caller's measurement."""
    content = path.read_bytes()
    model = onnx.load_model_from_string(content)
    layers = measure_layers(model, origin.promise, dict(origin.shared_weights))
    graph = runtime_graph(path)
    kernels = integer_kernels(graph)
    stored = {layer.name: origin.shared_weights.get(layer.name, layer.name) for layer in layers}
    fused = {name: kernels[initializer] for name, initializer in stored.items() if initializer in kernels}
    machine = this_machine()
    stored_bytes, bound = weight_bytes(model)
    others = count_others(model, set(stored.values()))
    work = measure_work(model)
    certificate = Certificate(
        file=path.name,
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        gzip_bytes=gzip_size(content),
        zstd_bytes=zstd_size(content),
        weight_bytes=stored_bytes,
        weight_entropy_bytes=bound,
        other_numbers=others,
        opset=next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0),
        inputs=input_shapes(model),
        outputs={value.name: _shape(value) for value in model.graph.output},
        macs=work.macs,
        tokens=work.tokens,
        recipe_name=origin.recipe_name,
        recipe_sha256=origin.recipe_sha256,
        promise=origin.promise,
        manifest=origin.manifest,
        preprocessing=dict(origin.preprocessing),
        reference=origin.reference,
        layers=layers,
        ops=count_ops(model),
        runtime_ops=count_ops(graph),
        kernels=fused,
        reference_sha256=reference_sha256,
        parity=parity,
        parity_stored=parity_stored,
        accuracy=accuracy,
        machine=machine,
        versions=versions(),
    )
    return certificate.model_copy(update={"notes": (*notes_of(certificate), *_unknown_work(work, origin))})


def _unknown_work(work: Work, origin: Provenance) -> Iterator[Note]:
    """Yield notes on multiply-adds and promised tokens that can't be counted."""
    if work.unknown:
        yield Note(code="macs_unknown", reason=work.unknown)
    if work.no_tokens and origin.promise.tokens is not None:
        yield Note(code="tokens_unknown", reason=work.no_tokens)


def notes_of(certificate: Certificate) -> Iterator[Note]:
    """Yield what follows from the other facts of a certificate and a reader should know."""
    parity, outputs = certificate.parity, tuple(certificate.outputs)
    quantized = [layer.name for layer in certificate.quantized]
    if quantized and may_saturate(certificate.machine):
        yield Note(code="no_vnni")
    in_float = tuple(name for name in quantized if name not in certificate.kernels)
    if in_float:
        yield Note(code="float_kernels", count=len(in_float), total=len(quantized), names=in_float)
    if len(outputs) > 1:
        yield Note(code="first_output", total=len(outputs), names=outputs[:1])
    if parity.source == "random":
        yield Note(code="random_inputs")
    elif parity.images < WANTED_IMAGES:
        yield Note(code="few_images", count=parity.images, total=WANTED_IMAGES)
    weights = count_weights(certificate.layers)
    if certificate.other_numbers > _MANY * weights:
        yield Note(code="other_numbers", count=certificate.other_numbers, total=weights)


def input_types(model: onnx.ModelProto) -> tuple[list[tuple[int, ...]], list[np.dtype[Any]]]:
    """Shapes (0 for a free dimension) and NumPy types of the inputs."""
    kinds = [value.type.tensor_type for value in model.graph.input]
    shapes = [tuple(max(dim.dim_value, 0) for dim in kind.shape.dim) for kind in kinds]
    return shapes, [np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)) for kind in kinds]


def input_shapes(model: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Shape of each input, a free dimension by its name."""
    return {value.name: _shape(value) for value in model.graph.input}


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
