"""Parts of a graph that do not act on its outputs, and weights that are computed at run time."""

from __future__ import annotations

import onnx

from ovit_engine.certificate.kernels import walk_nodes
from ovit_engine.certificate.stored import stored_tensors
from ovit_engine.certificate.weights import trace, weight_inputs


def inert_parts(model: onnx.ModelProto) -> list[str]:
    """Return a line for each tensor that no node reads, node that reaches no output, and weight that is computed.

    Such parts hide the weights that the model really uses.
    """
    nodes = list(walk_nodes(model.graph))
    read = {name for node in nodes for name in node.input} | {value.name for value in model.graph.output}
    found = [f"{tensor.name}: no node reads it" for tensor in model.graph.initializer if tensor.name not in read]
    needed = {value.name for value in model.graph.output}
    for node in reversed(model.graph.node):  # in the order of computation, as ONNX demands
        if needed.isdisjoint(node.output):
            found.append(f"{node.name or node.output[0]}: this {node.op_type} does not act on any output")
        else:
            needed.update(_inputs(node))
    return found + computed_weights(model)


def _inputs(node: onnx.NodeProto) -> set[str]:
    """What a node reads, in its subgraphs too."""
    inner = [attribute.g for attribute in node.attribute if attribute.type == onnx.AttributeProto.GRAPH]
    return {*node.input, *(name for graph in inner for each in walk_nodes(graph) for name in each.input)}


def computed_weights(model: onnx.ModelProto) -> list[str]:
    """Return a line for each product whose weight is computed from constants at run time: it can't be measured."""
    nodes = list(walk_nodes(model.graph))
    stored = stored_tensors(model)
    producers = {output: node for node in nodes for output in node.output}
    constant = set(stored)
    for node in nodes:
        if node.op_type != "Constant" and node.input and constant.issuperset(filter(None, node.input)):
            constant.update(node.output)
    return [
        f"{node.name or node.output[0]}: this {node.op_type} reads {name!r}, a weight computed from constants"
        for node in nodes
        for position in weight_inputs(node)
        for name, other in [(node.input[position], node.input[1 if position == 0 else 0])]
        if name in constant
        and trace(name, producers, stored) is None
        and other not in constant  # a product of two constants acts as a bias
    ]
