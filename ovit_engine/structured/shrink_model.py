"""Heads and units are really removed: smaller layers that compute the same (specs/structured-and-tokens.md §9).

`shrink` removes what gates switch off, `harvest` what zeros in the weights have left without effect. Each module is
first cut in a float64 copy, which must compute what it did; only then is the model touched.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ovit_engine import quant
from ovit_engine.certificate.manifest import Manifest, Part
from ovit_engine.distributed.sharding import is_sharded
from ovit_engine.masking.masks import Masks
from ovit_engine.masking.parameters import clean_name, is_attached, parameter_slots, unwrapped
from ovit_engine.structured.gates import KINDS, GateSite, find_sites, installed, uninstall
from ovit_engine.structured.optimizer_state import Cut, check_optimizer, cut_optimizer
from ovit_engine.structured.removal import Removal, check_same_outputs, float64_copy, removal_by_gate, removal_of_dead
from ovit_engine.utils.warn import warn

log = logging.getLogger(__name__)

_PART = "shrunk"  # attribute of a module that became smaller, beside its num_heads


def shrink(model: nn.Module, *, optimizer: Optimizer | None = None, masks: Masks | None = None) -> Manifest:
    """Remove in place what the gates of `model` switch off, and the gates; return what is left, by module.

    Layers next to a gate get new, smaller parameters. Where a pattern of `masks` (2:4, blocks) would not
    survive the removal of single units, units are removed by whole groups; other disabled units get zero columns.

    Args:
        model: the model itself, not a wrapper (DDP, torch.compile): wrap it again afterwards.
        optimizer: goes on with the smaller parameters, its momenta cut as they are.
        masks: of unstructured pruning; they become those of the smaller weights.

    Raises:
        ValueError: no gate, a wrapped, sharded or tied model, one that an engine is attached to, or an optimizer that
            can't follow.
        RuntimeError: the smaller model would not compute the same. The model stays as it was, as with ValueError.
    """
    _check_plain(model)
    sites = installed(model)
    if not sites:
        if left := manifest_of(model):
            raise ValueError(f"{type(model).__name__} was shrunk already, and no gate was made since: left are {left}")
        raise ValueError(f"{type(model).__name__} has no gates: harvest(model) removes what pruning left dead")
    removals = [removal_by_gate(site, masks) for site in sites]
    _remove(model, removals, optimizer, masks)
    for removal in removals:
        if removal.mute.any():
            log.warning(
                "%s: %d %s that are off stay as zeros, since a pattern holds them in groups with others",
                removal.site.owner_name,
                int(removal.mute.sum()),
                removal.site.kind,
            )
    uninstall(model)
    return manifest_of(model)


def harvest(model: nn.Module, *, optimizer: Optimizer | None = None, masks: Masks | None = None) -> Manifest:
    """Remove in place the heads and units that zeros in the weights have left without effect; return what is left.

    What such a head or unit always adds moves into a bias. Arguments and errors are those of `shrink`; with the masks
    of a model that follows a pattern, only whole groups are removed.

    Raises:
        ValueError: gates, which `shrink` removes first, or no attention and MLP that we know.
    """
    _check_plain(model)
    if installed(model):
        raise ValueError("the model has gates: shrink(model) first")
    _remove(model, [removal_of_dead(site, masks) for site in known_sites(model)], optimizer, masks)
    return manifest_of(model)


def rebuild(model: nn.Module, manifest: Manifest) -> nn.Module:
    """Cut `model`, as it was made, in place to the shapes of a shrunk one, whose weights can then be loaded strictly.

    Args:
        model: from `timm.create_model` with the same arguments, with any weights; the meta device will do.

    Raises:
        ValueError: the manifest is of another model.
    """
    _check_plain(model)
    if manifest_of(model) or installed(model):
        raise ValueError("the model has gates or was shrunk already: rebuild one as timm.create_model makes it")
    sites = {(site.owner_name, site.kind): site for site in (known_sites(model) if manifest.parts else ())}
    for part in manifest.parts:
        site = sites.get((part.name, part.kind))
        if site is None or (site.count, site.width) != (part.of, part.width):
            found = "no such module" if site is None else f"{site.count} {site.kind} of {site.width} features"
            raise ValueError(
                f"the manifest is of another model: {part.name} had {part.of} {part.kind} of {part.width} features, "
                f"here is {found}"
            )
    for part in manifest.parts:
        site = sites[part.name, part.kind]
        keep = torch.zeros(site.count, dtype=torch.bool, device="cpu")
        keep[list(part.kept)] = True
        _apply(Removal(site=site, keep=keep, mute=torch.zeros_like(keep)))
    return model


def manifest_of(model: nn.Module) -> Manifest:
    """Return what is left of the heads and units of a model that was shrunk, harvested or rebuilt, by module."""
    found = [(name, vars(module)[_PART]) for name, module in model.named_modules() if _PART in vars(module)]
    return Manifest(parts=tuple(part.model_copy(update={"name": clean_name(name)}) for name, part in found))


def known_sites(model: nn.Module) -> list[GateSite]:
    """Return the sites of both kinds; ValueError if there are none."""
    found, errors = [], []
    for kind in KINDS:
        try:
            found += find_sites(model, [kind])
        except ValueError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _check_plain(model: nn.Module) -> None:
    if unwrapped(model) is not model:
        raise ValueError(f"{type(model).__name__} is a wrapper: give the model inside, and wrap it again afterwards")
    if is_attached(model):
        raise ValueError("an engine is attached to the model: call engine.detach() first, or give a copy")
    if is_sharded(model):
        raise ValueError("the model is sharded: shrink it before fully_shard, or inside `with whole_model(model):`")


def _remove(model: nn.Module, removals: Sequence[Removal], optimizer: Optimizer | None, masks: Masks | None) -> None:
    """Check everything on copies, then cut."""
    for removal in removals:
        if not removal.is_nothing:
            _check_ties(model, removal)
            before, after = float64_copy(removal.site), float64_copy(removal.site)
            _apply(replace(removal, site=after))
            uninstall(after.owner)
            check_same_outputs(before, after)
    cuts = [cut for removal in removals for cut in _cuts(removal)]
    if optimizer is not None and cuts:
        check_optimizer(optimizer, cuts)
    whole = {} if masks is None else {name: masks.get(name) for name in masks.names()}
    for removal in removals:
        _apply(removal)
    if optimizer is not None:
        cut_optimizer(optimizer, cuts)
    for cut in cuts:
        if masks is not None and (mask := whole.get(cut.slot.name)) is not None:
            masks.set(cut.slot, cut.of(mask), masks.pattern(cut.slot.name))


def _check_ties(model: nn.Module, removal: Removal) -> None:
    """Raise ValueError where another layer uses a weight that would become smaller."""
    for slot, _ in removal.site.parts:
        if sum(p is slot.tensor for module in model.modules() for p in module._parameters.values()) > 1:
            raise ValueError(f"{slot.name} is tied to another weight: its {removal.site.kind} can't be removed")


def _cuts(removal: Removal) -> list[Cut]:
    """Return the parameters that become smaller."""
    return [
        Cut(slot, cast(nn.Parameter, slot.tensor), layout.axis, layout.along(removal.keep).nonzero().flatten())
        for slot, layout in (() if removal.keep.all() else removal.site.parts)
    ]


@torch.no_grad()
def _apply(removal: Removal) -> None:
    """Cut the layers of a site, in place, with the ranges of their rows, and record what is left."""
    site, source = removal.site, removal.site.source
    if removal.mute.any():
        site.linear.weight[:, removal.mute.repeat_interleave(site.width).nonzero().flatten()] = 0
    if removal.bias is not None:
        site.linear.bias.copy_(removal.bias)
    for cut in _cuts(removal):
        cut.apply()
        if cut.slot.module is site.linear:
            site.linear.in_features = len(cut.keep)
        elif cut.slot.attribute == "weight":
            source.out_features = len(cut.keep)
            if isinstance(source, quant.QuantLinear) and source.weight_quantizer.axis is not None:
                quantizer = source.weight_quantizer
                for name in ("scale", "zero_point", "minimum", "maximum"):
                    buffer: Tensor = getattr(quantizer, name)
                    setattr(quantizer, name, buffer[cut.keep.to(buffer.device)])
    _record(site, removal.keep)


def _record(site: GateSite, keep: Tensor) -> None:
    """Tell the owner how many heads it has, and which of the model as it was made these are."""
    kept = keep.nonzero().flatten().tolist()
    earlier: Part | None = vars(site.owner).get(_PART)
    numbers, of = (range(site.count), site.count) if earlier is None else (earlier.kept, earlier.of)
    if site.kind == "heads":
        vars(site.owner)["num_heads"] = len(kept)
        if hasattr(site.owner, "attn_dim"):
            vars(site.owner)["attn_dim"] = len(kept) * site.width
    part = Part(name=site.owner_name, kind=site.kind, of=of, width=site.width, kept=tuple(numbers[i] for i in kept))
    vars(site.owner)[_PART] = part


def warn_of_old_parameters(model: nn.Module, held: Collection[int]) -> None:
    """Warn where the model was shrunk and an optimizer that holds `held` (ids), made before, steps the old weights."""
    cut = {name for part in manifest_of(model).parts for name in part.axes()}
    lost = [
        s.name for s in parameter_slots(model) if s.name in cut and s.tensor.requires_grad and id(s.tensor) not in held
    ]
    if lost and set(held) - {id(parameter) for parameter in model.parameters()}:
        warn(
            f"the optimizer does not train {lost[0]!r}, and holds parameters that are not the model's: was it made "
            "before shrink(model)? Give it, shrink(model, optimizer=optimizer), or make a new one"
        )
