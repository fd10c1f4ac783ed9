"""ovit validate: is a recipe right, and what of a model does it take?"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from ovit_engine.cli import options

if TYPE_CHECKING:
    from ovit_engine.core.recipe import Recipe
    from ovit_engine.core.schedule import Clock
    from ovit_engine.engine import Engine

STEPS_PER_EPOCH = 100


@click.command()
@click.argument("recipe")
@options.model
@options.model_args
@options.epochs
@click.option(
    "--steps-per-epoch", type=click.IntRange(min=1), default=STEPS_PER_EPOCH, show_default=True, help="Optimizer steps."
)
@options.variables
def validate(
    recipe: str,
    model: str | None,
    model_args: tuple[tuple[str, Any], ...],
    epochs: int | None,
    steps_per_epoch: int,
    variables: tuple[tuple[str, Any], ...],
) -> None:
    """Check RECIPE, and against a model what its targets match."""
    from rich.console import Console

    from ovit_engine.core.recipe import Recipe

    read = Recipe.load(recipe, **dict(variables))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    assumed = None if epochs or read.training.model_fields_set else read.training.epochs
    if model is None and read.training.model is None:
        from ovit_engine.core.schedule import Clock

        clock = Clock(steps_per_epoch, steps_per_epoch * (epochs or read.training.epochs))
        with options.assuming(assumed):
            check_schedule(read, clock)
        console.print(f"{read.name}: ok; --model NAME checks its targets")
        return
    from ovit_engine.training.checks import check_training

    with options.assuming(assumed):
        engine = prepared(read, model, model_args, epochs=epochs, steps_per_epoch=steps_per_epoch)
    if read.training.model_fields_set:
        check_training(engine)
    _print_matches(console, engine)
    _rehearse(engine)
    console.print(f"{read.name}: ok on {engine.recipe.training.model}")


def _rehearse(validated: "Engine") -> None:
    """Try training and export on the model with its weights."""
    from rich.console import Console

    from ovit_engine.engine import Engine
    from ovit_engine.training.api import make_model, rehearse
    from ovit_engine.utils.progress import ProgressReport

    recipe, clock = validated.recipe, validated.run.clock
    model = make_model(recipe.training)
    engine = Engine(model, recipe, steps_per_epoch=clock.steps_per_epoch, total_steps=clock.total_steps).prepare()
    with ProgressReport(Console(stderr=True)) as engine.run.progress:
        rehearse(engine)


def check_schedule(recipe: "Recipe", clock: "Clock") -> None:
    """Raise RecipeError where the recipe's times or the schedule of its training section don't fit, without a model."""
    from ovit_engine.core.capabilities import timeline_rows

    timeline_rows(recipe.modifiers, clock)
    if recipe.training.scheduler is not None:
        from ovit_engine.training.schedulers import check_scheduler

        epochs = clock.total_steps // clock.steps_per_epoch
        check_scheduler(recipe.training.model_copy(update={"epochs": epochs}), recipe.modifiers)


def prepared(
    recipe: "Recipe",
    model: str | None,
    model_args: tuple[tuple[str, Any], ...],
    *,
    epochs: int | None = None,
    steps_per_epoch: int = STEPS_PER_EPOCH,
) -> "Engine":
    """Return an engine of the recipe on an empty model: the recipe's own, or another by name."""
    from ovit_engine.engine import Engine
    from ovit_engine.training.models import empty_model

    changed = options.with_options(recipe, model, model_args, epochs=epochs)
    return Engine(
        empty_model(changed.training), changed, steps_per_epoch=steps_per_epoch, epochs=changed.training.epochs
    ).prepare()


def _print_matches(console: Any, engine: "Engine") -> None:
    from ovit_engine.core.capabilities import Scheduled, having
    from ovit_engine.utils.console import plain_table

    rows = list(match_rows(engine))
    if rows:
        console.print(plain_table(("modifier", "targets", "tensors", "weights"), rows, left=("modifier", "targets")))
    for modifier in having(engine.modifiers, Scheduled):
        for line in modifier.outcome(engine.run):
            console.print(f"{modifier.name}: {line}")


def match_rows(engine: "Engine") -> Iterable[tuple[str, str, str, str]]:
    """Return (modifier, target, tensors, weights) for each target of each modifier, from what the modifiers claim."""
    from ovit_engine.core.capabilities import Exclusive
    from ovit_engine.masking.parameters import parameter_slots
    from ovit_engine.masking.presets import is_preset
    from ovit_engine.masking.targets import match_targets, matching

    sizes = {slot.name: slot.tensor.numel() for slot in parameter_slots(engine.model)}
    sizes |= {name.removesuffix(".weight"): size for name, size in sizes.items() if name.endswith(".weight")}
    for modifier in engine.modifiers:
        claims = modifier.claims(engine.run) if isinstance(modifier, Exclusive) else ()
        claimed = [claim.name for claim in claims if claim.resource in ("mask", "quantization")]
        # a layer and its weight are the same numbers
        claimed = [name for name in dict.fromkeys(claimed) if name in sizes and f"{name}.weight" not in claimed]
        targets = getattr(modifier, "targets", None) or []
        if any(is_preset(target) for target in targets):
            chosen = match_targets(engine.model, targets)
            groups = {target: [slot.name for slot in slots] for target, slots in chosen.items()}
        else:
            groups = {
                target: matching(target, claimed) or [name for name in claimed if matching(target, [f"{name}.weight"])]
                for target in targets
            }
        if not targets and claimed:
            groups = {"(its own choice)": claimed}
        for target, names in groups.items():
            yield modifier.name, target, str(len(names)), f"{sum(sizes[name] for name in names):,}"
