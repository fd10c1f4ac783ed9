"""A hash of each part of a file, kept beside PyTorch's answers: whatever is changed later can be named."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import onnx

# files of before have no hash of it
_LATER = "ovit.manifest"

_METADATA = ("ovit.recipe_name", "ovit.recipe", "ovit.promise", "ovit.preprocessing", "ovit.reference", _LATER)


def fingerprints(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """SHA-256, uint8 [32], of each tensor, node, input and output of the graph, and of what the metadata say of it."""
    graph = model.graph
    parts: dict[str, bytes] = {}
    for tensor in graph.initializer:
        parts[tensor.name] = _bytes(tensor)
    for index, node in enumerate(graph.node):
        parts[f"node {node.name or index}"] = _bytes(node)
    for kind, values in (("input", graph.input), ("output", graph.output)):
        parts |= {f"{kind} {value.name}": _bytes(value) for value in values}
    parts |= {entry.key: entry.value.encode() for entry in model.metadata_props if entry.key in _METADATA}
    return {name: np.frombuffer(hashlib.sha256(part).digest(), np.uint8) for name, part in parts.items()}


def altered(model: onnx.ModelProto, kept: Mapping[str, np.ndarray]) -> dict[str, str]:
    """Parts of the file that are not those which were written, and what became of each."""
    now = fingerprints(model)
    found = dict.fromkeys(kept.keys() - now.keys(), "it was in the file when it was written")
    found |= dict.fromkeys(now.keys() - kept.keys() - {_LATER}, "it was not in the file when it was written")
    for name in kept.keys() & now.keys():
        if not np.array_equal(now[name], kept[name]):
            found[name] = "it was changed since the file was written"
    return dict(sorted(found.items()))


def _bytes(part: onnx.TensorProto | onnx.NodeProto | onnx.ValueInfoProto) -> bytes:
    content: bytes = part.SerializeToString(deterministic=True)
    return content
