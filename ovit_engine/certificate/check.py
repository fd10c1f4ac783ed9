"""What a recipe promises about a file, and the comparison with what was measured."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ovit_engine.certificate.model import GroupRule, Promise, PromisedLayer, TileRule, read_pattern

if TYPE_CHECKING:
    from ovit_engine.certificate.model import Certificate, LayerFacts, Parity


MIN_AGREEMENT = 0.99

# noise is nothing the model knows: its two best classes often lie closer than one rounding level
MIN_AGREEMENT_RANDOM = 0.9

MIN_COSINE = 0.99

# one rounding level that falls the other way shows as 0.01-0.03; a wrong scale or weight as 0.3 and more
MAX_ERROR = 0.1

_INTEGER = ("INT8", "UINT8")


def check(certificate: Certificate, promise: Promise) -> list[str]:
    """Every way in which the measured file breaks ``promise``, a line each; empty if it holds."""
    violations = check_layers(certificate.layers, promise)
    if promise.tokens is not None and certificate.tokens is None:
        reason = next((str(note) for note in certificate.notes if note.code == "tokens_unknown"), "none are counted")
        violations.append(f"tokens: promised {promise.tokens}; {reason}")
    elif promise.tokens is not None and certificate.tokens != promise.tokens:
        violations.append(f"tokens: promised {promise.tokens}, the file has {certificate.tokens}")
    wanted = MIN_AGREEMENT_RANDOM if certificate.parity.source == "random" else MIN_AGREEMENT
    violations += _check_parity(certificate.parity, wanted, certificate.reference)
    stored = certificate.parity_stored
    if stored is not None:  # a few images: one that falls the other way is no breach
        violations += _check_parity(stored, min(wanted, 1 - 1 / stored.images), certificate.reference)
    return violations


def check_layers(layers: Iterable[LayerFacts], promise: Promise) -> list[str]:
    """Every way in which weights of the file break ``promise``, a line each."""
    measured = {layer.name: layer for layer in layers}
    violations = []
    for layer in promise.layers:
        facts = measured.get(layer.name)
        if facts is None:
            violations.append(f"{layer.name}: no such weight in the file")
        else:
            violations += _check_layer(layer, facts)
    return violations


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


def check_other(name: str, parity: Parity) -> list[str]:
    """Every way in which an output beside the compared one is not PyTorch's."""
    return [f"{name}: {line}" for line in _check_parity(parity, 0.0, "PyTorch")]


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
