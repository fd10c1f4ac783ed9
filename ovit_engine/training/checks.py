"""What `ovit train` refuses whatever the images are, so that `ovit validate` can refuse it too."""

from ovit_engine.engine import Engine
from ovit_engine.training.augmentation import mixes_images, training_transform, with_preset
from ovit_engine.training.batches import part_size
from ovit_engine.training.data import model_data_config
from ovit_engine.training.models import model_name
from ovit_engine.training.schedulers import check_scheduler
from ovit_engine.training.teachers import check_teacher

METRIC = "accuracy"  # what the bundled trainer reports


def check_training(engine: Engine) -> None:
    """Check the `training` section of the engine's recipe.

    Raises:
        RecipeError: a schedule that timm refuses, or that a modifier replaces.
        ValueError: a sweep by a metric that is not measured, a batch that cannot be divided or mixed in pairs, an
            augmentation that does not fit the model, a teacher that timm does not have.
    """
    training = with_preset(engine.recipe.training)
    check_scheduler(training, engine.modifiers)
    check_sweep(engine)
    part_size(training, training.batch_size, paired=mixes_images(training))
    training_transform(model_data_config(model_name(training), training.model_args), training.augmentation)
    check_teacher(engine.recipe)


def check_sweep(engine: Engine) -> None:
    """Raise ValueError if the recipe sweeps by a metric that the trainer does not measure."""
    if engine.sweep is not None and engine.sweep.plan.metric != METRIC:
        raise ValueError(f"sweep by {engine.sweep.plan.metric!r}: the trainer measures {METRIC!r} only")
