"""ovit show: what a recipe does, and when."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from ovit_engine.cli import options

if TYPE_CHECKING:
    from ovit_engine.core.modifier import Modifier
    from ovit_engine.core.recipe import Recipe
    from ovit_engine.core.training_options import Training

STEPS_PER_EPOCH = 100
MOST_ROWS = 500


@click.command(short_help="Print the timeline of RECIPE.")
@click.argument("recipe")
@options.epochs
@click.option("--steps-per-epoch", type=click.IntRange(min=1), help="Optimizer steps an epoch.")
@options.variables
def show(recipe: str, epochs: int | None, steps_per_epoch: int | None, variables: tuple[tuple[str, Any], ...]) -> None:
    """Print the timeline of RECIPE: when each modifier acts, sparsity, learning rate."""
    from ovit_engine.cli.validate import check_schedule
    from ovit_engine.core.capabilities import LearningRate, having, timeline_rows
    from ovit_engine.core.recipe import Recipe
    from ovit_engine.core.schedule import Clock
    from ovit_engine.utils.console import plain_table, table_console

    read = Recipe.load(recipe, **dict(variables))
    length = epochs or read.training.epochs
    steps = steps_per_epoch or STEPS_PER_EPOCH
    clock = Clock(steps, steps * length)
    trained = bool(read.training.model_fields_set)
    assumed = [f"{length} epochs (--epochs)"] if not (epochs or trained) else []
    with options.assuming(length if assumed else None):
        check_schedule(read, clock)
    assumed += [] if steps_per_epoch else [f"{steps} steps an epoch (--steps-per-epoch)"]
    rows = timeline_rows(read.modifiers, clock)
    if trained and not having(read.modifiers, LearningRate):
        rate = f"{read.training.lr:.3g} ({read.training.scheduler or 'constant'}, of the training section)"
        rows.insert(0, (0, "learning rate", rate))
    rows.sort(key=lambda row: row[0])
    lines = [(f"{clock.epochs(step):g}", str(step), what, value) for step, what, value in rows[:MOST_ROWS]]
    if len(rows) > MOST_ROWS:
        lines.append(("", "", f"... {len(rows) - MOST_ROWS:,} more", ""))
    lines.append((f"{length}", str(clock.total_steps), "end", ""))
    console = table_console()
    console.print(f"{read.name}: {length} epoch{'s' * (length > 1)} of {steps} steps")
    if assumed:
        console.print(f"assumed: {', '.join(assumed)}")
    if read.description:
        console.print(read.description)
    if read.training.model:
        console.print(training_line(read.training), soft_wrap=True)
    console.print(plain_table(("epoch", "step", "what", "value"), lines, left=("what", "value")))
    for line in preset_lines(read):
        console.print(line, soft_wrap=True)


def training_line(training: "Training") -> str:
    """Return what the bundled trainer does besides the modifiers, with what an augmentation preset says filled in."""
    from ovit_engine.training.augmentation import with_preset

    full = with_preset(training)
    drop = full.model_args.get("drop_path_rate")
    parts = [
        f"{full.model}, {full.optimizer}, batches of {full.batch_size}",
        f"augmentation {full.augmentation}, weight decay {full.weight_decay:g}",
        *([f"label smoothing {full.label_smoothing:g}"] if full.label_smoothing else []),
        *([f"stochastic depth {drop:g}"] if drop else []),
        *([f"gradients clipped to norm {full.clip_grad:g}"] if full.clip_grad is not None else []),
        *([f"weights averaged by {full.ema:g}"] if full.ema is not None else []),
    ]
    if full.accumulate > 1:
        parts[0] += f" in {full.accumulate} parts"
    return f"training: {', '.join(parts)}"


def preset_lines(recipe: "Recipe") -> Iterable[str]:
    """Return what the presets of a recipe take: of the model that it names with figures, or else in words."""
    from ovit_engine.masking.presets import is_preset, preset_of

    for modifier in recipe.modifiers:
        targets = getattr(modifier, "targets", None) or []
        presets = [target for target in targets if is_preset(target)]
        weights = _weights(recipe, modifier, targets) if presets and recipe.training.model else None
        for preset in presets:
            parts: Iterable[str] = preset_of(preset).roles
            if weights is not None:
                counts = {part: weights.get(f"{preset} {part}") for part in parts}
                parts = (f"{part} {count:,}" for part, count in counts.items() if count is not None)
            yield f"{modifier.name} on {preset}: {', '.join(parts)}; dense: {preset_of(preset).dense}"


def _weights(recipe: "Recipe", modifier: "Modifier", targets: list[str]) -> dict[str, int]:
    """Return how many weights each target takes of the recipe's model, by part in presets; raises RecipeError."""
    from ovit_engine.masking.targets import match_targets
    from ovit_engine.training.models import empty_model

    try:
        found = match_targets(empty_model(recipe.training), targets)
    except ValueError as error:
        raise modifier.error(str(error), "targets") from None
    return {target: sum(slot.tensor.numel() for slot in slots) for target, slots in found.items()}
