"""Every number that a file stores, wherever it lies, and where none could be measured. Needs no PyTorch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import numpy_helper

from ovit_engine.certificate.kernels import walk_graphs, walk_nodes

# more integers than axes, paddings and the like have are values
_SETTINGS = 16

_LARGEST = 2**31  # bytes: what protobuf reads

_LARGEST_METADATA = 16 * 2**20  # characters

_SHOWN = 100  # characters of a name in a message

_LISTS = ("value_floats", "value_ints", "value_float", "value_int")


def load_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its external data.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an ONNX file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{str(path)!r} is larger than 2 GiB, which no ONNX file is")
    try:
        model = onnx.load(path)
    except DecodeError:
        raise ValueError(f"{str(path)!r} is not an ONNX file") from None
    except (onnx.checker.ValidationError, OSError) as error:  # of tensors in other files
        raise ValueError(f"{str(path)!r} can't be read: {_line(error)}") from error
    if wrong := malformed(model):
        raise ValueError(f"{str(path)!r} is not a valid ONNX file: {wrong}")
    return model


def malformed(model: onnx.ModelProto) -> str | None:
    """Return what keeps a graph from being read at all, in a line; None for one that can be.

    Operators have the inputs they need, no value is computed from itself, shapes of tensors are shapes.
    """
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    for tensor in _all_tensors(model):
        if any(size < 0 for size in tensor.dims):
            return f"tensor {tensor.name[:_SHOWN]!r} has the shape {list(tensor.dims)[:8]}"
    if any(not isinstance(name, str) for name in _names(model)):
        return "a name in it is not UTF-8"
    for graph in walk_graphs(model.graph):
        for node in graph.node:
            least = _least_inputs(node, versions)
            if not node.output or len(node.input) < least or not all(node.input[:least]):
                what = "no output" if not node.output else f"{len(node.input)} inputs of {least}"
                return f"{node.op_type[:_SHOWN]} {node.name[:_SHOWN]!r} has {what}"
        if looped := _looped(graph):
            return f"{looped[:_SHOWN]!r} is computed from itself, or twice"
    if sum(len(entry.key) + len(entry.value) for entry in model.metadata_props) > _LARGEST_METADATA:
        return f"its metadata have more than {_LARGEST_METADATA:,} characters"
    return None


def _names(model: onnx.ModelProto) -> Iterator[object]:
    """Every name in a graph; protobuf gives those that are not UTF-8 as bytes."""
    for entry in model.metadata_props:
        yield from (entry.key, entry.value)
    for graph in walk_graphs(model.graph):
        for value in (*graph.input, *graph.output, *graph.initializer):
            yield value.name
        for node in graph.node:
            yield from (node.op_type, node.domain, node.name, *node.input, *node.output)
            yield from (attribute.name for attribute in node.attribute)


def _least_inputs(node: onnx.NodeProto, versions: Mapping[str, int]) -> int:
    domain = "" if node.domain == "ai.onnx" else node.domain
    try:
        schema = onnx.defs.get_schema(node.op_type, versions.get(domain or "ai.onnx", 1), domain)
    except (onnx.defs.SchemaError, TypeError):
        return 0
    return int(schema.min_input)


def _looped(graph: onnx.GraphProto) -> str | None:
    """A value that is computed from itself, or by two nodes."""
    waits = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    if len(waits) < sum(bool(name) for node in graph.node for name in node.output):
        return _twice(name for node in graph.node for name in node.output if name)[0]
    needs = [{waits[name] for name in node.input if name in waits} for node in graph.node]
    readers: dict[int, list[int]] = {}
    for index, before in enumerate(needs):
        for each in before:
            readers.setdefault(each, []).append(index)
    ready = [index for index, before in enumerate(needs) if not before]
    left = [len(before) for before in needs]
    done = 0
    while ready:
        done += 1
        for reader in readers.get(ready.pop(), ()):
            left[reader] -= 1
            if not left[reader]:
                ready.append(reader)
    if done == len(needs):
        return None
    return next(str(node.output[0]) for node, count in zip(graph.node, left, strict=True) if count)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def stored_tensors(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """All tensors that the file holds, by the name that nodes read them by: initializers, and values of Constants.

    Those of graphs inside nodes (If, Loop) are among them.
    """
    found = {tensor.name: tensor for graph in walk_graphs(model.graph) for tensor in graph.initializer}
    for node in walk_nodes(model.graph):
        if node.op_type == "Constant":
            values = [value for attribute in node.attribute for value in _constant(attribute)]
            found |= dict(zip(node.output, values, strict=False))
    return found


def count_others(model: onnx.ModelProto, weights: Collection[str]) -> int:
    """Numbers that the file stores besides the tensors `weights`: biases, norms, embeddings, scales, and what hides.

    Strings of Constants count by their bytes, since a graph can turn them into numbers.
    """
    stored = stored_tensors(model)
    held: int = sum(math.prod(tensor.dims) for name, tensor in stored.items() if name not in weights)
    for node in walk_nodes(model.graph):
        for attribute in node.attribute:
            held += sum(map(len, attribute.strings))
            if node.op_type == "Constant":
                held += len(attribute.s)
            else:
                tensors = [tensor for tensor in (attribute.t, *attribute.tensors) if tensor.ByteSize()]
                held += len(attribute.floats) + sum(math.prod(tensor.dims) for tensor in tensors)
                held += len(attribute.ints) if len(attribute.ints) > _SETTINGS else 0
    return held


def hidden(model: onnx.ModelProto) -> list[str]:
    """What keeps numbers of a file from being measured, a line each; files that we write have none of it."""
    found = [
        f"{tensor.name or 'a tensor'}: its values lie outside of the file, where no hash covers them"
        for tensor in _all_tensors(model)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    found += [f"{each.name}: a function of the file's own, in which nothing is measured" for each in model.functions]
    found += [f"{name}: stored as ONNX's sparse tensor, which is not measured" for name in _sparse(model)]
    if model.training_info:
        found.append("training_info: a second graph, which is not measured")
    fed = {value.name for graph in walk_graphs(model.graph) for value in graph.input}
    names = [tensor.name for graph in walk_graphs(model.graph) for tensor in graph.initializer]
    constants = [name for node in walk_nodes(model.graph) if node.op_type == "Constant" for name in node.output]
    found += [
        f"{name}: an input as well, so that whoever runs the file can replace it" for name in names if name in fed
    ]
    found += [f"{name}: stored twice" for name in _twice((*names, *constants))]
    found += [f"{key}: twice in the metadata" for key in _twice(entry.key for entry in model.metadata_props)]
    return found


def _constant(attribute: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    """The value of a Constant, however it is spelled; strings and sparse tensors give none."""
    if attribute.name == "value":
        yield attribute.t
    elif attribute.name in _LISTS:
        value = onnx.helper.get_attribute_value(attribute)
        yield numpy_helper.from_array(np.array(value, np.float32 if "float" in attribute.name else np.int64))


def _all_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from (tensor for graph in walk_graphs(model.graph) for tensor in graph.initializer)
    for node in (*walk_nodes(model.graph), *(node for each in model.functions for node in each.node)):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)


def _sparse(model: onnx.ModelProto) -> Iterator[str]:
    for graph in walk_graphs(model.graph):
        yield from (tensor.values.name for tensor in graph.sparse_initializer)
    for node in walk_nodes(model.graph):
        if any(attribute.HasField("sparse_tensor") or attribute.sparse_tensors for attribute in node.attribute):
            yield node.output[0]


def _twice(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
