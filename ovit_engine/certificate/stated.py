"""What a recipe's text says of a file, held against the file's weights and tokens. Needs neither PyTorch nor the model.

A recipe names its targets for a model that is not at hand here. Names and regular expressions are decided by the names
of the weights; presets and modifiers of other packages are given the benefit of the doubt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ovit_engine.certificate.model import TOKENS_UNKNOWN, LayerFacts, Promise, PromisedLayer, read_pattern
from ovit_engine.certificate.stated_tokens import REDUCERS, token_contradictions
from ovit_engine.certificate.token_counts import TokenCounts

_NO_RECIPE = (yaml.YAMLError, TypeError, ValueError, AttributeError, KeyError, RecursionError, re.error)

_PRESET = "preset:"

_REGEX = "re:"

_NEITHER = ("cyclic_lr", "distill", *REDUCERS)

# they remove heads and units, or let what is dead be removed
_HARVEST = "shrink"

_REMOVERS = ("structured_prune", "s2vite", "gohsp", _HARVEST)

_KNOWN = {"quantize", *_NEITHER, *_REMOVERS}  # besides pruners

# constants of the graph that are no parameter of the model
_UNNAMED = re.compile(r"val_\d+")

# rounding: each layer prunes a whole number of weights, N:M whole groups
_SLACK = 0.01


@dataclass(frozen=True)
class _Step:
    """One modifier of the recipe."""

    name: str
    options: Mapping[str, Any]

    @property
    def prunes(self) -> bool:
        pruner = self.name.endswith("_prune") or self.name in ("acdc", "constant_mask", "svite")
        return pruner and self.name not in _REMOVERS

    @property
    def targets(self) -> list[str]:
        """Empty: the modifier chooses for itself."""
        return _as_list(self.options.get("targets"))

    @property
    def pattern(self) -> str | dict[str, list[int]] | None:
        """None: whatever pattern the weights have."""
        pattern: str | dict[str, list[int]] = self.options.get("pattern", "unstructured")
        return None if self.name == "constant_mask" else pattern

    @property
    def exclude(self) -> list[str]:
        return _as_list(self.options.get("exclude"))

    def may_take(self, weight: str) -> bool:
        """Whether a weight of this name can be one of the targets."""
        if any(self._hits(pattern, weight) for pattern in self.exclude):
            return False
        return not self.targets or any(t.startswith(_PRESET) or self._hits(t, weight) for t in self.targets)

    def takes(self, weight: str) -> bool:
        """Whether it is one for certain."""
        return self.may_take(weight) and any(self._hits(target, weight) for target in self.targets)

    def _hits(self, target: str, weight: str) -> bool:
        # a quantized layer answers to its own name and to that of its weight
        names = [weight] if self.prunes else [weight, weight.rpartition(".")[0]]
        return any(_matches(target, name) for name in names)


def may_remove(modifiers: Iterable[str]) -> bool:
    """Whether files of a recipe of these modifiers, by name, may lack heads and units: of unknown ones nobody knows."""
    steps = [_Step(name, {}) for name in modifiers]
    return any(step.name in _REMOVERS or not (step.prunes or step.name in _KNOWN) for step in steps)


def contradictions(
    recipe_text: str,
    promise: Promise,
    layers: Sequence[LayerFacts],
    tokens: TokenCounts | None = None,
    no_tokens: str = TOKENS_UNKNOWN,
) -> list[str]:
    """Where the recipe denies the file's promise, weights or tokens, a line each. An empty text says nothing.

    `tokens` is None where the file's graph has none to count, `no_tokens` says why.
    """
    if not recipe_text.strip():
        return []
    try:
        steps = _read(recipe_text)
    except _NO_RECIPE as error:
        return [f"the recipe in the metadata is no recipe: {' '.join(str(error).split())}"]
    has_unknown = any(not step.prunes and step.name not in _KNOWN for step in steps)
    pruners = [step for step in steps if step.prunes]
    quantizers = [step for step in steps if step.name == "quantize"]
    promised = {layer.name: layer for layer in promise.layers}
    found: list[str] = []
    if not has_unknown:
        found += _unasked(pruners, quantizers, promised, layers)
        if not any(step.name in _REMOVERS for step in steps):
            gone = [layer for layer in promise.layers if layer.removed]
            found += [f"{layer.name}: {layer.removed} weights removed, the recipe removes none" for layer in gone]
        elif not any(step.name == _HARVEST for step in steps):
            gone = [layer for layer in promise.layers if layer.dead]
            found += [f"{layer.name}: {layer.dead} weights left as dead, the recipe has no shrink" for layer in gone]
    found += _patterns(pruners, promised.values())
    # a sweep keeps models of before the end: nothing else of the recipe need have begun by then
    sweeping = [step for step in pruners if step.options.get("sweep")]
    certain = sweeping or pruners
    found += _missing(certain, [] if sweeping else quantizers, promised, layers)
    for step in certain:
        found += _amount(step, promised, layers)
    try:
        return found + token_contradictions([(step.name, step.options) for step in steps], tokens, no_tokens)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        return [*found, f"the recipe in the metadata says of tokens what can't be read: {error}"]


def _unasked(
    pruners: list[_Step], quantizers: list[_Step], promised: Mapping[str, PromisedLayer], layers: Iterable[LayerFacts]
) -> Iterable[str]:
    """What the file has and no modifier of the recipe can have done."""
    names = _all_names(layers)
    for layer in promised.values():
        if layer.zeros and not _may_be_of(pruners, names.get(layer.name, [layer.name])):
            yield f"{layer.name}: {layer.zeros} zeros are promised, the recipe does not prune it"
    for facts in layers:
        if facts.quantized and not _may_be_of(quantizers, names[facts.name]):
            yield f"{facts.name}: stored as {facts.dtype}, the recipe does not quantize it"


def _may_be_of(steps: list[_Step], names: Iterable[str]) -> bool:
    return any(step.may_take(name) for step in steps for name in names)


def _all_names(layers: Iterable[LayerFacts]) -> dict[str, list[str]]:
    """What a modifier does to a weight that several layers share, it does under the name of one of them."""
    of_owner: dict[str, list[str]] = {}
    for facts in layers:
        of_owner.setdefault(facts.shared_with or facts.name, []).append(facts.name)
    return {name: names for names in of_owner.values() for name in names}


def _patterns(pruners: list[_Step], promised: Iterable[PromisedLayer]) -> Iterable[str]:
    for layer in promised:
        steps = [step for step in pruners if step.may_take(layer.name)]
        patterns = [step.pattern for step in steps]
        is_pruned = layer.zeros or any(step.takes(layer.name) and ":" in str(step.pattern) for step in steps)
        if is_pruned and steps and None not in patterns and layer.pattern not in patterns:
            asked = " or ".join(dict.fromkeys(str(pattern) for pattern in patterns))
            yield f"{layer.name}: the recipe prunes it {asked}, the file promises {layer.pattern}"


def _missing(
    pruners: list[_Step], quantizers: list[_Step], promised: Mapping[str, PromisedLayer], layers: Iterable[LayerFacts]
) -> Iterable[str]:
    """What the recipe does for certain, and the file does not promise."""
    for facts in layers:
        layer = promised.get(facts.name) or _tied(facts, promised, layers)
        if _UNNAMED.fullmatch(facts.name):
            continue
        if layer is None and any(step.takes(facts.name) and _final(step) for step in pruners):
            yield f"{facts.name}: the recipe prunes it, the file promises nothing"
        if any(step.takes(facts.name) for step in quantizers) and (layer is None or not layer.quantized):
            yield f"{facts.name}: the recipe quantizes it, the file does not promise int8"
    if any(map(_final, pruners)) and not any(layer.zeros or layer.dead for layer in promised.values()):
        yield "the recipe prunes, the file promises zeros nowhere"
    if quantizers and not any(layer.quantized for layer in promised.values()):
        yield "the recipe quantizes, the file promises int8 nowhere"


def _tied(
    facts: LayerFacts, promised: Mapping[str, PromisedLayer], layers: Iterable[LayerFacts]
) -> PromisedLayer | None:
    """The promise of a weight that is used twice is made under one of its names; it looks alike under the other."""
    same = [
        each.name for each in layers if (each.shape, each.dtype, each.zeros) == (facts.shape, facts.dtype, facts.zeros)
    ]
    return next((promised[name] for name in same if name in promised), None)


def _amount(step: _Step, promised: Mapping[str, PromisedLayer], layers: Iterable[LayerFacts]) -> Iterable[str]:
    """Sparsity over all that a modifier may have pruned, against what it states; a file can have more.

    It is a share of the weights that gates leave. Of these, what left with dead heads and units counts as zeros.
    """
    asked = _final(step)
    taken = _taken(step, promised, layers)
    share = _share(taken, sum(promised[facts.name].dead for facts in taken))
    if asked is not None and share is not None and share < asked - _SLACK:
        worst = min(taken, key=lambda facts: facts.sparsity)
        yield (
            f"{worst.name}: {worst.sparsity:.2%} zeros; the recipe's {step.name} asks for {asked:.2%}, "
            f"all it can have pruned has {share:.2%}"
        )


def unproven(recipe_text: str, promise: Promise, layers: Sequence[LayerFacts]) -> list[str]:
    """Sparsities of the recipe that a file has only together with dead weights said to have left it, a line each."""
    promised = {layer.name: layer for layer in promise.layers}
    if not any(layer.dead for layer in promise.layers):
        return []
    try:
        steps = [step for step in _read(recipe_text) if step.prunes]
    except _NO_RECIPE:  # `contradictions` tells
        return []
    found = []
    for step in _certain(steps):
        taken = _taken(step, promised, layers)
        asked, share = _final(step), _share(taken, 0)
        dead = sum(promised[facts.name].dead for facts in taken)
        if asked is not None and (share or 0.0) < asked - _SLACK:
            found.append(
                f"the recipe's {step.name} asks for {asked:.2%} zeros, the file has {share or 0.0:.2%}: the rest is to "
                f"have left with {dead:,} dead weights, which can't be measured"
            )
    return found


def left_out(recipe_text: str, promise: Promise, layers: Iterable[LayerFacts]) -> list[str]:
    """Weights that the recipe prunes for certain and the promise does not count among the pruned, a line each."""
    pruned = {layer.name for layer in promise.layers if layer.pruned or layer.zeros or layer.dead}
    known = {layer.name for layer in promise.layers}
    try:
        steps = [step for step in _read(recipe_text) if step.prunes and _final(step)]
    except _NO_RECIPE:
        return []
    return [
        f"{facts.name}: the recipe prunes it, the file does not count it among the pruned"
        for facts in layers
        if facts.name in known - pruned and any(step.takes(facts.name) for step in _certain(steps))
    ]


def _certain(pruners: list[_Step]) -> list[_Step]:
    """A sweep keeps models of before the end: of the pruners only the one that is swept need have begun by then."""
    return [step for step in pruners if step.options.get("sweep")] or pruners


def _taken(step: _Step, promised: Mapping[str, PromisedLayer], layers: Iterable[LayerFacts]) -> list[LayerFacts]:
    """The weights that a modifier pruned, or may have."""
    zeros = {name for name, layer in promised.items() if layer.zeros or layer.dead}
    taken = [facts for facts in layers if facts.name in promised]
    return [facts for facts in taken if step.takes(facts.name) or (facts.name in zeros and step.may_take(facts.name))]


def _share(layers: Sequence[LayerFacts], dead: int) -> float | None:
    """Share of zeros, with so many more that left; None of no weights."""
    total = dead + sum(facts.numel for facts in layers)
    return (dead + sum(facts.zeros for facts in layers)) / total if total else None


def _final(step: _Step) -> float | None:
    """The least sparsity that a finished run of the modifier can leave; None if the text does not say."""
    sweep = step.options.get("sweep")
    if sweep:
        steps = sweep["sparsity"] if isinstance(sweep, dict) else sweep
        return float(min(steps))
    amount = step.options.get("sparsity")
    if isinstance(amount, dict):
        range_end = amount.get("to", amount.get("final"))
        return float(max(amount.values()) if range_end is None else range_end)
    if amount is not None:
        return float(amount)
    pattern = step.pattern
    match = re.fullmatch(r"(\d+):(\d+)", pattern) if isinstance(pattern, str) else None
    return 1 - int(match[1]) / int(match[2]) if match else None


def _read(text: str) -> list[_Step]:
    document = yaml.safe_load(text)
    if not isinstance(document, dict) or not isinstance(document.get("modifiers"), list):
        raise ValueError("it has no list of modifiers")
    steps = [_Step(name, options or {}) for entry in document["modifiers"] for name, options in dict(entry).items()]
    for step in steps:
        if step.pattern is not None:
            read_pattern(step.pattern)
        _final(step)
        step.may_take("")
    return steps


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith(_REGEX):
        return re.fullmatch(pattern[len(_REGEX) :], name) is not None
    return pattern == name


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])
