"""One-shot pruning without training: accuracy over sparsity, of one pruner or several (oViT, §4.1 and Figure 3)."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ovit_engine.bases.gradient_pruner import SecondOrderPruner
from ovit_engine.core.capabilities import having
from ovit_engine.core.modifier import Modifier
from ovit_engine.core.recipe import Recipe
from ovit_engine.engine import Engine
from ovit_engine.flops import count_flops
from ovit_engine.gradients.calibration import Calibration
from ovit_engine.post_training.oneshot_report import GridStep, OneShot, PrunedAccuracy
from ovit_engine.post_training.pruners import OneShotPruner, choose_pruners

EVALUATION = 64  # gradients that take about as long as an evaluation: for the estimate of the time left only


def oneshot(
    model: nn.Module,
    recipe: Recipe,
    *,
    calibration: Calibration,
    evaluate: Callable[[nn.Module], float],
    sparsities: Sequence[float] = (),
    compare: Sequence[str] = (),
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[GridStep[OneShot]], object] = lambda step: None,
) -> OneShot:
    """Prune a copy of a trained model at once to each sparsity and evaluate it, without any training.

    Every pruning step starts from the same dense weights and sees the same gradients; of the recipe only the pruner
    is used. `model` is not changed.

    Args:
        calibration: the source of gradients: training images, and a loss without label smoothing.
        evaluate: accuracy in [0, 1] of a model, on images that `calibration` does not hold.
        sparsities: shares of zeros in the pruner's targets; none with an N:M pattern, which implies its own.
        compare: pruners to run ("ovit", "obert", "magnitude" ...) instead of the recipe's one; see `choose_pruners`.
        example_inputs: one batch as the model takes it; without it FLOPs are not counted.
        about: what else to keep beside the results: names of model and data, the seed.
        progress: called before each pruning step, and at the end.

    Raises:
        RecipeError: targets or a pattern that the model does not have.
        ValueError: no pruner, an unknown one, or a sparsity that makes no sense.
    """
    pruners = choose_pruners(recipe, compare)
    grid = list(_grid(pruners, list(dict.fromkeys(sparsities))))
    for *_, modifier in grid:  # whatever can't be followed is said before hours of work
        check_on(model, modifier, calibration)
    total = EVALUATION + sum(cost(modifier) for *_, modifier in grid)
    options = {pruner.label: pruner.all_options(sparsity) for pruner, sparsity, _ in grid}
    dense = checked_accuracy(evaluate, copy.deepcopy(model))  # a copy: evaluation may change modes
    found = OneShot(recipe=recipe, dense=dense, options=options, about=about or {})
    done = EVALUATION
    for pruner, sparsity, modifier in grid:
        what = pruner.label if sparsity is None else f"{pruner.label} at {100 * sparsity:g}%"
        progress(GridStep(what=what, done=done, total=total, result=found))
        pruned = prune_copy(model, modifier, calibration)
        masks, accuracy = pruned.engine.run.masks, checked_accuracy(evaluate, pruned.model)
        flops = None if example_inputs is None else count_flops(pruned.model, example_inputs, masks).reduction
        point = PrunedAccuracy(
            pruner=pruner.label,
            asked=sparsity,
            sparsity=masks.sparsity(),
            accuracy=accuracy,
            drop=dense - accuracy,
            flops_reduction=flops,
            seconds=pruned.seconds,
        )
        found = replace(found, points=(*found.points, point))
        done += cost(modifier)
    progress(GridStep(what="done", done=total, total=total, result=found))
    return found


def _grid(
    pruners: Sequence[OneShotPruner], sparsities: list[float]
) -> Iterator[tuple[OneShotPruner, float | None, Modifier]]:
    for pruner in pruners:
        pruner.check_sparsities(sparsities)
        amounts: Sequence[float | None] = sparsities or [None]
        for sparsity in amounts:
            yield pruner, sparsity, pruner.at(sparsity)


@dataclass(frozen=True)
class PrunedCopy:
    """A copy of the model after one pruning step."""

    model: nn.Module
    engine: Engine
    seconds: float


def prune_copy(model: nn.Module, modifier: Modifier, calibration: Calibration) -> PrunedCopy:
    """Prune a copy of `model` at once; `model` stays as it is."""
    pruned = copy.deepcopy(model)
    engine = _engine(pruned, modifier)
    start = time.perf_counter()
    engine.attach(torch.optim.SGD(pruned.parameters(), lr=0.0), calibration=calibration)
    return PrunedCopy(pruned, engine, time.perf_counter() - start)


def check_on(model: nn.Module, modifier: Modifier, calibration: Calibration | None) -> None:
    """Raise RecipeError where targets or pattern do not fit the model, MemoryError where memory is too small."""
    engine = _engine(model, modifier)
    engine.run.calibration = calibration
    for pruner in having(engine.modifiers, SecondOrderPruner):
        pruner.check_memory(engine.run)


def cost(modifier: Modifier) -> int:
    """Work of one pruning step and its evaluation, in gradients."""
    return EVALUATION + int(getattr(modifier, "gradients", 0)) * int(getattr(modifier, "recomputations", 1))


def checked_accuracy(evaluate: Callable[[nn.Module], float], model: nn.Module) -> float:
    """Return what `evaluate` measures; ValueError if that is no accuracy."""
    accuracy = float(evaluate(model))  # a tensor will do
    if not 0 <= accuracy <= 1:
        raise ValueError(f"evaluate must return an accuracy between 0 and 1, not {accuracy:g}")
    return accuracy


def _engine(model: nn.Module, modifier: Modifier) -> Engine:
    recipe = Recipe(name=modifier.name, modifiers=(modifier,))
    return Engine(model, recipe, steps_per_epoch=1, epochs=1).prepare()
