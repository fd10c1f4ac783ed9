"""Heads and units are really removed: smaller layers that compute the same (specs/structured-and-tokens.md §9).

`shrink` removes what gates switch off, `harvest` what zeros in the weights have left without effect. Each module is
first cut in a float64 copy, which must compute what it did; only then is the model touched. torch-pruning cuts the
layers and finds by itself, from the computation, which rows and columns belong together.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ovit_engine import quant
from ovit_engine.certificate.manifest import Manifest, Part
from ovit_engine.distributed.sharding import is_sharded
from ovit_engine.masking.masks import Masks
from ovit_engine.masking.parameters import clean_name, is_attached, parameter_slots, unwrapped
from ovit_engine.pruning.patterns import Spelling
from ovit_engine.structured.gates import KINDS, GateSite, find_sites, installed, uninstall
from ovit_engine.structured.optimizer_state import Cut, check_optimizer, transplant
from ovit_engine.structured.removal import Removal, check_dependencies, copied, dead, gated, probe, prove

log = logging.getLogger(__name__)

_PART = "shrunk"  # attribute of a module that became smaller, beside its num_heads


def shrink(model: nn.Module, *, optimizer: Optimizer | None = None, masks: Masks | None = None) -> Manifest:
    """Remove in place what the gates of `model` switch off, and the gates; return what is left, by module.

    Parameters of the layers beside a gate become new, smaller ones. Where a pattern of `masks` (2:4, blocks) would not
    survive that a single unit goes, units go by whole groups; the others that are off get zero columns.

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
    removals = [gated(site, masks) for site in sites]
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

    What such a head or unit always adds moves into a bias. Arguments and errors are those of `shrink`; give the masks
    of a model that follows a pattern, which then only whole groups leave.

    Raises:
        ValueError: gates, which `shrink` removes first, or no attention and MLP that we know.
    """
    _check_plain(model)
    if installed(model):
        raise ValueError("the model has gates: shrink(model) first")
    _remove(model, [dead(site, copied(site), masks, probe(site)) for site in known_sites(model)], optimizer, masks)
    return manifest_of(model)


def rebuild(model: nn.Module, manifest: Manifest) -> nn.Module:
    """Cut `model`, as it was made, in place to the shapes of a shrunk one, whose weights can then be loaded strictly.

    Args:
        model: from `timm.create_model` with the same arguments, its weights of no matter; on the meta device as well.

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
        _cut(Removal(site=site, keep=keep, mute=torch.zeros_like(keep)))
    return model


def manifest_of(model: nn.Module) -> Manifest:
    """What is left of the heads and units of a model that was shrunk, harvested or rebuilt, by module."""
    found = [(name, vars(module)[_PART]) for name, module in model.named_modules() if _PART in vars(module)]
    return Manifest(parts=tuple(part.model_copy(update={"name": clean_name(name)}) for name, part in found))


def known_sites(model: nn.Module) -> list[GateSite]:
    """Sites of both kinds; ValueError where there is none of either."""
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
    changing = [removal for removal in removals if not (removal.keep.all() and not removal.mute.any())]
    _check_ties(model, changing)
    for removal in changing:
        _check(removal)
    if optimizer is not None and any(not removal.keep.all() for removal in changing):
        check_optimizer(optimizer, [entry for removal in changing for entry in _targets(removal)])
    pruned = {} if masks is None else {name: masks.get(name) for name in masks.names()}
    cuts = [cut for removal in removals for cut in _cut(removal)]
    if optimizer is not None:
        transplant(optimizer, cuts)
    if masks is not None:
        _cut_masks(model, masks, cuts, cast(dict[str, Tensor], pruned))


def _check(removal: Removal) -> None:
    before, after = copied(removal.site), copied(removal.site)
    if not removal.keep.all():
        check_dependencies(Removal(site=copied(removal.site), keep=removal.keep, mute=removal.mute))
    _cut(Removal(site=after, keep=removal.keep, mute=removal.mute, bias=removal.bias))
    uninstall(after.owner)
    prove(before, after)


def _check_ties(model: nn.Module, removals: Sequence[Removal]) -> None:
    """A weight that another layer uses as well can't become smaller for one of them."""
    users = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    for removal in removals:
        for name, parameter, _ in _targets(removal):
            if users[id(parameter)] > 1:
                raise ValueError(f"{name} is tied to another weight: its {removal.site.kind} can't be removed")


def _targets(removal: Removal) -> list[tuple[str, nn.Parameter, int]]:
    """Name, parameter and axis of all that becomes smaller."""
    site = removal.site
    found = [
        (f"{site.source_name}.weight", cast(nn.Parameter, site.source.weight), 0),
        (f"{site.name}.weight", cast(nn.Parameter, site.linear.weight), 1),
    ]
    if site.source.bias is not None:
        found.insert(1, (f"{site.source_name}.bias", site.source.bias, 0))
    return found


@torch.no_grad()
def _cut(removal: Removal) -> list[Cut]:
    """Cut the layers of a site, in place, and keep the books of its owner."""
    import torch_pruning  # type: ignore[import-untyped]

    site = removal.site
    site.linear.weight[:, removal.muted_columns] = 0
    if removal.bias is not None:
        site.linear.bias.copy_(removal.bias)
    if removal.keep.all():
        _keep_books(site, removal.keep)
        return []
    before = _targets(removal)
    rows, columns = removal.rows, removal.columns
    _quantizer_rows(site.source, rows)
    torch_pruning.prune_linear_out_channels(site.source, rows)
    torch_pruning.prune_linear_in_channels(site.linear, columns)
    cuts = []
    for (name, old, axis), (_, new, _) in zip(before, _targets(removal), strict=True):
        new.requires_grad_(old.requires_grad)
        gone = torch.tensor(rows if axis == 0 else columns, device="cpu")
        keep = (
            torch.ones(old.shape[axis], dtype=torch.bool, device="cpu").index_fill_(0, gone, False).nonzero().flatten()
        )
        cuts.append(Cut(name, old, new, axis, keep))
    _keep_books(site, removal.keep)
    return cuts


def _keep_books(site: GateSite, keep: Tensor) -> None:
    """What the owner says of itself: its heads, and which of the model as it was made these are."""
    kept = keep.nonzero().flatten().tolist()
    earlier: Part | None = vars(site.owner).get(_PART)
    numbers, of = (range(site.count), site.count) if earlier is None else (earlier.kept, earlier.of)
    if site.kind == "heads":
        vars(site.owner)["num_heads"] = len(kept)
        if hasattr(site.owner, "attn_dim"):
            vars(site.owner)["attn_dim"] = len(kept) * site.width
    part = Part(name=site.owner_name, kind=site.kind, of=of, width=site.width, kept=tuple(numbers[i] for i in kept))
    vars(site.owner)[_PART] = part


def _quantizer_rows(layer: nn.Linear, rows: list[int]) -> None:
    """Ranges that a quantized layer has for each of its rows."""
    if not isinstance(layer, quant.QuantLinear) or layer.weight_quantizer.axis is None:
        return
    quantizer = layer.weight_quantizer
    keep = torch.ones(layer.out_features, dtype=torch.bool, device="cpu")
    keep[rows] = False
    for name in ("scale", "zero_point", "minimum", "maximum"):
        buffer: Tensor = getattr(quantizer, name)
        setattr(quantizer, name, buffer[keep.to(buffer.device)].contiguous())


def _cut_masks(model: nn.Module, masks: Masks, cuts: Sequence[Cut], before: dict[str, Tensor]) -> None:
    """Cut masks as their weights were cut."""
    slots = {slot.name: slot for slot in parameter_slots(model)}
    for cut in cuts:
        if cut.name in before:
            pattern: Spelling = masks.pattern(cut.name)
            masks.set(slots[cut.name], cut.of(before[cut.name]), pattern)
