"""Names for the weights of foreign files: exporters of PyTorch call those that they turned ``val_13`` and the like.

Both exporters say which module a node belongs to: the newer one in the node's metadata
(``pkg.torch.onnx.name_scopes``), the older one in its name (``/blocks/blocks.0/attn/qkv/MatMul``).
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from itertools import pairwise

import onnx

from ovit_engine.certificate.kernels import walk_nodes

_READERS = ("MatMul", "Gemm", "Conv")
_SCOPES = "pkg.torch.onnx.name_scopes"
_LONGEST = 10_000  # characters of a node's scopes
_UNNAMED = re.compile(r"val_\d+|onnx::\w+_\d+")


def name_by_module(model: onnx.ModelProto) -> None:
    """Call each unnamed weight ``<module>.weight`` after the module of the one node that reads it, in place.

    A weight that several nodes read, whose node names no module, or whose new name is taken keeps its own.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer if len(tensor.dims) >= 2}
    nodes = list(walk_nodes(model.graph))
    reads = Counter(name for node in nodes for name in node.input)
    taken = {tensor.name for tensor in model.graph.initializer} | {name for node in nodes for name in node.output}
    taken |= {value.name for value in model.graph.input}
    for node in nodes:
        for position, name in enumerate(node.input):
            if name not in weights or node.op_type not in _READERS or not _UNNAMED.fullmatch(name):
                continue
            module = _module_of(node)
            better = f"{module}.weight"
            if module and reads[name] == 1 and better not in taken:
                node.input[position] = weights[name].name = better
                taken.add(better)


def _module_of(node: onnx.NodeProto) -> str:
    """Path of the module, e.g. "blocks.0.attn.qkv"; "" where it is not told."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == _SCOPES), "")
    try:
        listed = ast.literal_eval(scopes) if 0 < len(scopes) <= _LONGEST else []
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        listed = []
    if isinstance(listed, list) and len(listed) > 1:  # the last is the operation
        return str(listed[-2])
    if not node.name.startswith("/"):
        return ""
    parts = node.name[1:].split("/")
    # a list of modules is there twice: /blocks/blocks.0
    return ".".join(part for part, child in pairwise(parts) if not child.startswith(f"{part}."))
