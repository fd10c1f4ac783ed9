"""What pruners share that need gradients: where they come from, the check of memory, steps in several parts."""

import logging
import warnings
from abc import abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt, PrivateAttr, model_validator
from torch import Tensor

from ovit_engine.modifier import Run
from ovit_engine.modifiers._base import PruningModifier
from ovit_engine.second_order import (
    LARGEST_BLOCK,
    METHODS,
    Pruned,
    PruneOptions,
    estimate_memory,
    preflight,
    prune_streamed,
)
from ovit_engine.targets import Slot

log = logging.getLogger(__name__)

CHUNK = 16  # gradients alive at a time: block Woodbury is fastest at 8 to 32 (specs/second-order.md §1.6)


class GradientPruningModifier(PruningModifier):
    """Prunes by a method of `prune_streamed`. A subclass names the method and states its options."""

    method: ClassVar[str]

    gradients: PositiveInt = Field(4096, description="gradients that a pruning step takes")
    images_per_gradient: PositiveInt = Field(16, description="images each of them is a mean over; damp goes with it")
    recomputations: PositiveInt = Field(1, description="a pruning step in as many parts, each with fresh gradients")

    _recent: deque[list[Tensor]] = PrivateAttr(default_factory=deque)

    @model_validator(mode="after")
    def _block_holds_a_group(self) -> "GradientPruningModifier":
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
        if run.calibration is None and any(step > run.step or run.step == 0 for step in self._events):
            if run.step in self._events:
                raise self.error(
                    "pruning at step 0 needs gradients: attach(optimizer, calibration=Calibration(loader, loss_fn))"
                )
            warnings.warn(
                f"{self.name}: no calibration was given, so the gradients of the last {self.window} training steps "
                "before each pruning step are used: larger batches at moving weights, with dropout. The published "
                "method is attach(optimizer, calibration=Calibration(loader, loss_fn))",
                stacklevel=4,
            )
        if any(step >= run.step for step in self._events):
            self._check_memory(run)
        super().attach(run)

    def _check_memory(self, run: Run) -> None:
        """Say what a pruning step needs, in log and history, and raise MemoryError now rather than hours later."""
        device = self._slots[0].tensor.device
        shapes = [slot.tensor.shape for slot in self._slots]
        block, count = self.options().get("block", 1), self.gradients if run.calibration is not None else self.window
        needed = estimate_memory(shapes, method=self.method, block=block, pattern=self.pattern, gradients=count)
        if run.calibration is None:  # the window of training gradients is held besides
            needed += self.window * sum(shape.numel() for shape in shapes) * 4
        log.info("%s needs %.2f GiB on %s for each pruning step", self.name, needed / 2**30, device)
        if run.step == 0:  # once, and not again where training is resumed
            run.log(f"{self.name}/memory_gib", needed / 2**30)
        preflight({device: needed}, METHODS[self.method].advice)

    def step_begin(self, run: Run) -> None:
        following = min((step for step in self._events if step > run.step), default=None)
        if run.calibration is not None or following is None or following - run.step > self.window:
            return
        self._recent.append([grad.detach().clone() for grad in self.training_gradients(run)])

    def solve(self, run: Run, slots: Sequence[Slot], sparsity: float | None) -> tuple[list[Tensor], list[Tensor]]:
        parts = self.recomputations if run.calibration is not None and sparsity is not None else 1
        masks = self.present_masks(run)
        before = [slot.gather().clone() for slot in slots]
        present = sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
        weights = before
        try:
            for part in range(1, parts + 1):
                goal = sparsity
                if sparsity is not None and part < parts:
                    goal = present + (sparsity - present) * part / parts
                pruned = self._solve_once(run, slots, weights, masks, goal, draw=run.step * parts + part - 1)
                masks, weights = pruned.masks, pruned.weights
                for slot, weight in zip(slots, weights, strict=True):
                    slot.write(weight)  # the next part's gradients are taken at the new weights
        except BaseException:
            for slot, weight in zip(slots, before, strict=True):
                slot.write(weight)  # all of a pruning step or nothing
            raise
        self._recent.clear()
        return masks, weights

    def _solve_once(
        self,
        run: Run,
        slots: Sequence[Slot],
        weights: list[Tensor],
        masks: list[Tensor],
        sparsity: float | None,
        draw: int,
    ) -> Pruned:
        chunks, count = self._chunks(run, slots, draw)
        names = [slot.name for slot in slots]
        options: PruneOptions = {
            **self.options(),
            "sparsity": sparsity,
            "scope": self.scope,
            "pattern": self.pattern,
        }
        return prune_streamed(weights, chunks, count, names=names, masks=masks, method=self.method, **options)

    def _chunks(self, run: Run, slots: Sequence[Slot], draw: int) -> tuple[Iterable[Sequence[Tensor]], int]:
        if run.calibration is None:
            recent = list(self._recent)
            before = max((step for step in self._events if step < run.step), default=0)
            if len(recent) < min(self.window, run.step - before):  # a resumed run has seen no more
                warnings.warn(
                    f"{self.name}: only {len(recent)} training gradients were seen before this step", stacklevel=6
                )
            return ([grad.unsqueeze(0) for grad in grads] for grads in recent), len(recent)
        gradients = run.calibration.gradients(
            run.model,
            slots,
            count=self.gradients,
            images_per_gradient=self.images_per_gradient,
            chunk=min(CHUNK, self.gradients),
            draw=draw,
        )
        return gradients, self.gradients


class BrainSurgeonModifier(GradientPruningModifier):
    """Scores by the inverse Fisher every unit as if it went alone: oBERT, and M-FAC."""

    block: int = Field(192, ge=1, le=LARGEST_BLOCK, description="size of a Fisher block")
    damp: PositiveFloat = Field(1e-6, description="dampening; more of it than oViT wants")
    update: Literal["joint", "independent", "none"] = Field(
        "joint", description="of what stays: exact for all that goes together, the published sum, or none"
    )

    def options(self) -> PruneOptions:
        return {"block": self.block, "damp": self.damp, "update": self.update}
