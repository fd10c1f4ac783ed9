"""From a model in training form to a promise and a file."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ovit_engine.certificate import Certificate, Promise, PromisedLayer
from ovit_engine.certificate.manifest import Manifest
from ovit_engine.core.capabilities import Deployable, having
from ovit_engine.core.modifier import Modifier
from ovit_engine.core.recipe import Recipe
from ovit_engine.distillation.teacher import forget_teacher
from ovit_engine.export.exporter import export_model, try_export
from ovit_engine.export.resolve import resolve_weights
from ovit_engine.export.writer import as_inputs
from ovit_engine.masking.masks import Masks
from ovit_engine.masking.parameters import clean_name
from ovit_engine.quant import QuantConv2d, QuantLinear
from ovit_engine.structured.gates import installed
from ovit_engine.structured.removal import hold_ranges
from ovit_engine.structured.shrink_model import harvest, manifest_of, shrink
from ovit_engine.tokens import hooks_of
from ovit_engine.utils.copying import copy_model


def write(
    reference: nn.Module,
    path: Path,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    recipe: Recipe,
    modifiers: Sequence[Modifier],
    masks: Masks,
    data: Iterable[Any] | None,
    preprocessing: Mapping[str, Any] | None,
    dynamic_batch: bool = True,
) -> Certificate:
    """Write `path` and its certificate from a model in training form, which is set to eval mode and stays what it is.

    Raises:
        ExportError: the file is not what `masks` and the quantized layers promise.
        RuntimeError: heads or units can't be removed without changing what the model computes.
    """
    baked, promise, manifest = _deployed(reference, modifiers, masks, example_inputs)
    return export_model(
        baked,
        path,
        example_inputs,
        promise=promise,
        manifest=manifest,
        recipe_text=recipe.dump(),
        recipe_name=recipe.name,
        preprocessing=dict(preprocessing or {}),
        data=data,
        reference_model=reference,
        dynamic_batch=dynamic_batch,
    )


def try_write(
    reference: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    modifiers: Sequence[Modifier],
    masks: Masks,
) -> None:
    """Raise what `write` would raise of the same model and modifiers, as far as it shows without training."""
    baked, promise, manifest = _deployed(reference, modifiers, masks, example_inputs)
    try_export(baked, example_inputs, promise=promise, manifest=manifest, reference_model=reference)


def _deployed(
    reference: nn.Module, modifiers: Sequence[Modifier], masks: Masks, example_inputs: Tensor | tuple[Tensor, ...]
) -> tuple[nn.Module, Promise, Manifest]:
    """Return the deployed form of a model, which is set to eval mode and stays what it is, and its promise."""
    deployable = having(modifiers, Deployable)
    for modifier in deployable:
        modifier.check(reference)
    forget_teacher(reference.eval())
    baked = copy_model(reference)
    masks = resolve_weights(baked, masks, as_inputs(example_inputs))
    promise = smaller(baked, masks, dead=any(modifier.removes_dead for modifier in deployable))
    manifest = manifest_of(baked)
    for modifier in deployable:
        modifier.bake(baked)
    return baked, promise, manifest


def smaller(model: nn.Module, masks: Masks, *, dead: bool) -> Promise:
    """Remove from a copy of the model what gates switch off and, if asked, what is `dead`; return what is promised."""
    if not dead and not installed(model):
        return promise_of(model, masks)
    own = Masks()  # of the copy: those of training stay as they are
    own.load_state_dict(masks.state_dict(), model)
    hold_ranges(model)  # the range of a weight belongs to the whole weight, as the trained model rounds it
    if installed(model):
        shrink(model, masks=own)
    gated = {name: _size(own, name) for name in own.names()}
    if dead:
        harvest(model, masks=own)
    return promise_of(model, own, whole={name: _size(masks, name) for name in masks.names()}, gated=gated)


def promise_of(
    model: nn.Module, masks: Masks, *, whole: Mapping[str, int] | None = None, gated: Mapping[str, int] | None = None
) -> Promise:
    """Return what a file of `model` must hold: zeros and patterns of `masks`, int8 in each quantized layer, tokens.

    `whole` are the sizes of masked weights before heads and units were removed, `gated` those once gates had
    had theirs.
    """
    quantized = {
        clean_name(f"{name}.weight")
        for name, module in model.named_modules()
        if isinstance(module, (QuantLinear, QuantConv2d)) and module.weight_quantizer.enabled
    }
    layers = []
    first = _first_names(model)
    for name in dict.fromkeys([*masks.names(), *sorted(quantized)]):
        masked = first.get(name, name)
        mask = masks.get(masked)
        size = 0 if mask is None else mask.numel()
        layers.append(
            PromisedLayer(
                name=name,
                zeros=0 if mask is None else int((~mask).sum()),
                pattern="unstructured" if mask is None else masks.pattern(masked),
                removed=(whole or {}).get(name, size) - size,
                dead=(gated or {}).get(name, size) - size,
                pruned=mask is not None,
                quantized=name in quantized,
            )
        )
    hooks = hooks_of(model)
    return Promise(layers=tuple(layers), tokens=None if hooks is None else hooks.token_counts())


def _first_names(model: nn.Module) -> dict[str, str]:
    """Return the name of each parameter's mask: of two layers that share a parameter, the first has it."""
    first = {parameter: clean_name(name) for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {clean_name(name): first[parameter] for name, parameter in every}


def _size(masks: Masks, name: str) -> int:
    mask = masks.get(name)
    return 0 if mask is None else mask.numel()
