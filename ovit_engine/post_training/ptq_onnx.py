"""Post-training quantization of an ONNX file that another tool wrote, by ONNX Runtime's quantizer, gated.

Left to itself that quantizer rounds every operator it knows, and a vision transformer loses ten points without a word
(specs/peers.md §4). It is given the layers that have weights, by name; what comes out is measured like our own files.
"""

import json
import logging
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from timm.data.config import resolve_data_config

from ovit_engine.certificate import Promise, PromisedLayer
from ovit_engine.certificate.kernels import open_session, run_outputs
from ovit_engine.certificate.measure import Provenance, input_types
from ovit_engine.certificate.parity import make_reference, take_sample
from ovit_engine.certificate.stored import load_onnx
from ovit_engine.certificate.tensors import hash_tensors
from ovit_engine.export.exporter import check_output_path, publish
from ovit_engine.export.module_names import name_by_module
from ovit_engine.export.writer import remove_debris
from ovit_engine.post_training.ptq import Compared, compared
from ovit_engine.training.data import config_of, model_data_config
from ovit_engine.utils.console import errors_only

log = logging.getLogger(__name__)

IMAGES = 256  # that ranges are taken from

_SUFFIX = "_quantized"

_WEIGHTS_ALONE = 4  # the IR version since which initializers need not be inputs

# outputs that hold values, and places of values
_CHOOSING = {"TopK": (0, 1), "ArgMax": (None, 0), "ArgMin": (None, 0)}

_WEIGHTED = ("MatMul", "Gemm", "Conv")


def ptq_onnx(
    source: str | Path,
    path: str | Path,
    batches: Sequence[np.ndarray],
    *,
    data: Iterable[Any],
    preprocessing: Any = None,
) -> Compared:
    """Quantize a float ONNX file: int8 weights a channel, uint8 activations, patch embedding and head left float.

    Args:
        source: a file with one input [batch, C, H, W] and class logits first among its outputs.
        batches: calibration images [N, C, H, W], as the file takes them.
        data: (inputs, targets) batches that both files are compared on; the first 1024 images are.
        preprocessing: for the new file's metadata.

    Raises:
        ExportError: the int8 file is too far from the float one, or a weight is not int8; nothing is written.
        ValueError: a file that has no weights to quantize, is int8 already, or takes other inputs.
    """
    source, path = Path(source), Path(path)
    check_output_path(path)
    if path.exists() and path.samefile(source):
        raise ValueError(f"{path.name} is the float file itself: name another output")
    float_model = read(source)
    shapes, types = input_types(float_model)
    sample = take_sample(data, shapes, types)
    exact = run_outputs(open_session(source), sample.inputs)
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(float_model, Path(folder) / "float.onnx")  # with its weights inside, wherever they were
        proto = _quantized(Path(folder), batches, source.name)
    weights = _name_weights(proto)
    remove_debris(proto)
    promise = Promise(layers=tuple(PromisedLayer(name=name, quantized=True) for name in weights))
    origin = Provenance(
        recipe_name=f"ptq of {source.name}",
        recipe_text="",
        promise=promise,
        preprocessing=dict(preprocessing or {}),
        reference=source.name,
    )
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
    reference = replace(make_reference(sample, exact), tensors=hash_tensors(proto, tensors))
    certificate = publish(proto, path, origin, sample, reference)
    return compared(path, sample, exact, certificate)


def read(source: Path) -> onnx.ModelProto:
    """Return a float ONNX file with one image input, its weights named after their modules where it tells them.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: no ONNX, int8 already, or other inputs.
    """
    model = load_onnx(source)
    if any(node.op_type == "DequantizeLinear" for node in model.graph.node):
        raise ValueError(f"{source.name} is quantized already: give the float file")
    _keep_weights_inside(model)
    shapes, types = input_types(model)
    if len(shapes) == 1 and shapes[0] and shapes[0][0]:
        raise ValueError(
            f"{source.name} takes batches of {shapes[0][0]} only: export it with a free batch dimension "
            "(dynamic_shapes)"
        )
    if len(shapes) != 1 or len(shapes[0]) != 4 or types[0] != np.float32 or not all(shapes[0][1:]):
        inputs = ", ".join(f"{list(shape)} {kind}" for shape, kind in zip(shapes, types, strict=True))
        raise ValueError(f"{source.name} takes {inputs}: one float32 input [batch, C, H, W] of fixed size is needed")
    name_by_module(model)
    return model


def _keep_weights_inside(model: onnx.ModelProto) -> None:
    """Weights are no inputs: until 2019 files had to list them there, as some exporters do to this day."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, _WEIGHTS_ALONE)


def image_config(source: Path, model: str | None, data: str) -> dict[str, Any]:
    """Return how the file wants its images, for `load_data`.

    Read from a file of ours; otherwise that of timm's `model`, or ImageNet's mean and deviation, with a warning where
    the images of `data` have none of their own.
    """
    proto = read(source)
    (shape,), _ = input_types(proto)
    known = {entry.key: entry.value for entry in proto.metadata_props}
    if known.get("ovit.preprocessing", "{}") != "{}":
        return config_of(json.loads(known["ovit.preprocessing"]))
    if model is None:
        if data != "digits":
            log.warning(
                "%s does not tell its preprocessing: ImageNet's mean and deviation are taken; did you mean --model "
                "NAME?",
                source.name,
            )
        config = dict(resolve_data_config({"input_size": tuple(shape[1:])}))  # type: ignore[no-untyped-call]
        for key in ("mean", "std"):  # of grey images: the mean colour
            if len(config[key]) != shape[1]:
                config[key] = (sum(config[key]) / len(config[key]),) * shape[1]
        return config
    return {**model_data_config(model, {}), "input_size": tuple(shape[1:])}


def classes_of(source: Path) -> int | None:
    """Return how many classes the first output tells apart; None where its size is free."""
    shape = read(source).graph.output[0].type.tensor_type.shape
    return shape.dim[-1].dim_value or None if shape.dim else None


def weighted_nodes(model: onnx.ModelProto) -> list[str]:
    """Nodes to quantize, by name: those that read a weight, but for the patch embedding, scorers and the last one.

    A patch embedding is a convolution of the input image whose stride is its kernel; a scorer does nothing but choose.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    image, computed = model.graph.input[0].name, _computed(model)
    found = []
    for node in model.graph.node:
        if not computed.intersection(node.output) or node.op_type not in _WEIGHTED or node.input[1] not in initializers:
            continue
        if len(initializers[node.input[1]].dims) < 2 or (node.input[0] == image and _is_patch_embedding(node)):
            continue
        found.append(node)
    return [node.name for node in found[:-1]]


def _computed(model: onnx.ModelProto) -> set[str]:
    """The values that an output is computed from, other than by places that are chosen (of the tokens that stay, say).

    Rounded scores are often equal, and then other tokens are chosen.
    """
    outputs = {output.name for output in model.graph.output}
    found = set(outputs)
    for node in reversed(model.graph.node):  # which stand in an order of computation
        values, places = _CHOOSING.get(node.op_type, (None, None))
        chooses = places is not None and node.output[places] not in outputs
        if chooses and values is not None and node.output[values] in found:
            chooses = False
        if not chooses and found.intersection(node.output):
            found.update(name for name in node.input if name)  # an input that is left out has no name
    if model.graph.input[0].name in found:
        return found
    return {name for node in model.graph.node for name in node.output}  # what is chosen is the result


def _is_patch_embedding(node: onnx.NodeProto) -> bool:
    attributes = {attribute.name: list(attribute.ints) for attribute in node.attribute}
    return "strides" in attributes and attributes["strides"] == attributes.get("kernel_shape")


def _quantized(folder: Path, batches: Sequence[np.ndarray], name: str) -> onnx.ModelProto:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # type: ignore[import-untyped]
    from onnxruntime.quantization.shape_inference import quant_pre_process  # type: ignore[import-untyped]

    source, prepared, result = (folder / f"{stage}.onnx" for stage in ("float", "prepared", "int8"))
    with errors_only(""):  # it logs advice to the root logger
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        model = onnx.load(prepared)
        for index, node in enumerate(model.graph.node):  # nodes are chosen by name; names may be missing, or come twice
            node.name = f"n{index}"
        onnx.save(model, prepared)
        names = weighted_nodes(model)
        if not names:
            raise ValueError(f"{name} has no MatMul, Gemm or Conv with a weight to quantize, but the last")
        quantize_static(
            str(prepared),
            str(result),
            _CalibrationReader(model.graph.input[0].name, batches),
            quant_format=QuantFormat.QDQ,
            nodes_to_quantize=names,
            op_types_to_quantize=list(_WEIGHTED),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            # the sums stay float: rounding them costs accuracy, and the kernel (MatMulIntegerToFloat) is as fast
            extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
        )
    return onnx.load(result)


class _CalibrationReader:
    """Hands ONNX Runtime one batch after the other."""

    def __init__(self, name: str, batches: Sequence[np.ndarray]) -> None:
        self._name, self._batches = name, iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def _name_weights(proto: onnx.ModelProto) -> list[str]:
    """Give int8 weights the names of their float ones; returns them."""
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    renamed = {
        name: name.removesuffix(_SUFFIX)
        for name, tensor in initializers.items()
        if name.endswith(_SUFFIX) and numpy_helper.to_array(tensor).dtype == np.int8 and len(tensor.dims) > 1
    }
    renamed = {old: new for old, new in renamed.items() if new not in initializers}
    for tensor in proto.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in proto.graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
    return sorted(renamed.values())
