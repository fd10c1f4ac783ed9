"""The matrix products of a network whose weight 2:4 kernels can read: Linear, MatMul and Gemm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn


@dataclass(frozen=True, order=True, kw_only=True)
class LayerShape:
    """Products [rows, in] x [in, out] of one shape."""

    out_features: int
    in_features: int
    # rows of the activations an image: tokens, as a rule
    rows: int
    # how many layers of the network have this shape
    layers: int = 1


def count_shapes(found: Iterable[LayerShape]) -> tuple[LayerShape, ...]:
    """Each shape once, with the number of its layers; the largest products first."""
    counts: dict[LayerShape, int] = {}
    for shape in found:
        key = replace(shape, layers=1)
        counts[key] = counts.get(key, 0) + shape.layers
    merged = [replace(shape, layers=count) for shape, count in counts.items()]
    return tuple(sorted(merged, key=lambda s: (-s.rows * s.in_features * s.out_features, s)))


def model_shapes(model: nn.Module, image: Tensor) -> tuple[LayerShape, ...]:
    """The Linear layers that one forward of `image` [1, ...] runs, on any device, meta included.

    Raises:
        ValueError: it runs none.
    """
    import torch
    from torch import nn

    found: list[LayerShape] = []

    def note(module: nn.Linear, inputs: tuple[Any, ...], output: Tensor) -> None:
        size = inputs[0].numel() // module.in_features
        found.append(LayerShape(out_features=module.out_features, in_features=module.in_features, rows=size))

    handles = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Linear)]
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(image)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(f"{type(model).__name__} runs no Linear layer: there is nothing that 2:4 kernels could read")
    return count_shapes(found)


def onnx_shapes(path: Path) -> tuple[LayerShape, ...]:
    """The MatMul and Gemm nodes of an ONNX file that read a stored weight, at one image.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no ONNX file, one without such nodes, or one whose shapes can't be inferred.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        model = onnx.load(path)
        shapes = _inferred(model)
    except (DecodeError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"{str(path)!r} is no ONNX file, or a damaged one: {str(error).splitlines()[0]}") from error
    constant = _constants(model.graph)
    found = []
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in constant or node.input[0] in constant:
            continue
        across, out = shapes.get(node.input[0]), shapes.get(node.output[0])
        if not across or not out:
            raise ValueError(f"{path.name}: the shapes at {node.name or node.op_type} can't be inferred at one image")
        found.append(LayerShape(out_features=out[-1], in_features=across[-1], rows=prod(out[:-1])))
    if not found:
        raise ValueError(f"{path.name} has no MatMul or Gemm that reads a stored weight")
    return count_shapes(found)


def _inferred(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shape of each value at one image, where it is known."""
    import onnx

    for value in model.graph.input:
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].dim_value:
            dims[0].dim_value = 1
    for value in model.graph.output:  # what the file says of its outputs names the free batch
        value.type.tensor_type.ClearField("shape")
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    batch = max((v.type.tensor_type.shape.dim[0].dim_value for v in model.graph.input if _rank(v)), default=1)
    known: dict[str, tuple[int, ...]] = {}
    for value in (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output):
        dims = value.type.tensor_type.shape.dim
        if dims and all(dim.dim_value for dim in dims):
            known[value.name] = (dims[0].dim_value // batch or 1, *(dim.dim_value for dim in dims[1:]))
    return known


def _rank(value: onnx.ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def _constants(graph: onnx.GraphProto) -> set[str]:
    """Initializers, and what is made of them alone by dequantizing or transposing."""
    known = {tensor.name for tensor in graph.initializer}
    for node in graph.node:  # in topological order
        if node.op_type in ("DequantizeLinear", "Transpose", "Identity") and node.input[0] in known:
            known |= set(node.output)
    return known
