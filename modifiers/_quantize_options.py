"""What `quantize` may round, and to what: options, and the modules of a model that they mean."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from ovit_engine import quant
from ovit_engine.masking.parameters import is_scorer
from ovit_engine.masking.targets import select

Group = Literal["linear", "conv", "patch_embed", "head", "attention", "layer_norm"]
Preset = Literal["cpu", "gpu"]
# measured on ONNX Runtime with AVX512-VNNI: docs/quantization.md
DEFAULT_GROUPS: tuple[Group, ...] = ("linear", "conv")
_LAYER_GROUPS = ("linear", "conv", "patch_embed", "head")


class Weights(BaseModel):
    """Symmetric int8: zeros stay exactly zero."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid")

    bits: Literal[7, 8] = Field(
        8,
        description="8 is what kernels take; 7 (-63 to 63, stored as int8) for x86 without VNNI, whose sums saturate",
    )
    per: Literal["channel", "tensor"] = Field(
        "channel", description="a scale for each output channel, or for the weight"
    )
    observer: Literal["min_max", "mse"] = Field(
        "min_max", description="range: the largest value, or what rounds with the least squared error"
    )


class Activations(BaseModel):
    """One scale a tensor: uint8 with a zero point, or int8 without one."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid")

    bits: Literal[8] = Field(8, description="8 is what CPU and GPU kernels take")
    symmetric: bool | None = Field(
        None, description="int8 with zero point 0 instead of uint8 with one; what the preset says if left out"
    )
    observer: Literal["min_max", "moving_average", "percentile", "mse"] | None = Field(
        None,
        description="range: extremes of all batches, or an average over batches of their extremes, of percentiles, or "
        "of what rounds with the least squared error; moving_average in training and mse after it if left out",
    )
    percentile: float = Field(99.99, gt=50, le=100, description="of observer percentile; the rest is cut at both ends")


class PostTraining(BaseModel):
    """Only for quantization without training (`ovit ptq`)."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid")

    images: int = Field(256, ge=1, description="images that ranges are taken from")
    smooth: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="SmoothQuant: the share of the difficulty that moves from inputs to weights; off if left out",
    )
    bias_correction: bool = Field(False, description="take the mean error of each output channel out of the bias")
    search: Literal["neural_compressor"] | None = Field(
        None,
        description="let Neural Compressor try observers and layers left float until the loss of accuracy is tolerable",
    )
    tolerable_loss: float = Field(0.01, ge=0, lt=1, description="of a search: relative to the float model's accuracy")
    max_trials: int = Field(8, ge=1, description="of a search: configurations tried at most")

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        limits = [name for name in ("tolerable_loss", "max_trials") if name in self.model_fields_set]
        if self.search is None and limits:
            raise ValueError(f"{limits[0]!r} is of a search: add 'search: neural_compressor', or leave it out")
        if self.search is not None and self.smooth is not None:
            raise ValueError("a search tries the model as it is: leave 'smooth' out, or 'search'")
        return self

    def without_search(self) -> "PostTraining":
        """The same options for a configuration that has been found."""
        kept = self.model_fields_set - {"search", "tolerable_loss", "max_trials"}
        return PostTraining(**{name: getattr(self, name) for name in kept})


@dataclass(frozen=True)
class Chosen:
    """Names of the modules to quantize."""

    layers: list[str]
    attention: list[str]
    layer_norms: list[str]


def scheme(preset: Preset, weights: Weights, activations: Activations, *, observer: str) -> quant.Scheme:
    """The scheme that the options spell; `observer` where they leave it open."""
    base = quant.CPU if preset == "cpu" else quant.GPU
    grid = base.activations
    if activations.symmetric is not None:
        grid = quant.INT8_ACTIVATION if activations.symmetric else quant.UINT8_AFFINE
    return replace(
        base,
        per_channel=weights.per == "channel",
        weights=quant.INT8_SYMMETRIC if weights.bits == 8 else quant.INT7_SYMMETRIC,
        weight_observer=weights.observer,
        activations=grid,
        activation_observer=activations.observer or observer,  # type: ignore[arg-type]  # one of the same names
        percentile=activations.percentile,
    )


def choose(
    model: nn.Module, groups: Collection[Group], targets: list[str] | None, exclude: list[str]
) -> tuple[Chosen, str | None]:
    """The modules that the options mean, and the first group that the model has nothing of (None: has all).

    Scorers of tokens stay float unless a target names one in full: rounded scores have ties, and runtimes break them
    otherwise than PyTorch.

    Raises:
        ValueError: a target or an exclusion that matches nothing.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    scorers = [name for name in modules if is_scorer(name) and name not in (targets or ())]
    layers = {n: m for n, m in modules.items() if isinstance(m, (nn.Linear, nn.Conv2d)) and n not in scorers}
    grouped = {name: _group_of(model, name, layer) for name, layer in layers.items()}
    found: dict[str, list[str]] = {
        group: [name for name in grouped if grouped[name] == group] for group in _LAYER_GROUPS
    }
    found["attention"] = quant.attention_modules(model)
    found["layer_norm"] = [n for n, module in modules.items() if isinstance(module, nn.LayerNorm) and n not in scorers]
    missing = next((group for group in groups if not found[group]), None)
    if targets is None:
        names = [name for name in layers if grouped[name] in groups]
    else:
        names = _select(layers, targets, "targets", model)
    others = {group: found[group] if group in groups else [] for group in ("attention", "layer_norm")}
    known = {**layers, **dict.fromkeys(name for group in others.values() for name in group), **dict.fromkeys(scorers)}
    spared = _select(known, exclude, "exclude", model)
    chosen = [[name for name in part if name not in spared] for part in (names, *others.values())]
    return Chosen(*chosen), missing


class UnknownTargetError(ValueError):
    """A target of `option` that matches nothing."""

    def __init__(self, message: str, option: str) -> None:
        super().__init__(message)
        self.option = option


def _select(known: Mapping[str, object], wanted: list[str], option: str, model: nn.Module) -> list[str]:
    # a layer answers to the name of its weight too, so that pruners and quantizers can share targets
    owners = {spelling: name for name in known for spelling in (name, f"{name}.weight")}
    try:
        found = select(list(owners), wanted, what="Linear or Conv2d layer", owner=type(model).__name__)
    except ValueError as error:
        raise UnknownTargetError(str(error), option) from None
    return list(dict.fromkeys(owners[name] for name in found))


def _group_of(model: nn.Module, name: str, module: nn.Module) -> Group:
    """Patch embedding by its name, the head as timm's `get_classifier` tells; the others by their class."""
    get_classifier = getattr(model, "get_classifier", None)
    heads = get_classifier() if callable(get_classifier) else None
    heads = heads if isinstance(heads, (tuple, list)) else [heads]
    if any(head is module for head in heads):
        return "head"
    if "patch_embed" in name.split("."):
        return "patch_embed"
    return "linear" if isinstance(module, nn.Linear) else "conv"
