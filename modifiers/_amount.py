"""How much a pruner prunes: the three forms of `sparsity`, and the sparsities of a sweep."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from ovit_engine.modifier import Time
from ovit_engine.schedule import CurveName

_SAME = 1e-9  # sparsities that differ by less were written as the same number


def _check_sparsity(value: Any) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{value!r} is no sparsity: write a share of zeros such as 0.75") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{value!r} is no sparsity: write a share of zeros such as 0.75")
    if not 0 <= value < 1:
        hint = f": did you mean {value / 100:g}?" if 2 <= value < 100 else ""
        raise ValueError(f"sparsity {value:g} is not in [0, 1){hint}")
    return float(value)


Sparsity = Annotated[float, BeforeValidator(_check_sparsity)]


class SparsityRange(BaseModel):
    """Sparsity that grows from the first pruning step to the last."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid", populate_by_name=True)

    initial: Sparsity = Field(alias="from", description="sparsity after the first pruning step")
    final: Sparsity = Field(alias="to", description="sparsity after the last one")
    curve: CurveName = Field("linear", description="how it grows between them")

    @model_validator(mode="after")
    def _ascending(self) -> "SparsityRange":
        if self.final < self.initial:
            raise ValueError(f"sparsity falls from {self.initial:g} to {self.final:g}: pruned weights do not come back")
        return self


def _check_amount(value: Any) -> Any:
    """Choose between the three forms by shape, so that an error speaks of the form that was written."""
    if isinstance(value, dict) and value and not {"from", "to", "curve", "initial", "final"} & set(map(str, value)):
        return SparsitySteps(steps=value)
    return SparsityRange.model_validate(value) if isinstance(value, dict) else _check_sparsity(value)


class SparsitySteps(BaseModel):
    """A sparsity for each pruning step, by its time."""

    steps: dict[Time, Sparsity]


def _spell_amount(value: Any) -> Any:
    if isinstance(value, SparsitySteps):
        return dict(value.steps)
    return value.model_dump(by_alias=True, exclude_unset=True) if isinstance(value, SparsityRange) else value


Amount = Annotated[
    float | SparsityRange | SparsitySteps, BeforeValidator(_check_amount), PlainSerializer(_spell_amount)
]


class SweepOptions(BaseModel):
    """Sparsities on the way, each of which leaves a checkpoint."""

    model_config = ConfigDict(extra="forbid")

    sparsity: list[Sparsity] = Field(min_length=1, description="the sparsities of which a checkpoint is kept")
    metric: str = Field("accuracy", min_length=1, description="name of the metric by which the best model is chosen")
    best: Literal["max", "min"] = Field("max", description="whether the metric is best where it is high, or low")
    onnx: bool = Field(False, description="export each to ONNX at the end (the bundled trainer)")


def _check_sweep(value: Any) -> Any:
    if not (value is None or isinstance(value, (list, tuple, dict, SweepOptions))):
        raise ValueError(f"{value!r} is no sweep: write a list of sparsities such as [0.5, 0.75]")
    return SweepOptions(sparsity=value) if isinstance(value, (list, tuple)) else value


def _spell_sweep(value: SweepOptions | None) -> Any:
    if value is None:
        return None
    given = value.model_dump(exclude_unset=True)
    return given["sparsity"] if set(given) == {"sparsity"} else given


Sweep = Annotated[SweepOptions | None, BeforeValidator(_check_sweep), PlainSerializer(_spell_sweep)]


def place_targets(scheduled: Mapping[int, float], targets: Sequence[float], *, movable: bool) -> dict[int, float]:
    """The pruning step at which each sparsity of a sweep is reached, in the order of time.

    Args:
        scheduled: sparsity after each pruning step, never falling.
        targets: the sparsities of the sweep.
        movable: whether the nearest step takes over a target; otherwise a target is one of the scheduled sparsities.

    Raises:
        ValueError: a target that no step reaches, or two on one step; it tells the sparsities there are.
    """
    there_are = f"the pruning steps are to {', '.join(f'{value:.4g}' for value in scheduled.values())}"
    lowest, highest = min(scheduled.values()), max(scheduled.values())
    placed: dict[int, float] = {}
    for target in sorted(targets):
        distances = {step: abs(value - target) for step, value in scheduled.items()}
        nearest = min(distances.values())
        if not movable and nearest > _SAME:
            raise ValueError(f"no pruning step is to {target:g}; {there_are}")
        if not lowest - _SAME <= target <= highest + _SAME:
            raise ValueError(f"{target:g} is out of reach; {there_are}")
        last = max(placed, default=-1)
        free = [step for step, away in distances.items() if away <= nearest + _SAME and step > last]
        if not free:
            raise ValueError(
                f"{placed[last]:g} and {target:g} fall on one pruning step, at step {last}: prune more often, or leave "
                f"one out; {there_are}"
            )
        below = [step for step in free if scheduled[step] <= target]
        placed[below[-1] if below else free[0]] = target  # among equal steps that which keeps the order
    return placed
