"""What `diagnose_file` finds, and how it is printed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import yaml

from ovit_engine.certificate.check import MIN_AGREEMENT
from ovit_engine.utils.console import table_console

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Score:
    """A variant of the file compared with the float logits."""

    # share of images with the same argmax
    agreement: float
    # squared error of the logits over their squares
    noise: float
    # top-1, where images have labels
    accuracy: float | None

    def describe(self) -> str:
        """In one line."""
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.2%}"
        return f"{self.agreement:.2%} agree{accuracy}"


@dataclass(frozen=True)
class PartCost:
    """What one part of the compression costs: a float file with this part alone, and the file without it."""

    name: Literal["activations", "weights", "sparsity"]
    alone: Score
    without: Score


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer; ratios of signal to quantization noise are in dB. `None`: not rounded, not compared or below 5 %."""

    name: str
    op: str
    # of its weight, compared with the reference's
    weight_sqnr: float | None
    # of its input, compared with that before it was rounded, and with that of the same layer in the float file
    input_sqnr: float | None
    total_sqnr: float | None
    # error of the logits that it makes alone, over the file's
    share: float | None
    # agreement that leaving it in float brings
    gain: float | None


@dataclass(frozen=True, kw_only=True)
class RecipeChange:
    """A change of the recipe that brings agreement back, measured on the file."""

    layers: tuple[str, ...]
    # ranges of these layers' inputs as this observer takes them; None: they stay in float
    observer: str | None
    score: Score

    def recipe(self) -> str:
        """The line of the recipe."""
        if self.observer is not None:
            return f"quantize: {{activations: {{observer: {self.observer}}}}}"
        names = yaml.safe_dump(list(self.layers), default_flow_style=True, width=10**6).strip()  # "0" is quoted
        return f"quantize: {{exclude: {names}}}"


# why the weights of the file are not compared with those of a reference, and what a reader is told
NotCompared = Literal["no reference", "missing layer", "other shape", "other weights", "other outputs"]

_SINCE = "was the model trained, smoothed or folded since?"

_NOT_COMPARED: dict[NotCompared, str] = {
    "no reference": "to measure what rounded weights and sparsity cost, name the float file: --reference float.onnx",
    "missing layer": "weights can't be compared: the reference has other layers",
    "other shape": "weights can't be compared: in the reference they have other shapes",
    "other weights": f"weights can't be compared: they differ by more than rounding and pruning: {_SINCE}",
    "other outputs": f"weights can't be compared: with those of the reference the outputs are other ones: {_SINCE}",
}


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What each part and each layer of a file costs, and which changes of the recipe help."""

    file: str
    images: int
    # the float file that was compared with; None: the file itself in float
    reference: str | None
    whole: Score
    float_accuracy: float | None
    parts: tuple[PartCost, ...]
    layers: tuple[LayerCost, ...]
    # the best first
    changes: tuple[RecipeChange, ...]
    not_compared: NotCompared | None

    @property
    def is_spread(self) -> bool:
        """Whether the file is bad, and no layer alone is to blame."""
        return self.whole.agreement < MIN_AGREEMENT and all(layer.share is None for layer in self.layers)

    def render(self, console: Console | None = None) -> None:
        """Print for people."""
        from rich.markup import escape
        from rich.table import Table

        console = console or table_console()
        accuracy = "" if self.float_accuracy is None else f", whose accuracy is {self.float_accuracy:.2%}"
        compared = "itself in float" if self.reference is None else self.reference
        first = f"{self.file} on {self.images} images: {self.whole.describe()} with {compared}{accuracy}"
        console.print(first, soft_wrap=True, markup=False)
        parts = Table("part", "alone in a float file", "the file without it", box=None, pad_edge=False)
        for part in self.parts:
            parts.add_row(part.name, part.alone.describe(), part.without.describe())
        headings = ("layer", "op", "weight SQNR", "input SQNR", "with layers before", "share of the error")
        layers = Table(*headings, "gain if float", box=None, pad_edge=False)
        for layer in self.layers:
            ratios = (layer.weight_sqnr, layer.input_sqnr, layer.total_sqnr)
            share = "< 5%" if layer.share is None else f"{layer.share:.1%}"
            gain = "" if layer.gain is None else f"{layer.gain:+.2%}"
            cells = ("" if ratio is None else f"{ratio:.1f} dB" for ratio in ratios)
            layers.add_row(escape(layer.name), layer.op, *cells, share, gain)
        for table in (parts, layers):
            console.print(table)
            console.print()
        for line in self.advice():
            console.print(line, soft_wrap=True, markup=False, highlight=False)

    def advice(self) -> list[str]:
        """Recipe lines with what they bring, or that nothing is wrong; then what could not be measured."""
        lines = []
        for change in self.changes:
            what = "left in float" if change.observer is None else f"with ranges of observer {change.observer}"
            lines += [f"{', '.join(change.layers)} {what}: {change.score.describe()}", f"  - {change.recipe()}"]
        if self.whole.agreement >= MIN_AGREEMENT:
            lines.append(f"nothing to change: at least {MIN_AGREEMENT:.0%} of the images agree")
        if self.is_spread:
            lines.append("no layer alone makes 5% of the error: it is spread over all of them")
        return lines if self.not_compared is None else [*lines, _NOT_COMPARED[self.not_compared]]
