"""Options of `gohsp` besides its times and budgets: how heads are ranked, and how hard penalties pull."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from ovit_engine.structured.ranking import find_ranker
from ovit_engine.structured.similarity import Kernel

BATCH = 64  # calibration images at a time


def _ranks_heads(name: str) -> str:
    if "heads" not in find_ranker(name).kinds:
        raise ValueError(f"{name!r} ranks {' and '.join(find_ranker(name).kinds)}, not heads")
    return name


class Ranking(BaseModel):
    """Which heads go: those of lowest score in each block."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    score: Annotated[str, AfterValidator(_ranks_heads)] = Field(
        "graph", description="graph, taylor, salience, l1, random, or the name of a ranker of yours"
    )
    images: PositiveInt = Field(
        512, description="calibration images of which outputs are compared, by graph, in batches of 64"
    )
    steps: PositiveInt = Field(
        10, description="training steps from start that tell gradients, or outputs where no calibration was given"
    )
    kernel: Kernel = Field(
        "shift", description="from cosine c to similarity: shift (1 + c) / 2, clip max(c, 0), exp e^((c - 1) / t)"
    )
    temperature: PositiveFloat = Field(1.0, description="t of the kernel exp")
    invert: bool = Field(False, description="whether the heads of highest score go, to see what the ranking is worth")
    seed: int = Field(0, ge=0, description="of a random score")

    @model_validator(mode="after")
    def _consistent(self) -> "Ranking":
        if "temperature" in self.model_fields_set and self.kernel != "exp":
            raise ValueError(f"'temperature' goes with kernel exp, not {self.kernel}")
        ranker = find_ranker(self.score)
        unused = {
            "images": ranker.needs != "outputs",
            "kernel": ranker.needs != "outputs",
            "steps": ranker.needs == "nothing",
            "seed": not ranker.seeded,
        }
        for option, is_unused in unused.items():
            if is_unused and option in self.model_fields_set:
                raise ValueError(f"{option!r} does not go with score {self.score!r}, which has no use for it")
        return self

    @property
    def batches(self) -> int:
        """How many calibration batches there are."""
        return -(-self.images // BATCH)


class Penalty(BaseModel):
    """How hard soft pruning pulls, and how that grows."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    heads: PositiveFloat | None = Field(
        None, description="lambda: weight of 1/2 ||W||^2 of heads that go; by the first gradients if left out"
    )
    units: PositiveFloat | None = Field(
        None, description="rho: weight of 1/2 ||W - Z + U||^2 of units; by the first gradients if left out"
    )
    share: PositiveFloat = Field(
        1.0, description="if left out: the first pull on what goes, as a share of the training loss's gradient there"
    )
    ramp: float = Field(1.5, ge=1, description="factor by which both grow at each update")
    limit: float = Field(1000.0, ge=1, description="how many times their first value they become at most")
    tolerance: PositiveFloat = Field(
        0.02, description="they grow no more once what is left of what goes is this share of the norm of the weights"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Penalty":
        if "share" in self.model_fields_set and self.heads is not None and self.units is not None:
            raise ValueError("'share' does not go with 'heads' and 'units', which are the first penalties themselves")
        return self
