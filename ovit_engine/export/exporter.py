"""``export_model``: write, measure, compare with the promise, and only then let the file appear."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ovit_engine.certificate.check import check, check_layers, check_other
from ovit_engine.certificate.computed import inert_parts
from ovit_engine.certificate.errors import CertificateError, ExportError
from ovit_engine.certificate.html import to_html
from ovit_engine.certificate.kernels import open_session, run_all
from ovit_engine.certificate.manifest import Manifest
from ovit_engine.certificate.measure import Provenance, measure_file
from ovit_engine.certificate.model import Certificate, Promise, certificate_path, page_path, reference_path
from ovit_engine.certificate.parity import (
    Reference,
    Sample,
    accuracy,
    compare,
    make_reference,
    random_sample,
    take_sample,
)
from ovit_engine.certificate.stored import hidden
from ovit_engine.certificate.tensors import hash_tensors
from ovit_engine.certificate.weights import measure_layers
from ovit_engine.export.writer import MIN_OPSET, as_inputs, build_onnx, check_float32, serialize, set_metadata
from ovit_engine.utils.autograd import eval_mode
from ovit_engine.utils.files import staged
from ovit_engine.utils.precision import exact_arithmetic
from ovit_engine.utils.suggest import listed

_BATCH = 64

# lowest mean cosine in a rehearsal: weights that were not trained amplify rounding, so this is looser than at export
_GROSS = 0.9

_WHOLE = Manifest()
log = logging.getLogger(__name__)


def export_model(
    model: nn.Module,
    path: str | Path,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    promise: Promise,
    manifest: Manifest = _WHOLE,
    recipe_text: str = "",
    recipe_name: str = "",
    preprocessing: Mapping[str, Any] | None = None,
    data: Any = None,
    reference_model: nn.Module | None = None,
    dynamic_batch: bool = True,
    opset: int = MIN_OPSET,
) -> Certificate:
    """Write ``model`` to ``path``, certificate and reference beside it, if it is what ``promise`` and recipe say.

    Args:
        model: the baked copy; it is moved to the CPU and set to eval mode.
        path: of the ONNX file. ``<stem>.certificate.json``, the same as ``.html``, and ``<stem>.reference.npz`` come
            beside it.
        example_inputs: one batch (of any size) as the model takes it.
        promise: what the file must be.
        manifest: which heads and units of the model as it was made are left; into the metadata.
        recipe_text: goes into the file's metadata, with its hash and ``recipe_name``.
        preprocessing: size, mean, std, crop, interpolation; JSON values, into the metadata.
        data: loader, dataset or batches of ``(inputs, targets)``; the first 1024 images are compared, 256 are wanted,
            32 needed. Without data parity is measured on seeded noise, and the certificate says so.
        reference_model: the fake-quantized, masked PyTorch model; ``model`` itself if there is none.

    Raises:
        ExportError: the model cannot be exported or the file breaks the promise; ``path`` is as it was before.
        ValueError: the data does not fit the model or is too little, or ``preprocessing`` is no JSON.
    """
    path = Path(path)
    check_output_path(path)
    check_float32(model)
    told = _as_json(preprocessing or {})
    sample = _sample(as_inputs(example_inputs), data)
    logits, *others = _pytorch_outputs(reference_model or model, sample)
    reference = make_reference(sample, logits)
    proto, shared, unused = build_onnx(model, example_inputs, dynamic_batch=dynamic_batch, opset=opset)
    promise = _without(promise, unused, path.name)
    origin = Provenance(
        recipe_name=recipe_name,
        recipe_text=recipe_text,
        promise=promise,
        manifest=manifest,
        preprocessing=told,
        shared_weights={layer.name: shared[layer.name] for layer in promise.layers if layer.name in shared},
    )
    state = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    promised = [origin.shared_weights.get(layer.name, layer.name) for layer in promise.layers]
    reference = replace(reference, tensors=hash_tensors(proto, state, promised))
    return publish(proto, path, origin, sample, reference, others=others)


def _without(promise: Promise, unused: Collection[str], file: str) -> Promise:
    """The promise without weights that the exported model never uses, such as those of heads for training only."""
    left = [layer.name for layer in promise.layers if layer.name in unused]
    if not left:
        return promise
    log.warning("%s: the model in eval mode does not use %s, which the file leaves out", file, listed(left))
    return promise.model_copy(update={"layers": tuple(layer for layer in promise.layers if layer.name not in unused)})


def try_export(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    *,
    promise: Promise,
    manifest: Manifest = _WHOLE,
    reference_model: nn.Module,
) -> None:
    """Raise what `export_model` would raise of a model whose training has not begun; nothing is written.

    Outputs are compared on ``example_inputs`` alone, and only for faults that no rounding explains: weights that were
    not trained say nothing about agreement.

    Raises:
        ExportError: the model cannot be exported, or the file would break the promise.
    """
    check_float32(model)
    inputs = as_inputs(example_inputs)
    sample = Sample(tuple(value.numpy() for value in inputs), None, "random")
    wanted = _pytorch_outputs(reference_model, sample)
    proto, shared, unused = build_onnx(model, example_inputs)
    promise = _without(promise, unused, "the file")
    if unmeasurable := hidden(proto):
        raise ExportError("the file could not be verified", unmeasurable)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rehearsal.onnx"
        path.write_bytes(serialize(proto))
        found = run_all(open_session(path), sample.inputs)
    promised = {layer.name: shared[layer.name] for layer in promise.layers if layer.name in shared}
    layers = measure_layers(proto, promise, promised)
    violations = [
        *check_layers(layers, promise),
        *inert_parts(proto),
        *manifest.contradictions({layer.name: layer.shape for layer in layers}),
    ]
    for (name, values), expected in zip(found.items(), wanted, strict=True):
        if (cosine := compare(values, expected, "random").cosine) < _GROSS:
            violations.append(f"{name} of the file is not the model's: mean cosine {cosine:.3f}")
    if violations:
        raise ExportError("the file would break its promise", violations)


def _as_json(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return dict(json.loads(json.dumps(dict(preprocessing), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"preprocessing: {error}; give finite numbers, texts and lists (tensor.tolist())") from None


def check_output_path(path: Path) -> None:
    """Raise ValueError where no file can be written."""
    if path.is_dir():
        raise ValueError(f"{str(path)!r} is a folder: name the file, {str(path / 'model.onnx')!r} for one")
    if not path.parent.is_dir():
        raise ValueError(f"no such folder: {path.parent}")


def publish(
    proto: onnx.ModelProto,
    path: Path,
    origin: Provenance,
    sample: Sample,
    reference: Reference,
    *,
    others: Sequence[np.ndarray] = (),
) -> Certificate:
    """Measure a graph and let it appear at ``path``, with certificate and reference, if it is what was promised.

    ``others``: what the outputs after the one in ``reference`` must be.

    Raises:
        ExportError: the file breaks its promise; ``path`` is as it was before.
    """
    unmeasurable = hidden(proto)
    if unmeasurable:
        raise ExportError("the file could not be verified", unmeasurable)
    set_metadata(proto, origin.metadata())
    with staged(path) as draft:
        kept = reference.to_bytes()
        reference_path(draft).write_bytes(kept)
        draft.write_bytes(serialize(proto))
        try:
            outputs = run_all(open_session(draft), sample.inputs)
            logits, *beside = outputs.values()
            certificate = _measure(draft, origin, sample, reference, hashlib.sha256(kept).hexdigest(), logits)
            compared = [compare(*pair, sample.source) for pair in zip(beside, others, strict=True)]
        except CertificateError as error:
            raise ExportError(error.summary, error.violations) from error
        violations = [
            *check(certificate, origin.promise),
            *(line for pair in zip(list(outputs)[1:], compared, strict=True) for line in check_other(*pair)),
            *inert_parts(proto),
            *origin.manifest.contradictions({layer.name: layer.shape for layer in certificate.layers}),
        ]
        if violations:
            raise ExportError(f"{path.name} breaks its promise", violations)
        certificate_path(draft).write_text(certificate.to_json(), encoding="utf-8")
        page_path(draft).write_text(to_html(certificate), encoding="utf-8")
    if sample.source == "random":
        log.warning("%s: parity was measured on random inputs, since no data was given", path.name)
    return certificate


def _sample(example: tuple[Tensor, ...], data: Any) -> Sample:
    shapes = [tuple(value.shape) for value in example]
    dtypes = [value.numpy().dtype for value in example]
    return random_sample(shapes, dtypes) if data is None else take_sample(data, shapes, dtypes)


def _pytorch_outputs(model: nn.Module, sample: Sample) -> list[np.ndarray]:
    """Every output with a row for each image, float32, in eval mode; every module's mode is as before afterwards."""
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    outputs = []
    with eval_mode(model), exact_arithmetic():  # a GPU would round convolutions to ten bits, which the file does not
        for start in range(0, len(sample), _BATCH):
            batch = [torch.from_numpy(array[start : start + _BATCH]).to(device) for array in sample.inputs]
            leaves = [leaf for leaf in pytree.tree_leaves(model(*batch)) if isinstance(leaf, Tensor)]
            rows = [leaf if leaf.dim() and len(leaf) == len(batch[0]) else None for leaf in leaves]
            outputs.append([None if leaf is None else leaf.float().cpu().numpy() for leaf in rows])
    # of a fixed size that happens to be that of one batch an output has rows in that batch only
    found = [np.concatenate(parts) for parts in zip(*outputs, strict=True) if not any(part is None for part in parts)]
    if not found:
        raise ExportError("no parity", ["no output has a row for each image, so nothing can be compared"])
    return found


def _measure(
    path: Path, origin: Provenance, sample: Sample, reference: Reference, digest: str, logits: np.ndarray
) -> Certificate:
    parity = compare(logits, reference.logits, sample.source)
    stored = len(reference.stored[0])
    part = None
    if stored < len(sample):
        part = compare(logits[:stored], reference.logits[:stored], sample.source)
    return measure_file(
        path,
        origin,
        reference_sha256=digest,
        parity=parity,
        parity_stored=part,
        accuracy=accuracy(logits, reference.logits, sample.labels),
    )
