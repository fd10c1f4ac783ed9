"""Every number that a file stores, wherever it lies, and where none could be measured. Needs no PyTorch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import numpy_helper

from ovit_engine.certificate.kernels import walk_graphs, walk_nodes

# more integers than axes, paddings and the like have are values
_SETTINGS = 16

_LISTS = ("value_floats", "value_ints", "value_float", "value_int")


def load_onnx(path: Path) -> onnx.ModelProto:
    """Read an ONNX file with its external data.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not an ONNX file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return onnx.load(path)
    except DecodeError:
        raise ValueError(f"{str(path)!r} is not an ONNX file") from None


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
