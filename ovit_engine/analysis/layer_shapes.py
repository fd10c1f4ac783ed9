"""The matrix products of a network whose weight 2:4 kernels can read: Linear, MatMul and Gemm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, order=True, kw_only=True)
class LayerShape:
    """Products [rows, in] x [in, out] of one shape."""

    out_features: int
    in_features: int
    # rows of the activations for one image: tokens, as a rule
    rows: int
    # how many layers of the network have this shape
    layers: int = 1


def count_shapes(found: Iterable[LayerShape]) -> tuple[LayerShape, ...]:
    """Return each shape once, with the number of its layers; the largest products first."""
    counts: dict[LayerShape, int] = {}
    for shape in found:
        key = replace(shape, layers=1)
        counts[key] = counts.get(key, 0) + shape.layers
    merged = [replace(shape, layers=count) for shape, count in counts.items()]
    return tuple(sorted(merged, key=lambda s: (-s.rows * s.in_features * s.out_features, s)))


def linear_shapes(model: nn.Module, image: Tensor) -> tuple[LayerShape, ...]:
    """Return the Linear layers that one forward of `image` [1, ...] runs, on any device, meta included.

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
        raise ValueError(f"{type(model).__name__} runs no Linear layer: 2:4 kernels have nothing to read")
    return count_shapes(found)


def onnx_shapes(path: Path) -> tuple[LayerShape, ...]:
    """Return the MatMul and Gemm nodes of an ONNX file that read a stored weight, for one image.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not an ONNX file, has no such nodes, or its shapes can't be inferred.
    """
    import onnx

    from ovit_engine.certificate.stored import load_onnx
    from ovit_engine.certificate.weights import trace
    from ovit_engine.certificate.work import infer_shapes

    model = load_onnx(path)
    try:
        shapes, batch = infer_shapes(model)
    except onnx.shape_inference.InferenceError as error:
        raise ValueError(f"the shapes in {str(path)!r} can't be inferred: {str(error).splitlines()[0]}") from error
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {output: node for node in model.graph.node for output in node.output}
    found = []
    for node in model.graph.node:
        if node.op_type not in ("MatMul", "Gemm") or trace(node.input[1], producers, stored) is None:
            continue
        across, out = shapes.get(node.input[0]), shapes.get(node.output[0])
        if not across or not out:
            raise ValueError(f"{path.name}: the shapes at {node.name or node.op_type} can't be inferred for one image")
        found.append(LayerShape(out_features=out[-1], in_features=across[-1], rows=prod(out[:-1]) // batch or 1))
    if not found:
        raise ValueError(f"{path.name} has no MatMul or Gemm that reads a stored weight")
    return count_shapes(found)
