"""Reading weights out of an ONNX graph: which operator reads them, along which axis, in which type."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
from onnx import numpy_helper

from ovit_engine.certificate.errors import CertificateError
from ovit_engine.certificate.kernels import walk_nodes
from ovit_engine.certificate.model import GroupRule, LayerFacts, Promise, TileRule, read_pattern
from ovit_engine.certificate.stored import stored_tensors

# operators that multiply with weights -> the inputs that may be one; a matrix product has its weight on either side
READERS = {
    "MatMul": (1, 0),
    "Gemm": (1, 0),
    "Conv": (1,),
    "ConvTranspose": (1,),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
}

# those whose sums run along the second axis of the weight, as sparse kernels read it
_ALONG_INPUTS = ("MatMul", "Gemm", "Conv")

# what may stand between an activation's DequantizeLinear and its reader
_SHAPE_ONLY = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")

# what sparse tensor cores of Ampere and newer read
_AMPERE = GroupRule(2, 4)


@dataclass(frozen=True)
class StoredWeight:
    """A weight of the file in PyTorch's orientation."""

    name: str
    op: str
    dtype: str
    quantized: bool
    # bool [out, in, ...]: the value that the operator reads is exactly zero
    is_zero: np.ndarray
    # all zero points are 0; None where it is not quantized
    symmetric: bool | None = None
    # the other operand
    activation: Activation | None = None
    # name of the node that reads it
    node: str = ""


@dataclass(frozen=True)
class Activation:
    """The quantized input of an operator, as it comes out of DequantizeLinear."""

    dtype: str
    symmetric: bool


@dataclass(frozen=True)
class TracedTensor:
    """An initializer and what lies between it and its reader."""

    name: str
    quantize: onnx.NodeProto | None
    transposed: bool


def read_weights(model: onnx.ModelProto) -> dict[str, StoredWeight]:
    """Every stored tensor that a product, convolution or recurrent layer reads as its weight, by name."""
    initializers = stored_tensors(model)
    nodes = list(walk_nodes(model.graph))
    producers = {output: node for node in nodes for output in node.output}
    weights: dict[str, StoredWeight] = {}
    for node in nodes:
        for position in weight_inputs(node):
            source = trace(node.input[position], producers, initializers)
            if source is None or len(initializers[source.name].dims) < 2:
                continue
            flip = _stored_in_out(node, position) != source.transposed
            weight = _read(initializers, source, node.op_type, flip)
            if node.op_type == "Einsum":
                weight = replace(weight, is_zero=_rows_of_einsum(weight.is_zero, node, position))
            activation = _activation(node.input[1 if position == 0 else 0], producers, initializers)
            weight = replace(weight, activation=activation, node=node.name)
            other = weights.get(source.name)
            if other is None or _misfits(weight) >= _misfits(other):  # read both ways round: the worse of the two
                weights[source.name] = weight
            if node.op_type in ("MatMul", "Gemm"):
                break
    return weights


def weight_inputs(node: onnx.NodeProto) -> Sequence[int]:
    """The inputs at which an operator may read a weight."""
    if node.op_type == "Einsum" and len(node.input) > 1:
        return range(len(node.input))
    return READERS.get(node.op_type, ())


def measure_layers(model: onnx.ModelProto, promise: Promise, names: dict[str, str]) -> tuple[LayerFacts, ...]:
    """Facts of every weight, patterns checked where promised.

    ``names`` maps a promised name to the initializer that holds it where that has another name (equal weights are
    stored once). A promised weight that none of these operators reads is measured as it is stored.
    """
    weights = read_weights(model)
    initializers = stored_tensors(model)
    facts = {name: _facts(name, weight, None) for name, weight in weights.items()}
    owners = {name: name for name in facts}  # tensor -> the weight that it counts for
    for layer in promise.layers:
        stored = names.get(layer.name, layer.name)
        weight = weights.get(stored)
        if weight is None and stored in initializers:
            weight = _read(initializers, TracedTensor(stored, None, False), "other", False)
        if weight is not None:
            measured = _facts(layer.name, weight, read_pattern(layer.pattern))
            owner = owners.setdefault(stored, layer.name)
            facts[layer.name] = measured.model_copy(update={} if owner == layer.name else {"shared_with": owner})
    return tuple(facts[name] for name in sorted(facts, key=_in_numbers))


def _in_numbers(name: str) -> list[tuple[int, str]]:
    """A key that puts block 10 after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def hardware_rows(values: np.ndarray) -> np.ndarray:
    """[out, kh * kw * in]: neighbours are input channels, as sparse kernels read them."""
    return np.moveaxis(values, 1, -1).reshape(len(values), -1)


def broken_groups(is_zero: np.ndarray, rule: GroupRule) -> int | None:
    """Groups along the input axis with more than ``rule.keep`` non-zeros; None if groups do not fit the axis."""
    if is_zero.ndim < 2 or is_zero.shape[1] % rule.cols:
        return None
    kept = (~hardware_rows(is_zero)).reshape(-1, rule.cols).sum(axis=1)
    return int((kept > rule.keep).sum())


def tile_zeros(is_zero: np.ndarray, rule: TileRule) -> int:
    """Zeros in tiles that are zero throughout; 0 if tiles do not fit the weight."""
    if is_zero.ndim < 2:
        return 0
    rows = hardware_rows(is_zero)
    if rows.shape[0] % rule.rows or rows.shape[1] % rule.cols:
        return 0
    tiles = rows.reshape(rows.shape[0] // rule.rows, rule.rows, rows.shape[1] // rule.cols, rule.cols)
    return int(tiles.all(axis=(1, 3)).sum()) * rule.rows * rule.cols


def _misfits(weight: StoredWeight) -> int:
    """Groups that break 2:4; all where groups do not fit."""
    broken = broken_groups(weight.is_zero, _AMPERE)
    return weight.is_zero.size if broken is None else broken


def _facts(name: str, weight: StoredWeight, rule: GroupRule | TileRule | None) -> LayerFacts:
    zero = weight.is_zero
    return LayerFacts(
        name=name,
        op=weight.op,
        node=weight.node,
        shape=zero.shape,
        dtype=weight.dtype,
        quantized=weight.quantized,
        numel=zero.size,
        zeros=int(zero.sum()),
        symmetric=weight.symmetric,
        activation=None if weight.activation is None else weight.activation.dtype,
        activation_symmetric=None if weight.activation is None else weight.activation.symmetric,
        broken_2_4=broken_groups(zero, _AMPERE) if weight.op in _ALONG_INPUTS else None,
        broken_groups=broken_groups(zero, rule) if isinstance(rule, GroupRule) else None,
        tile_zeros=tile_zeros(zero, rule) if isinstance(rule, TileRule) else None,
    )


def trace(
    value: str, producers: Mapping[str, onnx.NodeProto], initializers: Mapping[str, onnx.TensorProto]
) -> TracedTensor | None:
    """Follow a value back over DequantizeLinear, Transpose and Identity to an initializer.

    None where it comes from elsewhere, or where its axes are exchanged otherwise than [out, in] and [in, out].
    """
    quantize: onnx.NodeProto | None = None
    turns: list[onnx.NodeProto] = []
    seen: set[str] = set()
    while value not in initializers:
        node = producers.get(value)
        if (
            node is None
            or not node.input
            or value in seen
            or node.op_type not in ("DequantizeLinear", "Transpose", "Identity")
        ):
            return None
        if node.op_type == "DequantizeLinear":
            quantize = node
        if node.op_type == "Transpose":
            turns.append(node)
        seen.add(value)
        value = node.input[0]
    axes = list(range(len(initializers[value].dims)))
    swapped = [*axes[:-2], *axes[:-3:-1]]
    orders = [next((list(a.ints) for a in node.attribute if a.name == "perm"), axes[::-1]) for node in turns]
    if any(order not in (axes, swapped) for order in orders):
        return None
    return TracedTensor(value, quantize, sum(order != axes for order in orders) % 2 == 1)


def _activation(
    value: str, producers: dict[str, onnx.NodeProto], initializers: dict[str, onnx.TensorProto]
) -> Activation | None:
    """The integer type that an operand is read in; None where it is float."""
    while (node := producers.get(value)) is not None:
        if node.op_type == "DequantizeLinear":
            if len(node.input) < 3 or node.input[2] not in initializers:
                return Activation("UINT8", True)  # ONNX's default: unsigned, zero point 0
            zero_point = initializers[node.input[2]]
            is_symmetric = not to_array(zero_point).any()
            return Activation(onnx.TensorProto.DataType.Name(zero_point.data_type), is_symmetric)
        if node.op_type not in _SHAPE_ONLY:
            return None
        value = node.input[0]
    return None


def to_array(tensor: onnx.TensorProto) -> np.ndarray:
    """An initializer's values. Raises CertificateError naming it if its bytes do not fill its shape."""
    try:
        array: np.ndarray = numpy_helper.to_array(tensor)
    except KeyError:
        raise CertificateError("unreadable", [f"{tensor.name}: no such type, {tensor.data_type}"]) from None
    except (ValueError, TypeError) as error:
        raise CertificateError("unreadable", [f"{tensor.name}: {error}"]) from error
    return array


def _stored_in_out(node: onnx.NodeProto, position: int) -> bool:
    """Whether the operator reads its weight as [in, out]."""
    if node.op_type == "Gemm":
        turned = any(a.name == ("transA", "transB")[position] and a.i for a in node.attribute)
        return turned == (position == 0)
    return node.op_type == "MatMul" and position == 1


def _rows_of_einsum(values: np.ndarray, node: onnx.NodeProto, position: int) -> np.ndarray:
    """[out, in], where the sum runs along `in`; as stored where the equation does not name each axis."""
    equation = next((a.s.decode() for a in node.attribute if a.name == "equation"), "").replace(" ", "")
    terms, arrow, result = equation.partition("->")
    letters = terms.split(",")[position]
    if not arrow:
        result = "".join(letter for letter in terms if terms.count(letter) == 1)
    summed = [axis for axis, letter in enumerate(letters) if letter not in result]
    kept = [axis for axis, letter in enumerate(letters) if letter in result]
    if len(letters) != values.ndim or "." in letters or not summed or not kept:
        return values
    return values.transpose(*kept, *summed).reshape(math.prod(values.shape[axis] for axis in kept), -1)


def _read(initializers: dict[str, onnx.TensorProto], source: TracedTensor, op: str, flip: bool) -> StoredWeight:
    tensor = initializers[source.name]
    values = to_array(tensor)
    zero = 0 if source.quantize is None else _zero_point(initializers, source.quantize, values)
    try:
        is_zero = values == zero
    except ValueError:
        where = f"{source.name}: zero points of shape {list(np.shape(zero))} for levels of shape {list(values.shape)}"
        raise CertificateError("unreadable", [where]) from None
    if flip:
        is_zero = np.swapaxes(is_zero, -1, -2)
    if op == "MatMul" and is_zero.ndim > 2:  # a stack of weights [out, in]
        is_zero = is_zero.reshape(-1, is_zero.shape[-1])
    dtype = onnx.TensorProto.DataType.Name(tensor.data_type)
    symmetric = None if source.quantize is None else not np.any(zero)
    return StoredWeight(source.name, op, dtype, source.quantize is not None, is_zero, symmetric)


def _zero_point(
    initializers: dict[str, onnx.TensorProto], node: onnx.NodeProto, values: np.ndarray
) -> np.ndarray | int:
    """The level that stands for zero, shaped to compare with ``values``."""
    if len(node.input) < 3 or not node.input[2]:
        return 0
    if node.input[2] not in initializers:
        raise CertificateError("unreadable", [f"{node.input[0]}: its zero point {node.input[2]!r} is no stored tensor"])
    zero_point = to_array(initializers[node.input[2]])
    if zero_point.ndim == 0 or zero_point.size == 1:
        return zero_point.reshape(())
    options = {attribute.name: int(attribute.i) for attribute in node.attribute}
    axis = options.get("axis", 1)
    if not -values.ndim <= axis < values.ndim:
        raise CertificateError(
            "unreadable", [f"{node.input[0]}: scales along axis {axis} of a tensor of {values.ndim} axes"]
        )
    if zero_point.ndim > 1:  # one for each block of levels along the axis
        if zero_point.ndim != values.ndim:
            raise CertificateError("unreadable", [f"{node.input[0]}: zero points of {zero_point.ndim} axes"])
        spread = np.repeat(zero_point, min(max(options.get("block_size", 1), 1), values.shape[axis]), axis)
        return spread[tuple(map(slice, values.shape))]
    shape = [1] * values.ndim
    shape[axis] = -1
    return zero_point.reshape(shape)
