"""Int8 quantization-aware training of Linear and Conv2d layers."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr
from torch import nn

from ovit_engine import quant
from ovit_engine.modifier import Claim, Modifier, Run, Time
from ovit_engine.modifiers._base import Targets
from ovit_engine.processes import process_group
from ovit_engine.registry import register
from ovit_engine.schedule import Clock
from ovit_engine.targets import select


class Weights(BaseModel):
    """Symmetric int8, one scale an output channel: zeros stay exactly zero."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid")

    bits: Literal[8] = Field(8, description="8 is what CPU and GPU kernels take")
    per: Literal["channel"] = Field("channel", description="a scale for each output channel")


class Activations(BaseModel):
    """Asymmetric uint8, one scale and zero point a tensor."""

    model_config = ConfigDict(allow_inf_nan=False, extra="forbid")

    bits: Literal[8] = Field(8, description="8 is what CPU and GPU kernels take")


class _Times(NamedTuple):
    """The steps at which phases begin."""

    observe: int
    start: int
    freeze: int
    freeze_norm: int | None


@register("quantize")
class Quantize(Modifier):
    """Trains with fake-quantized weights and inputs; export turns them into int8.

    Unless `targets` say otherwise these are all Linear and Conv2d layers but those under the name `patch_embed` and the
    classifier head that timm's `get_classifier` tells; in other models name yours in `exclude`. Attention, softmax,
    LayerNorm, GELU and residual adds stay float: rounding them costs vision transformers ten points and gains no time
    (specs/peers.md §4).
    """

    surgery = True

    start: Time = Field("0ep", description="time from which the model trains with fake-quantized layers")
    start_observers: Time | None = Field(
        None,
        description="time from which ranges are watched without rounding, so that rounding starts with settled ones; "
        "at start if left out",
    )
    freeze_observers: Time | None = Field(
        None, description="time at which ranges freeze; half-way between start and the end of training if left out"
    )
    freeze_batch_norm: Time | None = Field(
        None, description="time at which batch-norm statistics freeze; never if left out"
    )
    targets: Targets | None = Field(None, min_length=1, description='layers by name, or "re:" and a regular expression')
    exclude: Targets = Field(default_factory=list, description="layers that stay float")
    weights: Weights = Field(default_factory=Weights, description="how weights are quantized")
    activations: Activations = Field(default_factory=Activations, description="how inputs are quantized")

    _layers: tuple[str, ...] = PrivateAttr(default=())
    _model: nn.Module | None = PrivateAttr(default=None)
    _done: int = PrivateAttr(default=-1)  # the last step whose phase is in force
    _times: _Times = PrivateAttr(default=_Times(0, 0, 0, None))

    def _resolve(self, clock: Clock) -> _Times:
        start = clock.steps(self.start)
        self.check_end(clock, start, "start")
        if start == clock.total_steps:
            raise self.error(
                f"{self.start!r} is the end of training: no step is left to train with quantization", "start"
            )
        observe = start if self.start_observers is None else clock.steps(self.start_observers)
        if observe > start:
            raise self.error(
                f"{self.start_observers!r} comes after the start at {self.start!r}: what is rounded needs a range",
                "start_observers",
            )
        freeze = (start + clock.total_steps + 1) // 2
        if self.freeze_observers is not None:
            freeze = clock.steps(self.freeze_observers)
            self.check_end(clock, freeze, "freeze_observers")
        if freeze <= start:
            raise self.error(
                f"{self.freeze_observers!r} does not come after the start at {self.start!r}: observers see nothing",
                "freeze_observers",
            )
        norm = None if self.freeze_batch_norm is None else clock.steps(self.freeze_batch_norm)
        if norm is not None:
            self.check_end(clock, norm, "freeze_batch_norm")
        return _Times(observe, start, freeze, norm)

    def timeline(self, clock: Clock) -> Iterable[tuple[int, str, str]]:
        observe, start, freeze, norm = self._resolve(clock)
        if observe < start:
            yield observe, "quantization", "observers start"
        yield start, "quantization", "int8 fake-quantization starts"
        yield freeze, "quantization", "observers freeze"
        if norm is not None:
            yield norm, "quantization", "batch-norm statistics freeze"

    def changes(self, clock: Clock) -> Iterable[int]:
        return (self._resolve(clock)[0],)

    def prepare(self, run: Run) -> None:
        self._times = self._resolve(run.clock)
        self._model = run.model
        names = self._choose(run.model)
        try:
            prepared = quant.prepare_quantization(run.model, names)
        except ValueError as error:
            raise self.error(str(error)) from None
        refused = [name for name in prepared.skipped if self.targets is not None]
        if refused:
            raise self.error(f"{refused[0]!r} can't be quantized: {prepared.skipped[refused[0]]}", "targets")
        if not prepared.layers:
            raise self.error(f"{type(run.model).__name__} has no Linear or Conv2d layer to quantize")
        self._layers = prepared.layers

    def claims(self, run: Run) -> Iterable[Claim]:
        for name in self._layers:
            yield Claim(f"the quantization of {name}", self._times.observe, run.total_steps)

    def attach(self, run: Run) -> None:
        if lost := quant.unrounded_outputs(run.model):
            kind = type(run.model.get_submodule(lost[0])).__name__
            raise self.error(
                f"{lost[0]!r} became a new {kind} after engine.prepare(), and would not be rounded: convert it before"
            )
        self._check_model_came_too(run)
        self._act(run)
        norm = self._times.freeze_norm
        if norm is not None and norm <= run.step:  # resumed: the hold on the statistics is in no state dict
            quant.freeze_batch_norm(run.model)

    def _check_model_came_too(self, run: Run) -> None:
        """Ranges and phases are the model's own: without its state a resumed run would train float to the end."""
        if self._done >= self._times.start and not any(bool(q.enabled) for _, q in quant.quantizers(run.model)):
            raise RuntimeError(
                f"{self.name}: at step {run.step} layers are rounded already, but this model's quantizers are off: "
                "call model.load_state_dict(...) between engine.load_state_dict(...) and attach"
            )

    def step_end(self, run: Run) -> None:
        self._act(run)

    def detach(self, run: Run) -> None:
        if run.step <= self._times.start:
            self.finish_late(run, "quantization-aware training")
            raise self.error("training ended before a step with quantization was made", "start")
        if run.step < self._times.freeze:
            self.finish_late(run, "freezing the observers")
            self._freeze(run)

    def state_dict(self) -> dict[str, Any]:
        return {"done": self._done}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._done = state["done"]

    def apply_to(self, model: nn.Module) -> None:
        assert self._model is not None
        copies = dict(quant.quantizers(model))
        for name, quantizer in quant.quantizers(self._model):
            if name not in copies:
                raise RuntimeError(
                    "the EMA copy was made before its layers were: call engine.prepare() before that line"
                )
            copies[name].load_state_dict(quantizer.state_dict())

    def bake(self, model: nn.Module) -> None:
        quant.bake(model)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the quantized layers, once PREPARE is over."""
        return self._layers

    def _act(self, run: Run) -> None:
        """Do what is due since the last time: a step whose end was interrupted is made up for at the next."""
        observe, start, freeze, norm = self._times
        due = range(self._done + 1, run.step + 1)
        if observe < run.step and self._done < freeze:
            self._share_ranges(run)
        if observe in due:
            quant.set_observing(run.model, True)
        if start in due:
            quant.set_enabled(run.model, True)
        if freeze in due:
            self._freeze(run)
        if norm in due:
            quant.freeze_batch_norm(run.model)
        # 0: ranges are watched, 1: values are rounded besides, 2: ranges are frozen
        phases = [phase for phase, step in enumerate((observe, start, freeze)) if step in due]
        if phases:
            run.tell({f"{self.name}/phase": float(phases[-1])})
        if start <= run.step and self._done < freeze:
            # copies of the model follow at every step: an average of ranges that begins before they were seen is none
            run.copies_behind = True
        self._done = run.step

    def _share_ranges(self, run: Run) -> None:
        """Every process watched its share of the batch; a weight's range needs no more than the weight."""
        group = process_group()
        if group is not None:
            watching = (q for _, q in quant.quantizers(run.model) if q.observer.only_in_training)
            quant.share_ranges(watching, group)

    def _freeze(self, run: Run) -> None:
        """Let no range move any more; a layer that training never called has none and stays float."""
        layers = {name: run.model.get_submodule(name) for name in self._layers}
        unseen = [name for name, layer in layers.items() if not layer.get_submodule("input_quantizer").observed]
        if len(unseen) == len(layers):
            raise self.error("no layer was called in training mode, where ranges are watched: call model.train()")
        quant.set_observing(run.model, False)
        for name, quantizer in quant.quantizers(run.model):
            run.shared[f"the range of {name!r}"] = torch.stack((quantizer.minimum, quantizer.maximum))
        for name in unseen:
            quant.set_enabled(layers[name], False)
        if unseen:
            warnings.warn(
                f"{self.name}: {', '.join(unseen)} stayed float, since training never called "
                f"{'it' if len(unseen) == 1 else 'them'}: name such layers in 'exclude'",
                stacklevel=10,
            )

    def _choose(self, model: nn.Module) -> list[str]:
        known = {name: m for name, m in model.named_modules() if name and isinstance(m, (nn.Linear, nn.Conv2d))}
        # a layer answers to the name of its weight too, so that pruners and quantizers can share targets
        owners = {spelling: name for name in known for spelling in (name, f"{name}.weight")}
        if self.targets is None:
            chosen = [name for name in known if not _stays_float(model, name, known[name])]
        else:
            chosen = self._select(model, owners, self.targets, "targets")
        spared = self._select(model, owners, self.exclude, "exclude")
        return [name for name in chosen if name not in spared]

    def _select(self, model: nn.Module, owners: dict[str, str], targets: list[str], option: str) -> list[str]:
        try:
            found = select(list(owners), targets, what="Linear or Conv2d layer", owner=type(model).__name__)
        except ValueError as error:
            raise self.error(str(error), option) from None
        return list(dict.fromkeys(owners[name] for name in found))


def _stays_float(model: nn.Module, name: str, module: nn.Module) -> bool:
    """Whether a layer is the patch embedding, or the head as timm's `get_classifier` tells."""
    get_classifier = getattr(model, "get_classifier", None)
    heads = get_classifier() if callable(get_classifier) else None
    heads = heads if isinstance(heads, (tuple, list)) else [heads]
    return "patch_embed" in name.split(".") or any(head is module for head in heads)
