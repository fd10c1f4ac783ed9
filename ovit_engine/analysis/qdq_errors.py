"""How much rounding changes each activation and weight, by ONNX Runtime's own `qdq_loss_debug`.

The library matches tensors of two files by their names, and knows the pairs in a file by the names that ONNX Runtime's
quantizer gives them. Our files have other names, so each rounded value is tapped under a name of the library's own.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # type: ignore[import-untyped]
from onnx import helper
from onnxruntime.quantization import qdq_loss_debug  # type: ignore[import-untyped]
from onnxruntime.quantization.quant_utils import DEQUANT_OUTPUT_SUFFIX  # type: ignore[import-untyped]

from ovit_engine.analysis.qdq import QdqLayer
from ovit_engine.certificate.errors import CertificateError

Feeds = Mapping[str, np.ndarray]

_SILENT = 4


def qdq_activations(
    model: onnx.ModelProto, layers: Collection[QdqLayer], batches: Iterable[Feeds]
) -> Iterator[dict[str, list[np.ndarray]]]:
    """Collect what the layers of a file round, or of the file in float would: a dictionary for each batch.

    In it are the values before they are rounded, by `Rounding.tap`, and after it with the library's suffix.
    """
    with tempfile.TemporaryDirectory() as folder:
        tapped, augmented = Path(folder) / "tapped.onnx", Path(folder) / "augmented.onnx"
        onnx.save(_with_taps(model, layers), tapped)
        qdq_loss_debug.modify_model_output_intermediate_tensors(tapped, augmented, op_types_for_saving=["Identity"])
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _SILENT
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        for batch in batches:  # one at a time: all activations of many images do not fit into memory
            try:
                found = qdq_loss_debug.collect_activations(str(augmented), [batch], session_options=options)
            except Exception as error:  # the runtime's own exceptions share no other base
                raise CertificateError(
                    "ONNX Runtime cannot run the file", [str(error).strip().splitlines()[0]]
                ) from error
            yield found


def input_errors(
    model: onnx.ModelProto, floated: onnx.ModelProto, layers: Collection[QdqLayer], batch: Feeds
) -> dict[str, tuple[float, float]]:
    """Return the signal to noise ratios of each layer's rounded input in dB; the worst of several inputs.

    The first is to the input before it was rounded, the second to the input of the same layer in the float file.
    """
    (rounded,), (exact,) = (list(qdq_activations(each, layers, [batch])) for each in (model, floated))
    matched = qdq_loss_debug.create_activation_matching(rounded, exact)
    ratios = qdq_loss_debug.compute_activation_error(matched)
    found = {}
    for layer in layers:
        pairs = [(each["qdq_err"], each["xmodel_err"]) for each in (ratios[r.tap] for r in layer.roundings)]
        if pairs:
            found[layer.output] = (min(own for own, _ in pairs), min(whole for _, whole in pairs))
    return found


def weight_errors(layers: Collection[QdqLayer], exact: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return the signal to noise ratio of each layer's weight in dB; `exact` are the float weights, by output."""
    matched = {
        layer.output: {"float": exact[layer.output], "dequantized": layer.weight.values}
        for layer in layers
        if layer.weight is not None and layer.output in exact
    }
    ratios: dict[str, float] = qdq_loss_debug.compute_weight_error(matched)
    return ratios


def _with_taps(model: onnx.ModelProto, layers: Collection[QdqLayer]) -> onnx.ModelProto:
    """Return a copy with a name of the library's own for each rounded value; `model` is the file, or all in float."""
    tapped = copy.deepcopy(model)
    nodes = {node.output[0]: node for node in tapped.graph.node}
    for rounding in (rounding for layer in layers for rounding in layer.roundings):
        taps = {rounding.tap: rounding.source}
        if rounding.quantizer in nodes:
            before, after = nodes[rounding.quantizer].input[0], nodes[rounding.reader].input[rounding.position]
            taps = {rounding.tap: before, rounding.tap + DEQUANT_OUTPUT_SUFFIX: after}
        tapped.graph.node.extend(helper.make_node("Identity", [value], [name]) for name, value in taps.items())
    return tapped
