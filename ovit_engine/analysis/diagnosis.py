"""What ``diagnose`` found, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import yaml

from ovit_engine.utils.console import table_console

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class Score:
    """A variant of the file beside the float logits."""

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
    """One part: activations, weights or sparsity."""

    name: str
    # a float file with this part alone, and the file without it
    alone: Score
    without: Score


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One layer. ``None`` where it was not measured: no output of its own, or it makes little of the error."""

    name: str
    op: str
    # of its output beside the float layer's on the same input; sqnr in dB
    cosine: float | None
    sqnr: float | None
    # error of the logits that it makes alone, over the file's
    share: float | None
    # agreement that leaving it float brings
    gain: float | None


@dataclass(frozen=True, kw_only=True)
class Mend:
    """Something that brings agreement back, measured on the file."""

    layers: tuple[str, ...]
    # ranges of these layers' inputs as this observer takes them; None: they stay float
    observer: str | None
    score: Score

    def recipe(self) -> str:
        """The lines of a recipe."""
        if self.observer is not None:
            return f"quantize: {{activations: {{observer: {self.observer}}}}}"
        names = yaml.safe_dump(list(self.layers), default_flow_style=True, width=10**6).strip()  # "0" is quoted
        return f"quantize: {{exclude: {names}}}"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What each part and each layer of a file costs, and what mends it."""

    file: str
    images: int
    # the float file that was compared with; None: the file itself in float
    reference: str | None
    whole: Score
    float_accuracy: float | None
    parts: tuple[PartCost, ...]
    layers: tuple[LayerCost, ...]
    mends: tuple[Mend, ...]
    notes: tuple[str, ...]

    def render(self, console: Console | None = None) -> None:
        """Print for people."""
        from rich.markup import escape
        from rich.table import Table

        console = console or table_console()
        accuracy = "" if self.float_accuracy is None else f", whose accuracy is {self.float_accuracy:.2%}"
        compared = "itself in float" if self.reference is None else self.reference
        console.print(
            f"{self.file} on {self.images} images: {self.whole.describe()} with {compared}{accuracy}",
            soft_wrap=True,
            markup=False,
        )
        parts = Table("part", "alone in a float file", "the file without it", box=None, pad_edge=False)
        for part in self.parts:
            parts.add_row(part.name, part.alone.describe(), part.without.describe())
        console.print(parts)
        console.print()
        layers = Table("layer", "op", "cosine", "SQNR", "share of the error", "gain if float", box=None, pad_edge=False)
        for layer in self.layers:
            layers.add_row(
                escape(layer.name),
                layer.op,
                "" if layer.cosine is None else f"{layer.cosine:.4f}",
                "" if layer.sqnr is None else f"{layer.sqnr:.1f} dB",
                "< 5%" if layer.share is None else f"{layer.share:.1%}",
                "" if layer.gain is None else f"{layer.gain:+.2%}",
            )
        console.print(layers)
        console.print()
        for line in self.advice():
            console.print(line, soft_wrap=True, markup=False, highlight=False)

    def advice(self) -> list[str]:
        """Recipe lines with what they bring, or that nothing needs mending; then notes."""
        lines = []
        for mend in self.mends:
            what = "left float" if mend.observer is None else f"with ranges of observer {mend.observer}"
            lines += [f"{', '.join(mend.layers)} {what}: {mend.score.describe()}", f"  - {mend.recipe()}"]
        if not self.mends and not any("spread" in note for note in self.notes):
            lines.append("nothing to mend: at least 99% of the images agree")
        return [*lines, *self.notes]
