"""Which layers sparse tensor cores (NVIDIA Ampere and newer) can take. Needs neither PyTorch nor a GPU.

The rules are those of libraries, not of our measurements:

- cuSPARSELt takes a 2:4 operand whose rows and columns are multiples of 32 in int8 and of 16 in fp16 or bf16
  (PyTorch's table for it, ``torch/sparse/semi_structured.py``, ``SparseSemiStructuredTensorCUSPARSELT``).
- In a convolution the four neighbours are input channels, at each place of the kernel
  (TensorRT documentation, "Structured Sparsity").
- TensorRT reads quantized operands as signed int8 with zero point 0, weights and activations alike
  (TensorRT documentation, "Working with Quantized Types").
- TensorRT times sparse and dense kernels and takes the faster one. NVIDIA's engineers saw sparse ones win above 256
  input and output channels (NVIDIA/TensorRT issue 3849; also 2169), which is a doubt here and no verdict.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ovit_engine.certificate.model import (
    Certificate,
    GroupRule,
    LayerFacts,
    TileRule,
    read_pattern,
)

READINESS_COLUMNS = ("weight", "out", "K", "operands", "2:4", "on sparse tensor cores")

_MULTIPLE = {"INT8": 32, "UINT8": 32}

_MULTIPLE_HALF = 16

_SMALL = 256

_GROUP = 4

# [I] [TRT] (Sparsity) Layers eligible for sparse math: a, b + c
# [I] [TRT] (Sparsity) TRT inference plan picked sparse implementation for layers: a
_LOG = re.compile(r"\(Sparsity\)\s*([^:\n]*):[ \t]*([^\n]*)")


@dataclass(frozen=True, kw_only=True)
class SparseLayer:
    """What the rules ask of a layer: from a file, or of a recipe before anything was trained."""

    name: str
    # name of the node that reads the weight; empty where there is no file
    node: str = ""
    out: int
    # input channels a group: the axis in which two of four are zero
    k: int
    # as ONNX names them; the activation None where it is read in float
    weight: str
    activation: str | None
    weight_symmetric: bool = True
    activation_symmetric: bool = True
    # groups of 4 with more than 2 non-zeros; None where K is no multiple of 4
    broken: int | None
    # all groups of 4
    groups: int


def from_facts(facts: LayerFacts) -> SparseLayer:
    """The same of a weight that was measured in a file."""
    return SparseLayer(
        name=facts.name,
        node=facts.node,
        out=facts.shape[0],
        k=facts.shape[1],
        weight=facts.dtype,
        activation=facts.activation,
        weight_symmetric=facts.symmetric is not False,
        activation_symmetric=facts.activation_symmetric is not False,
        broken=facts.broken_2_4,
        groups=facts.numel // _GROUP,
    )


def blockers(layer: SparseLayer) -> tuple[str, ...]:
    """Why no sparse kernel can take the layer; empty if one can."""
    found = []
    if layer.broken is None:
        found.append(f"K {layer.k} is no multiple of 4")
    elif layer.broken:
        found.append("not 2:4")
    multiple = _MULTIPLE.get(layer.weight, _MULTIPLE_HALF)
    kind = "int8" if layer.weight in _MULTIPLE else "fp16"
    for axis, size in (("K", layer.k), ("out", layer.out)):
        if size % multiple:
            found.append(f"{axis} {size} is no multiple of {multiple} ({kind})")
    return (*found, *_operand_blockers(layer))


def doubts(layer: SparseLayer) -> tuple[str, ...]:
    """What makes a dense kernel likely to win."""
    if blockers(layer):
        return ()
    small = [f"{axis} {size}" for axis, size in (("K", layer.k), ("out", layer.out)) if size <= _SMALL]
    return (f"{' and '.join(small)}: dense often wins up to {_SMALL}",) if small else ()


def readiness_row(layer: SparseLayer) -> tuple[str, ...]:
    """A row of READINESS_COLUMNS."""
    reasons = blockers(layer)
    verdict = f"no: {'; '.join(reasons)}" if reasons else "can be"
    if doubts(layer):
        verdict += f" ({'; '.join(doubts(layer))})"
    sparse = "-" if layer.broken is None else _share(layer)
    operands = f"{_type(layer.weight)} x {_type(layer.activation or 'FLOAT')}"
    return layer.name, str(layer.out), str(layer.k), operands, sparse, verdict


def trtexec_line(file: str | Path, inputs: Mapping[str, Sequence[int | str]], *, int8: bool) -> str:
    """The command that builds the file with sparse kernels allowed; a free dimension is measured at 1."""
    free = any(isinstance(size, str) for shape in inputs.values() for size in shape)
    shapes = ",".join(
        f"{name}:{'x'.join('1' if isinstance(size, str) else str(size) for size in shape)}"
        for name, shape in inputs.items()
    )
    return (
        f"trtexec --onnx={file} {'--int8' if int8 else '--fp16'} --sparsity=enable --verbose"
        f"{f' --shapes={shapes}' if free else ''}"
    )


@dataclass(frozen=True)
class TensorRTChoice:
    """What a trtexec log says of sparse kernels, by names of nodes."""

    eligible: frozenset[str]
    picked: frozenset[str]

    def of(self, node: str) -> str:
        """In a word or two, for a node."""
        if node in self.picked:
            return "sparse"
        return "dense was faster" if node in self.eligible else "not eligible"


def read_trt_log(text: str) -> TensorRTChoice:
    """Read the (Sparsity) lines of ``trtexec --sparsity=enable --verbose``; of several builds in one log the last.

    The format is that of logs in NVIDIA/TensorRT issues 2169 and 4056 (TensorRT 8). A fused layer is written as nodes
    joined by " + "; each counts.

    Raises:
        ValueError: no such lines, or of a wording that is not known.
    """
    found: dict[str, frozenset[str]] = {}
    lines = _LOG.findall(text)
    for title, names in lines:
        words = title.lower()
        if "picked" in words or "chose" in words:
            found["picked"] = _nodes(names)
        elif "eligible" in words:
            found["eligible"] = _nodes(names)
    if not lines:
        raise ValueError("no line of it begins with (Sparsity): was trtexec run with --sparsity=enable --verbose?")
    missing = {"eligible", "picked"} - found.keys()
    if missing:
        raise ValueError(f"no (Sparsity) line says which layers are {missing.pop()}; there is {lines[0][0]!r}")
    return TensorRTChoice(found["eligible"] | found["picked"], found["picked"])


def total_line(layers: Iterable[SparseLayer]) -> str:
    """How much of a model can run sparse: layers, and weights."""
    layers = list(layers)
    ready = [layer for layer in layers if not blockers(layer)]
    weights = sum(layer.groups for layer in layers) * _GROUP
    share = sum(layer.groups for layer in ready) * _GROUP / weights if weights else 0.0
    return f"{len(ready)} of {len(layers)} layers can run on sparse tensor cores, {share:.1%} of their weights"


def group_count(shape: Sequence[int]) -> int:
    """Groups of four in a weight of this shape, incomplete ones left out."""
    return math.prod(shape) // _GROUP


def _operand_blockers(layer: SparseLayer) -> list[str]:
    if layer.weight not in _MULTIPLE:
        return ["activation int8, weight float"] if layer.activation is not None else []
    found = []
    if layer.weight != "INT8" or not layer.weight_symmetric:
        found.append("weight not symmetric int8")
    if layer.activation is None:
        found.append("activation float: both operands must be int8")
    elif layer.activation != "INT8" or not layer.activation_symmetric:
        found.append(f"activation {_type(layer.activation)} is not symmetric int8")
    return found


def _share(layer: SparseLayer) -> str:
    kept = 1 - (layer.broken or 0) / max(layer.groups, 1)
    return f"{min(kept, 0.999) if layer.broken else kept:.1%} of groups"  # no rounding says that all are


def _type(name: str) -> str:
    return name.lower().replace("float16", "fp16")


def _nodes(names: str) -> frozenset[str]:
    layers = [layer for layer in names.split(", ") if layer.strip()]
    return frozenset(node.strip() for layer in layers for node in layer.split(" + "))


def has_2_4(certificate: Certificate) -> bool:
    """Whether the file promises the pattern of sparse tensor cores anywhere."""
    return bool(matrices(certificate))


def matrices(certificate: Certificate) -> list[LayerFacts]:
    """The weights that are promised in a pattern of sparse tensor cores: others need not have it."""
    rules = {layer.name: read_pattern(layer.pattern) for layer in certificate.promise.layers}
    return [layer for layer in certificate.layers if _is_sparse(rules.get(layer.name)) and len(layer.shape) > 1]


def _is_sparse(rule: GroupRule | TileRule | None) -> bool:
    """At most two of four."""
    return isinstance(rule, GroupRule) and rule.cols == 4 and rule.keep <= 2
