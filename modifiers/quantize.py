"""Int8 in training (quantization-aware) and after it."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor, nn

from ovit_engine import (
    Claim,
    Clock,
    Deployable,
    Exclusive,
    Row,
    Run,
    Scheduled,
    Surgical,
    Synchronized,
    Targets,
    Time,
    quant,
    register,
)
from ovit_engine.distributed.comm import world
from ovit_engine.modifiers._quantize_options import (
    DEFAULT_GROUPS,
    Activations,
    Chosen,
    Group,
    PostTraining,
    Preset,
    UnknownTargetError,
    Weights,
    choose,
    scheme,
)
from ovit_engine.quant.batch_norm import is_foldable
from ovit_engine.utils.suggest import listed
from ovit_engine.utils.warn import warn


class _Phases(NamedTuple):
    """The steps at which phases begin."""

    observe: int
    start: int
    freeze: int
    freeze_norm: int | None


@register("quantize")
class Quantize(Scheduled, Surgical, Deployable, Exclusive, Synchronized):
    """Trains with fake-quantized weights and inputs; export turns them into int8. `ovit ptq` does so without training.

    Unless `targets` say otherwise these are all Linear and Conv2d layers but those under the name `patch_embed` and the
    classifier head that timm's `get_classifier` tells; in other models name yours in `exclude`. Those two, the products
    of attention and the outputs of LayerNorm are `groups` to ask for. Softmax, GELU and residual adds stay float:
    rounding them costs vision transformers ten points and gains no time (specs/peers.md §4).
    """

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
    preset: Preset = Field(
        "cpu", description="cpu: int8 weights, uint8 inputs (x86 with VNNI); gpu: int8 both, no zero points (TensorRT)"
    )
    groups: list[Group] = Field(
        list(DEFAULT_GROUPS),
        description="what is quantized: linear and conv layers, patch_embed, head; besides, the "
        "products of attention, the outputs of layer_norm",
    )
    targets: Targets | None = Field(None, min_length=1, description='layers by name, or "re:" and a regular expression')
    exclude: Targets = Field(default_factory=list, description="layers that stay float")
    weights: Weights = Field(default_factory=Weights, description="how weights are quantized")
    activations: Activations = Field(default_factory=Activations, description="how inputs are quantized")
    ptq: PostTraining | None = Field(None, description="options of quantization without training")

    _layers: tuple[str, ...] = PrivateAttr(default=())
    _model: nn.Module | None = PrivateAttr(default=None)
    _done: int = PrivateAttr(default=-1)  # the last step whose phase is in force
    _reloaded: bool = PrivateAttr(default=False)  # whether the loop loaded a state since the last step
    _frozen: set[str] = PrivateAttr(default_factory=set)  # quantizers that round by a range that is frozen
    _moved: bool = PrivateAttr(default=False)  # whether ranges may have moved in the last event
    _frozen_at: int = PrivateAttr(default=-1)  # the step at which ranges froze
    _times: _Phases = PrivateAttr(default=_Phases(0, 0, 0, None))

    def _resolve(self, clock: Clock) -> _Phases:
        start = self.time_of(clock, "start")
        if start == clock.total_steps:
            raise self.too_short(
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
            freeze = self.time_of(clock, "freeze_observers")
        if freeze <= start:
            raise self.error(
                f"{self.freeze_observers!r} does not come after the start at {self.start!r}: observers see nothing",
                "freeze_observers",
            )
        norm = None if self.freeze_batch_norm is None else self.time_of(clock, "freeze_batch_norm")
        return _Phases(observe, start, freeze, norm)

    def timeline(self, clock: Clock) -> Iterable[Row]:
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
        self._install(run.model, self._choose(run.model), observer="moving_average")

    def claims(self, run: Run) -> Iterable[Claim]:
        for name in self._layers:
            yield Claim("quantization", name, self._times.observe, run.total_steps)

    def attach(self, run: Run) -> None:
        if self.ptq is not None:
            raise self.error(
                "these options are for quantization without training: run ovit ptq, or leave them out", "ptq"
            )
        if lost := quant.unrounded_outputs(run.model):
            kind = type(run.model.get_submodule(lost[0])).__name__
            raise self.error(
                f"{lost[0]!r} became a new {kind} after engine.prepare(), and would not be rounded: convert it before"
            )
        self._check_model_came_too(run)
        self._act(run)
        if self._done >= self._times.freeze:
            self._frozen = self._rounding(run.model)
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

    def reloaded(self, run: Run) -> None:
        self._reloaded = True
        observe, start, freeze, _ = self._times
        for _, quantizer in quant.quantizers(run.model):
            quantizer.enabled.fill_(self._done >= start)
            quantizer.observing.fill_(observe <= self._done < freeze)
            if self._done >= freeze:  # no range comes any more
                quantizer.enabled.logical_and_(quantizer.observed)

    def _check_reloaded(self, run: Run) -> None:
        """Not at once: weights of an earlier phase may be there for an evaluation, and go again."""
        if self._reloaded and (lost := self._frozen - self._rounding(run.model)):
            raise RuntimeError(
                f"{self.name}: ranges are frozen at step {run.step}, and the state that the loop loaded into the model "
                f"has none of {min(lost)!r}: load one of after quantization began, or go back with a new Engine that "
                "loads the engine's state of that step"
            )
        self._reloaded = False

    @staticmethod
    def _rounding(model: nn.Module) -> set[str]:
        return {name for name, quantizer in quant.quantizers(model) if bool(quantizer.enabled)}

    def step_begin(self, run: Run) -> None:
        self._check_reloaded(run)

    def step_end(self, run: Run) -> None:
        self._act(run)

    def detach(self, run: Run) -> None:
        self._check_reloaded(run)
        if run.step <= self._times.start:
            self.check_length(run, "quantization-aware training")
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

    @property
    def calibration_images(self) -> int:
        """How many images ranges are taken from without training."""
        return (self.ptq or PostTraining()).images

    @property
    def search(self) -> PostTraining | None:
        """The limits of the search that is asked for; None where none is."""
        return self.ptq if self.ptq is not None and self.ptq.search is not None else None

    @property
    def post_training_scheme(self) -> quant.Scheme:
        """What the options spell where there is no training."""
        return scheme(self.preset, self.weights, self.activations, observer="mse")

    def picked(self, exclude: Iterable[str], observer: str) -> "Quantize":
        """A copy with what a search picked in place of the search: layers that stay float besides, and an observer."""
        activations = self.activations.model_copy(update={"observer": observer})
        changes = {"exclude": [*self.exclude, *exclude], "activations": activations}
        assert self.ptq is not None
        copy = self.model_copy(update={**changes, "ptq": self.ptq.without_search()}, deep=True)
        copy._origins = self._origins
        return copy

    def quantize(self, model: nn.Module, batches: Sequence[tuple[Any, ...]]) -> tuple[str, ...]:
        """Quantize a trained model at once, in place, with ranges taken from `batches`; times play no part.

        Args:
            batches: positional arguments of the model, one tuple a batch.

        Returns:
            lines about what was done and what was left.

        Raises:
            RecipeError: as PREPARE, or `smooth` on a model that has nothing to smooth.
        """
        options = self.ptq or PostTraining()
        chosen = self._choose(model)
        notes = []
        if options.smooth is not None:
            with self.errors_at("ptq.smooth"):
                smoothed = quant.smooth(model, chosen.layers, batches, options.smooth)
            notes.append(smoothed.describe())
        self._install(model, chosen, observer="mse")
        unseen = quant.calibrate(model, batches)
        if unseen:
            notes.append(f"{', '.join(unseen)} stayed float: the calibration images never reached it")
        if options.bias_correction:
            count = quant.correct_biases(model, batches)
            notes.append(f"bias correction: {count} layers")
        return tuple(notes)

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
            run.report({f"{self.name}/phase": float(phases[-1])})
        self._moved = start <= run.step and self._done < freeze
        self._done = run.step

    def copies_are_behind(self, run: Run) -> bool:
        # at every step while ranges move: an average of ranges that begins before they were seen is none
        return self._moved

    def synchronized(self, run: Run) -> Mapping[str, Tensor]:
        if self._frozen_at != run.step:
            return {}
        ranges = quant.quantizers(run.model)
        return {f"the range of {name!r}": torch.stack((each.minimum, each.maximum)) for name, each in ranges}

    def _share_ranges(self, run: Run) -> None:
        """Every process watched its share of the batch; a weight's range needs no more than the weight."""
        watching = (q for _, q in quant.quantizers(run.model) if q.observer.only_in_training)
        quant.share_ranges(watching, world())

    def _freeze(self, run: Run) -> None:
        """Let no range move any more; a layer that training never called has none and stays float."""
        layers = [run.model.get_submodule(name) for name in self._layers]
        if not any(layer.get_submodule("input_quantizer").observed for layer in layers):
            raise self.error("no layer was called in training mode, where ranges are watched: call model.train()")
        quant.set_observing(run.model, False)
        self._frozen_at = run.step
        unseen = quant.disable_unobserved(run.model)
        self._frozen = self._rounding(run.model)
        if unseen:
            warn(
                f"{self.name}: {', '.join(unseen)} stayed float, since training never called "
                f"{'it' if len(unseen) == 1 else 'them'}: name such layers in 'exclude'"
            )

    def _choose(self, model: nn.Module) -> Chosen:
        if self.targets is not None:
            layers = [group for group in self.groups if group not in ("attention", "layer_norm")]
            if layers != list(DEFAULT_GROUPS):
                raise self.error("'targets' name the layers already: leave groups of layers as they are", "groups")
        try:
            chosen, missing = choose(model, self.groups, self.targets, self.exclude)
        except UnknownTargetError as error:
            raise self.error(str(error), error.option) from None
        if missing is not None and missing not in DEFAULT_GROUPS:
            raise self.error(f"{missing!r}: {type(model).__name__} has nothing that we know as such", "groups")
        return chosen

    def _install(self, model: nn.Module, chosen: Chosen, observer: str) -> None:
        """Put quantizers into a model."""
        spelled = scheme(self.preset, self.weights, self.activations, observer=observer)
        with self.errors_at():
            prepared = quant.prepare_quantization(
                model, chosen.layers, scheme=spelled, attention=chosen.attention, outputs=chosen.layer_norms
            )
        refused = [name for name in prepared.skipped if self.targets is not None]
        if refused:
            raise self.error(f"{refused[0]!r} can't be quantized: {prepared.skipped[refused[0]]}", "targets")
        if prepared.skipped:
            warn(f"{self.name}: {_counted(model, prepared.skipped)} stay float: they have a forward of their own")
        unknown = [] if self.targets is not None else quant.unquantized(model)
        if unknown:
            counted = _counted(model, unknown)
            warn(f"{self.name}: weights of {counted} stay float: only Linear and Conv2d layers are quantized")
        if not prepared.layers:
            raise self.error(f"{type(model).__name__} has no Linear or Conv2d layer to quantize")
        self._layers = prepared.layers
        if prepared.untraced and any(map(is_foldable, model.modules())):
            warn(
                f"{self.name}: torch.fx can't trace the model's code around {listed(prepared.untraced)}: batch-norms "
                "behind them are not folded into int8 convolutions and stay float, which is right but slower"
            )


def _counted(model: nn.Module, names: Iterable[str]) -> str:
    """Return "2 Conv2dSame ('stem', 'blocks.0.conv')": modules by kind and name."""
    names = list(names)
    kinds = Counter(type(model.get_submodule(name)).__name__ for name in names)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    return f"{counts} ({listed(names, shown=8)})"
