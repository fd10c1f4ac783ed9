"""ONNX Runtime: sessions, outputs, and the graph it really runs."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]

from ovit_engine.certificate.errors import CertificateError
from ovit_engine.certificate.model import INTEGER_KERNELS

_SILENT = 4  # what fails is raised, with the same words

_BATCH = 64

# images that a file may take at once, if it takes no other number
LARGEST_BATCH = 1024


def open_session(path: Path, *, threads: int = 0, optimized: Path | None = None) -> Any:
    """A CPU session with all graph optimizations.

    ``threads`` 0 leaves the choice to the runtime; idle threads sleep instead of spinning, so that sessions measured
    side by side do not take each other's cores. ``optimized``: where to write the graph that is run.

    Raises CertificateError if the runtime cannot load the file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's own exceptions share no other base
        reason = str(error).strip().splitlines()[0]
        raise CertificateError(f"ONNX Runtime cannot load {path.name}", [reason]) from error


def runtime_graph(path: Path) -> onnx.ModelProto:
    """The graph that ONNX Runtime runs on this machine, after its optimizations."""
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        open_session(path, optimized=optimized)
        return onnx.load(optimized)


def integer_kernels(model: onnx.ModelProto) -> dict[str, str]:
    """Which integer kernel of an optimized graph reads each initializer, by the initializer's name."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    kernels = [node for node in walk_nodes(model.graph) if node.op_type in INTEGER_KERNELS]
    return {name: node.op_type for node in kernels for name in node.input if name in initializers}


def count_ops(model: onnx.ModelProto) -> dict[str, int]:
    """Operators of a model, subgraphs included, most frequent first."""
    return dict(Counter(node.op_type for node in walk_nodes(model.graph)).most_common())


def walk_graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and those inside its nodes (If, Loop)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            # asked for, an attribute's graph that is not there would be made by the first who edits it
            for inner in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                yield from walk_graphs(inner)


def walk_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph and of the graphs inside its nodes."""
    for inner in walk_graphs(graph):
        yield from inner.node


def run_outputs(session: Any, inputs: Sequence[np.ndarray]) -> np.ndarray:
    """The first output that has a row for each image, float32; raises CertificateError as `run_all`."""
    return next(iter(run_all(session, inputs).values()))


def run_all(session: Any, inputs: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Every output that has a row for each image, float32, by name; a file of fixed batch is fed that many at a time.

    Raises CertificateError if the runtime gives up half-way, or no output has a row for each image.
    """
    names = [value.name for value in session.get_inputs()]
    first = session.get_inputs()[0].shape[0]
    size = first if isinstance(first, int) else _BATCH
    if not 0 < size <= LARGEST_BATCH:
        reason = f"it takes batches of {size} only; 1 to {LARGEST_BATCH} are run"
        raise CertificateError("ONNX Runtime cannot run the file", [reason])
    count = len(inputs[0])
    found: dict[str, list[np.ndarray]] = {value.name: [] for value in session.get_outputs()}
    for start in range(0, count, size):
        batch = [_padded(array[start : start + size], size if isinstance(first, int) else 0) for array in inputs]
        try:
            outputs = session.run(list(found), dict(zip(names, batch, strict=True)))
        except Exception as error:  # the runtime's own exceptions share no other base
            raise CertificateError("ONNX Runtime cannot run the file", [str(error).strip().splitlines()[0]]) from error
        for name, output in zip(list(found), outputs, strict=True):
            if isinstance(output, np.ndarray) and output.ndim and len(output) == len(batch[0]):
                found[name].append(output[: min(size, count - start)])
            else:
                del found[name]
    if not found:
        raise CertificateError("no parity", ["no output has a row for each image, so nothing can be compared"])
    return {name: np.concatenate(parts).astype(np.float32) for name, parts in found.items()}


def _padded(batch: np.ndarray, size: int) -> np.ndarray:
    missing = max(0, size - len(batch))
    return np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)]) if missing else batch
