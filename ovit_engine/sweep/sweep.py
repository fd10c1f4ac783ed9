"""The sparsity sweep: one training leaves the best model of each sparsity that it passes.

A point lives from the pruning step that reaches its sparsity until the model becomes another one: the next pruning
step of any pruner, a phase of AC/DC, or the start of quantization, since a float model and its int8 form are not to be
compared by one metric. In that time the model of the best reported metric is kept; where none is reported, the last.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ovit_engine.core.capabilities import Exclusive, Scheduled, SweepPlan, having
from ovit_engine.core.modifier import Modifier
from ovit_engine.core.recipe import Recipe
from ovit_engine.core.run import Run
from ovit_engine.distributed.comm import world
from ovit_engine.masking.masks import Masks
from ovit_engine.quant import dense_state_dict
from ovit_engine.sweep.folder import FOLDER, INDEX, Index, Point, draw, is_of, point_name, weigh, write_index
from ovit_engine.utils.autograd import kept_modes
from ovit_engine.utils.random_states import random_state, set_random_state
from ovit_engine.utils.torch_files import load_file, save_file

log = logging.getLogger(__name__)

Evaluate = Callable[[nn.Module], float]

Snapshot = Callable[[], Mapping[str, Any]]


def find_sweep(modifiers: Sequence[Modifier], recipe: Recipe, run: Run, output: Path | None) -> "Sweep | None":
    """The sweep that a recipe asks for.

    Raises:
        RecipeError: two modifiers ask for one, or a sparsity that no pruning step reaches.
    """
    scheduled = having(modifiers, Scheduled)
    found = [(modifier, plan) for modifier in scheduled if (plan := modifier.sweep_plan(run.clock)) is not None]
    if not found:
        return None
    if len(found) > 1:
        first, second = found[0][0], found[1][0]
        raise second.error(f"{first.name} ({first.origin() or 'same recipe'}) sweeps already: one may", "sweep")
    changes = sorted({step for modifier in scheduled for step in modifier.changes(run.clock)})
    return Sweep(*found[0], changes, recipe, run, output)


class Sweep:
    """Keeps the models. The engine says when: `leave` before the model may change, `enter` after.

    Attributes:
        points: what was kept so far, by sparsity.
        extra: a function whose result is written into each checkpoint beside model and engine: what a trainer needs to
            rebuild them.
        baseline: the metric of the dense model, where somebody knows it.
    """

    def __init__(
        self,
        modifier: Modifier,
        plan: SweepPlan,
        changes: Sequence[int],
        recipe: Recipe,
        run: Run,
        output: Path | None,
    ) -> None:
        self.plan = plan
        self.folder = None if output is None else output / FOLDER
        self.points: dict[float, Point] = {}
        self.extra: Callable[[], Mapping[str, Any]] = dict
        self.baseline: float | None = None
        self._modifier, self._changes, self._recipe, self._run = modifier, changes, recipe, run
        self._evaluate: Evaluate | None = None
        self._snapshot: Snapshot | None = None  # set where training goes on
        self._entered = -1  # the last change that happened
        self._open: float | None = None  # the sparsity of the point that lives now
        self._fingerprint = ""  # of its masks
        self._resumed = False
        self._finished = False

    @property
    def names(self) -> list[str]:
        """Sparsities of which a model was kept, as files are named."""
        return [point_name(sparsity) for sparsity in sorted(self.points)]

    def start(self, snapshot: Snapshot, evaluate: Evaluate | None) -> None:
        """Begin to keep models.

        Args:
            snapshot: what a checkpoint holds of model and engine.
            evaluate: measures the model as it is; called before a point ends.

        Raises:
            RecipeError: the engine was given no folder.
            FileExistsError: the folder holds the points of another training.
        """
        if self.folder is None:
            raise self._modifier.error(
                "a sweep leaves files: make the engine as Engine(model, recipe, ..., output='runs/x')", "sweep"
            )
        self._snapshot, self._evaluate = snapshot, evaluate
        if world().is_main:
            self._take_over(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)

    def leave(self, until: int) -> None:
        """The model is about to change, where a change is due by step `until`: settle the point that lives."""
        if self._open is not None and any(self._entered < step <= until for step in self._changes):
            self._close_point()
            self._open = None

    def enter(self, until: int) -> None:
        """What was due by step `until` is done: if the last of it reached a point, the point lives from now on."""
        latest = max((step for step in self._changes if step <= until), default=-1)
        if latest > self._entered:
            self._entered = latest
            self._open = self.plan.points.get(latest)
            self._fingerprint = _digest(self._run.masks)

    def metric(self, name: str, value: float) -> None:
        """A measured value; the model is kept where it is the best of its point so far."""
        if name != self.plan.metric or self._open is None or self._snapshot is None or not math.isfinite(value):
            return
        best = self.points.get(self._open)
        rises = self.plan.best == "max"
        if best is None or best.metric is None or (value > best.metric if rises else value < best.metric):
            self._keep(value)

    def finish(self) -> None:
        """Training is over: settle the last point, which still takes a metric that is reported later."""
        if self._open is not None:
            self._close_point()
        self._finished = True
        missing = [point_name(sparsity) for sparsity in self.plan.points.values() if sparsity not in self.points]
        if missing:
            log.warning("the sweep has no model at %s: training did not come by", ", ".join(missing))
        if self.plan.onnx and self.extra is dict:
            log.warning("the bundled trainer exports a sweep's points; here: load_point(model, file).export(...)")
        self._write_index()

    def state_dict(self) -> dict[str, Any]:
        """Which point lives, and what was kept."""
        return {
            "entered": self._entered,
            "open": self._open,
            "fingerprint": self._fingerprint,
            "baseline": self.baseline,
            "points": [asdict(point) for point in self.points.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self._entered, self._open, self._fingerprint = state["entered"], state["open"], state["fingerprint"]
        self.baseline = state["baseline"]
        self.points = {point["sparsity"]: Point(**point) for point in state["points"]}
        self._resumed = True

    def _take_over(self, folder: Path) -> None:
        """Files on the disk may be newer than the state that training resumes from: they count, none is lost."""
        files = {s: folder / f"{point_name(s)}.pt" for s in self.plan.points.values()}
        there = {sparsity: path for sparsity, path in files.items() if path.exists()}
        if not self._resumed and (there or (folder / INDEX).exists()):
            raise FileExistsError(
                f"{str(folder)!r} holds the sweep of another training: load its state into the engine to go on, or "
                "choose another output"
            )
        known, self.points = self.points, {}
        for sparsity, path in there.items():
            content = load_file(path, lazily=True)
            if not is_of(content, self._recipe.hash, self._run.total_steps):
                raise FileExistsError(f"{str(path)!r} is of another training: choose another output")
            self.points[sparsity] = Point(**content["point"])
        for sparsity in known.keys() - there.keys():
            log.warning("the sweep's %s is not in %r: it stays where training began", files[sparsity].name, str(folder))

    def _close_point(self) -> None:
        """Measure the living point a last time, and keep its model where no metric chose one."""
        assert self._open is not None
        if self._evaluate is not None:
            value = _evaluated(self._evaluate, self._run.model)
            self._run.log(self.plan.metric, value)
            self.metric(self.plan.metric, value)
        best = self.points.get(self._open)
        if best is None or best.metric is None:
            self._keep(None)

    def _keep(self, metric: float | None) -> None:
        """Write the model as it is as that of the living point, unless somebody changed its masks."""
        assert self._open is not None
        assert self._snapshot is not None
        if _digest(self._run.masks) != self._fingerprint:
            return
        state = {**self._snapshot(), **self.extra()}
        point = self._describe(self._open, metric, dense_state_dict(state["model"]))
        if world().is_main:
            assert self.folder is not None
            save_file(self.folder / point.checkpoint, {**state, "point": asdict(point)})
        self.points[self._open] = point
        self._write_index()

    def _describe(self, sparsity: float, metric: float | None, weights: Mapping[str, torch.Tensor]) -> Point:
        run = self._run
        pruned = {name: int((~mask).sum()) for name in run.masks.names() if (mask := run.masks.get(name)) is not None}
        claims = self._modifier.claims(run) if isinstance(self._modifier, Exclusive) else ()
        claimed = [claim.name for claim in claims if claim.resource == "mask"]
        zeros = [(pruned[name], weights[name].numel()) for name in claimed if name in pruned]
        parameters = sum(parameter.numel() for parameter in run.model.parameters())
        raw, packed = weigh(weights.values()) if world().is_main else (0, 0)
        return Point(
            sparsity=sparsity,
            measured=sum(count for count, _ in zeros) / max(1, sum(size for _, size in zeros)),
            step=run.step,
            epoch=run.clock.epochs(run.step),
            metric=metric,
            checkpoint=f"{point_name(sparsity)}.pt",
            bytes=raw,
            gzip_bytes=packed,
            parameters=parameters,
            parameters_left=parameters - sum(pruned.values()),
        )

    def _write_index(self) -> None:
        if self.folder is None or not world().is_main:
            return
        index = Index(
            recipe=self._recipe.name,
            recipe_hash=self._recipe.hash,
            asked=tuple(self.plan.points.values()),
            metric=self.plan.metric,
            best=self.plan.best,
            onnx=self.plan.onnx,
            finished=self._finished,
            baseline=self.baseline,
            points=tuple(self.points[key] for key in sorted(self.points)),
        )
        write_index(self.folder, index)
        if self._finished:
            draw(self.folder, index)


def _evaluated(evaluate: Evaluate, model: nn.Module) -> float:
    """The metric of a model, whose mode and whose training's random numbers stay as they were.

    Raises:
        TypeError: `evaluate` gives no number.
    """
    state = random_state()
    try:
        with kept_modes(model), torch.no_grad():
            value = evaluate(model)
    finally:
        set_random_state(state)
    try:
        return float(value)
    except TypeError:
        raise TypeError(f"evaluate(model) must return one number, not {type(value).__name__}") from None


def _digest(masks: Masks) -> str:
    found = hashlib.sha256()
    for name, packed in masks.state_dict().items():
        found.update(name.encode())
        found.update(packed["bits"].numpy().data)
    return found.hexdigest()
