"""Which pruners a one-shot comparison runs, each with which options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ovit_engine.bases.pruner import Pruner
from ovit_engine.core.errors import Origin
from ovit_engine.core.recipe import Recipe
from ovit_engine.core.registry import modifiers
from ovit_engine.pruning.patterns import NM, parse_pattern
from ovit_engine.utils.suggest import suggest
from ovit_engine.utils.validation import reason

SUFFIX = "_prune"

# What the pruners of a comparison have in common; the rest (block, damp ...) is each one's own.
SHARED = ("targets", "scope", "pattern", "gradients", "images_per_gradient", "recomputations", "memory_limit")

# When and how much: a one-shot run sets these itself.
SCHEDULE = ("start", "end", "every", "sparsity", "sweep")

# Names for --compare beside those of the modifiers: a modifier with options of its own.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "obert_independent": ("obert", {"update": "independent"}),  # WoodFisher and oBERT as published
}


@dataclass(frozen=True, kw_only=True)
class OneShotPruner:
    """A pruner of a comparison: its options without a schedule."""

    label: str
    kind: type[Pruner]
    options: Mapping[str, Any]  # those that were given; the others are the modifier's defaults
    origins: Mapping[str, Origin]  # where in a recipe they stand

    def at(self, sparsity: float | None, **options: Any) -> Pruner:
        """Return the modifier that prunes at once to `sparsity` (None: what an N:M pattern implies).

        Raises:
            ValueError: options that do not fit, or a sparsity that the pattern contradicts.
        """
        amount = {} if sparsity is None else {"sparsity": sparsity}
        try:
            return self.kind.model_validate({**self.options, **options, **amount}).set_origins(self.origins)
        except ValidationError as error:
            raise ValueError(f"{self.label}: {reason(error.errors()[0])}") from None

    def all_options(self, sparsity: float | None) -> dict[str, Any]:
        """Return every option but the schedule, defaults included, that has a value."""
        dumped = self.at(sparsity).model_dump(mode="json", by_alias=True)
        return {key: value for key, value in dumped.items() if key not in SCHEDULE and value is not None}

    def check_sparsities(self, sparsities: Sequence[float]) -> None:
        """Raise ValueError where sparsities are missing, or given beside a pattern that implies its own."""
        pattern = parse_pattern(self.options.get("pattern", "unstructured"))
        if isinstance(pattern, NM) and sparsities:
            raise ValueError(f"{self.label}: the pattern {pattern} implies its sparsity: give none beside it")
        if not isinstance(pattern, NM) and not sparsities:
            raise ValueError("no sparsity was given: name one or several, such as 0.5,0.75,0.9")
        for sparsity in sparsities:
            self.at(sparsity)


def choose_pruners(recipe: Recipe, compare: Sequence[str] = ()) -> list[OneShotPruner]:
    """Return the recipe's one pruner, or those that `compare` names ("ovit", "obert", "magnitude" ...), in that order.

    One that is in the recipe has the recipe's options; another takes from the recipe's first pruner what all have in
    common (`SHARED`), and its own defaults.

    Raises:
        ValueError: no pruner in the recipe, several with nothing to choose between them, one that needs training, or an
            unknown name.
    """
    own = [modifier for modifier in recipe.modifiers if isinstance(modifier, Pruner)]
    if not own:
        others = ", ".join(modifier.name for modifier in recipe.modifiers) or "no modifier at all"
        raise ValueError(f"recipe {recipe.name!r} has no pruner to run one-shot; it has {others}")
    names = [_known_pruner(name) for name in dict.fromkeys(compare)] or [_only(recipe, own)]
    return [_pruner(recipe, own, name) for name in dict.fromkeys(names)]


def pruner_names() -> list[str]:
    """Return what can be compared."""
    return sorted([*(name for name, kind in _pruners().items() if not kind.needs_training), *VARIANTS])


def _pruners() -> dict[str, type[Pruner]]:
    """Return the pruners of single weights by their labels."""
    return {_label(name): kind for name, kind in modifiers().items() if issubclass(kind, Pruner)}


def _label(name: str) -> str:
    """Return a pruner's name without its suffix, or as it is where another modifier is called that."""
    short = name.removesuffix(SUFFIX)
    return name if short in modifiers() else short


def _known_pruner(name: str) -> str:
    known = pruner_names()
    short = _label(name)
    if short in known:
        return short
    raise ValueError(f"no pruner {name!r} to compare{suggest(short, known, cutoff=0.6)}")


def _only(recipe: Recipe, own: Sequence[Pruner]) -> str:
    names = list(dict.fromkeys(_label(modifier.name) for modifier in own))
    if len(names) > 1:
        raise ValueError(
            f"recipe {recipe.name!r} has {len(names)} pruners: name one to compare, or all ({','.join(names)})"
        )
    if own[0].needs_training:
        raise ValueError(f"recipe {recipe.name!r}: {own[0].name} prunes only while a model trains, not one-shot")
    return names[0]


def _pruner(recipe: Recipe, own: Sequence[Pruner], label: str) -> OneShotPruner:
    short, more = VARIANTS.get(label, (label, {}))
    kind = _pruners()[short]
    same = [modifier for modifier in own if type(modifier) is kind]
    if len(same) > 1:
        raise ValueError(f"recipe {recipe.name!r} has {kind.name} {len(same)} times: leave one for a one-shot run")
    source = same[0] if same else own[0]
    given = source.model_dump(mode="json", by_alias=True, exclude_unset=True)
    wanted = set(kind.model_fields) - set(SCHEDULE) if same else set(SHARED) & set(kind.model_fields)
    options = {key: value for key, value in given.items() if key in wanted}
    return OneShotPruner(label=label, kind=kind, options={**options, **more}, origins=source.origins)
