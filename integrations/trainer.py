"""The loop of the bundled trainer: what it does with the engine is what a user's own loop does."""

import csv
import io
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.data.distributed_sampler import RepeatAugSampler
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # public, though not re-exported by "as"
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from ovit_engine.calibration import Calibration
from ovit_engine.engine import Engine
from ovit_engine.files import atomic_write
from ovit_engine.integrations.augmentation import PRESETS, make_mixup, with_preset
from ovit_engine.integrations.checkpoint import LAST, load_checkpoint, load_weights, save_checkpoint
from ovit_engine.integrations.data import ImageData, load_data, model_data_config
from ovit_engine.integrations.images import UnreadableImageError
from ovit_engine.integrations.models import make_model, model_name, seed_everything, with_classes
from ovit_engine.integrations.sweep import METRIC, complete
from ovit_engine.recipe import Recipe, Training

log = logging.getLogger(__name__)

METRICS = "metrics.csv"


@dataclass(frozen=True, kw_only=True)
class EpochMetrics:
    """One line of metrics.csv."""

    epoch: int  # counts from 1
    loss: float  # mean training loss
    accuracy: float  # top-1 on the validation images
    lr: float  # of the first group, in the last step
    sparsity: float  # share of zeros in the weights that the recipe has masked so far
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What the trainer tells while it works; each function may do nothing."""

    begin: Callable[[int, int, int], None]  # (epoch, epochs, steps)
    step: Callable[[], None]
    end: Callable[[EpochMetrics], None]
    work: Callable[[str, int, int], None] | None = None  # (what, done, total) inside a step; None: the run's own log


SILENT = Progress(begin=lambda epoch, epochs, steps: None, step=lambda: None, end=lambda metrics: None)


@dataclass(frozen=True)
class Trained:
    """A finished run. `engine.export(...)` is the next line."""

    model: nn.Module
    engine: Engine
    data: ImageData
    metrics: tuple[EpochMetrics, ...]
    checkpoint: Path


class Trainer:
    """Model, data, optimizer and engine of one run: `prepare`, perhaps `resume`, then `fit`."""

    def __init__(
        self,
        recipe: Recipe,
        data: str,
        output: Path,
        device: str,
        workers: int,
        strict: bool,
        root: str | Path | None,
    ) -> None:
        config = model_data_config(model_name(recipe.training), recipe.training.model_args)
        self.data = load_data(data, config=config, augmentation=recipe.training.augmentation, strict=strict, root=root)
        self.recipe = with_classes(recipe, self.data)
        self.training = with_preset(self.recipe.training)
        self.preset = PRESETS.get(self.training.augmentation)
        self.mixup = make_mixup(self.training, self.training.model_args["num_classes"])
        self.output = output
        self.device = choose_device(device)
        self._make_loaders({"num_workers": workers, "pin_memory": self.device.type == "cuda"})
        self.metrics: list[EpochMetrics] = []

    def _make_loaders(self, options: dict[str, Any]) -> None:
        images = len(self.data.train)  # type: ignore[arg-type]
        part = part_size(self.training, images, paired=self.mixup is not None)
        self.order = torch.Generator()
        self.repeats: RepeatAugSampler | None = None
        if self.preset is not None and self.preset.repeats > 1:
            self.repeats = RepeatAugSampler(  # type: ignore[no-untyped-call]
                self.data.train, num_replicas=1, rank=0, num_repeats=self.preset.repeats, selected_round=0
            )
        self.train_loader: DataLoader[Any] = DataLoader(
            self.data.train,
            batch_size=part,
            shuffle=self.repeats is None,
            sampler=self.repeats,
            drop_last=True,
            generator=self.order,
            **options,
        )
        self.steps = len(self.train_loader) // self.training.accumulate
        self.val_loader: DataLoader[Any] = DataLoader(self.data.val, batch_size=part, **options)
        self.calibration_loader: DataLoader[Any] = DataLoader(self.data.calibration, **options)

    def prepare(self, *, pretrained: bool, checkpoint: Path | None) -> None:
        self.model = make_model(self.training, pretrained=pretrained)
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
        self.model.to(self.device)
        self.engine = Engine(
            self.model, self.recipe, steps_per_epoch=self.steps, epochs=self.training.epochs, output=self.output
        ).prepare()
        if self.engine.sweep is not None:
            if self.engine.sweep.plan.metric != METRIC:
                raise ValueError(f"sweep by {self.engine.sweep.plan.metric!r}: the trainer measures {METRIC!r} only")
            self.engine.sweep.extra = self._about
        options: dict[str, Any] = {}
        if self.preset is not None and self.training.optimizer == "adamw":
            options["eps"] = self.preset.eps
        self.optimizer = create_optimizer_v2(
            self.model,
            opt=self.training.optimizer,
            lr=self.training.lr,
            weight_decay=self.training.weight_decay,
            momentum=self.training.momentum,
            **options,
        )
        self.optimizer_state: Mapping[str, Any] | None = None

    def resume(self, path: Path) -> None:
        state = load_checkpoint(path)
        if "point" in state:
            raise ValueError(f"{str(path)!r} is a point of a sweep: ovit sweep DIR --continue SPARSITY goes on from it")
        self.engine.load_state_dict(state["engine"])  # first: it says so where the checkpoint is of another recipe
        if self.engine.finished:
            raise ValueError(f"the run in {str(path)!r} is finished: all {state['epoch']} epochs are done")
        if state["data"] != self.data.name:
            log.warning("the run began with the data %r and goes on with %r", state["data"], self.data.name)
        self.model.load_state_dict(state["model"])
        self.optimizer_state = state["optimizer"]
        self.metrics = [EpochMetrics(**row) for row in state["metrics"]]

    def fit(self, progress: Progress) -> Trained:
        self.output.mkdir(parents=True, exist_ok=True)
        epochs = self.training.epochs
        seed_everything(self.training.seed)
        with self.engine as engine:
            if progress.work is not None:
                engine.run.progress = progress.work
            engine.attach(
                self.optimizer,
                calibration=Calibration(self.calibration_loader, cross_entropy, seed=self.training.seed),
                evaluate=self.accuracy,
            )
            if self.optimizer_state is not None:
                self.optimizer.load_state_dict(dict(self.optimizer_state))
            for epoch in range(len(self.metrics), epochs):
                start = time.perf_counter()
                progress.begin(epoch + 1, epochs, self.steps)
                loss = self._train_epoch(epoch, progress)
                if epoch + 1 == epochs:
                    engine.detach()
                self.metrics.append(self._measure(epoch, loss, start))
                self._save(epoch + 1)
                progress.end(self.metrics[-1])
        if self.data.unreadable:
            log.warning("%d unreadable images in all; others stood in for them", len(self.data.unreadable))
        if self.engine.sweep is not None:
            wanted = self.val_loader if self.engine.sweep.plan.onnx else None
            complete(self.output, lambda: make_model(self.training), self.data.preprocessing, data=wanted)
        return Trained(self.model, self.engine, self.data, tuple(self.metrics), self.output / LAST)

    def _train_epoch(self, epoch: int, progress: Progress) -> float:
        """Mean loss of an epoch."""
        # all randomness starts anew each epoch, so that a run that was resumed is the same as one that was not
        seed = self.training.seed * 1_000_003 + epoch + 1
        seed_everything(seed)
        self.order.manual_seed(seed)
        if self.repeats is not None:
            self.repeats.set_epoch(seed)  # type: ignore[no-untyped-call]
        self.model.train()
        total = torch.zeros((), device=self.device)
        with _worker_errors():
            batches = iter(self.train_loader)
            for _ in range(self.steps):
                total += self._train_step(islice(batches, self.training.accumulate))
                progress.step()
        mean = float(total) / self.steps
        if not math.isfinite(mean):
            raise ValueError(
                f"the training loss of epoch {epoch + 1} is {mean}: lower the learning rate; "
                f"the last checkpoint is that of epoch {epoch}"
            )
        return mean

    def _train_step(self, parts: Iterable[Any]) -> torch.Tensor:
        """One optimizer step; its mean loss."""
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        for images, labels in parts:
            loss = self._loss(images.to(self.device), labels.to(self.device)) / self.training.accumulate
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        if self.training.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.training.clip_grad)
        self.optimizer.step()
        return total

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        smoothing = self.training.label_smoothing
        if self.mixup is not None:
            images, labels = self.mixup(images, labels)
            smoothing = 0.0  # the soft labels are smoothed
        return self.engine.loss(cross_entropy(self.model(images), labels, label_smoothing=smoothing))

    def _measure(self, epoch: int, loss: float, start: float) -> EpochMetrics:
        accuracy = self.accuracy(self.model)
        self.engine.metric(METRIC, accuracy)
        return EpochMetrics(
            epoch=epoch + 1,
            loss=loss,
            accuracy=accuracy,
            lr=float(self.optimizer.param_groups[0]["lr"]),
            sparsity=self.engine.run.masks.sparsity(),
            seconds=time.perf_counter() - start,
        )

    def accuracy(self, model: nn.Module) -> float:
        """Top-1 on the validation images."""
        with _worker_errors():
            return evaluate(model, self.val_loader, self.device)

    def _about(self) -> dict[str, Any]:
        """What a checkpoint tells besides model, optimizer and engine."""
        return {
            "optimizer": {},  # a point of a sweep starts with a new one
            "epoch": len(self.metrics),
            "recipe": self.recipe.dump(),
            "data": self.data.name,
            "preprocessing": self.data.preprocessing,
            "metrics": [asdict(metrics) for metrics in self.metrics],
        }

    def _save(self, epoch: int) -> None:
        about = self._about()
        parts = {"model": self.model, "optimizer": self.optimizer, "engine": self.engine}
        state = {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]
        save_checkpoint(self.output / LAST, {**about, **state, "epoch": epoch})
        rows = about["metrics"]
        table = io.StringIO()
        writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        atomic_write(self.output / METRICS, lambda stream: stream.write(table.getvalue().encode()))


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[Any], device: torch.device) -> float:
    """Top-1 accuracy in eval mode; the model's training flags are put back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    right = torch.zeros((), dtype=torch.long, device=device)
    count = 0
    for images, labels in loader:
        right += (model(images.to(device)).argmax(-1) == labels.to(device)).sum()
        count += int((labels >= 0).sum())  # less than zero: an unreadable image, for which another stands in
    for module, flag in flags:
        module.training = flag
    return int(right) / count


def part_size(training: Training, images: int, *, paired: bool) -> int:
    """Images that go through the model at a time: a part of a batch, or of all `images` where they are fewer.

    Args:
        paired: each image is mixed with another of its part, so the number must be even.

    Raises:
        ValueError: an odd number, or fewer images than parts.
    """
    size = training.batch_size // training.accumulate
    if paired and size % 2:
        raise ValueError(
            f"augmentation {training.augmentation!r} mixes images in pairs: batch_size / accumulate must be even, "
            f"not {size}"
        )
    size = min(size, images // training.accumulate)
    size -= size % 2 if paired else 0
    if size == 0:
        raise ValueError(f"{images} training images are too few for accumulate: {training.accumulate}")
    return size


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is a GPU where there is one. Raises ValueError for one that is not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"no device {name!r}: write auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: torch finds no GPU here")
    return device


@contextmanager
def _worker_errors() -> Iterator[None]:
    """A loader's worker wraps what it raises in its traceback: only the line that names the image is kept."""
    try:
        yield
    except UnreadableImageError as error:
        last = str(error).rstrip().splitlines()[-1]
        raise UnreadableImageError(last.rpartition(f"{UnreadableImageError.__name__}: ")[2]) from None
