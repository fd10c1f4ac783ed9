"""An int8 file taken apart: its layers, and the same file with some of them in float. NumPy, onnx and onnxruntime.

A layer is a MatMul, Gemm or convolution with its weight and the QuantizeLinear/DequantizeLinear pairs around it. A
layer in float reads what the QuantizeLinear read.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnxruntime.quantization.quant_utils import compute_scale_zp  # type: ignore[import-untyped]

from ovit_engine.certificate.kernels import walk_nodes
from ovit_engine.certificate.weights import to_array, trace

_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose")

# between a layer and the rounding of its output: bias, activation, folded scale
_FOLLOWERS = ("Add", "Relu", "Clip", "HardSwish", "HardSigmoid", "Mul", "Reshape", "Squeeze", "Unsqueeze", "Identity")

_REMOVABLE = ("QuantizeLinear", "DequantizeLinear", "Transpose", "Identity")

_INTEGER_OPERATORS = (
    "QLinearMatMul",
    "QLinearConv",
    "QGemm",
    "MatMulInteger",
    "ConvInteger",
    "DynamicQuantizeLinear",
)

# names of the recipe's observers
OBSERVERS = ("min_max", "percentile", "mse")

_PERCENTILE = 99.99

# of the extremes: where values may be cut off
_FRACTIONS = np.linspace(1.0, 0.02, 50)


@dataclass(frozen=True)
class LayerWeight:
    """A weight as its layer reads it: dequantized, and [in, out] also where a Gemm stores [out, in]."""

    # the initializer, and the position at which the layer reads it
    name: str
    position: int
    # float32; `level` is the width of a quantization level at each value, None where the file stores floats
    values: np.ndarray
    level: np.ndarray | None


@dataclass(frozen=True)
class Rounding:
    """A QuantizeLinear/DequantizeLinear pair at one input of one node."""

    # first output of the node that reads the rounded value, and the position at which it does
    reader: str
    position: int
    # output of the QuantizeLinear
    quantizer: str
    # what the reader reads where the whole file is in float: the value that a chain of pairs begins with
    source: str

    @property
    def tap(self) -> str:
        """The name under which `qdq_activations` collects the value."""
        return f"{self.reader}.{self.position}"


@dataclass(frozen=True)
class QdqLayer:
    """A unit that can be left in float by itself."""

    name: str
    # what an `exclude` of a recipe calls it; None for what recipes have no name for
    recipe_name: str | None
    op: str
    # first output of its node, which names it in the graph
    output: str
    weight: LayerWeight | None
    # the roundings that disappear when this layer is left in float
    roundings: tuple[Rounding, ...]


def find_layers(model: onnx.ModelProto) -> list[QdqLayer]:
    """Every layer, in the order of the graph; a rounding that belongs to none is a unit of the node that reads it.

    Raises:
        ValueError: the file's integers are not QuantizeLinear/DequantizeLinear pairs.
    """
    wrong = next((node.op_type for node in model.graph.node if node.op_type in _INTEGER_OPERATORS), None)
    if wrong is not None:
        raise ValueError(f"the file has {wrong}: only QuantizeLinear/DequantizeLinear pairs can be taken apart")
    producers = {output: node for node in model.graph.node for output in node.output}
    weights = _read_weights(model, producers)
    roundings: dict[str, list[Rounding]] = defaultdict(list)
    for node in model.graph.node:
        for position, value in enumerate(node.input):
            quantizer = _quantizer(producers, value)
            if quantizer is not None:
                rounding = Rounding(node.output[0], position, quantizer.output[0], _source(producers, value))
                roundings[_owner(producers, node, quantizer)].append(rounding)
    found: dict[str, QdqLayer] = {}
    for node in model.graph.node:
        output = node.output[0]
        if output not in weights and output not in roundings:
            continue
        name, recipe_name = _names(model, producers, node, weights)
        name = f"{name} ({output})" if name in found else name
        layer = QdqLayer(name, recipe_name, node.op_type, output, weights.get(output), tuple(roundings[output]))
        found[name] = layer
    return list(found.values())


def rewrite(
    model: onnx.ModelProto,
    *,
    float_inputs: Collection[str],
    weights: Mapping[str, np.ndarray],
    layers: Collection[QdqLayer],
) -> onnx.ModelProto:
    """Return a copy without the roundings of `float_inputs`, and with other `weights`; both name layers by output."""
    changed = copy.deepcopy(model)
    nodes = {node.output[0]: node for node in changed.graph.node}
    order = {output: index for index, output in enumerate(nodes)}
    roundings = [rounding for layer in layers if layer.output in float_inputs for rounding in layer.roundings]
    # in the order of the graph: a quantizer that reads another one's output is led past that one first
    for rounding in sorted(roundings, key=lambda each: order[each.reader]):
        nodes[rounding.reader].input[rounding.position] = nodes[rounding.quantizer].input[0]
    for layer in layers:
        if layer.output in weights:
            assert layer.weight is not None
            name, node = f"{layer.output}.float_weight", nodes[layer.output]
            values = np.ascontiguousarray(weights[layer.output], dtype=np.float32)
            changed.graph.initializer.append(numpy_helper.from_array(values, name))
            node.input[layer.weight.position] = name
            kept = [attribute for attribute in node.attribute if attribute.name != "transB"]
            del node.attribute[:]
            node.attribute.extend(kept)
    _remove_unused(changed)
    return changed


def with_ranges(model: onnx.ModelProto, values: Mapping[str, np.ndarray], observer: str) -> onnx.ModelProto:
    """Return a copy in which the quantizers in `values`, by output, have the range that `observer` takes from those."""
    changed = copy.deepcopy(model)
    stored = {tensor.name: to_array(tensor) for tensor in model.graph.initializer}
    nodes = {node.output[0]: node for node in changed.graph.node}
    for output, array in values.items():
        zero = stored.get(nodes[output].input[2] if len(nodes[output].input) > 2 else "", np.array(1, np.uint8))
        names = f"{output}.scale", f"{output}.zero_point"
        for name, value in zip(names, quantizer_range(array, zero, observer), strict=True):
            changed.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        for node in changed.graph.node:
            if output in (node.output[0], node.input[0] if node.op_type == "DequantizeLinear" else None):
                node.input[1], node.input[2] = names
    return changed


def _read_weights(model: onnx.ModelProto, producers: Mapping[str, onnx.NodeProto]) -> dict[str, LayerWeight]:
    """The weight of each product, by the first output of its node."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        for position in (1, 0) if node.op_type == "MatMul" else (1,) if node.op_type in _PRODUCTS else ():
            source = trace(node.input[position], producers, stored)
            if source is None or len(stored[source.name].dims) < 2:
                continue
            values, level = to_array(stored[source.name]), None
            if source.quantize is not None:
                level, zero = (_spread(source.quantize, index, stored, values) for index in (1, 2))
                values = (values.astype(np.int32) - zero) * level
            is_turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
            if source.transposed != is_turned:
                values, level = np.swapaxes(values, -1, -2), None if level is None else np.swapaxes(level, -1, -2)
            found[node.output[0]] = LayerWeight(source.name, position, values.astype(np.float32), level)
            break
    return found


def _spread(node: onnx.NodeProto, index: int, stored: Mapping[str, onnx.TensorProto], levels: np.ndarray) -> np.ndarray:
    """A DequantizeLinear's scale (input 1) or zero point (2, 0 if missing), broadcast to its levels."""
    if len(node.input) <= index or not node.input[index]:
        return np.zeros_like(levels, np.int32)
    if node.input[index] not in stored or stored[node.input[index]].dims[1:]:
        raise ValueError(f"{node.input[0]!r}: only one constant scale for each tensor or channel can be taken apart")
    value = to_array(stored[node.input[index]])
    if value.size > 1:
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        if not -levels.ndim <= axis < levels.ndim:
            raise ValueError(f"{node.input[0]!r}: scales along axis {axis} of a tensor of {levels.ndim} axes")
        value = value.reshape([-1 if each == axis % levels.ndim else 1 for each in range(levels.ndim)])
    return np.broadcast_to(value.astype(np.float32 if index == 1 else np.int32), levels.shape)


def _quantizer(producers: Mapping[str, onnx.NodeProto], value: str) -> onnx.NodeProto | None:
    """The QuantizeLinear whose dequantized output `value` is."""
    node = producers.get(value)
    inner = producers.get(node.input[0]) if node is not None and node.op_type == "DequantizeLinear" else None
    return inner if inner is not None and inner.op_type == "QuantizeLinear" else None


def _source(producers: Mapping[str, onnx.NodeProto], value: str) -> str:
    while (quantizer := _quantizer(producers, value)) is not None:
        value = quantizer.input[0]
    return value


def _owner(producers: Mapping[str, onnx.NodeProto], reader: onnx.NodeProto, quantizer: onnx.NodeProto) -> str:
    """The node that a rounding goes with: the layer that reads it, else the layer or LayerNorm whose output it is."""
    if reader.op_type in _PRODUCTS:
        return str(reader.output[0])
    node = producers.get(quantizer.input[0])
    while node is not None and node.op_type in _FOLLOWERS:
        node = next((producers[value] for value in node.input if value in producers), None)
    if node is not None and node.op_type in (*_PRODUCTS, "LayerNormalization"):
        return str(node.output[0])
    return str(reader.output[0])


def _names(
    model: onnx.ModelProto,
    producers: Mapping[str, onnx.NodeProto],
    node: onnx.NodeProto,
    weights: Mapping[str, LayerWeight],
) -> tuple[str, str | None]:
    """(name for people, name in a recipe)."""
    if node.output[0] in weights:
        name = _module(weights[node.output[0]].name)
        return name, name
    if node.op_type == "LayerNormalization" and node.input[1] not in producers:
        name = _module(node.input[1])
        if model.producer_name == "ovit-engine":  # baked, it is the first of two: its rounding comes second
            name = name.removesuffix(".0")
        return name, name
    label = f"{node.op_type} {node.name or node.output[0]}"
    if node.op_type == "MatMul":  # a product of attention, of the module that its operands come out of
        before = next((weights[each].name for each in _outputs_before(producers, node) if each in weights), "")
        if "." in before:
            module = _module(before).rpartition(".")[0]
            return f"{module} {label}", module
    return label, None


def _module(parameter: str) -> str:
    for suffix in ("_quantized", "_QuantizeLinear", ".weight"):
        parameter = parameter.removesuffix(suffix)
    return parameter


def _outputs_before(producers: Mapping[str, onnx.NodeProto], node: onnx.NodeProto) -> Iterator[str]:
    """First outputs of the nodes that come before a node, nearest first."""
    queue, seen = [node], {node.output[0]}
    while queue:
        for value in queue.pop(0).input:
            before = producers.get(value)
            if before is not None and before.output[0] not in seen:
                seen.add(before.output[0])
                yield before.output[0]
                queue.append(before)


def _remove_unused(model: onnx.ModelProto) -> None:
    """Remove roundings and weights that nothing reads any more."""
    nodes, unused = model.graph.node, [None]
    while unused:
        read = {value for node in walk_nodes(model.graph) for value in node.input}
        read |= {value.name for value in model.graph.output}
        unused = [node for node in nodes if node.op_type in _REMOVABLE and read.isdisjoint(node.output)]
        for node in unused:
            nodes.remove(node)


def quantizer_range(values: np.ndarray, zero: np.ndarray, observer: str) -> tuple[np.float32, np.generic]:
    """(scale, zero point) that `observer` takes from `values` [N]; an int8 zero point `zero` of 0 remains 0."""
    kind, is_symmetric = zero.dtype.type, zero.dtype == np.int8 and not zero.any()
    most = np.array(np.iinfo(kind).max, kind)
    least = np.array(-most if is_symmetric else np.iinfo(kind).min, kind)

    def parameters(low: float, high: float) -> tuple[np.float32, np.generic]:
        zero_point, scale = compute_scale_zp(np.array(low), np.array(high), least, most, symmetric=is_symmetric)
        return np.float32(scale), kind(zero_point)

    def error(scale: np.float32, zero_point: Any) -> float:
        levels = np.clip(np.rint(finite / scale) + int(zero_point), least, most)
        return float(np.square((levels - int(zero_point)) * np.float64(scale) - finite).sum())

    finite = np.append(values[np.isfinite(values)], 0.0).astype(np.float64)  # 0 is a level of every range
    low, high = float(finite.min()), float(finite.max())
    if observer == "percentile":
        low, high = (float(each) for each in np.percentile(finite, [100 - _PERCENTILE, _PERCENTILE]))
    if observer == "mse":
        return min((parameters(low * share, high * share) for share in _FRACTIONS), key=lambda found: error(*found))
    return parameters(low, high)
