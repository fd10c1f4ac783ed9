"""Which tensors a modifier works on."""

import time
from collections.abc import Iterable, Mapping, Sequence

import regex
from torch import nn

from ovit_engine.masking.parameters import Slot, clean_name, is_scorer, parameter_slots
from ovit_engine.masking.presets import is_preset, is_prunable, match_preset, preset_of
from ovit_engine.utils.suggest import suggest

_REGEX = "re:"

_MAX_EXPRESSION = 1000  # characters

_MATCH_SECONDS = 1


def matching(target: str, names: Iterable[str]) -> list[str]:
    """Return the names that a target matches whole: "re:" marks a regular expression, anything else is the name itself.

    Raises:
        ValueError: a broken expression, or one that takes longer than a second.
    """
    if not target.startswith(_REGEX):
        return [name for name in names if name == target]
    expression = _compiled(target)
    end = time.monotonic() + _MATCH_SECONDS
    try:
        return [n for n in names if expression.fullmatch(n, timeout=max(1e-3, end - time.monotonic()))]
    except TimeoutError:
        raise ValueError(f"target {target!r} takes longer than {_MATCH_SECONDS} s to match: simplify it") from None


def _compiled(target: str) -> regex.Pattern[str]:
    text = target.removeprefix(_REGEX)
    if len(text) > _MAX_EXPRESSION:
        raise ValueError(f"a target has {len(text):,} characters: {_MAX_EXPRESSION:,} at most")
    try:
        return regex.compile(text)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"target {target!r} is no regular expression: {error}") from None


def check_target_syntax(value: str) -> str:
    """Return `value` if it is a well-formed target; raises ValueError for a broken expression or an unknown preset."""
    if is_preset(value):
        preset_of(value)
    if value.startswith(_REGEX):
        _compiled(value)
    return value


def select(names: Sequence[str], targets: Iterable[str], *, what: str, owner: str) -> list[str]:
    """Return the names that `targets` choose, in the order of `names`.

    A target that matches nothing is an error with the nearest names, since a silent miss leaves a layer dense.

    Raises:
        ValueError: a target that matches none of `names`.
    """
    chosen: set[str] = set()
    for target in targets:
        if is_preset(target):
            raise ValueError(f"{target!r} is for pruners: it names weights, not what is chosen here ({what})")
        found = set(matching(target, names))
        if not found:
            raise ValueError(f"target {target!r} matches no {what} of {owner}{_nearest(target, names)}")
        chosen |= found
    return [name for name in names if name in chosen]


def _nearest(target: str, names: Sequence[str]) -> str:
    text = target.removeprefix(_REGEX).replace("\\", "").replace(".*", "")
    return suggest(text, names, count=3, cutoff=0.3)


def find_slots(model: nn.Module, targets: Iterable[str]) -> list[Slot]:
    """Return the parameters that `targets` choose: names, regular expressions ("re:...") and presets ("preset:vit").

    Raises:
        ValueError: a target that matches no parameter (nearest names shown), one that takes 1-D tensors by a regular
            expression (norm gains and biases are pruned only when named in full), or a preset that does not fit.

    Scorers of tokens are pruned only when named in full too; expressions pass them over.
    """
    chosen = {slot.name for slots in match_targets(model, targets).values() for slot in slots}
    return [slot for slot in parameter_slots(model) if slot.name in chosen]


def match_targets(model: nn.Module, targets: Iterable[str]) -> dict[str, list[Slot]]:
    """The parameters that each target chooses, for a preset those of each part ("preset:vit qkv"); raises as above."""
    targets = list(dict.fromkeys(targets))
    slots = {slot.name: slot for slot in parameter_slots(model)}
    presets = [target for target in targets if is_preset(target)]
    written = [target for target in targets if target not in presets]
    _refuse_tied(model, slots, written)
    names = [name for name in slots if not is_scorer(name) or name in written]
    groups = {target: select(names, [target], what="parameter", owner=type(model).__name__) for target in written}
    _refuse_flat(slots, groups)
    prunable = [name for name in names if is_prunable(slots[name].module, slots[name].attribute)]
    sizes = {name: slots[name].tensor.numel() for name in prunable}
    for target in presets:
        others = {name for each in written for name in groups[each]}
        others |= {name for each in presets if each != target for name in preset_of(each).take(sizes)}
        parts = match_preset(target, sizes, others=others, owner=type(model).__name__)
        groups |= {f"{target} {part}": names for part, names in parts.items() if names}
    return {target: [slots[name] for name in names] for target, names in groups.items()}


def _refuse_tied(model: nn.Module, slots: Mapping[str, Slot], targets: Sequence[str]) -> None:
    """A tied weight answers to its first name only."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (other := clean_name(name)) in targets and other not in slots:
            first = next(slot.name for slot in slots.values() if slot.tensor is parameter)
            raise ValueError(f"target {other!r} is tied to {first!r}: name that")


def _refuse_flat(slots: Mapping[str, Slot], groups: Mapping[str, Sequence[str]]) -> None:
    """One-dimensional tensors are taken only by a name in full."""
    for target, names in groups.items():
        flat = [name for name in names if slots[name].tensor.ndim < 2 and name not in groups]
        if flat:
            raise ValueError(
                f"target {target!r} also takes {len(flat)} one-dimensional tensor{'s' * (len(flat) > 1)} such as "
                f"{flat[0]!r} (norm gains, biases): narrow it, or name them in full if you mean them"
            )
