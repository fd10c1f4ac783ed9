"""The certificate: what was measured from the bytes of one ONNX file. Data only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ovit_engine.certificate.manifest import Manifest, check_keys, check_unique
from ovit_engine.certificate.notes import Note
from ovit_engine.certificate.ratio import Ratio, Speed
from ovit_engine.certificate.token_counts import TokenCounts

# of certificates; any change of their fields raises it, and no other format is read
FORMAT = 6

# ONNX Runtime's operators that compute with integers
INTEGER_KERNELS = frozenset(
    {
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "QAttention",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
    }
)

Count = Annotated[int, Field(ge=0)]

Positive = Annotated[int, Field(ge=1)]

Share = Annotated[float, Field(ge=0, le=1)]


class _Facts(BaseModel):
    # NaN is no fact, and would be equal to nothing and different from nothing in every comparison
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class LayerFacts(_Facts):
    """One weight of the file."""

    name: str
    # the operator that reads it: MatMul, Gemm, Conv ...
    op: str
    # the name of that operator's node, as other tools' logs have it
    node: str = ""
    # [out, in, ...], as PyTorch has it, however the file stores it
    shape: tuple[int, ...]
    dtype: str
    # read through DequantizeLinear
    quantized: bool
    numel: Positive
    zeros: Count
    # all zero points of the weight are 0 (None: not quantized)
    symmetric: bool | None = None
    # integer type of the other operand and whether its zero point is 0 (None: it is read in float)
    activation: str | None = None
    activation_symmetric: bool | None = None
    # groups of 4 neighbours with more than 2 non-zeros along the axis that sparse kernels read (None: no multiple of 4)
    broken_2_4: Count | None = None
    # N:M promised: groups with too many non-zeros (None: the input axis is no multiple of the group)
    broken_groups: Count | None = None
    # blocks promised: zeros that lie in tiles of nothing but zeros
    tile_zeros: Count | None = None
    # another weight of these, which is stored once for both: totals count it there
    shared_with: str | None = None

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / self.numel


class Parity(_Facts):
    """How far the file's outputs are from those of the fake-quantized, masked PyTorch model."""

    images: Positive
    # "data", or "random": seeded normal noise where no data was given
    source: str
    # share of images with the same argmax, and its 95 % Wilson interval
    agreement: Share
    agreement_low: Share
    agreement_high: Share
    # mean over images of the cosine between the logits
    cosine: float
    # largest absolute difference / largest absolute logit
    max_error: Annotated[float, Field(ge=0)]


class Accuracy(_Facts):
    """Top-1 on the labelled images that parity was measured on."""

    images: Positive
    file: Share
    # of what the file is compared with (the certificate's ``reference``)
    pytorch: Share


class Latency(_Facts):
    """One file at one batch size on the certificate's machine; seconds a batch."""

    file: str
    batch_size: Positive
    threads: Positive
    # paired rounds, in each of which file and baseline ran in turn
    rounds: Positive
    median: float
    # quartiles
    low: float
    high: float
    # images a second at the median
    throughput: float
    # None for the baseline itself
    baseline: str | None
    verdict: Speed | None
    ratio: Ratio | None


class Machine(_Facts):
    """Where the runtime's kernels were chosen."""

    cpu: str
    cores: Positive
    # instruction sets that matter for int8
    int8: tuple[str, ...]


class Certificate(_Facts):
    """Everything measured about one file. ``verify`` measures it again from the file alone."""

    format: int = FORMAT
    file: str
    sha256: str
    bytes: Count
    # by gzip -6 and zstd -12
    gzip_bytes: Count
    # None where the package `zstandard` is not installed
    zstd_bytes: Count | None = None
    # all weights of two dimensions and more: as stored, and at the entropy of where zeros lie and of the other values
    weight_bytes: Count
    weight_entropy_bytes: Count
    # numbers that the file stores in addition to `layers`: biases, norms, embeddings, scales
    other_numbers: Count
    opset: Count
    # name -> shape, a free dimension by its name
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    # multiply-adds of products and convolutions for one image, zeros in full (None: a note says why)
    macs: Count | None = None
    # tokens along the blocks (None: not the graph of a plain transformer)
    tokens: TokenCounts | None = None

    recipe_name: str
    recipe_sha256: str
    promise: Promise
    # which heads and units of the model as it was made are left
    manifest: Manifest = Manifest()
    preprocessing: dict[str, Any]
    # what parity and accuracy compare the file with
    reference: str = "PyTorch"

    # every weight that a MatMul, Gemm or Conv reads, and every promised one
    layers: tuple[LayerFacts, ...]
    ops: dict[str, Count]
    # the graph after ONNX Runtime's optimizations on this machine
    runtime_ops: dict[str, Count]
    # weight -> the integer kernel that reads it on this machine
    kernels: dict[str, str]

    reference_sha256: str
    parity: Parity
    # on the images stored in the reference, where these are not all
    parity_stored: Parity | None = None
    accuracy: Accuracy | None = None
    # measured on request (``latency.add_latency``); everything else is measured again by ``verify``
    latency: tuple[Latency, ...] = ()

    machine: Machine
    versions: dict[str, str]
    notes: tuple[Note, ...] = ()

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: tuple[LayerFacts, ...]) -> tuple[LayerFacts, ...]:
        check_unique(layer.name for layer in layers)
        return layers

    @property
    def pruned(self) -> tuple[LayerFacts, ...]:
        """The weights that a pruner worked on, those that it left dense among them."""
        names = {layer.name for layer in self.promise.layers if layer.zeros or layer.pruned}
        return tuple(layer for layer in self.layers if layer.name in names)

    @property
    def total_sparsity(self) -> float:
        """Share of zeros over all weights in ``layers``; 0 if there is none."""
        return _share_of_zeros(self.layers)

    @property
    def sparsity(self) -> float:
        """Share of zeros over the weights that a pruner worked on; 0 if on none."""
        return _share_of_zeros(self.pruned)

    @property
    def dead(self) -> int:
        """Weights said to have left with heads and units that zeros had left without effect: not in the file."""
        return sum(layer.dead for layer in self.promise.layers)

    @property
    def sparsity_with_dead(self) -> float:
        """`sparsity` with `dead` counted as zeros: what a recipe is held against. The file can't prove that part."""
        names = {layer.name for layer in self.promise.layers if layer.zeros or layer.pruned or layer.dead}
        return _share_of_zeros([layer for layer in self.layers if layer.name in names], self.dead)

    @property
    def quantized(self) -> tuple[LayerFacts, ...]:
        """The weights stored as integers."""
        return tuple(layer for layer in self.layers if layer.quantized)

    @property
    def integer_kernels(self) -> int:
        """Nodes of ``runtime_ops`` that compute with integers."""
        return sum(count for op, count in self.runtime_ops.items() if op in INTEGER_KERNELS)

    @property
    def int8_share(self) -> float:
        """Share of all weights in ``layers`` that is stored as integers."""
        total = count_weights(self.layers)
        return count_weights(self.quantized) / total if total else 0.0

    def to_json(self) -> str:
        """Indented JSON, ending in a newline."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read the text of `to_json`.

        Raises:
            ValueError: the text is something else, of another format, or has a key twice.
        """
        found = _Header.model_validate_json(text).format
        if found != FORMAT:
            raise ValueError(f"it has format {found}, this ovit-engine reads format {FORMAT}: export the file again")
        certificate = cls.model_validate_json(text, strict=True)
        check_keys(text)
        return certificate

    def __str__(self) -> str:
        """Return a summary of a few lines; `render.print_certificate` prints everything."""
        lines = [
            f"{self.file}: {self.bytes:,} bytes, {self.gzip_bytes:,} by gzip",
            f"{self.sparsity:.2%} zeros in pruned weights, {self.total_sparsity:.2%} in all; "
            f"{self.int8_share:.1%} int8 in {len(self.quantized)} layers, {self.integer_kernels} integer kernels",
            f"{self.parity.agreement:.2%} of {self.parity.images} images agree with {self.reference}",
        ]
        if self.accuracy is not None:
            lines.append(f"{self.accuracy.file:.2%} top-1, {self.reference} {self.accuracy.pytorch:.2%}")
        if self.manifest:
            lines.append(f"{self.manifest} are left, as the run said")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


class _Header(BaseModel):
    """What certificates of every format have."""

    format: int


def count_weights(layers: Iterable[LayerFacts]) -> int:
    """How many weights these hold; one that is stored once for two layers counts once."""
    return sum(layer.numel for layer in _each_stored(layers))


def _share_of_zeros(layers: Sequence[LayerFacts], left: int = 0) -> float:
    """With so many more that ``left``, zeros all."""
    total = left + count_weights(layers)
    return (left + sum(layer.zeros for layer in _each_stored(layers))) / total if total else 0.0


def _each_stored(layers: Iterable[LayerFacts]) -> Iterable[LayerFacts]:
    """Of those that share a weight one, whichever of them are there."""
    return {layer.shared_with or layer.name: layer for layer in layers}.values()


def certificate_path(path: Path) -> Path:
    """Where the certificate of an ONNX file lies."""
    return path.with_name(f"{path.stem}.certificate.json")


def page_path(path: Path) -> Path:
    """Where the certificate of an ONNX file lies as a page for people."""
    return path.with_name(f"{path.stem}.certificate.html")


def reference_path(path: Path) -> Path:
    """Where the PyTorch reference of an ONNX file lies."""
    return path.with_name(f"{path.stem}.reference.npz")


class PromisedLayer(BaseModel):
    """What one weight must be in the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="name of the parameter, e.g. blocks.0.attn.qkv.weight")
    zeros: int = Field(default=0, ge=0, description="at least so many weights are exactly zero")
    pattern: str | dict[str, list[int]] = Field(
        default="unstructured", description='as recipes spell it: "unstructured", "2:4", {"block": [1, 4]}'
    )
    removed: int = Field(default=0, ge=0, description="so many weights left with whole heads and units")
    dead: int = Field(
        default=0, ge=0, description="so many of those that zeros had left without effect; the others were gated off"
    )
    pruned: bool = Field(default=False, description="a pruner worked on it, also where that left every weight")
    quantized: bool = Field(default=False, description="the weight is stored as 8-bit integers")

    @field_validator("pattern")
    @classmethod
    def _readable(cls, pattern: str | dict[str, list[int]]) -> str | dict[str, list[int]]:
        read_pattern(pattern)
        return pattern

    @model_validator(mode="after")
    def _part_of_removed(self) -> PromisedLayer:
        if self.dead > self.removed:
            raise ValueError(f"{self.name}: {self.dead} dead weights are more than the {self.removed} removed ones")
        return self


class Promise(BaseModel):
    """What a recipe promises about a file: one entry for each weight it worked on, and how many tokens are left."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: tuple[PromisedLayer, ...] = ()
    # of a model whose tokens are reduced
    tokens: TokenCounts | None = None

    @field_validator("layers")
    @classmethod
    def _each_once(cls, layers: tuple[PromisedLayer, ...]) -> tuple[PromisedLayer, ...]:
        check_unique(layer.name for layer in layers)
        return layers


class GroupRule(NamedTuple):
    """At most ``keep`` of ``cols`` neighbours are non-zero (N:M)."""

    keep: int
    cols: int


class TileRule(NamedTuple):
    """Zeros come in tiles of ``rows`` x ``cols``."""

    rows: int
    cols: int


def read_pattern(pattern: str | dict[str, list[int]]) -> GroupRule | TileRule | None:
    """The rule a pattern sets for a file; None if any weight may be zero.

    Read here without PyTorch, so that a file is checked by other code than pruned it. Raises ValueError.
    """
    if pattern == "unstructured":
        return None
    if isinstance(pattern, dict) and set(pattern) == {"block"} and len(pattern["block"]) == 2:
        rule = TileRule(*pattern["block"])
        if min(rule) >= 1:
            return rule
    match = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", pattern) if isinstance(pattern, str) else None
    if match is not None and 0 < int(match[1]) <= int(match[2]):
        return GroupRule(int(match[1]), int(match[2]))
    raise ValueError(f"unknown pattern in a promise: {str(pattern)[:100]!r}")
