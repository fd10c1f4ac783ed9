"""Base classes of pruners that need gradients: where these come from, the check of memory, steps in several parts."""

import logging
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, PrivateAttr, model_validator
from torch import Tensor

from ovit_engine.bases.pruner import Pruner
from ovit_engine.core.run import Run
from ovit_engine.distributed.comm import world
from ovit_engine.distributed.sharding import gathered, whole_model
from ovit_engine.masking.parameters import Slot
from ovit_engine.pruning import LARGEST_BLOCK, GradientSource, Pruned, PruneOptions, plan_pruning, prune_streamed
from ovit_engine.pruning.patterns import NM
from ovit_engine.utils.warn import warn

log = logging.getLogger(__name__)

# Gradients alive at a time: many of a small model, whose backward passes are cheaper together, at most 64 MiB of them;
# block Woodbury takes 16 at once whatever arrives.
FEWEST, MOST, ENTRIES = 16, 64, 2**24


class GradientPruner(Pruner):
    """Prunes by gradients: of `attach(calibration=...)`, or of the training steps before a pruning step without one.

    A subclass overrides `scores` with the help of `mean_over_gradients`.
    """

    gradients: PositiveInt = Field(4096, description="gradients that a pruning step takes")
    images_per_gradient: PositiveInt = Field(16, description="images each of them is a mean over; damp goes with it")

    _recent: deque[list[Tensor]] = PrivateAttr(default_factory=deque)

    @property
    def window(self) -> int:
        """How many gradients of training are kept where no calibration was given."""
        return min(self.gradients, 64)

    @property
    def _ahead(self) -> list[int]:
        """The pruning steps that are not done, where a run goes on."""
        return [step for step in self._events if step > self._done]

    def attach(self, run: Run) -> None:
        ahead = self._ahead
        if run.calibration is None and ahead:
            if ahead[0] <= run.step and not self._recent:
                raise self.error(
                    f"pruning at step {run.step} needs gradients: attach(optimizer, calibration=Calibration(loader, "
                    "loss_fn))"
                )
            warn(
                f"{self.name}: no calibration was given, so the gradients of at most {self.window} training steps "
                "before each pruning step are used: larger batches at moving weights, with dropout. The published "
                "method is attach(optimizer, calibration=Calibration(loader, loss_fn))"
            )
        if ahead:
            self._check_images(run)
        super().attach(run)

    def _check_images(self, run: Run) -> None:
        """Warn where one gradient takes all images there are: without augmentation all gradients are then the same."""
        images = None if run.calibration is None else run.calibration.images
        if images is not None and images <= self.images_per_gradient:
            warn(
                f"{self.name}: there are {images} calibration images, and images_per_gradient is "
                f"{self.images_per_gradient}: every gradient takes all of them, so they are alike"
            )

    def step_begin(self, run: Run) -> None:
        following = min((step for step in self._events if step > run.step), default=None)
        if run.calibration is not None or following is None or following - run.step > self.window:
            return
        self._recent.append([grad.detach().clone() for grad in self.training_gradients(run)])

    def state_dict(self) -> dict[str, Any]:
        # without them a run that goes on would prune by fewer gradients: another model
        return {**super().state_dict(), "recent": [list(grads) for grads in self._recent]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        shapes = [slot.tensor.shape for slot in self._slots]
        for grads in state["recent"]:
            if [grad.shape for grad in grads] != shapes:
                raise ValueError(f"{self.name}: the checkpoint's training gradients are not those of the targets here")
        devices = [slot.tensor.device for slot in self._slots]
        self._recent = deque(
            [grad.to(device, copy=True) for grad, device in zip(grads, devices, strict=True)]
            for grads in state["recent"]
        )

    def mean_over_gradients(
        self, run: Run, slots: Sequence[Slot], function: Callable[[Tensor], Tensor]
    ) -> list[Tensor]:
        """Return for each slot the mean of `function` over its gradients, those of all processes, in float64.

        Args:
            function: maps gradients [k, *shape] to values of the same shape, element by element or sample by sample.
        """
        with whole_model(run.model):
            chunks, count = self._chunks(run, slots, run.step)
            sums = [torch.zeros(slot.tensor.shape, dtype=torch.float64, device=slot.tensor.device) for slot in slots]
            for chunk in chunks(list(range(len(slots)))):
                for total, gradients in zip(sums, chunk, strict=True):
                    total += function(gradients.to(total.device, torch.float64)).sum(0)
        return [world().sum(total) / count for total in sums]

    def _prune(self, run: Run, event: int) -> None:
        super()._prune(run, event)
        self._recent.clear()

    def _chunks(self, run: Run, slots: Sequence[Slot], draw: int) -> tuple[GradientSource, int]:
        """Gradients of slots by index, those of this rank, and how many there are on all ranks."""
        comm = world()
        calibration = run.calibration
        if calibration is None:
            recent = list(self._recent)
            before = max((step for step in self._events if step < run.step), default=0)
            if len(recent) < min(self.window, run.step - before):  # it went on without its calibration
                warn(f"{self.name}: only {len(recent)} training gradients were seen before this step")
            # every rank has the same ones, averaged; shards become whole on all ranks at once
            mine = [
                g for i, grads in enumerate(recent) if (g := list(map(gathered, grads))) and i % comm.count == comm.rank
            ]
            return lambda indices: ([grads[i].unsqueeze(0) for i in indices] for grads in mine), len(recent)

        def gradients(indices: list[int]) -> Iterable[Sequence[Tensor]]:
            return calibration.gradients(
                run.model,
                [slots[index] for index in indices],
                count=self.gradients,
                images_per_gradient=self.images_per_gradient,
                chunk=chunk_size(sum(slot.tensor.numel() for slot in slots), self.gradients),
                draw=draw,
                share=(comm.rank, comm.count),
                among=slots,
            )

        return gradients, self.gradients


def chunk_size(weights: int, count: int) -> int:
    """How many of `count` gradients of so many weights to hold at a time; at least sixteen chunks for ranks."""
    return min(count, max(FEWEST, min(MOST, ENTRIES // weights, count // 16)))


class SecondOrderPruner(GradientPruner):
    """Prunes by a method of `prune_streamed`. A subclass names the method and states its options."""

    method: ClassVar[str]

    recomputations: PositiveInt = Field(1, description="a pruning step in as many parts, each with fresh gradients")
    memory_limit: PositiveFloat | None = Field(
        None,
        description="GiB that the solver may take, what is available if left out; with less than it needs, gradients "
        "are taken several times, for a group of targets each",
    )

    _checked: bool = PrivateAttr(default=False)  # whether its need of memory is in the history

    @model_validator(mode="after")
    def _block_holds_a_group(self) -> "SecondOrderPruner":
        block = self.options().get("block", LARGEST_BLOCK)
        if block < self.pattern.group:
            raise ValueError(f"a Fisher block of {block} can't hold the {self.pattern.group} weights of {self.pattern}")
        return self

    @abstractmethod
    def options(self) -> PruneOptions:
        """Options of the method itself: block, damp and the like."""

    @property
    def window(self) -> int:
        """How many gradients of training are kept where no calibration was given."""
        # never more memory than the inverse Fisher, which holds `block` numbers a weight; without one, a moderate sum
        return min(self.gradients, self.options().get("block", 64))

    def attach(self, run: Run) -> None:
        if self._ahead:
            self.check_memory(run)
        super().attach(run)

    def check_memory(self, run: Run) -> None:
        """Say what a pruning step needs, in log and history, and raise MemoryError now rather than hours later."""
        count = self.gradients if run.calibration is not None else self.window
        weights = [slot.tensor for slot in self._slots]
        # the window of training gradients is held besides
        window = 0 if run.calibration is not None else self.window * sum(weight.numel() for weight in weights) * 4
        plan = plan_pruning(
            weights,
            method=self.method,
            gradients=count,
            names=[slot.name for slot in self._slots],
            memory_limit=self._limit,
            held_besides=window,
            comm=world(),
            **self._options(next(iter(self._events.values()))),
        )
        needed = max(world().gather(plan.needed + window)) / 2**30  # the history is the same on every rank
        log.info("%s needs %.2f GiB on %s for each pruning step", self.name, needed, weights[0].device)
        if not self._checked:  # once, and not again where training is resumed
            run.log(f"{self.name}/memory_gib", needed)
        self._checked = True
        if plan.passes > 1:
            limit = (
                "more than is available" if self.memory_limit is None else f"memory_limit is {self.memory_limit:g} GiB"
            )
            warn(
                f"{self.name}: a pruning step needs {needed:.2f} GiB, {limit}: its targets are taken in "
                f"{len(plan.rounds)} groups, and gradients {plan.passes} times"
            )

    @property
    def _limit(self) -> int | None:
        """`memory_limit` in bytes."""
        return None if self.memory_limit is None else int(self.memory_limit * 2**30)

    def _options(self, sparsity: float | None) -> PruneOptions:
        return {**self.options(), "sparsity": sparsity, "scope": self.scope, "pattern": self.pattern}

    def part_sparsity(self, present: float, final: float, part: int) -> float:
        """The sparsity after a part (1, 2, ...) of a pruning step in `recomputations` parts."""
        return present + (final - present) * part / self.recomputations

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "checked": self._checked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._checked = state["checked"]

    def solve(self, run: Run, slots: Sequence[Slot], sparsity: float | None) -> tuple[list[Tensor], list[Tensor]]:
        # the sparsity of N:M has no parts
        parts = self.recomputations if run.calibration is not None and not isinstance(self.pattern, NM) else 1
        masks = self.present_masks(run)
        before = [slot.gather().clone() for slot in slots]
        present = sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        weights = before
        try:
            for part in range(1, parts + 1):
                goal = sparsity
                if sparsity is not None and part < parts:
                    goal = self.part_sparsity(present, sparsity, part)
                what = self.name if parts == 1 else f"{self.name} (part {part} of {parts})"
                pruned = self._solve_once(run, slots, weights, masks, goal, run.step * parts + part - 1, what)
                masks, weights = pruned.masks, pruned.weights
                for slot, weight in zip(slots, weights, strict=True):
                    slot.write(weight)  # the next part's gradients are taken at the new weights
        except BaseException:
            for slot, weight in zip(slots, before, strict=True):
                slot.write(weight)  # all of a pruning step or nothing
            raise
        return masks, weights

    def _solve_once(
        self,
        run: Run,
        slots: Sequence[Slot],
        weights: list[Tensor],
        masks: list[Tensor],
        sparsity: float | None,
        draw: int,
        what: str,
    ) -> Pruned:
        with whole_model(run.model):
            chunks, count = self._chunks(run, slots, draw)
            pruned = prune_streamed(
                weights,
                chunks,
                count,
                names=[slot.name for slot in slots],
                masks=masks,
                method=self.method,
                memory_limit=self._limit,
                comm=world(),
                progress=lambda stage, done, total: run.progress(f"{what}: {stage}", done, total),
                **self._options(sparsity),
            )
        for stage, seconds in pruned.timings.items():
            run.report({f"{self.name}/{stage}_seconds": seconds})
        if pruned.passes:
            spent = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in pruned.timings.items())
            log.info("%s: gradients came %d times; %s", what, pruned.passes, spent)
        return pruned


class BrainSurgeon(SecondOrderPruner):
    """Scores by the inverse Fisher every unit as if it went alone: oBERT, and M-FAC."""

    block: int = Field(192, ge=1, le=LARGEST_BLOCK, description="size of a Fisher block")
    damp: PositiveFloat = Field(1e-6, description="dampening; more of it than oViT wants")
    update: Literal["joint", "independent", "none"] = Field(
        "joint", description="of what stays: exact for all that goes together, the published sum, or none"
    )

    def options(self) -> PruneOptions:
        return {"block": self.block, "damp": self.damp, "update": self.update}
