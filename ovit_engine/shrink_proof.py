"""Before anything is removed: that nothing else depends on it, and that the result is the same in float64."""

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ovit_engine import quant
from ovit_engine.gates import GateSite, uninstall
from ovit_engine.shrink_plan import Removal

# of the largest output; float64 rounds at 1e-16, and a wrong row or column shows as 1e-3 and more
TOLERANCE = 1e-9
_SEED = 20090
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def copied(site: GateSite) -> GateSite:
    """The same site in a copy of its owner: float64, on the CPU, in eval mode, with ranges that do not move.

    Hooks that are methods stay behind: they belong to objects that watch the training model.
    """
    with _without_methods(site.owner):
        owner = copy.deepcopy(site.owner)
    owner = owner.to("cpu", torch.float64).eval()
    hold_ranges(owner)
    return replace(site, owner=owner, linear=owner.get_submodule(site.name.rpartition(".")[2]))  # type: ignore[arg-type]


def hold_ranges(model: nn.Module) -> None:
    """Stop observers, after live ranges of weights have followed the weights of this moment."""
    for module in model.modules():
        if isinstance(module, (quant.QuantLinear, quant.QuantConv2d)):
            module.weight_quantizer.observe(module.weight)
    quant.set_observing(model, False)


def probe(site: GateSite) -> Tensor:
    """Inputs of the owner, float64 [2, 7, features], always the same."""
    generator = torch.Generator().manual_seed(_SEED)
    shape = 2, 7, site.source.in_features
    return torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")


@torch.no_grad()
def prove(before: GateSite, after: GateSite) -> None:
    """Raise RuntimeError unless two copies of an owner compute the same."""
    inputs = probe(before)
    wanted, found = before.owner(inputs), after.owner(inputs)
    error, size = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not error <= TOLERANCE * size:
        raise RuntimeError(
            f"{before.owner_name}: without its removed {before.kind} it computes something else (largest difference "
            f"{error:.3g} of {size:.3g} in float64): the model stays as it was"
        )


def check_dependencies(removal: Removal) -> None:
    """Raise RuntimeError unless torch-pruning, following the computation, finds the rows and columns that we cut.

    `removal` is of a copy, which is spoilt.
    """
    import torch_pruning  # type: ignore[import-untyped]

    site = removal.site
    uninstall(site.owner)
    quant.set_enabled(site.owner, False)
    for module in site.owner.modules():
        for hooks in _HOOKS:
            getattr(module, hooks).clear()
    for name in ("q_norm", "k_norm"):  # over the features of one head, the same for each
        if name in site.owner._modules:
            setattr(site.owner, name, nn.Identity())
    site.owner.requires_grad_(True)
    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(site.owner, probe(site)[:1], verbose=False)
        group = graph.get_pruning_group(site.source, torch_pruning.prune_linear_out_channels, removal.rows)
    found: dict[Any, tuple[bool, list[int]]] = {}
    for dependency, indices in group:
        layer = dependency.target.module
        if isinstance(layer, nn.Parameter) or any(True for _ in layer.parameters()):
            found[layer] = (graph.is_out_channel_pruning_fn(dependency.handler), sorted(indices))
    expected = {site.source: (True, removal.rows), site.linear: (False, removal.columns)}
    if found != expected:
        names = {module: name for name, module in site.owner.named_modules()}
        parts = ", ".join(sorted(str(names.get(layer, "a parameter")) for layer in found))
        raise RuntimeError(
            f"{site.owner_name}: torch-pruning finds that its {site.kind} can't be taken out of "
            f"{site.source_name.rpartition('.')[2]} and {site.name.rpartition('.')[2]} alone (found: {parts})"
        )


@contextmanager
def _without_methods(owner: nn.Module) -> Iterator[None]:
    """`owner` without hooks that are bound methods."""
    before = [(module, name, getattr(module, name)) for module in owner.modules() for name in _HOOKS]
    try:
        for module, name, hooks in before:
            functions = ((key, hook) for key, hook in hooks.items() if not isinstance(hook, types.MethodType))
            setattr(module, name, type(hooks)(functions))
        yield
    finally:
        for module, name, hooks in before:
            setattr(module, name, hooks)
