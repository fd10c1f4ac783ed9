"""Taking an int8 file apart: its layers, and the same file with some of them in float.

A layer is a MatMul, Gemm or convolution with its weight and the QuantizeLinear/DequantizeLinear pairs around it. What
is left float reads what the QuantizeLinear read. NumPy and onnx alone.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

_READERS = ("MatMul", "Gemm", "Conv", "ConvTranspose")

# between a layer and the rounding of its output: bias, activation, folded scale
_FOLLOWERS = ("Add", "Relu", "Clip", "HardSwish", "HardSigmoid", "Mul", "Reshape", "Squeeze", "Unsqueeze", "Identity")

_NOT_TAKEN = ("QLinearMatMul", "QLinearConv", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantizeLinear")


@dataclass(frozen=True)
class Weight:
    """A weight as its layer reads it: the DequantizeLinear already done, transposed where the graph does it."""

    # the initializer, and the position at which the layer reads it
    name: str
    position: int
    # float32; `scale` is the width of a level, broadcast to its shape, None where the file stores floats
    values: np.ndarray
    scale: np.ndarray | None


@dataclass(frozen=True)
class Layer:
    """A unit that can be left float by itself."""

    name: str
    # what an `exclude` of a recipe calls it; None for what recipes have no name for
    recipe_name: str | None
    op: str
    # first output of its node, which names it in the graph
    output: str
    weight: Weight | None
    # (first output of the reading node, position, output of the QuantizeLinear): roundings that go with this layer
    roundings: tuple[tuple[str, int, str], ...]
    # of a Gemm: its weight is [out, in]
    transposed: bool = False


class Graph:
    """The nodes of a file by what they produce and read."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.producers = {output: node for node in model.graph.node for output in node.output if output}

    def value(self, name: str) -> np.ndarray:
        """An initializer. Raises ValueError where a quantizer's scale is computed in the graph."""
        if name not in self.initializers:
            raise ValueError(f"{name!r} is no initializer: only files with constant scales can be taken apart")
        found: np.ndarray = numpy_helper.to_array(self.initializers[name])
        return found

    def quantizer(self, value: str) -> onnx.NodeProto | None:
        """The QuantizeLinear whose dequantized output `value` is."""
        node = self.producers.get(value)
        if node is None or node.op_type != "DequantizeLinear":
            return None
        inner = self.producers.get(node.input[0])
        return inner if inner is not None and inner.op_type == "QuantizeLinear" else None


def find_layers(model: onnx.ModelProto) -> list[Layer]:
    """Every layer, in the order of the graph; then roundings that belong to none, a unit for each reader.

    Raises:
        ValueError: the file's integers are no QuantizeLinear/DequantizeLinear pairs.
    """
    wrong = next((node.op_type for node in model.graph.node if node.op_type in _NOT_TAKEN), None)
    if wrong is not None:
        raise ValueError(f"the file has {wrong}: only QuantizeLinear/DequantizeLinear pairs can be taken apart")
    graph = Graph(model)
    nodes = {node.output[0]: node for node in model.graph.node}
    weights = {output: _weight_of(graph, node) for output, node in nodes.items() if node.op_type in _READERS}
    roundings: dict[str, list[tuple[str, int, str]]] = defaultdict(list)
    for output, node in nodes.items():
        for position, value in enumerate(node.input):
            quantizer = graph.quantizer(value)
            if quantizer is not None:
                owner = _owner(graph, node, quantizer)
                roundings[owner].append((output, position, quantizer.output[0]))
    found = []
    names: set[str] = set()
    for output, node in nodes.items():
        weight = weights.get(output)
        if weight is None and output not in roundings:
            continue
        name, recipe_name = _names(graph, node, weight)
        unique = name if name not in names else f"{name} ({output})"
        names.add(unique)
        transposed = any(a.name == "transB" and bool(a.i) for a in node.attribute)
        found.append(Layer(unique, recipe_name, node.op_type, output, weight, tuple(roundings[output]), transposed))
    return found


def rewrite(
    model: onnx.ModelProto,
    *,
    float_inputs: Collection[str],
    weights: Mapping[str, np.ndarray],
    layers: Collection[Layer],
) -> onnx.ModelProto:
    """A copy in which layers `float_inputs` (by output) are not rounded, and layers in `weights` have those instead."""
    changed = copy.deepcopy(model)
    nodes = {node.output[0]: node for node in changed.graph.node}
    order = {output: index for index, output in enumerate(nodes)}
    quantizers = {node.output[0]: node for node in changed.graph.node if node.op_type == "QuantizeLinear"}
    edges = [edge for layer in layers if layer.output in float_inputs for edge in layer.roundings]
    # in the order of the graph: a quantizer that reads another one's output is led past that one first
    for reader, position, quantizer in sorted(edges, key=lambda edge: order[edge[0]]):
        nodes[reader].input[position] = quantizers[quantizer].input[0]
    for layer in layers:
        if layer.output in weights:
            assert layer.weight is not None
            name = f"{layer.output}.float_weight"
            values = np.ascontiguousarray(weights[layer.output], dtype=np.float32)
            changed.graph.initializer.append(numpy_helper.from_array(values, name))
            nodes[layer.output].input[layer.weight.position] = name
    _remove_unused(changed)
    return changed


def rerange(model: onnx.ModelProto, ranges: Mapping[str, tuple[np.float32, np.generic]]) -> onnx.ModelProto:
    """A copy in which quantizers (by output) and what dequantizes them have another (scale, zero point)."""
    changed = copy.deepcopy(model)
    for output, (scale, zero_point) in ranges.items():
        names = f"{output}.scale", f"{output}.zero_point"
        for name, value in zip(names, (scale, zero_point), strict=True):
            changed.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
        for node in changed.graph.node:
            if output in (node.output[0], node.input[0] if node.op_type == "DequantizeLinear" else None):
                node.input[1], node.input[2] = names
    _remove_unused(changed)
    return changed


def with_twins(model: onnx.ModelProto, layers: Collection[Layer], weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """A copy with a float twin beside each MatMul, Gemm and convolution, which reads the same input before rounding.

    Outputs are four sums for each, [noise, twin^2, own^2, own * twin], named ``<output>.sums``: float [4].
    """
    changed = copy.deepcopy(model)
    graph = Graph(changed)
    nodes = {node.output[0]: node for node in changed.graph.node}
    graph_of = changed.graph
    graph_of.initializer.append(numpy_helper.from_array(np.array([1], dtype=np.int64), "twin.flat"))
    for layer in layers:
        if layer.op not in _READERS:
            continue
        own, stem = layer.output, f"{layer.output}.twin"
        twin = copy.deepcopy(nodes[own])
        twin.name, twin.output[0] = stem, stem
        for reader, position, quantizer in layer.roundings:
            if reader == own:
                twin.input[position] = graph.producers[quantizer].input[0]
        if own in weights:
            assert layer.weight is not None
            graph_of.initializer.append(numpy_helper.from_array(weights[own].astype(np.float32), f"{stem}.weight"))
            twin.input[layer.weight.position] = f"{stem}.weight"
        parts = [f"{stem}.{part}" for part in ("noise", "twin2", "own2", "dot")]
        graph_of.node.extend(
            [
                twin,
                helper.make_node("Sub", [own, stem], [f"{stem}.difference"]),
                helper.make_node("Mul", [own, stem], [f"{stem}.product"]),
                helper.make_node("ReduceSumSquare", [f"{stem}.difference"], [f"{parts[0]}.sum"], keepdims=0),
                helper.make_node("ReduceSumSquare", [stem], [f"{parts[1]}.sum"], keepdims=0),
                helper.make_node("ReduceSumSquare", [own], [f"{parts[2]}.sum"], keepdims=0),
                helper.make_node("ReduceSum", [f"{stem}.product"], [f"{parts[3]}.sum"], keepdims=0),
                *(helper.make_node("Reshape", [f"{part}.sum", "twin.flat"], [part]) for part in parts),
                helper.make_node("Concat", parts, [f"{own}.sums"], axis=0),
            ]
        )
        graph_of.output.append(helper.make_tensor_value_info(f"{own}.sums", onnx.TensorProto.FLOAT, [4]))
    return changed


def _owner(graph: Graph, reader: onnx.NodeProto, quantizer: onnx.NodeProto) -> str:
    """The node that a rounding goes with: the layer that reads it, else the layer or LayerNorm whose output it is."""
    if reader.op_type in _READERS:
        return str(reader.output[0])
    node = graph.producers.get(quantizer.input[0])
    while node is not None and node.op_type in _FOLLOWERS:
        node = next((graph.producers[value] for value in node.input if value in graph.producers), None)
    if node is not None and node.op_type in (*_READERS, "LayerNormalization"):
        return str(node.output[0])
    return str(reader.output[0])


def _weight_of(graph: Graph, node: onnx.NodeProto) -> Weight | None:
    for position in (1, 0) if node.op_type == "MatMul" else (1,):
        found = _constant(graph, node.input[position])
        if found is not None and found[1].ndim >= 2:
            name, values, scale = found
            return Weight(name, position, values, scale)
    return None


def _constant(graph: Graph, value: str) -> tuple[str, np.ndarray, np.ndarray | None] | None:
    """(initializer, values, width of a level) of a value that is computed from one initializer."""
    if value in graph.initializers:
        stored = graph.value(value)
        return (value, stored.astype(np.float32), None) if stored.dtype.kind == "f" else None
    node = graph.producers.get(value)
    if node is None:
        return None
    if node.op_type == "DequantizeLinear" and node.input[0] in graph.initializers:
        return (node.input[0], *_dequantize(graph, node))
    if node.op_type in ("Transpose", "Identity"):
        inner = _constant(graph, node.input[0])
        if inner is None or node.op_type == "Identity":
            return inner
        order = next((list(a.ints) for a in node.attribute if a.name == "perm"), None)
        name, values, scale = inner
        return name, values.transpose(order), None if scale is None else scale.transpose(order)
    return None


def _dequantize(graph: Graph, node: onnx.NodeProto) -> tuple[np.ndarray, np.ndarray]:
    levels, scale = graph.value(node.input[0]), graph.value(node.input[1]).astype(np.float32)
    zero = graph.value(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros_like(scale, np.int32)
    if scale.ndim > 1:
        raise ValueError(f"{node.input[0]!r} has a scale for each block: only one a tensor or a channel is known here")
    shape = [1] * levels.ndim
    if scale.ndim == 1 and scale.size > 1:
        shape[next((int(a.i) for a in node.attribute if a.name == "axis"), 1)] = -1
    scale, zero = scale.reshape(shape), zero.astype(np.int32).reshape(shape)
    values = ((levels.astype(np.int32) - zero) * scale).astype(np.float32)
    return values, np.broadcast_to(scale, levels.shape)


def _names(graph: Graph, node: onnx.NodeProto, weight: Weight | None) -> tuple[str, str | None]:
    """(name for people, name in a recipe)."""
    if weight is not None:
        name = _module(weight.name)
        return name, name
    if node.op_type == "LayerNormalization" and node.input[1] in graph.initializers:
        name = _module(node.input[1])
        if graph.model.producer_name == "ovit-engine":  # baked, it is the first of two: its rounding comes second
            name = name.removesuffix(".0")
        return name, name
    label = f"{node.op_type} {node.name or node.output[0]}"
    if node.op_type == "MatMul":  # a product of attention, of the module that its operands come out of
        before = next(_weights_before(graph, node), None)
        if before is not None and "." in before:
            module = _module(before).rpartition(".")[0]
            return f"{module} {label}", module
    return label, None


def _module(parameter: str) -> str:
    for suffix in ("_quantized", "_QuantizeLinear", ".weight"):
        parameter = parameter.removesuffix(suffix)
    return parameter


def _weights_before(graph: Graph, node: onnx.NodeProto) -> Iterator[str]:
    """Names of the weights whose layers come before a node, nearest first."""
    queue, seen = [node], {node.output[0]}
    while queue:
        current = queue.pop(0)
        for value in current.input:
            before = graph.producers.get(value)
            if before is None or before.output[0] in seen:
                continue
            seen.add(before.output[0])
            weight = _weight_of(graph, before) if before.op_type in _READERS else None
            if weight is not None:
                yield weight.name
            queue.append(before)


def _remove_unused(model: onnx.ModelProto) -> None:
    """Remove nodes and initializers that no output needs."""
    needed = {value.name for value in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if any(output in needed for output in node.output):
            kept.append(node)
            needed |= set(node.input)
            for attribute in node.attribute:  # what the graphs inside If and Loop read from outside
                for inner in [attribute.g, *attribute.graphs]:
                    needed |= {value for each in inner.node for value in each.input}
    kept.reverse()
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    for field, values in ((model.graph.node, kept), (model.graph.initializer, tensors)):
        values = [copy.deepcopy(value) for value in values]
        del field[:]
        field.extend(values)


# names of the recipe's observers
OBSERVERS = ("min_max", "percentile", "mse")

_PERCENTILE = 99.99

_FRACTIONS = np.linspace(1.0, 0.02, 50)

_SAMPLE = 2**18


def quantizer_range(
    values: np.ndarray, integers: tuple[type[np.generic], bool], observer: str
) -> tuple[np.float32, np.generic]:
    """(scale, zero point) that `observer` takes from `values` [N].

    Args:
        integers: (np.uint8 or np.int8, whether the zero point must be 0).
    """
    kind, symmetric = integers
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    if observer == "percentile" and finite.size:
        low, high = (float(each) for each in np.percentile(finite, [100 - _PERCENTILE, _PERCENTILE]))
    if observer == "mse" and finite.size:
        some = finite if finite.size <= _SAMPLE else np.random.default_rng(0).choice(finite, _SAMPLE)
        errors = [_error(some, *_parameters(low * f, high * f, kind, symmetric), kind) for f in _FRACTIONS]
        best = _FRACTIONS[int(np.argmin(errors))]
        low, high = low * best, high * best
    scale, zero_point = _parameters(low, high, kind, symmetric)
    return np.float32(scale), kind(zero_point)


def _parameters(low: float, high: float, kind: type[np.generic], symmetric: bool) -> tuple[float, int]:
    bounds = np.iinfo(kind)  # type: ignore[type-var]
    low, high = min(low, 0.0), max(high, 0.0)
    if symmetric:
        return max(max(-low, high) / bounds.max, 1e-12), 0
    scale = max((high - low) / (bounds.max - bounds.min), 1e-12)
    return scale, int(np.clip(round(bounds.min - low / scale), bounds.min, bounds.max))


def _error(values: np.ndarray, scale: float, zero_point: int, kind: type[np.generic]) -> float:
    bounds = np.iinfo(kind)  # type: ignore[type-var]
    levels = np.clip(np.rint(values / scale) + zero_point, bounds.min, bounds.max)
    return float(np.square((levels - zero_point) * scale - values).sum())
