"""A float ONNX file of any tool, brought into the one form that is quantized: opset 13, float32, weights as tensors."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from ovit_engine.certificate.kernels import LARGEST_BATCH, walk_graphs, walk_nodes
from ovit_engine.certificate.measure import input_types
from ovit_engine.certificate.stored import load_onnx
from ovit_engine.export.module_names import name_by_module
from ovit_engine.utils.suggest import suggest

_OPSET = 13  # since which DequantizeLinear has a scale for each channel

_WEIGHTS_ALONE = 4  # the IR version since which initializers need not be inputs

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

_QUANTIZED = ("Integer", "QLinear", "QuantizeLinear", "QGemm", "QAttention", "MatMulNBits", "FromQuantized")

_FREE_BATCH = "batch"

Shapes = Mapping[str, Sequence[int]]


def read(source: Path) -> onnx.ModelProto:
    """Return a float ONNX file in the form that is quantized, its weights named after their modules where it says so.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no ONNX, quantized already, or an opset that can't be converted.
    """
    model = load_onnx(source)
    for node in walk_nodes(model.graph):
        if any(part in node.op_type for part in _QUANTIZED):
            raise ValueError(f"{source.name} is quantized already ({node.op_type}): give the float file")
    _keep_weights_inside(model)
    model = _at_opset(model, source.name)
    _name_free_batches(model)
    _constants_as_weights(model)
    _as_float32(model)
    _fold_gemm_factors(model)
    name_by_module(model)
    return model


def data_shapes(
    model: onnx.ModelProto, given: Shapes, name: str
) -> tuple[list[tuple[int, ...]], list[np.dtype[Any]], int]:
    """Return the shape of one batch of each input (batch 0 where it is free), their types, and the batch or 0.

    Args:
        given: the sizes of inputs that the file leaves free, by the input's name.

    Raises:
        ValueError: an unknown input, sizes that the file does not take or that are still free, or inputs whose first
            axis is not one batch.
    """
    known = [value.name for value in model.graph.input]
    for each in given:
        if each not in known:
            raise ValueError(f"{name} has no input {each!r}{suggest(each, known)}")
    shapes, types = input_types(model)
    found = [
        _fixed(value, shape, given.get(value.name), name)
        for value, shape in zip(model.graph.input, shapes, strict=True)
    ]
    if not found:
        raise ValueError(f"{name} has no input")
    batches = dict(zip(known, (shape[0] for shape in found), strict=True))
    if len(set(batches.values())) > 1:
        told = ", ".join(f"{each} {list(shape)}" for each, shape in zip(known, found, strict=True))
        raise ValueError(f"{name} takes {told}: the first axis of every input must be the same batch")
    if found[0][0] > LARGEST_BATCH:
        raise ValueError(f"{name} takes batches of {found[0][0]} only: {LARGEST_BATCH} at most")
    return found, types, found[0][0]


def _fixed(
    value: onnx.ValueInfoProto, shape: tuple[int, ...], given: Sequence[int] | None, name: str
) -> tuple[int, ...]:
    """The sizes of one input; only its batch may be free."""
    dims = [str(size) if size > 0 else "?" for size in shape]
    if not value.type.HasField("tensor_type"):
        raise ValueError(f"input {value.name!r} of {name} is not a tensor")
    is_ranked = value.type.tensor_type.HasField("shape")
    if is_ranked and not shape:
        raise ValueError(f"input {value.name!r} of {name} is a single number: every input needs a batch first")
    if given is not None:
        sizes = tuple(given)
        fits = not is_ranked or (
            len(sizes) == len(shape) and all(own in (0, size) for own, size in zip(shape, sizes, strict=True))
        )
        if not fits or len(sizes) < 1:
            raise ValueError(f"--shape {value.name}={','.join(map(str, sizes))}: {name} takes [{', '.join(dims)}]")
        return (shape[0] if shape else 0, *sizes[1:])
    if not is_ranked or not all(shape[1:]):
        wanted = ",".join(["1", *(size if size != "?" else "SIZE" for size in dims[1:])]) if is_ranked else "1,..."
        told = f"{name} leaves sizes of {value.name!r} free ([{', '.join(dims)}])"
        raise ValueError(f"{told}: give them, --shape {value.name}={wanted}")
    return shape


def _keep_weights_inside(model: onnx.ModelProto) -> None:
    """Weights are no inputs: until 2019 files had to list them there, as some exporters do to this day."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, _WEIGHTS_ALONE)


def _at_opset(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    found = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), _OPSET)
    if found >= _OPSET:
        return model
    try:
        return version_converter.convert_version(model, _OPSET)
    except Exception as error:  # the C++ converter's own
        reason = " ".join(str(error).split())[-200:]
        raise ValueError(f"{name} has opset {found}, and onnx can't convert it to {_OPSET}: {reason}") from error


def _name_free_batches(model: onnx.ModelProto) -> None:
    """A size of -1 is a free one; of the first axis, the batch."""
    for value in (*model.graph.input, *model.graph.output):
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_value < 0 or dim.dim_param == "?":
                dim.dim_param = _FREE_BATCH if axis == 0 else f"{value.name}_{axis}"
    del model.graph.value_info[:]  # as free, and as wrong; they are inferred again


def _constants_as_weights(model: onnx.ModelProto) -> None:
    """Constant nodes of the main graph as initializers."""
    kept = []
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].name == "value":
            tensor = model.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        else:
            kept.append(node)
    if len(kept) < len(model.graph.node):
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del model.graph.node[:]
        model.graph.node.extend(copies)


def _as_float32(model: onnx.ModelProto) -> None:
    """Compute in float32 where the file does in 16 bits; its inputs and outputs keep their types."""
    graph = model.graph
    for value in list(graph.input):
        if value.type.tensor_type.elem_type in _HALF:
            _rename_reads(graph, value.name, f"{value.name}.float32")
            cast = helper.make_node("Cast", [value.name], [f"{value.name}.float32"], to=TensorProto.FLOAT)
            graph.node.insert(0, cast)
    producers = {output: node for node in graph.node for output in node.output}
    for value in graph.output:
        kind = value.type.tensor_type.elem_type
        if kind in _HALF and value.name in producers:
            _rename_reads(graph, value.name, f"{value.name}.float32")
            node = producers[value.name]
            node.output[list(node.output).index(value.name)] = f"{value.name}.float32"
            graph.node.append(helper.make_node("Cast", [f"{value.name}.float32"], [value.name], to=kind))
    last = {value.name for value in graph.output}
    for node in walk_nodes(graph):
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _HALF:
                attribute.i = attribute.i if last.intersection(node.output) else TensorProto.FLOAT
    for tensor in _tensors(graph):
        if tensor.data_type in _HALF:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name))
    for inner in walk_graphs(graph):
        if inner is not graph:
            for value in (*inner.input, *inner.output, *inner.value_info):
                if value.type.tensor_type.elem_type in _HALF:
                    value.type.tensor_type.elem_type = TensorProto.FLOAT


def _rename_reads(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in walk_nodes(graph):
        for position, name in enumerate(node.input):
            if name == old:
                node.input[position] = new


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    for inner in walk_graphs(graph):
        yield from inner.initializer
        for node in inner.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors


def _fold_gemm_factors(model: onnx.ModelProto) -> None:
    """Fold alpha and beta of Gemm into weight and bias: ONNX Runtime's quantizer leaves beta out."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    reads = Counter(name for node in walk_nodes(model.graph) for name in node.input)
    for node in model.graph.node:
        if node.op_type != "Gemm":
            continue
        for key, position in (("alpha", 1), ("beta", 2)):
            factor = next((each for each in node.attribute if each.name == key), None)
            name = node.input[position] if len(node.input) > position else ""
            if factor is None or factor.f == 1 or (name and name not in stored):
                continue
            node.attribute.remove(factor)
            if name:
                folded = numpy_helper.to_array(stored[name]) * np.float32(factor.f)
                target = stored[name] if reads[name] == 1 else model.graph.initializer.add()
                own = name if reads[name] == 1 else f"{name}.{key}.{node.output[0]}"
                target.CopyFrom(numpy_helper.from_array(folded, own))
                node.input[position] = own
