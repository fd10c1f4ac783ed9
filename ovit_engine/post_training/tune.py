"""A small grid over dampening, gradients and block size of a pruner, by one-shot pruning (oViT, appendix G)."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor, nn

from ovit_engine.core.recipe import Recipe
from ovit_engine.gradients.calibration import Calibration
from ovit_engine.post_training.oneshot import EVALUATION, check_on, checked_accuracy, cost, prune_copy
from ovit_engine.post_training.oneshot_report import GridReport, GridStep, as_csv, as_json
from ovit_engine.post_training.pruners import OneShotPruner, choose_pruners
from ovit_engine.utils.console import plain_table

if TYPE_CHECKING:
    from rich.console import Console


NAME = "tune"

COSTLY = ("gradients", "block")

DAMPS = (1e-8, 1e-7, 1e-6, 1e-5)  # the paper's best for oViT is the first, for WoodFisher the third

FRACTIONS = (4, 1)  # of the recipe's gradients and block

HELD_OUT, MOST_HELD_OUT = 0.2, 5000  # share of the training images that settings are compared on, and their number


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of the grid."""

    options: Mapping[str, float]  # damp, gradients, block: those that the pruner has
    loss: float  # mean on the held-out training images, infinite where it is no number
    sparsity: float  # measured
    seconds: float  # of the pruning step


@dataclass(frozen=True, kw_only=True)
class Tuned(GridReport):
    """A grid and its best setting. Accuracies are on the validation images, which took no part in the choice."""

    name = NAME

    recipe: Recipe
    pruner: OneShotPruner
    asked: float | None  # the sparsity; None where the pattern implies it
    own: Mapping[str, float]  # the recipe's setting
    dense_loss: float  # before pruning, on the held-out training images
    settings: tuple[Setting, ...] = ()
    dense: float | None = None  # accuracies come last: of the dense model,
    accuracy: float | None = None  # of the best setting
    own_accuracy: float | None = None  # of the recipe's setting
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def best(self) -> Setting:
        """The setting of the lowest loss; of equals the cheapest."""
        return min(self.settings, key=lambda each: (each.loss, *(each.options.get(name, 0) for name in COSTLY)))

    def lines(self) -> str:
        """Return the pruner with the best setting, as YAML to paste into a recipe."""
        same = [each for each in self.recipe.modifiers if type(each) is self.pruner.kind]
        kept = [*same, self.pruner.at(self.asked)][0].model_dump(mode="json", by_alias=True, exclude_unset=True)
        options = {**kept, **self.pruner.options, **self.best.options}
        return yaml.safe_dump([{self.pruner.kind.name: options}], sort_keys=False)

    def print_to(self, console: "Console") -> None:
        """Print the grid, the best setting, what it does on the validation images, and the lines to paste."""
        names = tuple(self.own)
        rows = [("dense", *("",) * (len(names) - 1), f"{self.dense_loss:.4f}", "", "")]
        rows += [
            (
                *(f"{each.options[name]:g}" for name in names),
                f"{each.loss:.4f}",
                f"{each.seconds:.1f}",
                " ".join(self._marks(each)),
            )
            for each in self.settings
        ]
        console.print(plain_table((*names, "held-out loss", "seconds", ""), rows, left=(names[0],)))
        if self.accuracy is not None and self.own_accuracy is not None and self.dense is not None:
            console.print(
                f"accuracy on the validation images: dense {self.dense:.2%}, the recipe's setting "
                f"{self.own_accuracy:.2%}, the best {self.accuracy:.2%}"
            )
        console.print(f"to paste into the recipe:\n{self.lines()}", end="")

    def csv(self) -> str:
        """Return one line a setting."""
        rows = [
            {**each.options, "loss": each.loss, "sparsity": each.sparsity, "seconds": each.seconds}
            | {"best": each == self.best, "recipe": each.options == self.own}
            for each in self.settings
        ]
        return as_csv([*self.own, "loss", "sparsity", "seconds", "best", "recipe"], rows)

    def json(self) -> str:
        found = {
            "pruner": self.pruner.label,
            "options": self.pruner.all_options(self.asked),
            "sparsity": self.asked,
            "dense_loss": self.dense_loss,
            "settings": [
                {**asdict(each), "loss": each.loss if math.isfinite(each.loss) else None} for each in self.settings
            ],
            "best": dict(self.best.options),
            "accuracy": {"dense": self.dense, "recipe": self.own_accuracy, "best": self.accuracy},
        }
        return as_json(self.recipe, self.about, found)

    def _marks(self, setting: Setting) -> list[str]:
        marks = ["best"] if setting == self.best else []
        return [*marks, "recipe"] if setting.options == self.own else marks


def tune(
    model: nn.Module,
    recipe: Recipe,
    *,
    calibration: Calibration,
    held_out: Iterable[tuple[Any, Any]],
    evaluate: Callable[[nn.Module], float],
    sparsity: float | None = None,
    pruner: str | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[GridStep[Tuned]], object] = lambda step: None,
) -> Tuned:
    """Find damp, gradients and block of a recipe's pruner by pruning copies of a trained model at once.

    Settings are compared by the mean loss on `held_out`. Only the best one and the recipe's own are then evaluated on
    the validation images, so that these are no part of the choice.

    Args:
        calibration: the source of gradients, and of the loss.
        held_out: batches of training images that `calibration` does not hold (`hold_out` splits them off); iterated
            once a setting.
        evaluate: accuracy in [0, 1] of a model on the validation images.
        sparsity: at which settings are compared; None with an N:M pattern, which implies its own.
        pruner: which one ("obert"), where the recipe has several, or one that it does not have.
        about: what else to keep beside the results.
        progress: called before each pruning step, and at the end.

    Raises:
        RecipeError: targets or a pattern that the model does not have.
        ValueError: nothing to tune, no sparsity, or no setting with a finite loss.
    """
    (chosen,) = choose_pruners(recipe, () if pruner is None else (pruner,))
    chosen.check_sparsities([] if sparsity is None else [sparsity])
    own, grid = settings(chosen, sparsity)
    modifiers = [chosen.at(sparsity, **options) for options in grid]
    for modifier in modifiers:  # whatever can't be followed is said before hours of work
        check_on(model, modifier, calibration)
    total = 4 * EVALUATION + sum(map(cost, modifiers))
    dense_loss = mean_loss(copy.deepcopy(model), held_out, calibration)
    if math.isinf(dense_loss):
        raise ValueError("the loss of the dense model on the held-out images is no finite number")
    found = Tuned(recipe=recipe, pruner=chosen, asked=sparsity, own=own, dense_loss=dense_loss, about=about or {})
    best = unchanged = model
    done = EVALUATION
    for options, modifier in zip(grid, modifiers, strict=True):
        what = ", ".join(f"{name} {value:g}" for name, value in options.items())
        progress(GridStep(what=what, done=done, total=total, result=found))
        pruned = prune_copy(model, modifier, calibration)
        setting = Setting(
            options=options,
            loss=mean_loss(pruned.model, held_out, calibration),
            sparsity=pruned.engine.run.masks.sparsity(),
            seconds=pruned.seconds,
        )
        found = replace(found, settings=(*found.settings, setting))
        if setting is found.best:
            best = pruned.model
        if options == own:
            unchanged = pruned.model
        done += cost(modifier)
    if math.isinf(found.best.loss):
        raise ValueError(f"no setting of {chosen.label} gives a finite loss on the held-out images")
    progress(GridStep(what="validation", done=done, total=total, result=found))
    found = replace(
        found,
        dense=checked_accuracy(evaluate, copy.deepcopy(model)),
        accuracy=checked_accuracy(evaluate, best),
        own_accuracy=checked_accuracy(evaluate, unchanged),
    )
    progress(GridStep(what="done", done=total, total=total, result=found))
    return found


def settings(pruner: OneShotPruner, sparsity: float | None) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Return the pruner's own damp, gradients and block (those that it has), and the grid around them.

    Damp takes `DAMPS` and its own value, gradients and block a quarter of their value and all of it.

    Raises:
        ValueError: the pruner has none of the three.
    """
    modifier = pruner.at(sparsity)
    own = {name: getattr(modifier, name) for name in ("damp", "gradients", "block") if hasattr(modifier, name)}
    if not own:
        raise ValueError(f"{pruner.label} has no damp, gradients or block to tune")
    smallest = {"gradients": 1, "block": modifier.pattern.group}
    axes: list[list[float]] = []
    for name, value in own.items():
        if name == "damp":
            axes.append(sorted({*DAMPS, value}))
        else:
            axes.append(sorted({max(smallest[name], value // fraction) for fraction in FRACTIONS}))
    return own, [dict(zip(own, values, strict=True)) for values in product(*axes)]


def hold_out(count: int, *, seed: int = 0) -> tuple[list[int], list[int]]:
    """Split the indices of `count` training images: (for gradients, to compare settings on), both in order.

    Raises:
        ValueError: fewer than two images.
    """
    if count < 2:
        raise ValueError(f"{count} training images can't be split: tuning compares settings on a part of them")
    held = max(1, min(MOST_HELD_OUT, round(HELD_OUT * count)))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed), device="cpu").tolist()
    return sorted(order[held:]), sorted(order[:held])


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[tuple[Any, Any]], calibration: Calibration) -> float:
    """Return the mean over all images in eval mode of the calibration's loss; infinite if it is no number."""
    model.eval()
    device = next(model.parameters()).device
    total, count = 0.0, 0
    for batch in batches:
        inputs, targets = (part.to(device) if isinstance(part, Tensor) else part for part in batch)
        size = len(targets)
        total += float(calibration.loss_fn(model(inputs), targets)) * size
        count += size
    if not count:
        raise ValueError("no images were held out to compare settings on")
    return total / count if math.isfinite(total) else math.inf
