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

from ovit_engine.certificate.errors import VerificationError
from ovit_engine.certificate.kernels import INTEGER_KERNELS, count_ops, integer_kernels, runtime_graph
from ovit_engine.certificate.machine import int8_note, this_machine, versions
from ovit_engine.certificate.manifest import Manifest
from ovit_engine.certificate.model import (
    TOKENS_UNKNOWN,
    Accuracy,
    Certificate,
    LayerFacts,
    Parity,
    Promise,
    count_weights,
)
from ovit_engine.certificate.parity import WANTED_IMAGES
from ovit_engine.certificate.sizes import gzip_size, weight_bytes, zstd_size
from ovit_engine.certificate.stated import unproven
from ovit_engine.certificate.stated_tokens import REDUCERS
from ovit_engine.certificate.stored import count_others
from ovit_engine.certificate.strict_json import first_faults, read_object
from ovit_engine.certificate.weights import measure_layers
from ovit_engine.certificate.work import Work, measure_work

_FORMAT = "1"

# biases, norms, embeddings and scales of a transformer are a tenth of a tiny one's weights, and less of others'
_MANY = 0.25


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a file knows about itself: it travels in the ONNX metadata."""

    recipe_name: str
    recipe_text: str
    promise: Promise
    # which heads and units of the model as it was made are left
    manifest: Manifest = field(default_factory=Manifest)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    # what the file is compared with: PyTorch's model, or the float ONNX file that it was made of
    reference: str = "PyTorch"
    # what the metadata say of the sparsity of each promised weight; "" where it is yet to be written
    sparsity: str = ""
    # promised weight -> initializer, where an equal weight is stored once for both
    shared_weights: Mapping[str, str] = field(default_factory=dict)

    @property
    def recipe_sha256(self) -> str:
        """Hash of the recipe's text."""
        return hashlib.sha256(self.recipe_text.encode()).hexdigest()

    def metadata(self, layers: tuple[LayerFacts, ...]) -> dict[str, str]:
        """The ONNX metadata, with the measured sparsity of the promised weights."""
        return {
            "ovit.format": _FORMAT,
            "ovit.recipe_name": self.recipe_name,
            "ovit.recipe": self.recipe_text,
            "ovit.recipe_sha256": self.recipe_sha256,
            "ovit.promise": self.promise.model_dump_json(),
            "ovit.manifest": self.manifest.model_dump_json(),
            "ovit.preprocessing": json.dumps(dict(self.preprocessing)),
            "ovit.reference": self.reference,
            "ovit.shared_weights": json.dumps(dict(self.shared_weights)),
            "ovit.sparsity": self._sparsity_of(layers),
            "ovit.versions": json.dumps(versions()),
        }

    def contradictions(self, layers: tuple[LayerFacts, ...]) -> list[str]:
        """Where the metadata deny what was measured."""
        shapes = {layer.name: layer.shape for layer in layers}
        found = self.manifest.contradictions(shapes)
        if self.sparsity != self._sparsity_of(layers):
            found.append("the sparsity in the file's metadata is not that of its weights")
        for layer in self.promise.layers:
            removed = self.manifest.removed_from(layer.name, shapes[layer.name]) if layer.name in shapes else 0
            if layer.removed > removed:
                found.append(f"{layer.name}: {layer.removed} weights are said to be removed, by the manifest {removed}")
        return found

    def _sparsity_of(self, layers: tuple[LayerFacts, ...]) -> str:
        promised = {layer.name for layer in self.promise.layers}
        return json.dumps({layer.name: round(layer.sparsity, 6) for layer in layers if layer.name in promised})

    @classmethod
    def read(cls, model: onnx.ModelProto) -> Origin:
        """Read it back. Raises VerificationError if the file is not one of ours or contradicts itself."""
        found = {entry.key: entry.value for entry in model.metadata_props}
        if found.get("ovit.format") != _FORMAT:
            raise VerificationError("cannot verify", ["no ovit-engine metadata in the file: was it exported by us?"])
        try:
            read_object(found["ovit.promise"])
            origin = cls(
                recipe_name=found["ovit.recipe_name"],
                recipe_text=found["ovit.recipe"],
                promise=Promise.model_validate_json(found["ovit.promise"], strict=True),
                manifest=Manifest.model_validate_json(found.get("ovit.manifest", "{}"), strict=True),
                preprocessing=read_object(found["ovit.preprocessing"]),
                reference=found.get("ovit.reference", "PyTorch"),
                sparsity=found["ovit.sparsity"],
                shared_weights=_names(read_object(found["ovit.shared_weights"])),
            )
        except (KeyError, ValueError) as error:
            reason = f"without {error}" if isinstance(error, KeyError) else first_faults(error)
            raise VerificationError("cannot verify", [f"broken ovit-engine metadata: {reason}"]) from error
        unpromised = origin.shared_weights.keys() - {layer.name for layer in origin.promise.layers}
        if unpromised:
            raise VerificationError("cannot verify", [f"{min(unpromised)}: named as shared, and not promised"])
        if origin.recipe_sha256 != found.get("ovit.recipe_sha256"):
            raise VerificationError("cannot verify", ["the recipe in the metadata does not match its own hash"])
        return origin


def measure_file(
    path: Path,
    origin: Origin,
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
    ops, kernels = count_ops(graph), integer_kernels(graph)
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
        runtime_ops=ops,
        integer_kernels=sum(count for op, count in ops.items() if op in INTEGER_KERNELS),
        kernels=fused,
        reference_sha256=reference_sha256,
        parity=parity,
        parity_stored=parity_stored,
        accuracy=accuracy,
        machine=machine,
        versions=versions(),
    )
    return certificate.model_copy(
        update={"notes": (*notes_of(certificate, origin.recipe_text), *unknown_work(work, origin))}
    )


def _names(found: Mapping[str, Any]) -> dict[str, str]:
    wrong = [name for name, other in found.items() if not isinstance(other, str)]
    if wrong:
        raise ValueError(f"{wrong[0]} is shared with {found[wrong[0]]!r}, which is no name")
    return dict(found)


def unknown_work(work: Work, origin: Origin) -> Iterator[str]:
    """Notes on multiply-adds, and on tokens that are to be fewer, that can't be counted."""
    if work.unknown:
        yield f"multiply-adds are not counted: {work.unknown}"
    if work.no_tokens and (origin.promise.tokens is not None or any(name in origin.recipe_text for name in REDUCERS)):
        yield f"{TOKENS_UNKNOWN}: {work.no_tokens}"


def notes_of(certificate: Certificate, recipe_text: str) -> tuple[str, ...]:
    """What a reader should know before they trust a number of this certificate: all of it follows from the others."""
    parity, outputs = certificate.parity, list(certificate.outputs)
    quantized = [layer.name for layer in certificate.quantized]
    notes = [int8_note(certificate.machine)] if quantized else []
    in_float = [name for name in quantized if name not in certificate.kernels]
    if in_float:
        some = ", ".join(in_float[:3]) + (", ..." if len(in_float) > 3 else "")
        notes.append(
            f"{len(in_float)} of {len(quantized)} int8 weights are computed with in float by the runtime: {some}"
        )
    if len(outputs) > 1:
        notes.append(f"parity compares {outputs[0]!r}, the first of {len(outputs)} outputs")
    if parity.source == "random":
        notes.append("parity was measured on random inputs: no data was given")
    elif parity.images < WANTED_IMAGES:
        notes.append(f"parity was measured on {parity.images} images, all there were; {WANTED_IMAGES} are wanted")
    others, weights = certificate.other_numbers or 0, count_weights(certificate.layers)
    if others > _MANY * weights:
        notes.append(f"{others:,} numbers are stored besides the {weights:,} weights of products, unmeasured")
    notes += unproven(recipe_text, certificate.promise, certificate.layers)
    return tuple(note for note in notes if note is not None)


def input_types(model: onnx.ModelProto) -> tuple[list[tuple[int, ...]], list[np.dtype[Any]]]:
    """Shapes (0 for a free dimension) and NumPy types of the inputs."""
    kinds = [value.type.tensor_type for value in model.graph.input]
    shapes = [tuple(dim.dim_value for dim in kind.shape.dim) for kind in kinds]
    return shapes, [np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)) for kind in kinds]


def input_shapes(model: onnx.ModelProto) -> dict[str, tuple[int | str, ...]]:
    """Shape of each input, a free dimension by its name."""
    return {value.name: _shape(value) for value in model.graph.input}


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
