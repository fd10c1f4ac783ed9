"""What the engine refuses: surgery that comes too late, two writers of one thing."""

import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from ovit_engine.core.modifier import Claim, Modifier, Run
from ovit_engine.core.optimizers import _is_of_deepspeed, _wrapper
from ovit_engine.core.recipe import Recipe
from ovit_engine.distributed.sharding import is_sharded, sharded_modules
from ovit_engine.gradients.calibration import Calibration
from ovit_engine.masking.parameters import Slot, clean_name, parameter_slots, unwrapped
from ovit_engine.structured.gates import installed
from ovit_engine.structured.groups import Groups


def check_made(model: object, recipe: object) -> None:
    """Raise TypeError for what no engine can be made of."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(recipe, (Recipe, str, Path)):
        raise TypeError(f"recipe must be a Recipe, a path or a name, not {type(recipe).__name__}")
    check_supported(model)


def check_arguments(
    optimizers: Iterable[object], calibration: object, criterion: object, ema: object, evaluate: object
) -> None:
    """Raise TypeError for what `attach` can't work with, before anything is done."""
    for each in optimizers:
        if _is_of_deepspeed(type(each)):
            raise TypeError(f"{type(each).__name__} of DeepSpeed keeps weights in flat buffers: {_INSTEAD}")
        if getattr(each, "_overlap_with_ddp", False):
            raise TypeError(
                "ZeroRedundancyOptimizer(overlap_with_ddp=True) has no step to follow: leave the option out"
            )
        if not isinstance(each, Optimizer):
            kind = type(each).__name__
            raise TypeError(f"attach needs a torch optimizer, not {kind}: of a wrapper, give the inner one")
    if calibration is not None and not isinstance(calibration, Calibration):
        raise TypeError(f"calibration must be Calibration(loader, loss_fn), not {type(calibration).__name__}")
    if criterion is not None and not isinstance(criterion, nn.Module):
        raise TypeError(
            f"criterion must be a module such as nn.CrossEntropyLoss(), not {type(criterion).__name__}; "
            "with a function, write loss = engine.loss(loss) in the loop"
        )
    if ema is not None and not isinstance(ema, nn.Module):
        raise TypeError(f"ema must be an averaged copy of the model, not {type(ema).__name__}")
    if evaluate is not None and not callable(evaluate):
        raise TypeError(f"evaluate must be a function of the model, not {type(evaluate).__name__}")


def check_teacher(teacher: object, model: nn.Module, modifiers: Iterable[Modifier]) -> None:
    """Raise for a teacher that is no other model, or that no modifier learns from."""
    if teacher is None:
        return
    if not isinstance(teacher, nn.Module):
        raise TypeError(f"teacher must be a torch.nn.Module, not {type(teacher).__name__}")
    if unwrapped(teacher) is unwrapped(model):
        raise ValueError("the teacher is the model itself: leave it out for a copy of the model as training begins")
    if not any(modifier.needs_teacher() for modifier in modifiers):
        raise ValueError("a teacher was given, and no modifier of the recipe learns from one: add 'distill'")


def check_supported(model: nn.Module) -> None:
    """Raise TypeError for a model whose parameters other software has put into flat buffers of its own."""
    found = None
    modules = list(model.modules())
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in modules):
        found = "FSDP1 (FullyShardedDataParallel)"
    elif "_is_fsdp_managed_module" in vars(model) and not is_sharded(model) and not sharded_modules(model):
        found = "FSDP1 (FullyShardedDataParallel)"  # the wrapper is outside, and the model holds views of a flat buffer
    elif any(_is_of_deepspeed(type(module)) for module in modules):
        found = "DeepSpeed's engine"
    elif any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        found = "DeepSpeed ZeRO"
    if found is not None:
        raise TypeError(f"the model is in {found}, where no weight can be masked: {_INSTEAD}")


def check_parameters(model: nn.Module, optimizers: Iterable[Optimizer], new: Iterable[Slot]) -> None:
    """Raise where no optimizer trains this model, or none has the parameters that PREPARE made; warn of old ones."""
    held = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    if not any(id(parameter) in held for parameter in model.parameters()):
        why = (
            "it was made before fully_shard, which replaces them"
            if is_sharded(model)
            else "was it made for a copy of it?"
        )
        raise ValueError(f"the optimizer holds no parameter of this model: {why}")
    if any(id(slot.tensor) not in held for slot in new):  # as they are now: fully_shard replaces them
        raise RuntimeError(
            "the recipe adds parameters that the optimizer lacks: call engine.prepare() before making it"
        )
    _warn_of_old_parameters(model, held)


def check_device(model: nn.Module, device: torch.device | None) -> None:
    """Raise RuntimeError where the model's first parameter is not where it was at attach."""
    now = next((parameter.device for parameter in model.parameters()), None)
    if now != device:
        raise RuntimeError(
            f"the model moved from {device} to {now} after engine.attach, and masks, scores and the optimizer did not: "
            "move it before the optimizer is made"
        )


def _warn_of_old_parameters(model: nn.Module, held: set[int]) -> None:
    """Warn where the model was shrunk and the optimizer, made before that, would step the old layers' weights."""
    from ovit_engine.structured.shrink_model import manifest_of

    cut = {name for part in manifest_of(model).parts for name in part.axes()}
    if not cut:
        return
    trained = [slot for slot in parameter_slots(model) if slot.name in cut and slot.tensor.requires_grad]
    lost = [slot.name for slot in trained if id(slot.tensor) not in held]
    if lost and held - {id(parameter) for parameter in model.parameters()}:
        warnings.warn(
            f"the optimizer does not train {lost[0]!r}, and holds parameters that are not the model's: was it made "
            "before shrink(model)? Give it, shrink(model, optimizer=optimizer), or make it anew",
            stacklevel=4,
        )


def check_surgery(model: nn.Module, modifiers: Iterable[Modifier]) -> None:
    """Raise where the recipe changes the model and that is wrapped already: the wrapper would not see it."""
    needs = [(m.name, "replaces layers" if m.surgery else "needs a teacher") for m in modifiers if _changes(m)]
    if needs and (late := _wrapper(model)):
        name, does = needs[0]
        raise RuntimeError(f"{name} {does}, and the model is {late} already: call engine.prepare() before that line")


def check_gates(run: Run, modifiers: Iterable[Modifier]) -> None:
    """Raise where the recipe prunes beside gates that are off from before, and so could not export what it trained.

    An earlier recipe left them, or they were set by hand. Export removes what is off, which no modifier of this recipe
    asked for.
    """
    sites = [site for site in installed(run.model) if not site.gate.is_meta]
    leaving = [site for site in sites if not Groups.of(site, run.tiles).of_gate(site.gate).all()]
    if not leaving:
        return
    modifiers = tuple(modifiers)
    if any(modifier.removes_units for modifier in modifiers):
        return
    beside = {f"the mask of {name}.weight": site for site in leaving for name in (site.name, site.source_name)}
    for modifier in modifiers:
        for claim in modifier.claims(run):
            if site := beside.get(claim.what):
                off = int((~site.gate).sum())
                raise modifier.error(
                    f"{off} of {site.count} {site.kind} of {site.owner_name} are off already, and export would remove "
                    "them, which this recipe doesn't ask for: shrink(model) first (ovit_engine.structured.shrink_model)"
                )


def forget_compiled(modifiers: Iterable[Modifier]) -> None:
    """Let functions that were compiled around the model be compiled again: nothing tells of them.

    Guards of torch 2.11 do not see that a module's class changes; those of 2.15 do.
    """
    if "torch._dynamo" in sys.modules and any(map(_changes, modifiers)):
        torch.compiler.reset()


def _changes(modifier: Modifier) -> bool:
    """Whether it does what must be done before the model is compiled: hooks that come later are not seen."""
    return modifier.surgery or modifier.needs_teacher()


_INSTEAD = "use DistributedDataParallel or FSDP2 (torch.distributed.fsdp.fully_shard)"


def check_copy(copy: nn.Module, model: nn.Module) -> nn.Module:
    """`copy`, if it has all that `model` has; ValueError for a copy of another model, or of before `prepare`."""
    shapes = {clean_name(name): tensor.shape for name, tensor in copy.state_dict().items()}
    for name, tensor in unwrapped(model).state_dict().items():
        found = shapes.get(clean_name(name))
        if found is None:
            raise ValueError(f"the EMA copy lacks {name!r}, which the model has: make the copy after engine.prepare()")
        if found != tensor.shape:
            raise ValueError(f"{name!r} of the EMA copy is {list(found)}, of the model {list(tensor.shape)}")
    return copy


def check_claims(claims: list[tuple[Modifier, Claim]]) -> None:
    """Raise where at overlapping times two modifiers write one thing, or one writes what another needs left alone."""
    for index, (second, later) in enumerate(claims):
        for first, earlier in claims[:index]:
            overlap = earlier.what == later.what and earlier.start <= later.end and later.start <= earlier.end
            if first is not second and overlap and not (earlier.reason and later.reason):
                where = first._origins.get("", "same recipe")
                if reason := later.reason or earlier.reason:
                    raise second.error(
                        f"{later.what} from step {later.start} to {later.end} does not go with {first.name} ({where}) "
                        f"from {earlier.start} to {earlier.end}: {reason}"
                    )
                raise second.error(
                    f"writes {later.what} from step {later.start} to {later.end}, where {first.name} ({where}) writes "
                    f"it from {earlier.start} to {earlier.end}"
                )


def warn_of_an_early_end(run: Run) -> None:
    """At DETACH: warn where more than a few steps are missing, and say so where a gradient scaler skipped them."""
    if not run.nearly_done:
        warnings.warn(
            f"the optimizer applied {run.step} of {run.total_steps} steps: the recipe's times came late; "
            "steps_per_epoch counts optimizer steps (divide len(loader) by gradient accumulation)",
            stacklevel=3,
        )
    elif run.total_steps - run.step > run.tolerance:
        warnings.warn(
            f"the gradient scaler skipped {run.skipped} steps, and {run.step} of {run.total_steps} were applied: the "
            "recipe's times came late, and what was due after the last step is done without training after it; train "
            "longer, or begin with a smaller scale",
            stacklevel=3,
        )


def warn_of_a_late_end(run: Run) -> None:
    """After each step: warn at the first one that is past the end."""
    if run.step == run.total_steps + 1:
        warnings.warn(
            f"training goes on past the {run.total_steps} steps that steps_per_epoch and epochs gave: the "
            "recipe's schedule was too short for this loop",
            stacklevel=6,
        )
