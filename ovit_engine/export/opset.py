"""Opset 20 for files whose activations are int8.

At opset 21 ONNX Runtime (1.31.1, on x86) cannot load int8 that is reshaped between two layers: it copies the rounding
behind the reshape with an ``output_dtype``, turns int8 into uint8, and then finds that the two differ. Opset 20 has no
such attribute.
"""

from __future__ import annotations

import onnx

from ovit_engine.certificate.kernels import walk_nodes

_NEWER = 21
_OLDER = 20
# what opset 21 gave them says how to round to types that we do not write
_NEW_ATTRIBUTES = {"QuantizeLinear": ("output_dtype", "block_size"), "DequantizeLinear": ("block_size",)}
# the one operator that computes something else since
_CHANGED = "GroupNormalization"


def has_int8_activations(proto: onnx.ModelProto) -> bool:
    """Whether something other than a weight is rounded to int8."""
    int8 = {tensor.name for tensor in proto.graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    return any(node.op_type == "QuantizeLinear" and node.input[2] in int8 for node in walk_nodes(proto.graph))


def step_down(proto: onnx.ModelProto) -> bool:
    """Declare opset 20 in place of 21, where the graph means the same in both; returns whether it does."""
    nodes = list(walk_nodes(proto.graph))
    entry = next(entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
    if entry.version != _NEWER or any(node.op_type == _CHANGED for node in nodes) or proto.functions:
        return False
    entry.version = _OLDER
    for node in nodes:
        kept = [a for a in node.attribute if a.name not in _NEW_ATTRIBUTES.get(node.op_type, ())]
        del node.attribute[:]
        node.attribute.extend(kept)
    return True
