"""What a recipe promises about a file, and the comparison with what was measured."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ovit_engine.token_counts import TokenCounts

if TYPE_CHECKING:
    from ovit_engine.export.certificate import Certificate, LayerFacts, Parity

MIN_AGREEMENT = 0.99
# noise is nothing the model knows: its two best classes often lie closer than one rounding level
MIN_AGREEMENT_RANDOM = 0.9
MIN_COSINE = 0.99
# one rounding level that falls the other way shows as 0.01-0.03; a wrong scale or weight as 0.3 and more
MAX_ERROR = 0.1

TOKENS_UNKNOWN = "those of the file are not counted"

_INTEGER = ("INT8", "UINT8")


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
        alone(layer.name for layer in layers)
        return layers


def alone(names: Iterable[str]) -> None:
    """Raise ValueError where a name is there twice: what it stands for would count twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} is there twice")


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
        return TileRule(*pattern["block"])
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    if match is None:
        raise ValueError(f"unknown pattern in a promise: {pattern!r}")
    return GroupRule(int(match[1]), int(match[2]))


def check(certificate: Certificate, promise: Promise) -> list[str]:
    """Every way in which the measured file breaks ``promise``, a line each; empty if it holds."""
    measured = {layer.name: layer for layer in certificate.layers}
    violations = []
    for layer in promise.layers:
        facts = measured.get(layer.name)
        if facts is None:
            violations.append(f"{layer.name}: no such weight in the file")
        else:
            violations += _check_layer(layer, facts)
    if promise.tokens is not None and certificate.tokens is None:
        violations.append(f"tokens: promised {promise.tokens}; {no_tokens(certificate)}")
    elif promise.tokens is not None and certificate.tokens != promise.tokens:
        violations.append(f"tokens: promised {promise.tokens}, the file has {certificate.tokens}")
    wanted = MIN_AGREEMENT_RANDOM if certificate.parity.source == "random" else MIN_AGREEMENT
    violations += _check_parity(certificate.parity, wanted, certificate.reference)
    stored = certificate.parity_stored
    if stored is not None:  # a few images: one that falls the other way is no breach
        violations += _check_parity(stored, min(wanted, 1 - 1 / stored.images), certificate.reference)
    return violations


def no_tokens(certificate: Certificate) -> str:
    """Why the file's tokens are not counted."""
    return next((note for note in certificate.notes if note.startswith(TOKENS_UNKNOWN)), TOKENS_UNKNOWN)


def _check_layer(layer: PromisedLayer, facts: LayerFacts) -> list[str]:
    violations = []
    if layer.quantized and not (facts.quantized and facts.dtype in _INTEGER):
        violations.append(f"{layer.name}: promised int8, the file stores {facts.dtype}")
    if facts.zeros < layer.zeros:
        violations.append(f"{layer.name}: promised {layer.zeros} zeros, the file has {facts.zeros} of {facts.numel}")
    rule = read_pattern(layer.pattern)
    if isinstance(rule, GroupRule) and facts.broken_groups != 0:
        count = "groups that cannot be formed" if facts.broken_groups is None else f"{facts.broken_groups} groups"
        violations.append(f"{layer.name}: promised {layer.pattern}, {count} with more than {rule.keep} non-zero")
    if isinstance(rule, TileRule) and (facts.tile_zeros or 0) < layer.zeros:
        violations.append(
            f"{layer.name}: promised {layer.zeros} zeros in tiles of {rule.rows}x{rule.cols}, "
            f"the file has {facts.tile_zeros or 0}"
        )
    return violations


def _check_parity(parity: Parity, agreement: float, reference: str) -> list[str]:
    violations = []
    if parity.agreement < agreement:
        violations.append(
            f"parity: {parity.agreement:.2%} of {parity.images} images agree with {reference}, {agreement:.0%} needed"
        )
    if parity.cosine < MIN_COSINE:
        violations.append(f"parity: mean cosine of the logits {parity.cosine:.4f}, {MIN_COSINE} needed")
    if parity.max_error > MAX_ERROR:
        violations.append(
            f"parity: largest error is {parity.max_error:.3f} of the largest logit, at most {MAX_ERROR} allowed"
        )
    return violations
