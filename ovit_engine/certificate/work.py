"""The work of one image, read from the shapes of an ONNX graph: multiply-adds, and tokens along the blocks.

Shapes are inferred by onnx with the batch set to 1; nothing is run, and no weight is looked at. Needs no PyTorch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
from onnx import shape_inference

from ovit_engine.certificate.kernels import walk_nodes
from ovit_engine.certificate.token_counts import TokenCounts

Shapes = Mapping[str, tuple[int, ...]]

# operator -> which inputs are its operands; the output has as many elements as there are sums
_PRODUCTS = {
    "Conv": (0, 1),
    "ConvInteger": (0, 1),
    "ConvTranspose": (0, 1),
    "Gemm": (0, 1),
    "MatMul": (0, 1),
    "MatMulInteger": (0, 1),
    "QLinearConv": (0, 3),
    "QLinearMatMul": (0, 3),
}

# products as well, whose sums no rule here counts
_UNCOUNTED = frozenset({"Attention", "DeformConv", "Einsum", "GRU", "LSTM", "RNN"})

_OURS = ("", "ai.onnx")

# larger constants are data, smaller ones may be the shape of something
_SMALL = 1024


@dataclass(frozen=True)
class Work:
    """What a file computes for one image."""

    # multiply-adds of products and convolutions, zeros in full; None where `unknown` says why they can't be counted
    macs: int | None
    # None where `no_tokens` says why the graph is not that of a plain transformer
    tokens: TokenCounts | None
    unknown: str = ""
    no_tokens: str = ""


def measure_work(model: onnx.ModelProto) -> Work:
    """The work of one image in a file; half of the operations that `flops.count_flops` counts in PyTorch."""
    try:
        shapes, batch = infer_shapes(model)
    except (shape_inference.InferenceError, RuntimeError, ValueError, TypeError) as error:  # of broken shapes
        reason = f"onnx can't infer its shapes: {' '.join(str(error).split())[:200]}"
        return Work(None, None, reason, reason)
    macs, tokens, unknown, no_tokens = None, None, "", ""
    try:
        tokens = _tokens(model.graph, shapes, batch)
    except _UnknownError as error:
        no_tokens = str(error)
    try:
        macs = round(_multiply_adds(model.graph, shapes) / batch)
    except _UnknownError as error:
        unknown = str(error)
    return Work(macs, tokens, unknown, no_tokens)


def infer_shapes(model: onnx.ModelProto) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shape of each value of the graph that is fully known, and the batch: 1 where the file leaves it free."""
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions)
    light.graph.name = model.graph.name
    light.graph.node.extend(model.graph.node)
    light.graph.input.extend(model.graph.input)
    light.graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) > _SMALL:
            light.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        else:
            light.graph.initializer.append(tensor)
    stored = {tensor.name for tensor in model.graph.initializer}
    fed = [value.type.tensor_type.shape for value in light.graph.input if value.name not in stored]
    for shape in fed:
        if shape.dim and not shape.dim[0].dim_value:
            shape.dim[0].dim_value = 1
    for value in light.graph.output:  # what they were said to be depends on the free batch
        value.type.tensor_type.ClearField("shape")
    inferred = shape_inference.infer_shapes(light, data_prop=True).graph
    found = {tensor.name: tuple(tensor.dims) for tensor in inferred.initializer}
    for value in (*inferred.input, *inferred.output, *inferred.value_info):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            found[value.name] = tuple(dim.dim_value for dim in kind.shape.dim)
    return found, fed[0].dim[0].dim_value if fed and fed[0].dim else 1


class _UnknownError(Exception):
    """Why multiply-adds or tokens can't be counted."""


def _multiply_adds(graph: onnx.GraphProto, shapes: Shapes) -> int:
    total = 0
    for node in graph.node:
        for inner in _inside(node):
            if inner.op_type in (*_PRODUCTS, *_UNCOUNTED):
                raise _UnknownError(f"{inner.op_type} {inner.name!r} inside {node.op_type} {node.name!r} may run often")
        if node.domain not in _OURS or node.op_type in _UNCOUNTED:
            raise _UnknownError(f"what {node.op_type} {node.name!r} computes is not known here")
        if node.op_type in _PRODUCTS:
            total += _of_node(node, shapes)
    return total


def _inside(node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
    """Nodes of the graphs that a node holds (If, Loop)."""
    for attribute in node.attribute:
        for graph in [attribute.g, *attribute.graphs]:
            yield from walk_nodes(graph)


def _of_node(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Multiply-adds of one product or convolution."""
    left, right = (node.input[position] for position in _PRODUCTS[node.op_type])
    for name in (left, right, node.output[0]):
        if name not in shapes:
            raise _UnknownError(f"the shape of {name!r} at {node.op_type} {node.name!r} can't be inferred")
    a, b, out = shapes[left], shapes[right], shapes[node.output[0]]
    if node.op_type == "ConvTranspose":
        return math.prod(a) * math.prod(b[1:])
    if "Conv" in node.op_type:  # weight [out, in / groups, ...]
        return math.prod(out) * math.prod(b[1:])
    is_turned = node.op_type == "Gemm" and any(each.name == "transA" and each.i for each in node.attribute)
    return math.prod(out) * (a[0] if is_turned else a[-1])


def _tokens(graph: onnx.GraphProto, shapes: Shapes, batch: int) -> TokenCounts:
    """Tokens along the blocks. Raises unless every attention is that of one image's tokens, which never grow.

    Attention is a Softmax over square scores [batch, heads, N, N]. Tokens are values [batch, N, C] of the most frequent
    width C: what blocks read, add and write. The most of them that there are before the first attention come in, those
    of the last residual sum leave; scorers look at patches alone, which are fewer.
    """
    values = [shapes[name] for node in graph.node for name in node.output if name in shapes]
    widths = Counter(shape[2] for shape in values if len(shape) == 3 and shape[0] == batch)
    places = [i for i, node in enumerate(graph.node) if _is_attention(node, shapes)]
    scores = [shapes[graph.node[i].input[0]] for i in places]
    if any(node.op_type == "Attention" for node in graph.node):
        raise _UnknownError(
            "attention is one operator (opset 23 and newer): export at opset 21, where it is written out"
        )
    if not widths or not places:
        raise _UnknownError(
            "no Softmax over square scores [batch, heads, tokens, tokens] of known shape is in the graph"
        )
    if any(shape[0] != batch for shape in scores):
        raise _UnknownError("attention is that of windows, not of an image")
    width = widths.most_common(1)[0][0]
    stream = [
        (i, shapes[name][1], _is_sum(node, shapes))
        for i, node in enumerate(graph.node)
        for name in node.output
        if name in shapes and len(shapes[name]) == 3 and shapes[name][::2] == (batch, width)
    ]
    entering = [count for i, count, _ in stream if i < places[0]]
    leaving = [count for i, count, is_sum in stream if i > places[-1] and is_sum]
    if not entering or not leaving:
        raise _UnknownError("no tokens [batch, tokens, width] of known shape stand before and behind attention")
    counts = [max(entering), *(shape[-1] for shape in scores), leaving[-1]]
    if counts != sorted(counts, reverse=True):
        raise _UnknownError(f"they grow along the graph: {', '.join(map(str, counts))}")
    return TokenCounts(entering=counts[0], attention=tuple(counts[1:-1]), leaving=counts[-1])


def _is_attention(node: onnx.NodeProto, shapes: Shapes) -> bool:
    scores = shapes.get(node.input[0], ()) if node.op_type == "Softmax" else ()
    return len(scores) == 4 and scores[2] == scores[3] > 1


def _is_sum(node: onnx.NodeProto, shapes: Shapes) -> bool:
    """Whether a node adds two tensors of one shape, and no bias."""
    return node.op_type == "Add" and len({shapes.get(name) for name in (*node.input, *node.output)}) == 1
