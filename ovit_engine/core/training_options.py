"""The `training` section of a recipe: options of the bundled trainer."""

from typing import Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from ovit_engine.core.errors import Placed, RecipeError
from ovit_engine.utils.suggest import suggest

Augmentation = Literal[
    "none", "noise", "standard", "light1", "light2", "medium1", "medium2", "deit_light", "deit", "torchvision"
]


class TeacherModel(BaseModel):
    """Whom `distill` and its like learn from."""

    model_config = ConfigDict(extra="forbid")

    model: str = Field("same", description="timm model name, or same: that of the training")
    model_args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of timm.create_model")
    checkpoint: str | None = Field(
        None,
        description="its weights; if left out timm's own (downloads them), for same those that training starts from",
    )

    @model_validator(mode="after")
    def _another(self) -> "TeacherModel":
        if self.model == "same" and self.model_args:
            raise ValueError("model_args go with a model: 'same' takes those of the training")
        return self


class Training(Placed):
    """How the bundled trainer (`ovit train`) trains; a user's own loop never reads it."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    model: str | None = Field(None, description="timm model name")
    model_args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of timm.create_model")
    epochs: PositiveInt = Field(10, le=100_000, description="passes over the training images")
    batch_size: PositiveInt = Field(64, description="images an optimizer step, of all processes together")
    accumulate: PositiveInt = Field(1, description="parts that a batch is computed in, one after the other")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="the optimizer")
    lr: PositiveFloat = Field(5e-4, description="learning rate; an LR modifier overrides it")
    scheduler: Literal["cosine", "tanh", "poly", "step", "multistep"] | None = Field(
        None, description="timm's learning-rate schedule, for a recipe without an LR modifier; constant if left out"
    )
    scheduler_args: dict[str, Any] = Field(
        default_factory=dict,
        description="of timm's create_scheduler_v2: warmup_epochs, warmup_lr, min_lr and the like",
    )
    weight_decay: float = Field(0.05, ge=0, description="decoupled weight decay (adamw) or L2 (sgd)")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the training loss; never of calibration")
    augmentation: Augmentation = Field(
        "none",
        description="none; noise: Gaussian (tiny images such as digits); standard: timm's crop, flip and jitter; "
        "or a preset of augmentation and regularization, in which options that are written here win",
    )
    clip_grad: PositiveFloat | None = Field(None, description="largest gradient norm")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of an averaged copy of the weights, which is then validated and exported"
    )
    teacher: TeacherModel | None = Field(
        None, description="of modifiers that learn from one (distill); the model as training starts if left out"
    )
    seed: int = Field(0, ge=0, description="of weights, order and augmentation")

    def __eq__(self, other: object) -> bool:
        """Equal options; where they stood in a file does not count."""
        return type(self) is type(other) and self.model_dump() == other.model_dump()

    def error(self, message: str, option: str = "") -> RecipeError:
        """A RecipeError that says where `option` of the section stands; "scheduler_args.min_lr" is one of a mapping."""
        origin = self.origin(option)
        where = f"{origin}: " if origin else ""
        return RecipeError(f"{where}training{'.' + option if option else ''}: {message}")

    @field_validator("augmentation", mode="before")
    @classmethod
    def _known_augmentation(cls, value: Any) -> Any:
        names = get_args(Augmentation)
        if value not in names:
            raise ValueError(f"there is no {value!r}{suggest(str(value), list(names))}")
        return value

    @model_validator(mode="after")
    def _whole_parts(self) -> "Training":
        if self.batch_size % self.accumulate:
            raise ValueError(f"a batch of {self.batch_size} does not divide into {self.accumulate} equal parts")
        return self

    @model_validator(mode="after")
    def _scheduled(self) -> "Training":
        if self.scheduler_args and self.scheduler is None:
            raise ValueError("scheduler_args without a scheduler: name one, as 'scheduler: cosine'")
        return self
