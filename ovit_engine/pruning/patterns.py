"""Which weights are pruned together: a pattern turns scores and a sparsity into a boolean mask (True = kept).

Three patterns, each a frozen value that can be hashed, pickled and written in a recipe:

==================  =========================================================================================
``unstructured``    any weight
``"2:4"``           *keep* 2 of every *group* of 4 along the axis the hardware reads
``{block: [1, 4]}`` whole tiles of rows x columns, again along the hardware axis
==================  =========================================================================================

The hardware axis is the input axis. A matrix [out, in] is taken as it is; a convolution [out, in, kh, kw] is read as
(out, kh, kw, in), because sparse kernels (cuSPARSELt, TensorRT) group input channels and not pixels of one kernel.
`to_layout` and `from_layout` are that reading, shared by masks, solvers and the checks on an exported file.
"""

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ovit_engine.utils.suggest import suggest

Spelling = str | dict[str, list[int]]

_SPELLINGS = ("unstructured", "2:4", "{block: [1, 4]}")

# 1:3 is 0.6667: somebody who writes 0.667 beside it means the same.
_SPARSITY_TOLERANCE = 1e-3


class Pattern(ABC):
    """What a pruner has to know about a pattern."""

    unit: int  # weights that go as one (consecutive in the layout)
    group: int  # weights that must not be torn apart (consecutive in the layout)

    def check(self, shape: torch.Size) -> None:  # noqa: B027 (every shape will do)
        """Raise ValueError, with the shape, if a weight of this shape cannot follow the pattern."""

    def resolve(self, sparsity: float | None) -> float:
        """Return the sparsity meant, or raise ValueError if it is missing, out of range or contradicts the pattern."""
        if sparsity is None:
            raise ValueError(f"pattern {self} needs a sparsity: only keep:group patterns imply one")
        if not 0 <= sparsity <= 1:
            raise ValueError(f"sparsity must be between 0 and 1, is {sparsity}")
        return sparsity

    @abstractmethod
    def to_layout(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """Flatten to [*leading dims, numel] so that units and groups are consecutive."""

    @abstractmethod
    def from_layout(self, flat: Tensor, shape: torch.Size) -> Tensor:
        """Undo `to_layout` for a tensor [numel] of a weight of this shape."""

    @abstractmethod
    def mask(self, scores: Tensor, sparsity: float | None = None) -> Tensor:
        """Return True where a weight is kept; a score of -inf (already pruned) is never kept."""

    @abstractmethod
    def describe(self) -> Spelling:
        """Return the value to write in a recipe."""

    def __str__(self) -> str:
        return str(self.describe())


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Any weight may be pruned."""

    unit = 1
    group = 1

    def to_layout(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """Row-major order: a view where the tensor is contiguous."""
        return tensor.reshape(*tensor.shape[:leading], tensor.shape[leading:].numel())

    def from_layout(self, flat: Tensor, shape: torch.Size) -> Tensor:
        return flat.reshape(shape)

    def mask(self, scores: Tensor, sparsity: float | None = None) -> Tensor:
        """Drop exactly round(sparsity * numel) weights of lowest score, ties by position.

        More are dropped only if more were pruned before (-inf). Raises ValueError for NaN scores or a bad sparsity.
        """
        _no_nan(scores)
        kept = _keep_best(scores.flatten(), round(self.resolve(sparsity) * scores.numel()))
        return kept.reshape(scores.shape) & ~scores.isneginf()

    def describe(self) -> str:
        return "unstructured"


@dataclass(frozen=True)
class NM(Pattern):
    """Keep `keep` of every `group` consecutive weights along the hardware axis, whole at once.

    Weights pruned before stay pruned and are counted: a group that already has more zeros than needed keeps fewer.
    """

    keep: int
    group: int
    unit = 1

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.group:
            raise ValueError(
                f"pattern {self.keep}:{self.group}: write keep:group with 1 <= keep < group, "
                f"e.g. 2:4 keeps 2 of every 4"
            )

    def check(self, shape: torch.Size) -> None:
        _, inner = _hardware_axes(shape)
        if inner % self.group:
            raise ValueError(
                f"pattern {self} needs an input axis that is a multiple of {self.group}; "
                f"shape {tuple(shape)} has {inner}"
            )

    def resolve(self, sparsity: float | None) -> float:
        """1 - keep/group; any other sparsity is a ValueError."""
        own = 1 - self.keep / self.group
        if sparsity is not None and not abs(sparsity - own) <= _SPARSITY_TOLERANCE:
            raise ValueError(f"pattern {self} is a sparsity of {own:g}: sparsity {sparsity:g} contradicts it")
        return own

    def to_layout(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """Return the rows of the hardware layout, one after the other."""
        return to_hardware(tensor, leading).flatten(leading)

    def from_layout(self, flat: Tensor, shape: torch.Size) -> Tensor:
        return from_hardware(flat, shape)

    def mask(self, scores: Tensor, sparsity: float | None = None) -> Tensor:
        """Keep the `keep` highest scores of each group, ties dropping the first position first.

        Raises ValueError for NaN scores, a shape that does not fit or a sparsity that contradicts the pattern.
        """
        _no_nan(scores)
        self.resolve(sparsity)
        self.check(scores.shape)
        groups = self.to_layout(scores).reshape(-1, self.group)
        dropped = groups.argsort(dim=-1, stable=True)[:, : self.group - self.keep]
        kept = torch.ones_like(groups, dtype=torch.bool).scatter_(1, dropped, False)
        return self.from_layout(kept.flatten(), scores.shape) & ~scores.isneginf()

    def describe(self) -> str:
        return f"{self.keep}:{self.group}"


@dataclass(frozen=True)
class Block(Pattern):
    """Whole tiles of `rows` output channels x `cols` inputs (hardware axis) go together.

    A tile of which only some weights were pruned before counts as present; its pruned weights stay pruned.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"block [{self.rows}, {self.cols}]: rows and columns must be 1 or more")
        for name in ("unit", "group"):
            object.__setattr__(self, name, self.rows * self.cols)  # frozen

    def check(self, shape: torch.Size) -> None:
        outer, inner = _hardware_axes(shape)
        if outer % self.rows or inner % self.cols:
            raise ValueError(
                f"pattern {self} needs output and input axes that are multiples of {self.rows} and {self.cols}; "
                f"shape {tuple(shape)} has {outer} and {inner}"
            )

    def to_layout(self, tensor: Tensor, leading: int = 0) -> Tensor:
        """Tile after tile, each row-major."""
        rows, lead = to_hardware(tensor, leading), tensor.shape[:leading]
        outer, inner = rows.shape[-2:]
        tiles = rows.reshape(*lead, outer // self.rows, self.rows, inner // self.cols, self.cols)
        return tiles.transpose(-3, -2).reshape(*lead, outer * inner)

    def from_layout(self, flat: Tensor, shape: torch.Size) -> Tensor:
        outer, _ = _hardware_axes(shape)
        tiles = flat.reshape(outer // self.rows, -1, self.rows, self.cols)
        return from_hardware(tiles.transpose(1, 2).reshape(-1), shape)

    def mask(self, scores: Tensor, sparsity: float | None = None) -> Tensor:
        """Drop exactly round(sparsity * tiles) tiles of lowest summed score, ties by position.

        Raises ValueError for NaN scores, a shape that does not fit or a bad sparsity.
        """
        _no_nan(scores)
        self.check(scores.shape)
        tiles = unit_scores(self, scores)
        kept = _keep_best(tiles, round(self.resolve(sparsity) * len(tiles)))
        return self.from_layout(kept.repeat_interleave(self.unit), scores.shape) & ~scores.isneginf()

    def describe(self) -> dict[str, list[int]]:
        return {"block": [self.rows, self.cols]}

    def __str__(self) -> str:
        return f"{{block: [{self.rows}, {self.cols}]}}"


def parse_pattern(value: object) -> Pattern:
    """Read a pattern as a recipe spells it: "unstructured", "2:4" (keep:group) or {"block": [1, 4]}.

    A Pattern is returned as it is, and `str(pattern)` is read back. Raises ValueError with what was written and what
    could have been meant.
    """
    if isinstance(value, Pattern):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        raise ValueError(_unquoted(value))
    if isinstance(value, str):
        return _parse_text(value.strip())
    if isinstance(value, dict):
        return _parse_block(value)
    raise ValueError(f'pattern {value!r}: write unstructured, "2:4" (keep:group) or {{block: [1, 4]}}')


def to_hardware(tensor: Tensor, leading: int = 0) -> Tensor:
    """Return rows as hardware reads them: [*leading dims, out, kh * kw * in] for a convolution, [out, in] for a matrix.

    A vector is one row. `leading` dimensions (a stack of gradients) are left alone.
    """
    lead, shape = tensor.shape[:leading], tensor.shape[leading:]
    if len(shape) < 2:
        return tensor.reshape(*lead, 1, shape.numel())
    return tensor.movedim(leading + 1, -1).reshape(*lead, shape[0], shape[1:].numel())


def from_hardware(rows: Tensor, shape: torch.Size) -> Tensor:
    """Undo `to_hardware` (no leading dimensions): a tensor of this shape."""
    if len(shape) < 3:
        return rows.reshape(shape)
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()


def unit_scores(pattern: Pattern, scores: Tensor) -> Tensor:
    """Return one score a unit [units]: the sum over its weights, of which those pruned before (-inf) count nothing.

    A unit that is pruned wholly stays -inf.
    """
    units = pattern.to_layout(scores).reshape(-1, pattern.unit)
    gone = units.isneginf()
    return units.masked_fill(gone, 0).sum(1).masked_fill(gone.all(1), -math.inf)


def _hardware_axes(shape: torch.Size) -> tuple[int, int]:
    """Return the sizes of the output and input axes; a vector has one output."""
    return (shape[0], shape[1]) if len(shape) >= 2 else (1, shape.numel())


def _keep_best(scores: Tensor, drop: int) -> Tensor:
    kept = torch.ones_like(scores, dtype=torch.bool)
    kept[scores.argsort(stable=True)[:drop]] = False
    return kept


def _no_nan(scores: Tensor) -> None:
    if scores.isnan().any():
        raise ValueError("scores hold NaN")


def _unquoted(value: int) -> str:
    keep, group = divmod(value, 60)
    if keep and group:  # YAML 1.1 reads digits with a colon as base sixty
        return f"an unquoted {keep}:{group} is read by YAML as the number {value}: write it in quotes"
    return f"pattern {value} is a number: an unquoted 2:4 is read by YAML as 124, write it in quotes"


def _parse_text(text: str) -> Pattern:
    if text == "unstructured":
        return Unstructured()
    if ratio := re.fullmatch(r"(\d+)\s*:\s*(\d+)", text):
        return NM(int(ratio[1]), int(ratio[2]))
    if tile := re.fullmatch(r"\{block: \[(\d+), (\d+)\]\}", text):
        return Block(int(tile[1]), int(tile[2]))
    raise ValueError(f"unknown pattern {text!r}{suggest(text, _SPELLINGS)}")


def _parse_block(value: dict[object, object]) -> Block:
    size = value.get("block")
    if set(value) != {"block"} or not isinstance(size, list | tuple) or len(size) != 2:
        raise ValueError(f"pattern {value!r}: a block is written {{block: [rows, columns]}}, e.g. {{block: [1, 4]}}")
    rows, cols = size
    if not all(isinstance(edge, int) and not isinstance(edge, bool) for edge in size):
        raise ValueError(f"pattern {value!r}: rows and columns of a block are whole numbers")
    return Block(rows, cols)
