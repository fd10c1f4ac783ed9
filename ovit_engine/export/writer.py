"""From a baked PyTorch model to a clean ONNX graph."""

from __future__ import annotations

import contextlib
import hashlib
import io
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxscript.optimizer
import torch
from onnx import numpy_helper
from onnxscript import opset21
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ovit_engine.certificate.computed import computed_weights
from ovit_engine.certificate.errors import ExportError
from ovit_engine.certificate.kernels import walk_graphs, walk_nodes
from ovit_engine.export.opset import has_int8_activations, step_down
from ovit_engine.quant.functional import DEQUANTIZE_OVERLOAD, QUANTIZE_OVERLOAD
from ovit_engine.utils.console import errors_only
from ovit_engine.utils.files import atomic_write

MIN_OPSET = 21
_MAX_BYTES = 2**31 - 1
# it warns of each Split that it leaves as it is
_OPTIMIZER = ("onnxscript.optimizer._constant_folding",)


class Built(NamedTuple):
    """An ONNX graph of a model."""

    proto: onnx.ModelProto
    # weight -> the initializer that holds it where an equal weight has its name
    shared: dict[str, str]
    # parameters and buffers of the model that its outputs don't depend on
    unused: set[str]


def write_onnx(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Tensor],
    path: Path,
    *,
    dynamic_batch: bool = True,
    opset: int = MIN_OPSET,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Write ``model`` (baked) to ``path``, atomically; returns the initializers that equal weights share.

    Raises:
        ExportError: PyTorch cannot trace the model, or the file would pass the 2 GiB that one ONNX file may have.
    """
    built = build_onnx(model, example_inputs, dynamic_batch=dynamic_batch, opset=opset)
    set_metadata(built.proto, metadata or {})
    atomic_write(path, serialize(built.proto))
    return built.shared


def build_onnx(
    model: nn.Module, example_inputs: Tensor | Sequence[Tensor], *, dynamic_batch: bool = True, opset: int = MIN_OPSET
) -> Built:
    """The ONNX graph of ``model`` in eval mode, without exporter debris.

    The model is moved to the CPU. One input is called "input", one output "logits"; several are numbered. Weights have
    their PyTorch names.
    """
    if opset < MIN_OPSET:
        raise ValueError(f"opset must be {MIN_OPSET} or newer, got {opset}")
    model = model.cpu().eval()
    check_float32(model)
    inputs = as_inputs(example_inputs)
    if dynamic_batch and any(len(value) < 2 for value in inputs):
        # with one example torch.export follows a model's branch for a batch of 1 and silently fixes the size
        inputs = tuple(torch.cat([value, value]) for value in inputs)
    with torch.no_grad():
        outputs = [leaf for leaf in pytree.tree_leaves(model(*inputs)) if isinstance(leaf, Tensor)]
    batch = torch.export.Dim("batch")
    program = _export(
        model,
        inputs,
        opset_version=opset,
        input_names=_numbered("input", "input", len(inputs)),
        output_names=_numbered("logits", "output", len(outputs)),
        dynamic_shapes=tuple({0: batch} for _ in inputs) if dynamic_batch else None,
    )
    proto: onnx.ModelProto = program.model_proto
    if computed_weights(proto):
        # the exporter folds up to a megabyte; a large weight that is scaled or standardised would stay unmeasurable
        onnxscript.optimizer.fold_constants(proto, input_size_limit=_MAX_BYTES, output_size_limit=_MAX_BYTES)
    if dynamic_batch:
        _check_dynamic(proto)
    names = name_weights(proto, model)
    remove_debris(proto)
    if has_int8_activations(proto):
        step_down(proto)
    return Built(proto, names, _unused(model, program.exported_program))


def _unused(model: nn.Module, program: torch.export.ExportedProgram) -> set[str]:
    """The tensors of the model whose memory no node of the traced program reads."""
    signature, state = program.graph_signature, model.state_dict()
    read = {node.name for node in program.graph.nodes if node.op == "placeholder" and node.users}
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    tensors = [state[name] for key, name in names.items() if key in read and name in state]
    lifted = signature.inputs_to_lifted_tensor_constants.items()
    tensors += [value for key, name in lifted if key in read and isinstance(value := program.constants[name], Tensor)]
    used = {tensor.untyped_storage().data_ptr() for tensor in tensors}
    return {name for name, tensor in state.items() if tensor.untyped_storage().data_ptr() not in used}


def check_float32(model: nn.Module) -> None:
    """Raise ExportError for weights of another floating type: DequantizeLinear gives float32."""
    other = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32), None)
    if other is not None:
        raise ExportError("cannot export", [f"the model has {other} weights: give a float32 copy, model.float()"])


def _check_dynamic(proto: onnx.ModelProto) -> None:
    """Raise ExportError where the model's own code fixed the batch while it was traced."""
    for value in proto.graph.input:
        first = value.type.tensor_type.shape.dim[0]
        if not first.dim_param:
            reason = f"the model's code fixes the batch of {value.name!r} to {first.dim_value} (a loop over the batch?)"
            raise ExportError("cannot export", [f"{reason}: mend it, or ask for dynamic_batch=False"])


def as_inputs(example_inputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The positional arguments of the model, detached, on the CPU. Raises TypeError if one is no tensor."""
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    for value in inputs:
        if not isinstance(value, Tensor):
            raise TypeError(f"example_inputs must be tensors, got {type(value).__name__}")
        if value.dim() == 0 or len(value) == 0:
            raise ValueError(f"example_inputs need a batch dimension of 1 or more, got shape {tuple(value.shape)}")
    if not inputs:
        raise ValueError("example_inputs is empty")
    return tuple(value.detach().cpu() for value in inputs)


def name_weights(proto: onnx.ModelProto, model: nn.Module) -> dict[str, str]:
    """Give weights that the exporter transposed or folded their PyTorch names again, found by content.

    Returns the names that stay different: weight -> initializer, where equal weights are stored once.
    """
    initializers = {tensor.name: tensor for tensor in proto.graph.initializer}
    by_content: dict[tuple[tuple[int, ...], bytes], str] = {}
    for name, tensor in initializers.items():
        if len(tensor.dims) >= 2:
            by_content.setdefault(_fingerprint(numpy_helper.to_array(tensor)), name)
    renamed: dict[str, str] = {}
    shared: dict[str, str] = {}
    for name, value in model.state_dict().items():
        if name in initializers or value.dim() < 2:
            continue
        array = value.detach().numpy()
        found = by_content.get(_fingerprint(array)) or by_content.get(_fingerprint(array.swapaxes(-1, -2)))
        if found is None:
            continue
        if found in model.state_dict() or found in renamed:
            shared[name] = renamed.get(found, found)
        else:
            renamed[found] = name
    for tensor in proto.graph.initializer:
        tensor.name = renamed.get(tensor.name, tensor.name)
    for node in walk_nodes(proto.graph):
        for position, value_name in enumerate(node.input):
            node.input[position] = renamed.get(value_name, value_name)
    return shared


def remove_debris(proto: onnx.ModelProto) -> None:
    """Remove what the exporter leaves for its own debugging: stack traces, local paths, torch names, value_info.

    They were 55 % of a small file, and they tell strangers about the machine that wrote it.
    """
    proto.producer_name, proto.producer_version = "ovit-engine", ""
    proto.ClearField("doc_string")
    del proto.metadata_props[:]
    for graph in walk_graphs(proto.graph):
        del graph.value_info[:]
        for item in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
            item.ClearField("doc_string")
            del item.metadata_props[:]


def set_metadata(proto: onnx.ModelProto, metadata: Mapping[str, str]) -> None:
    """Replace the model's metadata."""
    del proto.metadata_props[:]
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)


def serialize(proto: onnx.ModelProto) -> bytes:
    """The file's bytes. Raises ExportError above 2 GiB."""
    size = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    if size > _MAX_BYTES:
        raise ExportError("cannot export", [f"the weights take {size / 2**30:.1f} GiB, one ONNX file holds 2 GiB"])
    content: bytes = proto.SerializeToString(deterministic=True)
    return content


def _export(model: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> Any:
    printed = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stderr(printed), errors_only(*_OPTIMIZER):
        # the exporter's own deprecations; warnings of the user's model still show
        for module in (r"torch\.onnx", r"torch\.export", r"torch\._export", r"onnxscript", r"onnx_ir", r"copyreg"):
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=module)
            warnings.filterwarnings("ignore", category=FutureWarning, module=module)
        # all inputs share one batch dimension: that is meant
        warnings.filterwarnings("ignore", message="# The axis name: batch will not be used", category=UserWarning)
        try:
            program = torch.onnx.export(
                model,
                inputs,
                dynamo=True,
                verbose=False,
                external_data=False,
                custom_translation_table={
                    QUANTIZE_OVERLOAD: _quantize_linear,
                    DEQUANTIZE_OVERLOAD: _dequantize_linear,
                },
                **options,
            )
        except torch.onnx.OnnxExporterError as error:
            # what was printed (graphs, page after page) is dropped: the cause says it in a line
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise ExportError("torch.onnx cannot export the model", [reason]) from error
    sys.stderr.write(printed.getvalue())
    return program


def _quantize_linear(x: Any, scale: Any, zero_point: Any) -> Any:
    return opset21.QuantizeLinear(x, scale, zero_point)


def _dequantize_linear(levels: Any, scale: Any, zero_point: Any, axis: int) -> Any:
    return opset21.DequantizeLinear(levels, scale, zero_point, axis=axis)


def _numbered(single: str, several: str, count: int) -> list[str]:
    return [single] if count == 1 else [f"{several}_{index}" for index in range(count)]


def _fingerprint(array: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return array.shape, hashlib.sha256(array.tobytes()).digest()
