"""Hold the zeros that a checkpoint already has, as when a sparse model is fine-tuned or quantized."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import Field, PrivateAttr
from torch import Tensor

from ovit_engine import (
    NM,
    Claim,
    Clock,
    Coordinated,
    Exclusive,
    Modifier,
    Pattern,
    Patterned,
    Row,
    Run,
    Scheduled,
    Slot,
    Targets,
    find_slots,
    register,
)
from ovit_engine.bases.pruner import check_gates
from ovit_engine.core.loggers import sparsity_name
from ovit_engine.masking.parameters import parameter_slots
from ovit_engine.utils.warn import warn

_PATTERN = NM(2, 4)  # what hardware reads: units beside it leave by fours


@register("constant_mask")
class ConstantMask(Scheduled, Exclusive, Patterned, Coordinated):
    """Keeps zeros zero. They are read when training starts (ATTACH): load the sparse checkpoint before."""

    targets: Targets | None = Field(
        None,
        min_length=1,
        description='weights by name, or "re:" and a regular expression; all matrices and convolutions with zeros '
        "if left out",
    )

    _named: list[Slot] = PrivateAttr(default_factory=list)
    _patterns: dict[str, Pattern] = PrivateAttr(default_factory=dict)
    _held: bool = PrivateAttr(default=False)

    def timeline(self, clock: Clock) -> Iterable[Row]:
        yield 0, "mask", f"present zeros are held ({self.name})"

    def prepare(self, run: Run) -> None:
        if self.targets is not None:
            with self.errors_at("targets"):
                self._named = find_slots(run.model, self.targets)
        slots = [slot for slot in self._named or _sparse(run) if not slot.tensor.is_meta]
        self._patterns = {slot.name: _PATTERN for slot in slots if _is_2_4(slot.gather() != 0)}

    def patterns(self) -> Mapping[str, Pattern]:
        return self._patterns

    def coordinate(self, run: Run, modifiers: Sequence[Modifier]) -> None:
        check_gates(self, run, self._named or _sparse(run), modifiers)

    def claims(self, run: Run) -> Iterable[Claim]:
        for slot in self._named or _sparse(run):
            yield Claim("mask", slot.name, 0, run.total_steps)

    def attach(self, run: Run) -> None:
        if self._held:
            return  # resumed: the masks came with the state
        for slot in self._named or self._found(run):
            mask = slot.gather() != 0
            if bool(mask.all()):
                raise self.error(f"{slot.name!r} has no zeros: load the sparse checkpoint before attach", "targets")
            gated = getattr(slot.module, "input_gate", None) is not None
            if gated and slot.name not in self._patterns and _is_2_4(mask):
                raise self.error(
                    f"{slot.name!r} is 2:4, which its gate was not told: load the sparse checkpoint before prepare"
                )
            # a promise of what the file must have: where every group holds 2:4, that it still does
            run.masks.set(slot, mask, _PATTERN.describe() if _is_2_4(mask) else "unstructured")
        self._held = True
        run.log(sparsity_name(self.name), run.masks.sparsity())

    def state_dict(self) -> dict[str, Any]:
        return {"held": self._held}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._held = state["held"]

    def _found(self, run: Run) -> list[Slot]:
        slots = _sparse(run)
        empty = [slot for slot in slots if not bool(slot.gather().any())]
        if empty:
            warn(
                f"{self.name}: {empty[0].name!r} is all zeros, which looks like a fresh layer: it stays free "
                "(name it in 'targets' to hold it)"
            )
        slots = [slot for slot in slots if slot not in empty]
        if not slots and not run.is_rehearsal:  # of a recipe alone, before there is a checkpoint
            raise self.error("no matrix or convolution has zeros to hold: load the sparse checkpoint before attach")
        return slots


def _is_2_4(mask: Tensor) -> bool:
    """Whether zeros [out, in, ...] follow the pattern in every group."""
    try:
        _PATTERN.check(mask.shape)
    except ValueError:
        return False
    return not bool((mask & ~_PATTERN.mask(mask.float())).any())


def _sparse(run: Run) -> list[Slot]:
    """Parameters of two dimensions or more that hold zeros; none of a model without values (`ovit validate`)."""
    slots = [slot for slot in parameter_slots(run.model) if slot.tensor.ndim >= 2 and not slot.tensor.is_meta]
    return [slot for slot in slots if bool((slot.gather() == 0).any())]
