"""ovit verify-resume: kill a training under a recipe again and again, and compare it with one that was not."""

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ovit_engine.cli import options

if TYPE_CHECKING:
    from ovit_engine.core.recipe import Recipe
    from ovit_engine.training.verify_resume import Verdict

MODEL = "vit_tiny_patch16_224"  # of recipes that name none
BATCH = 8  # images a step
CHECKPOINTS = 12  # about as many
GRADIENTS = 16  # of a pruning step: the fewest of which several may be taken from one backward pass
IMAGES_PER_GRADIENT = 4
BLOCK = 32  # of the Fisher matrix
LARGEST_TOTAL = 5000  # steps of a training that we would wait for
SHOWN = 5  # differences


@click.command(name="verify-resume", short_help="Kill a small training again and again, compare with one unbroken.")
@click.argument("recipe")
@click.option("--kills", type=click.IntRange(min=1), default=8, show_default=True, help="How often it is killed.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of where it is killed.")
@click.option(
    "--steps", type=click.IntRange(min=8), default=60, show_default=True, help="Length of training, at least."
)
@click.option("--model", help="timm model, taken as it is; if left out the recipe's own, made small, or a small ViT.")
@options.model_args
@options.epochs
@options.variables
def verify_resume(
    recipe: str,
    kills: int,
    seed: int,
    steps: int,
    model: str | None,
    model_args: tuple[tuple[str, Any], ...],
    epochs: int | None,
    variables: tuple[tuple[str, Any], ...],
) -> None:
    """Verify that a training under RECIPE can be killed at any moment and go on as if nothing had happened.

    A small model is trained on random images, in epochs of few steps: once unbroken, and once killed (SIGKILL) before,
    inside and after what the recipe does and while checkpoints are written, going on each time from the last whole one.
    The exit code is 0 if every checkpoint of the two is the same, bit for bit: weights, masks, optimizer, quantizer
    ranges and all else that the engine keeps.
    """
    from ovit_engine.core.recipe import Recipe
    from ovit_engine.training.api import with_training
    from ovit_engine.training.models import small_setup, with_small_model
    from ovit_engine.training.verify_resume import Job
    from ovit_engine.training.verify_resume import verify_resume as verify

    read = with_training(Recipe.load(recipe, **dict(variables)), epochs=epochs)
    if model is None and read.training.model is None:
        read = with_training(read, model=MODEL)
    small, is_own = quick(read), model in (None, read.training.model)
    per_epoch = steps_per_epoch(small, steps)
    small = with_small_model(small, per_epoch) if model is None else with_training(small, model=model)
    args = small.training.model_args if is_own else {}  # the recipe's arguments go with the recipe's model
    small = with_training(small, model_args={**args, **dict(model_args)})
    job = Job(
        build=partial(small_setup, small.training, BATCH * per_epoch),
        recipe=small.dump(),
        steps_per_epoch=per_epoch,
        epochs=small.training.epochs,
        batch_size=BATCH,
        every=max(1, per_epoch * small.training.epochs // CHECKPOINTS),
        seed=small.training.seed,
    )
    click.echo(f"{read.name} on {small.training.model}: {job.total_steps} steps, a checkpoint every {job.every}")
    with tempfile.TemporaryDirectory(prefix="ovit-verify-resume-") as folder:
        verdict = verify(job, Path(folder), kills=kills, seed=seed)
    _print(verdict)
    if not verdict.identical:
        raise click.exceptions.Exit(1)


def quick(recipe: "Recipe") -> "Recipe":
    """`recipe` with few gradients a pruning step and small Fisher blocks; whatever else it says stays."""
    modifiers = []
    for modifier in recipe.modifiers:
        group = getattr(getattr(modifier, "pattern", None), "group", 1)  # a block holds one
        small = {"gradients": GRADIENTS, "images_per_gradient": IMAGES_PER_GRADIENT, "block": max(BLOCK, group)}
        large = {key: value for key, value in small.items() if getattr(modifier, key, 0) > value}
        modifiers.append(modifier.model_copy(update=large))
    return replace(recipe, modifiers=tuple(modifiers))


def steps_per_epoch(recipe: "Recipe", least: int) -> int:
    """The fewest steps an epoch with which training has `least` steps and the recipe's times can be told apart.

    Raises:
        RecipeError: the recipe's times do not go together in trainings that we would wait for.
    """
    from ovit_engine.core.capabilities import timeline_rows
    from ovit_engine.core.errors import RecipeError
    from ovit_engine.core.schedule import Clock

    epochs = recipe.training.epochs
    number = -(-least // epochs)
    while True:
        clock = Clock(number, number * epochs)
        try:
            timeline_rows(recipe.modifiers, clock)
            return number
        except RecipeError:
            number += 1
            if number * epochs > LARGEST_TOTAL:
                raise


def _print(verdict: "Verdict") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("killed", no_wrap=True)
    table.add_column("resumed at", justify="right", no_wrap=True)
    for restart in verdict.restarts:
        table.add_row(restart.where, str(restart.resumed))
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    kills = f"{len(verdict.restarts)} kill{'s' * (len(verdict.restarts) > 1)}"
    if verdict.identical:
        console.print(f"bit-identical: {kills}, all {len(verdict.compared)} checkpoints equal the unbroken run's")
        return
    console.print(f"NOT the same after {kills}: of {len(verdict.compared)} checkpoints the first that differs is")
    console.print(f"{verdict.differs}, in {len(verdict.differences)} places:")
    for difference in verdict.differences[:SHOWN]:
        console.print(f"  {difference}", markup=False)
