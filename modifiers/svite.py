"""SViTE (Chen et al. 2021, arXiv 2106.04533, section 3.1): training that is sparse from the first step to the last.

Its rules are those of RigL (Evci et al. 2020, arXiv 1911.11134); with `grow: random` of SET (Mocanu et al. 2018). RigL
leaves the optimizer's step out where connections move, SViTE does not: no hook can take a step back from an optimizer,
and leaving out gradients instead is not the same in all of them, so the step is made here.
"""

from collections.abc import Iterable, Mapping
from time import perf_counter
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor

from ovit_engine import Claim, Clock, Row, Run, Slot, register
from ovit_engine.bases.amounts import Sparsity
from ovit_engine.bases.pruner import Masking
from ovit_engine.core.saved import place_saved
from ovit_engine.core.training_length import is_nearly_done
from ovit_engine.masking.masks import check_packed, pack_mask, unpack_mask
from ovit_engine.modifiers._updates import UpdatingModifier, forget
from ovit_engine.pruning import prune_by_scores
from ovit_engine.pruning.rewire import random_scores, rewire


@register("svite")
class Svite(UpdatingModifier, Masking):
    """Trains a sparse model whose connections move: the smallest weights go, others come where the gradient is large.

    Each tensor keeps as many weights as it started with. New connections start from zero, and the optimizer has no past
    of them; one that goes and comes back in the same update keeps its value. Under N:M the smallest weights of a tensor
    go and each group grows as many as it lost; with blocks whole tiles move, by their sums of |w| and |gradient|.
    """

    scope: Literal["global", "layer", "erk"] = Field(
        "erk",
        description="how the sparsity is shared out at the start: small tensors denser (erk), alike in each (layer), "
        "or over all targets (global)",
    )
    sparsity: Sparsity | None = Field(None, description="share of zeros, always; N:M implies its own")
    init: Literal["random", "magnitude"] = Field(
        "random", description="which weights are there at first: random ones, or the largest of a trained model"
    )
    grow: Literal["gradient", "random"] = Field(
        "gradient", description="where connections come: at the largest training gradients, or anywhere"
    )
    seed: int = Field(0, ge=0, description="of what is random")

    _every: int = PrivateAttr(default=1)
    _last: int = PrivateAttr(default=0)  # the step of the last update
    _gains: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # sums of |gradient| since `gradients` steps
    _ever: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # what was part of the model at any time

    @model_validator(mode="after")
    def _consistent(self) -> "Svite":
        self.pattern.resolve(self.sparsity)
        if self.grow == "random" and "gradients" in self.model_fields_set:
            raise ValueError("'gradients' does not go with 'grow: random', which takes none")
        if (self.init, self.grow) == ("magnitude", "gradient") and "seed" in self.model_fields_set:
            raise ValueError("'seed' does not go with 'init: magnitude' and 'grow: gradient': nothing is random then")
        return self

    def timeline(self, clock: Clock) -> Iterable[Row]:
        updates = self.updates(clock)
        if self.init == "magnitude":
            yield 0, "sparsity", self.describe(self.sparsity)
        else:
            yield 0, "topology", f"{self.describe(self.sparsity)}, at random"
        yield updates[0], "topology", f"{self.share(updates[0], clock):.2%} moves, and again every {self.every}"
        yield updates[-1], "topology", f"{self.share(updates[-1], clock):.2%} moves, a last time"

    def changes(self, clock: Clock) -> Iterable[int]:
        return (0, *self.updates(clock))

    def prepare(self, run: Run) -> None:
        updates = self.updates(run.clock)
        self._every, self._last = updates.step, updates[-1]
        super().prepare(run)

    def claims(self, run: Run) -> Iterable[Claim]:
        reason = "what is rounded must be what is deployed, so quantize after the last update, or end those earlier"
        for slot in self._slots:
            yield Claim("mask", slot.name, 0, self._last)
            yield Claim("quantization", slot.owner_name, 0, self._last, reason)
        yield from self.gate_claims(run, 0)  # its sparsity is of all weights

    def attach(self, run: Run) -> None:
        frozen = [slot.name for slot in self._slots if not slot.tensor.requires_grad]
        if frozen and self.grow == "gradient":  # said now, and not at the first update
            raise self.error(f"{frozen[0]!r} is frozen, so there is no gradient by which it could grow", "targets")
        super().attach(run)

    def step_begin(self, run: Run) -> None:
        update = (run.step // self._every + 1) * self._every  # the next one
        if self.grow == "random" or update > self._last or run.step < update - self.gradients:
            return
        for slot, gradient in zip(self._slots, self.training_gradients(run), strict=True):
            before = self._gains.get(slot.name)
            size = gradient.abs().float()
            self._gains[slot.name] = size if before is None else before.to(size.device).add_(size)

    def detach(self, run: Run) -> None:
        if self._done < self._last and not is_nearly_done(run):  # weights that came in the last steps would stay zero
            self.finish_late(run, f"the last update at step {self._last}")

    def _act(self, run: Run) -> None:
        step = min(run.step // self._every * self._every, self._last)
        if step <= self._done:
            return
        begin = perf_counter()
        if step == 0:
            self._start(run)
        else:
            self._update(run, step)
        self._done = step
        run.log(f"{self.name}/ever_active", self._ever_active())
        run.report({f"{self.name}/seconds": perf_counter() - begin})

    def _start(self, run: Run) -> None:
        weights = [slot.gather() for slot in self._slots]
        if self.init == "magnitude":
            scores = [weight.abs().float() for weight in weights]
        else:
            scores = [
                self._random(slot, 0).to(weight.device) for slot, weight in zip(self._slots, weights, strict=True)
            ]
        names = [slot.name for slot in self._slots]
        options: dict[str, Any] = {"sparsity": self.sparsity, "scope": self.scope, "pattern": self.pattern}
        pruned = prune_by_scores(weights, scores, names=names, **options)
        self.write(run, pruned.masks, pruned.weights)
        self._ever = dict(zip(names, (mask.clone() for mask in pruned.masks), strict=True))

    def _update(self, run: Run, step: int) -> None:
        """Move connections in all tensors, or where one of them can't be compared in none."""
        share = self.share(step, run.clock)
        before = self.present_masks(run)
        after = [
            rewire(slot.gather(), mask, self._gain(slot, step), pattern=self.pattern, fraction=share, name=slot.name)
            for slot, mask in zip(self._slots, before, strict=True)
        ]
        self._gains = {}
        for slot, old, new in zip(self._slots, before, after, strict=True):
            forget(run.optimizers, slot, new & ~old)
            run.masks.set(slot, new, self.pattern.describe())
            self._ever[slot.name] = self._ever[slot.name].to(new.device) | new

    def _gain(self, slot: Slot, step: int) -> Tensor:
        return self._random(slot, step) if self.grow == "random" else self._gains[slot.name]

    def _random(self, slot: Slot, step: int) -> Tensor:
        return random_scores(slot.tensor.shape, slot.name, self.seed, step)

    def _ever_active(self) -> float:
        """Share of the weights that were part of the model at any time: the paper's in-time over-parametrisation."""
        return sum(int(ever.sum()) for ever in self._ever.values()) / sum(ever.numel() for ever in self._ever.values())

    def state_dict(self) -> dict[str, Any]:
        return {
            **super().state_dict(),
            "gains": {name: gain.clone() for name, gain in self._gains.items()},
            "ever": {name: pack_mask(ever) for name, ever in self._ever.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        slots = {slot.name: slot.tensor for slot in self._slots}
        gains = place_saved(state["gains"], slots, "gradients")
        for name, packed in state["ever"].items():
            if name not in slots:
                raise ValueError(f"the checkpoint's record of {name!r} fits no target here")
            check_packed(name, packed, slots[name].shape)
        super().load_state_dict(state)
        self._gains = gains
        self._ever = {name: unpack_mask(packed).to(slots[name].device) for name, packed in state["ever"].items()}
