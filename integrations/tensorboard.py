"""TensorBoard for `Engine.log_to`.

Weights & Biases (`run.log`), MLflow (`mlflow.log_metrics`), Lightning's loggers (`logger.log_metrics`) and Accelerate's
(`accelerator.log`) take values and a step as they are, and need nothing here.
"""

from typing import Any

from torch.utils.tensorboard import SummaryWriter

from ovit_engine.core.loggers import Log


def tensorboard(folder: str | SummaryWriter, **options: Any) -> Log:
    """Writes scalars below `folder`, or to a SummaryWriter of yours: `engine.log_to(tensorboard("runs/1"))`."""
    writer = folder if isinstance(folder, SummaryWriter) else SummaryWriter(folder, **options)

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return log
