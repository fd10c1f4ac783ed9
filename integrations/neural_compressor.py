"""Quantization after training within a given loss: Neural Compressor searches, we write and check what it picked.

Neural Compressor tries configurations of its static int8 quantization (PT2E: `torch.export`, torchao's x86 quantizer)
and measures the accuracy of each; the first within the loss is quantized anew by us and written with int8 weights. Its
own model is not used: it keeps float weights (it ignores `fold_quantize`). Names that it does not know it ignores, and
it returns a model where no trial passed: both are errors here. Measured in specs/peers.md §4.
"""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ovit_engine.certificate import ExportError
from ovit_engine.core.modifier import Modifier
from ovit_engine.core.recipe import Recipe
from ovit_engine.masking.masks import Masks
from ovit_engine.post_training.ptq import Compared, Quantizes, ptq, quantize_of
from ovit_engine.quant import Scheme, layer_sensitivity
from ovit_engine.utils.files import staged

# images that trials are measured on: one of them is 0.2 % of accuracy
_IMAGES = 512
_LEAST_IMAGES = 32
_BATCH = 32
# its names of observers, and ours that take the range in the same way: its "kl" minimizes the squared error
_OBSERVERS = {"moving_average": "minmax", "mse": "kl"}


class Limits(Protocol):
    """What a search may cost."""

    tolerable_loss: float
    max_trials: int


class HasObserver(Protocol):
    """The options of activations."""

    observer: str | None


class Searched(Quantizes, Protocol):
    """The part of `quantize` that a search needs."""

    activations: HasObserver

    @property
    def search(self) -> Limits | None: ...

    @property
    def post_training_scheme(self) -> Scheme: ...

    def picked(self, exclude: Iterable[str], observer: str) -> Modifier: ...


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One configuration: an observer of activations, and the layers that stay float."""

    observer: str
    exclude: tuple[str, ...] = ()

    def describe(self) -> str:
        """In one line."""
        return f"observer {self.observer}, {len(self.exclude)} layers float"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to: accuracies are top-1 on `images` training images that gave no ranges."""

    picked: Candidate
    trials: tuple[tuple[Candidate, float], ...]
    float_accuracy: float
    images: int

    def lines(self) -> list[str]:
        """For people: a line a trial, and what was picked."""
        found = [
            f"trial {number}: {candidate.describe()}: accuracy {accuracy:.2%} "
            f"(float {self.float_accuracy:.2%}, {self.images} images)"
            for number, (candidate, accuracy) in enumerate(self.trials, 1)
        ]
        dumped = yaml.safe_dump(list(self.picked.exclude), default_flow_style=True, width=10**6).strip()
        names = f", exclude: {dumped}" if self.picked.exclude else ""
        return [*found, f"picked: activations: {{observer: {self.picked.observer}}}{names}"]


def search_batches(images: Dataset[Any], skip: int, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """(images, classes) batches from those that `calibration_batches` leaves when it takes `skip` with that seed.

    Raises:
        ValueError: fewer than 32 are left.
    """
    total = len(images)  # type: ignore[arg-type]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed), device="cpu")[skip : skip + _IMAGES]
    if len(order) < _LEAST_IMAGES:
        raise ValueError(
            f"a search measures accuracy on training images that give no ranges: of {total} {len(order)} are left, "
            f"{_LEAST_IMAGES} needed: lower 'ptq.images' ({skip})"
        )
    return [(batch, labels) for batch, labels, *_ in DataLoader(Subset(images, order.tolist()), batch_size=_BATCH)]


def search_ptq(
    model: nn.Module,
    recipe: Recipe,
    batches: Sequence[tuple[Tensor, ...]],
    path: str | Path,
    *,
    labelled: Sequence[tuple[Tensor, Tensor]],
    example_inputs: Tensor,
    data: Iterable[Any],
    masks: Masks | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> Compared:
    """`integrations.ptq.ptq` with the configuration that Neural Compressor picks, within its `tolerable_loss`.

    Args:
        labelled: (images, classes) batches that trials are measured on; see `search_batches`.

    Raises:
        ExportError: as `ptq`, or the file loses more on `data` than `tolerable_loss`; nothing is written.
        ValueError: no configuration passed, or `data` without classes.
        ModuleNotFoundError: Neural Compressor is not installed.
    """
    path = Path(path)
    quantize = cast(Searched, quantize_of(recipe))
    limits = _limits_of(quantize)
    found = search(model, quantize, batches, labelled)
    modifier = quantize.picked(found.picked.exclude, found.picked.observer)
    recipe = replace(
        recipe, modifiers=tuple(modifier if each.name == modifier.name else each for each in recipe.modifiers)
    )
    with staged(path.absolute().parent) as folder:
        compared = ptq(
            model,
            recipe,
            batches,
            folder / path.name,
            example_inputs=example_inputs,
            data=data,
            masks=masks,
            preprocessing=preprocessing,
        )
        exact, rounded = compared.float_accuracy, compared.int8_accuracy
        if exact is None or rounded is None:
            raise ValueError("a search within a loss of accuracy needs data with classes")
        if not passes(rounded, exact, limits.tolerable_loss):
            raise ExportError(
                f"{path.name} loses too much",
                [f"accuracy {exact:.2%} float, {rounded:.2%} int8: tolerable_loss is {limits.tolerable_loss:g} of it"],
            )
        for file in sorted(folder.iterdir(), key=lambda file: file.name == path.name):  # the model appears last
            file.replace(path.with_name(file.name))
    return replace(compared, notes=(*found.lines(), *compared.notes))


def search(
    model: nn.Module,
    quantize: Searched,
    batches: Sequence[tuple[Tensor, ...]],
    labelled: Sequence[tuple[Tensor, Tensor]],
) -> Found:
    """The first configuration of Neural Compressor within the loss; the model stays as it is.

    Raises:
        ValueError: no trial passed, Neural Compressor quantized other layers than it was told, or the float model gets
            no image right.
        ModuleNotFoundError: Neural Compressor is not installed.
    """
    limits = _limits_of(quantize)
    if any(len(batch) != 1 for batch in batches):
        raise ValueError("a search takes models of one input")
    rounded = deepcopy(model)
    quantize.quantize(rounded, batches)
    sensitivity = layer_sensitivity(rounded, batches[:2])
    ranked = sorted(sensitivity, key=lambda name: -sensitivity[name])
    given = quantize.activations.observer
    observers = list(_OBSERVERS) if given is None else [given]
    wrong = [observer for observer in observers if observer not in _OBSERVERS]
    if wrong:
        raise ValueError(
            f"Neural Compressor has no observer {wrong[0]!r}: take {' or '.join(map(repr, _OBSERVERS))}, "
            "or leave it open"
        )
    candidates = make_candidates(ranked, observers, limits.max_trials)
    return _Search(ranked, candidates, quantize.post_training_scheme, labelled).run(
        model, [batch for (batch,) in batches], limits.tolerable_loss
    )


def make_candidates(ranked: Sequence[str], observers: Sequence[str], count: int) -> list[Candidate]:
    """The first `count` of: no layer float, the most sensitive one, two, four ..., each with every observer."""
    found: list[Candidate] = []
    spared = 0
    while len(found) < count and spared < len(ranked):
        found += [Candidate(observer=observer, exclude=tuple(ranked[:spared])) for observer in observers]
        spared = max(1, 2 * spared)
    return found[:count]


def passes(accuracy: float, float_accuracy: float, tolerable_loss: float) -> bool:
    """Whether the loss, relative to the float accuracy, is tolerable: Neural Compressor's own rule."""
    return accuracy >= float_accuracy * (1 - tolerable_loss)


def _limits_of(quantize: Searched) -> Limits:
    if quantize.search is None:
        raise ValueError("the recipe asks for no search: quantize: {ptq: {search: neural_compressor}}")
    return quantize.search


class _Search:
    """One run of Neural Compressor's `autotune`, watched."""

    def __init__(
        self,
        layers: Sequence[str],
        candidates: Sequence[Candidate],
        scheme: Scheme,
        labelled: Sequence[tuple[Tensor, Tensor]],
    ) -> None:
        self.layers, self.candidates, self.scheme, self.labelled = layers, candidates, scheme, labelled
        self.trials: list[tuple[Candidate, float]] = []
        self.baseline: float | None = None

    def run(self, model: nn.Module, calibration: Sequence[Tensor], tolerable_loss: float) -> Found:
        """Search. See `search`."""
        size = len(calibration[0])
        try:
            with _quiet():
                from neural_compressor.torch.export import export  # type: ignore[import-untyped]
                from neural_compressor.torch.quantization import (  # type: ignore[import-untyped]
                    TuningConfig,
                    autotune,
                )
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"'search: neural_compressor' needs pip install 'neural-compressor[pt]>=3.8' ({error.name} is missing)"
            ) from error
        with _quiet():
            exported = export(deepcopy(model).cpu().eval(), (calibration[0],))
            config = TuningConfig(
                config_set=[self._config(candidate) for candidate in self.candidates],
                tolerable_loss=tolerable_loss,
                max_trials=len(self.candidates),
            )
            autotune(
                exported,
                config,
                eval_fn=lambda trial: self._evaluate(trial, size),
                run_fn=lambda trial: [trial(_filled(batch, size)) for batch in calibration],
                example_inputs=(calibration[0],),
            )
        return self._judge(tolerable_loss)

    def _config(self, candidate: Candidate) -> Any:
        """Everything is float but the layers named: what it quantizes by itself, we do not."""
        from neural_compressor.torch.quantization import StaticQuantConfig

        config = StaticQuantConfig(w_dtype="fp32", act_dtype="fp32")
        symmetric = self.scheme.activations.symmetric
        int8 = {
            "w_granularity": "per_channel" if self.scheme.per_channel else "per_tensor",
            "act_dtype": "int8" if symmetric else "uint8",
            "act_sym": symmetric,
            "act_algo": _OBSERVERS[candidate.observer],
        }
        for name in self.layers:
            if name not in candidate.exclude:
                config.set_local(name, StaticQuantConfig(**int8))
        return config

    @torch.no_grad()
    def _evaluate(self, trial: nn.Module, size: int) -> float:
        """Top-1 of one trial; its first call is of the float model."""
        right = sum(
            int((trial(_filled(images, size))[: len(images)].argmax(-1) == labels).sum())
            for images, labels in self.labelled
        )
        accuracy = right / self.images
        if self.baseline is None:
            self.baseline = accuracy
            if not right:
                raise ValueError(f"the float model gets none of {self.images} images right: there is nothing to keep")
            return accuracy
        candidate = self.candidates[len(self.trials)]
        _check_layers(quantized_layers(trial), set(self.layers) - set(candidate.exclude))
        self.trials.append((candidate, accuracy))
        return accuracy

    def _judge(self, tolerable_loss: float) -> Found:
        """What it returned says nothing: it returns its best model where none passed."""
        assert self.baseline is not None, "Neural Compressor evaluated nothing"
        for candidate, accuracy in self.trials:
            if passes(accuracy, self.baseline, tolerable_loss):
                return Found(
                    picked=candidate, trials=tuple(self.trials), float_accuracy=self.baseline, images=self.images
                )
        candidate, accuracy = max(self.trials, key=lambda trial: trial[1])
        raise ValueError(
            f"none of {len(self.trials)} trials of Neural Compressor keeps the accuracy of {self.baseline:.2%} within "
            f"a relative loss of {tolerable_loss:g}; the best keeps {accuracy:.2%} ({candidate.describe()}): raise "
            "'ptq.max_trials' or 'ptq.tolerable_loss', or ask ovit diagnose which layer costs it"
        )

    @property
    def images(self) -> int:
        """How many images a trial is measured on."""
        return sum(len(labels) for _, labels in self.labelled)


def quantized_layers(exported: nn.Module) -> set[str]:
    """Names of the modules whose Linear or Conv2d reads a rounded weight and a rounded input, in a converted graph."""
    operators = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)
    found = set()
    for node in cast(torch.fx.GraphModule, exported).graph.nodes:
        if node.op != "call_function" or node.target not in operators:
            continue
        if all("dequantize" in str(argument.target) for argument in node.args[:2]):
            stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
            found.add(str(stack[-1][0]))
    return found


def _check_layers(found: set[str], wanted: set[str]) -> None:
    """Raise ValueError where an option was ignored."""
    if found == wanted:
        return
    left, more = sorted(wanted - found), sorted(found - wanted)
    parts = [f"left {', '.join(left)} float"] * bool(left) + [f"quantized {', '.join(more)} too"] * bool(more)
    raise ValueError(f"Neural Compressor did not do as it was told: it {' and '.join(parts)}; name those in 'exclude'")


def _filled(batch: Tensor, size: int) -> Tensor:
    """The exported model takes batches of one size: repeat the last image."""
    missing = max(0, size - len(batch))
    return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])]) if missing else batch


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Its log prints every configuration and a table a trial; errors still show."""
    # a filter, because it sets its level again when it is imported; _pytree's warning is of torchao's import
    logs = [logging.getLogger(name) for name in ("neural_compressor", "torch.utils._pytree")]
    for log in logs:
        log.addFilter(_is_error)
    try:
        yield
    finally:
        for log in logs:
            log.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
