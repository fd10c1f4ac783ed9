"""The loop of the bundled trainer: what it does with the engine is what a user's own loop does."""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset

from ovit_engine.core.recipe import Recipe
from ovit_engine.core.state import whole_state_dict
from ovit_engine.distributed.comm import SINGLE_PROCESS, Comm
from ovit_engine.distributed.torchrun import first_on_machine
from ovit_engine.engine import Engine
from ovit_engine.export.rehearsal import MAX_EXAMPLES
from ovit_engine.gradients.calibration import Calibration
from ovit_engine.structured.shrink_model import rebuild
from ovit_engine.training.augmentation import AUGMENTATION_PRESETS, make_mixup, with_preset
from ovit_engine.training.batches import SeededItems, TrainingBatches, part_size, worker_errors
from ovit_engine.training.checkpoint import (
    LAST,
    clear_leftovers,
    folder_of,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    saved_manifest,
    set_aside,
    with_manifest,
)
from ovit_engine.training.checks import METRIC, check_sweep
from ovit_engine.training.data import ImageData, load_data, model_data_config
from ovit_engine.training.metrics import EpochMetrics, TrainingListener, evaluate, write_metrics
from ovit_engine.training.models import make_model, make_optimizer, model_name, with_classes
from ovit_engine.training.schedulers import make_scheduler
from ovit_engine.training.steps import Steps
from ovit_engine.training.sweep_run import complete
from ovit_engine.training.teachers import load_teacher, make_teacher, save_teacher
from ovit_engine.utils.random_states import mixed, seed_everything

log = logging.getLogger(__name__)

SAVE_EVERY = 600.0  # seconds


class FinishedRunError(ValueError):
    """There is nothing to go on with: all epochs of the run are done."""


@dataclass(frozen=True)
class Trained:
    """A finished run. `engine.export(...)` is the next line: of the averaged weights where the recipe asks for them."""

    model: nn.Module
    engine: Engine
    data: ImageData
    metrics: tuple[EpochMetrics, ...]
    checkpoint: Path


@dataclass
class EpochProgress:
    """How far an epoch is."""

    step: int = 0
    loss: torch.Tensor | None = None  # sum over its steps, mean over processes
    seconds: float = 0.0


class Trainer:
    """Model, data, optimizer and engine of one run: `prepare`, perhaps `resume`, then `fit`.

    Args:
        amp: mixed precision; None: as the run that is resumed, or none.
        save_every: seconds after which a checkpoint is written within an epoch.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: str,
        output: Path,
        device: torch.device,
        workers: int,
        strict: bool,
        root: str | Path | None,
        *,
        amp: bool | None = None,
        save_every: float = SAVE_EVERY,
        comm: Comm = SINGLE_PROCESS,
    ) -> None:
        config = model_data_config(model_name(recipe.training), recipe.training.model_args)
        augmentation = recipe.training.augmentation
        with first_on_machine(comm):  # it may download
            self.data = load_data(data, config=config, augmentation=augmentation, strict=strict, root=root)
        self.recipe = with_classes(recipe, self.data)
        self.training = with_preset(self.recipe.training)
        self.preset = AUGMENTATION_PRESETS.get(self.training.augmentation)
        self.mixup = make_mixup(self.training, self.training.model_args["num_classes"])
        self.output, self.device, self.comm = output, device, comm
        self._make_loaders({"num_workers": workers, "pin_memory": self.device.type == "cuda"})
        self.amp, self.save_every, self._saved = amp, save_every, 0.0
        self.metrics: list[EpochMetrics] = []
        self.within = EpochProgress()
        self.loop_state: Mapping[str, Any] | None = None

    def _make_loaders(self, options: dict[str, Any]) -> None:
        images, comm = len(self.data.train), self.comm  # type: ignore[arg-type]
        part = part_size(self.training, images, paired=self.mixup is not None, processes=comm.count)
        self.batches = TrainingBatches(
            images,
            part,
            accumulate=self.training.accumulate,
            repeats=1 if self.preset is None else self.preset.repeats,
            seed=self.training.seed,
            comm=comm,
        )
        self.steps = self.batches.steps
        # its own generator: a loader without one draws from the model's random numbers
        options["generator"] = torch.Generator()
        self.train_loader: DataLoader[Any] = DataLoader(
            SeededItems(self.data.train),
            batch_sampler=self.batches,  # of keys, not of indices
            **options,
        )
        self.val_loader: DataLoader[Any] = DataLoader(self.data.val, batch_size=part, **options)
        share = range(comm.rank, len(self.data.val), comm.count)  # type: ignore[arg-type]
        self.val_share: DataLoader[Any] = DataLoader(Subset(self.data.val, share), batch_size=part, **options)
        self.calibration_loader: DataLoader[Any] = DataLoader(self.data.calibration, **options)

    def prepare(self, *, pretrained: bool, checkpoint: Path | None, resumed: Path | None = None) -> None:
        self.model = make_model(self.training, pretrained=pretrained)
        if resumed is not None:
            rebuild(self.model, saved_manifest(load_checkpoint(resumed)))
        if checkpoint is not None:
            load_weights(self.model, checkpoint)
        self.model.to(self.device)
        teacher = make_teacher(self.recipe) if resumed is None else load_teacher(self.recipe, folder_of(resumed))
        self.engine = Engine(
            self.model,
            self.recipe,
            steps_per_epoch=self.steps,
            epochs=self.training.epochs,
            output=self.output,
            teacher=teacher,
        ).prepare()
        check_sweep(self.engine)
        if self.engine.sweep is not None:
            self.engine.sweep.extra = self._about_point
        ema = self.training.ema
        self.ema = None if ema is None else ModelEmaV3(self.model, decay=ema)
        self.optimizer = make_optimizer(self.model, self.training)
        self.scheduler = make_scheduler(self.engine, self.optimizer, self.training)

    @property
    def deployed(self) -> nn.Module:
        """The model that is validated and exported."""
        if self.ema is None:
            return self.model
        averaged: nn.Module = self.ema.module
        return averaged

    def resume(self, path: Path) -> None:
        state = load_checkpoint(path)
        if "point" in state:
            raise ValueError(f"{str(path)!r} is a point of a sweep: ovit sweep DIR --continue SPARSITY goes on from it")
        self.engine.load_state_dict(state["engine"])  # first: it says so where the checkpoint is of another recipe
        if self.engine.finished:
            raise FinishedRunError(f"the run in {str(path)!r} is finished: all {state['epoch']} epochs are done")
        if "loop" not in state:
            raise ValueError(f"{str(path)!r} is of an older ovit: begin a new run from its weights (--checkpoint)")
        loop = state["loop"]
        self.comm.assert_equal(lambda: {"the epoch": state["epoch"], "the step": loop["step"]}, "of the checkpoint")
        if self.amp not in (None, loop["amp"]):
            raise ValueError(f"the run in {str(path)!r} began with {'no ' * (not loop['amp'])}mixed precision")
        self.amp = loop["amp"]
        if state["data"] != self.data.name:
            log.warning("the run began with the data %r and goes on with %r", state["data"], self.data.name)
        self.model.load_state_dict(state["model"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["ema"])
        self.loop_state = {"optimizer": state["optimizer"], "scaler": loop["scaler"]}
        self.metrics = [EpochMetrics(**row) for row in state["metrics"]]
        self.within = EpochProgress(loop["step"], loop["loss"].to(self.device), loop["seconds"])
        if self.comm.is_main:
            clear_leftovers(self.output)
            set_aside(self.output / LAST)

    def fit(self, listener: TrainingListener) -> Trained:
        if self.comm.is_main:
            self.output.mkdir(parents=True, exist_ok=True)
            if self.engine.run.teacher is not None:
                save_teacher(self.engine.run.teacher.module, self.output)
        epochs = self.training.epochs
        with self.engine as engine:
            if listener.work is not None:
                engine.run.progress = listener.work
            # what modifiers draw at step 0; all that is drawn later starts from its step
            seed_everything(mixed(self.training.seed))
            engine.attach(
                self.optimizer,
                calibration=Calibration(self.calibration_loader, cross_entropy, seed=self.training.seed),
                ema=self.ema,
                evaluate=lambda model: self.accuracy(),
                example_inputs=self._examples(),
            )
            self._begin()
            for epoch in range(len(self.metrics), epochs):
                listener.begin(epoch + 1, epochs, self.steps)
                loss = self._train_epoch(epoch, listener)
                if epoch + 1 == epochs:
                    engine.detach()
                self.metrics.append(self._measure(epoch, loss))
                self.within = EpochProgress()
                self._save(epoch + 1)
                listener.end(self.metrics[-1])
        unreadable = set().union(*self.comm.gather(self.data.unreadable))
        if unreadable:
            log.warning("%d unreadable images in all; others stood in for them", len(unreadable))
        if self.engine.sweep is not None and self.comm.is_main:
            wanted = self.val_loader if self.engine.sweep.plan.onnx else None
            complete(self.output, lambda: make_model(self.training), self.data.preprocessing, data=wanted)
        if self.ema is not None:
            self.model.load_state_dict(self.deployed.state_dict())
        return Trained(self.model, self.engine, self.data, tuple(self.metrics), self.output / LAST)

    def _examples(self) -> Tensor:
        """The first validation images, for the rehearsal."""
        images = self.data.val
        return torch.stack([images[i][0] for i in range(min(MAX_EXAMPLES, len(images)))])  # type: ignore[arg-type]

    def _begin(self) -> None:
        """Put back the state of optimizer and scaler, and wrap the model for several processes."""
        network = self.model
        if self.comm.count > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            network = DistributedDataParallel(self.model, device_ids=devices)
        self.step = Steps(
            self.training,
            self.engine,
            network,
            self.optimizer,
            device=self.device,
            mixup=self.mixup,
            scheduler=self.scheduler,
            ema=self.ema,
            amp=bool(self.amp),
        )
        if self.loop_state is not None:
            self.optimizer.load_state_dict(dict(self.loop_state["optimizer"]))
            if self.loop_state["scaler"] and self.step.scaler.is_enabled():  # both parts of the run on a GPU
                self.step.scaler.load_state_dict(self.loop_state["scaler"])
        self._saved = time.monotonic()

    def _train_epoch(self, epoch: int, listener: TrainingListener) -> float:
        """Return the mean loss of an epoch, or of what is left of it."""
        self.model.train()
        within, start = self.within, time.perf_counter() - self.within.seconds
        if within.loss is None:
            within.loss = torch.zeros((), device=self.device)
        for _ in range(within.step):
            listener.step()
        self.batches.go_to(epoch, within.step)
        with worker_errors():
            batches = iter(self.train_loader)
            for step in range(within.step, self.steps):
                # of the step alone, so that a resumed run draws what an unbroken one does
                seed_everything(mixed(self.training.seed, epoch, step, self.comm.rank))
                parts = islice(batches, self.training.accumulate)
                loss = self.comm.sum(self.step(parts, epoch * self.steps + step))
                within.loss += loss / self.comm.count
                within.step, within.seconds = step + 1, time.perf_counter() - start
                self._save_in_time(epoch)
                listener.step()
        mean = float(within.loss) / self.steps
        self._check_loss(mean, epoch)
        return mean

    def _check_loss(self, loss: float, epoch: int) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"the training loss of epoch {epoch + 1} is {loss}: lower the learning rate; "
                f"the last checkpoint before that is {str(self.output / LAST)!r}"
            )

    def _measure(self, epoch: int, loss: float) -> EpochMetrics:
        start = time.perf_counter()
        for model in (self.model, *(() if self.ema is None else (self.ema.module,))):
            for buffer in model.buffers():  # running statistics follow the images of each process
                buffer.copy_(self.comm.broadcast(buffer))
        accuracy = self.accuracy()
        self.engine.metric(METRIC, accuracy)
        return EpochMetrics(
            epoch=epoch + 1,
            loss=loss,
            accuracy=accuracy,
            lr=float(self.optimizer.param_groups[0]["lr"]),
            sparsity=self.engine.run.masks.sparsity(),
            seconds=self.within.seconds + time.perf_counter() - start,
        )

    def accuracy(self) -> float:
        """Return the top-1 accuracy on the validation images, of what is deployed."""
        with worker_errors():
            return evaluate(self.deployed, self.val_share, self.device, comm=self.comm)

    def _about(self) -> dict[str, Any]:
        """Return what a checkpoint tells besides model, optimizer and engine."""
        return {
            "epoch": len(self.metrics),
            "recipe": self.recipe.dump(),
            "data": self.data.name,
            "preprocessing": self.data.preprocessing,
            "metrics": [asdict(metrics) for metrics in self.metrics],
            **with_manifest(self.model),
        }

    def _about_point(self) -> dict[str, Any]:
        """The same of a point of a sweep, which starts with a new optimizer; its model is the one that is measured."""
        return {**self._about(), "optimizer": {}, "model": whole_state_dict(self.deployed)}

    def _save_in_time(self, epoch: int) -> None:
        """A checkpoint within an epoch, now and then."""
        now = time.monotonic()
        if not self.comm.is_main or self.within.step == self.steps or now - self._saved < self.save_every:
            return
        assert self.within.loss is not None
        self._check_loss(float(self.within.loss), epoch)
        self._save(epoch)

    def _save(self, epoch: int) -> None:
        """Write what it takes to go on after `epoch` epochs and what is done of the next."""
        if not self.comm.is_main:
            return
        parts = {"model": self.model, "optimizer": self.optimizer, "engine": self.engine}
        state: dict[str, Any] = {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]
        if self.ema is not None:
            state["ema"] = self.deployed.state_dict()
        loss = torch.zeros(()) if self.within.loss is None else self.within.loss
        state["loop"] = {
            "step": self.within.step,
            "loss": loss,
            "seconds": self.within.seconds,
            "amp": bool(self.amp),
            "scaler": self.step.scaler.state_dict(),
        }
        save_checkpoint(self.output / LAST, {**self._about(), **state, "epoch": epoch})
        if self.within.step == 0:
            write_metrics(self.output, self.metrics)
        self._saved = time.monotonic()
