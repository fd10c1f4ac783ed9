"""Post-training quantization of an ONNX file that another tool wrote, by ONNX Runtime's quantizer, gated.

Left to itself that quantizer rounds every operator it knows, and a vision transformer loses ten points without a word
(specs/peers.md §4). It is given the layers that have weights, by name; what comes out is measured like our own files.
Where that is too far from the float file, other ranges are tried, then the layers that cost most stay float.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ovit_engine.analysis.diagnose import layer_costs, thin
from ovit_engine.analysis.qdq import OBSERVERS, quantizer_range
from ovit_engine.certificate import ExportError, Promise, PromisedLayer
from ovit_engine.certificate.kernels import open_session, run_all, run_outputs
from ovit_engine.certificate.measure import Provenance
from ovit_engine.certificate.parity import Sample, make_reference, take_sample
from ovit_engine.certificate.stored import hidden
from ovit_engine.certificate.tensors import hash_tensors
from ovit_engine.export.exporter import check_output_path, publish
from ovit_engine.export.writer import remove_debris
from ovit_engine.masking.targets import select
from ovit_engine.post_training.onnx_graph import data_shapes, read
from ovit_engine.post_training.ptq import Compared, compared
from ovit_engine.utils.console import errors_only
from ovit_engine.utils.suggest import suggest

log = logging.getLogger(__name__)

IMAGES = 256  # that ranges are taken from

_SUFFIX = "_quantized"

# outputs that hold values, and places of values
_CHOOSING = {"TopK": (0, 1), "ArgMax": (None, 0), "ArgMin": (None, 0)}

_WEIGHTED = ("MatMul", "Gemm", "Conv")

_CHECK_IMAGES = 32  # that a form or a choice is checked on before it is measured on all

_COST_IMAGES = 8  # that the cost of each layer is measured on

# squared error of the outputs over their squares: of a choice that is worth measuring, and what the layers that stay
# int8 may add up to, alone
_WORTH, _LEFT = 0.05, (0.02, 0.01, 0.004, 0.001)

_CHANGED = 0.02  # of the largest output: what bringing a file into another form may change

Batch = np.ndarray | tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Choice:
    """One way to quantize a file."""

    observer: str = "min_max"
    # weights that stay float
    exclude: tuple[str, ...] = ()

    def describe(self) -> str:
        """In a line."""
        left = f"; left in float: {', '.join(self.exclude)}" if self.exclude else ""
        return f"ranges by observer {self.observer}{left}"


def ptq_onnx(
    source: str | Path,
    path: str | Path,
    batches: Sequence[Batch],
    *,
    data: Iterable[Any],
    preprocessing: Mapping[str, Any] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    exclude: Sequence[str] = (),
    observer: str | None = None,
    search: bool = True,
) -> Compared:
    """Quantize a float ONNX file: int8 weights a channel, uint8 activations, patch embedding and head left float.

    Args:
        source: a file whose inputs have one batch as their first axis.
        batches: calibration batches as the file takes them; a tuple where it has several inputs.
        data: (inputs, targets) batches that both files are compared on; the first 1024 images are.
        preprocessing: for the new file's metadata.
        shapes: of inputs of which the file leaves more than the batch free.
        exclude: layers that stay float: names of weights without ".weight", or "re:" and a regular expression.
        observer: min_max, percentile or mse; if omitted, min_max is tried first.
        search: where the file is too far from the float one, try other observers (if none was given), then leave the
            layers that cost most in float.

    Raises:
        ExportError: the int8 file is too far from the float one, or a weight is not int8; nothing is written.
        ValueError: a file that has no weights to quantize, is int8 already, or takes other inputs.
    """
    source, path = Path(source), Path(path)
    check_output_path(path)
    if observer is not None and observer not in OBSERVERS:
        raise ValueError(f"no observer {observer!r}{suggest(observer, OBSERVERS)}")
    if path.exists() and path.samefile(source):
        raise ValueError(f"{path.name} is the float file itself: name another output")
    model = read(source)
    _check_output(model, source.name)
    sizes, types, size = data_shapes(model, shapes or {}, source.name)
    sample = take_sample(data, [(0, *shape[1:]) for shape in sizes], types)
    exact = list(run_all(open_session(source), sample.inputs).values())
    seen = _rebatched(batches, size, types)
    with tempfile.TemporaryDirectory() as folder:
        prepared = _prepared(Path(folder), model, source.name)
        _check_form(Path(folder) / "prepared.onnx", source, sample)
        quantizer = _Quantizer(Path(folder), prepared, seen, source.name, exclude)
        tries = _choices(quantizer, observer, search)
        refusal: ExportError | None = None
        for count, choice in enumerate(tries):
            try:
                proto = quantizer.quantized(choice)
                if count and not quantizer.is_close(proto):
                    continue
                done = _published(proto, path, source, sample, exact, preprocessing)
            except ExportError as error:
                refusal = refusal or error
                continue
            return (
                done if not count else replace(done, notes=(f"choice {count + 1} of the search: {choice.describe()}",))
            )
    assert refusal is not None
    raise refusal


def _published(
    proto: onnx.ModelProto,
    path: Path,
    source: Path,
    sample: Sample,
    exact: Sequence[np.ndarray],
    preprocessing: Mapping[str, Any] | None,
) -> Compared:
    """Write one int8 file and compare it with all outputs of the float one; raises ExportError."""
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
    reference = replace(make_reference(sample, exact[0]), tensors=hash_tensors(proto, tensors))
    certificate = publish(proto, path, origin, sample, reference, others=exact[1:])
    return compared(path, sample, exact[0], certificate)


def _check_output(model: onnx.ModelProto, name: str) -> None:
    if not model.graph.output:
        raise ValueError(f"{name} has no output")
    first = model.graph.output[0]
    kind = TensorProto.DataType.Name(first.type.tensor_type.elem_type)
    if "FLOAT" not in kind and kind != "UNDEFINED":
        raise ValueError(
            f"the first output of {name}, {first.name!r}, holds {kind}: whole numbers tell too little of what rounding "
            "changes; quantize a file that gives the scores they are chosen from"
        )


def _rebatched(batches: Sequence[Batch], size: int, types: Sequence[Any]) -> list[tuple[np.ndarray, ...]]:
    """The calibration batches as the file takes them: of its one size where that is fixed."""
    whole = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    typed = [tuple(array.astype(kind) for array, kind in zip(batch, types, strict=True)) for batch in whole]
    if not size:
        return typed
    columns = [np.concatenate(column) for column in zip(*typed, strict=True)]
    starts = range(0, len(columns[0]) - size + 1, size)
    return [tuple(column[start : start + size] for column in columns) for start in starts]


def _check_form(prepared: Path, source: Path, sample: Sample) -> None:
    """Raise ValueError if the file in the form that is quantized gives other outputs, in float."""
    few = [array[:_CHECK_IMAGES] for array in sample.inputs]
    found, wanted = (run_outputs(open_session(file), few) for file in (prepared, source))
    if not np.abs(found - wanted).max() <= _CHANGED * np.abs(wanted).max():
        raise ValueError(f"{source.name} gives other outputs once onnx has converted it to opset 13 and float32")


def weighted_nodes(model: onnx.ModelProto) -> list[str]:
    """Nodes to quantize, by name: those that read a weight, but for the patch embedding, scorers and the last one.

    A patch embedding is a convolution of the input image whose stride is its kernel; a scorer does nothing but choose.
    """
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    images, computed = _images(model), _computed(model)
    found = []
    for node in model.graph.node:
        if not computed.intersection(node.output) or node.op_type not in _WEIGHTED or node.input[1] not in initializers:
            continue
        weight = initializers[node.input[1]]
        if len(weight.dims) < 2 or weight.data_type != TensorProto.FLOAT:
            continue
        if node.input[0] in images and _is_patch_embedding(node):
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
    if found.intersection(value.name for value in model.graph.input):
        return found
    return {name for node in model.graph.node for name in node.output}  # what is chosen is the result


def _images(model: onnx.ModelProto) -> set[str]:
    """The inputs, and what is only another type of them."""
    inputs = {value.name for value in model.graph.input}
    return inputs.union(
        *(node.output for node in model.graph.node if node.op_type == "Cast" and node.input[0] in inputs)
    )


def _is_patch_embedding(node: onnx.NodeProto) -> bool:
    attributes = {attribute.name: list(attribute.ints) for attribute in node.attribute}
    return "strides" in attributes and attributes["strides"] == attributes.get("kernel_shape")


def _prepared(folder: Path, model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The float graph as ONNX Runtime's quantizer wants it, each node with a name of its own; kept as prepared.onnx."""
    from onnxruntime.quantization.shape_inference import quant_pre_process  # type: ignore[import-untyped]

    source, result = folder / "float.onnx", folder / "prepared.onnx"
    onnx.save(model, source)  # with its weights inside, wherever they were
    with errors_only(""):  # it logs advice to the root logger
        try:
            quant_pre_process(str(source), str(result), skip_symbolic_shape=True)
        except Exception as error:  # of ONNX Runtime and of onnx, which share no other base
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"ONNX Runtime can't prepare {name} for quantization: {reason}") from error
    prepared = onnx.load(result)
    for index, node in enumerate(prepared.graph.node):  # nodes are chosen by name; names may be missing, or come twice
        node.name = f"n{index}"
    onnx.save(prepared, result)
    return prepared


class _Quantizer:
    """Makes int8 files of one float file."""

    def __init__(
        self,
        folder: Path,
        prepared: onnx.ModelProto,
        batches: Sequence[tuple[np.ndarray, ...]],
        name: str,
        exclude: Sequence[str],
    ) -> None:
        self._folder, self._prepared, self._batches, self._name = folder, prepared, batches, name
        self._inputs = [value.name for value in prepared.graph.input]
        nodes = {node.name: node for node in prepared.graph.node}
        chosen = [nodes[each] for each in weighted_nodes(prepared)]
        if not chosen:
            raise ValueError(f"{name} has no MatMul, Gemm or Conv with a weight to quantize, but the last")
        layers = list(dict.fromkeys(_layer(node) for node in chosen))
        left = select(layers, exclude, what="layer", owner=name)
        self._nodes = [node for node in chosen if _layer(node) not in left]
        if not self._nodes:
            raise ValueError(f"exclude leaves nothing of {name} to quantize")

    def quantized(self, choice: Choice) -> onnx.ModelProto:
        """One int8 graph."""
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # type: ignore[import-untyped]

        result = self._folder / "int8.onnx"
        nodes = [node for node in self._nodes if node.input[1] not in choice.exclude]
        # the sums stay float: rounding them costs accuracy, and the kernel (MatMulIntegerToFloat) is as fast
        options: dict[str, Any] = {"OpTypesToExcludeOutputQuantization": ["MatMul"]}
        if choice.observer != "min_max":
            options["TensorQuantOverrides"] = {
                name: [{"quant_type": QuantType.QUInt8, "scale": np.array(scale), "zero_point": np.array(zero)}]
                for name, (scale, zero) in self._ranges(nodes, choice.observer).items()
            }
        with errors_only(""):
            quantize_static(
                str(self._folder / "prepared.onnx"),
                str(result),
                _CalibrationReader(self._feeds()),
                quant_format=QuantFormat.QDQ,
                nodes_to_quantize=[node.name for node in nodes],
                op_types_to_quantize=list(_WEIGHTED),
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options=options,
            )
        proto = onnx.load(result)
        if unmeasurable := hidden(proto):
            raise ValueError(f"{self._name} can't be verified in int8: {unmeasurable[0]}")
        return proto

    def is_close(self, proto: onnx.ModelProto) -> bool:
        """Whether an int8 graph is worth measuring: its outputs for some calibration images are near the float ones."""
        onnx.save(proto, self._folder / "choice.onnx")
        images = self._first(_CHECK_IMAGES)
        files = ("choice.onnx", "prepared.onnx")
        found, exact = (run_outputs(open_session(self._folder / file), images) for file in files)
        return float(np.square(found - exact).sum()) <= _WORTH * float(np.square(exact).sum())

    def costly(self, choice: Choice) -> Iterator[tuple[str, ...]]:
        """The fewest weights without which the others cost little, for less and less of it."""
        proto = self.quantized(choice)
        _name_weights(proto)
        costs = layer_costs(proto, Sample(tuple(self._first(_COST_IMAGES)), None, "data"), least=_LEFT[-1] / 10)
        weights = list(dict.fromkeys(node.input[1] for node in self._nodes))
        weights.sort(key=lambda name: -costs.get(name, 0.0))
        tried = 0
        for most in _LEFT:
            count = max(1, tried + 1)
            while count < len(weights) and sum(costs.get(name, 0.0) for name in weights[count:]) > most:
                count += 1
            if count < len(weights):
                tried = count
                yield tuple(weights[:count])

    def _first(self, count: int) -> list[np.ndarray]:
        """Return how many calibration images to use: a whole batch if the file has a fixed batch size."""
        return [np.concatenate(column)[:count] for column in zip(*self._batches, strict=True)]

    def _feeds(self) -> Iterator[dict[str, np.ndarray]]:
        for batch in self._batches:
            yield dict(zip(self._inputs, batch, strict=True))

    def _ranges(self, nodes: Sequence[onnx.NodeProto], observer: str) -> dict[str, tuple[np.float32, np.generic]]:
        """Scale and zero point of what `nodes` read."""
        wanted = sorted({node.input[0] for node in nodes} - set(self._inputs))
        tapped = onnx.ModelProto.FromString(self._prepared.SerializeToString())
        known = {value.name for value in tapped.graph.output}
        tapped.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in wanted if name not in known
        )
        onnx.save(tapped, self._folder / "tapped.onnx")
        session = open_session(self._folder / "tapped.onnx")
        seen: dict[str, list[np.ndarray]] = {name: [] for name in wanted}
        for feeds in self._feeds():
            for name, values in zip(wanted, session.run(wanted, feeds), strict=True):
                seen[name].append(thin(values))
        # a zero point other than 0: of the whole range of uint8
        unsigned = np.array(1, np.uint8)
        return {name: quantizer_range(np.concatenate(parts), unsigned, observer) for name, parts in seen.items()}


def _layer(node: onnx.NodeProto) -> str:
    return str(node.input[1]).removesuffix(".weight")


def _choices(quantizer: _Quantizer, observer: str | None, search: bool) -> Iterator[Choice]:
    """What is tried, in turn: other observers; then more and more layers in float."""
    yield (first := Choice(observer or "min_max"))
    if not search:
        return
    if observer is None:
        yield from (Choice(other) for other in OBSERVERS if other != first.observer)
    yield from (Choice(first.observer, exclude) for exclude in quantizer.costly(first))


class _CalibrationReader:
    """Hands ONNX Runtime one batch after the other."""

    def __init__(self, feeds: Iterator[dict[str, np.ndarray]]) -> None:
        self._feeds = feeds

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._feeds, None)


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
