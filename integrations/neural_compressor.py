"""Neural Compressor's search for the layers that stay float and the observer of activations.

`autotune` quantizes the exported model (PT2E, torchao's x86 quantizer) by one configuration after another and stops at
the first whose accuracy is within the tolerable loss. We take its choice and not its model, which keeps float weights
(it ignores `fold_quantize`): `ovit ptq` quantizes again with our own quantizers. Neural Compressor ignores layer names
it does not know and returns a model even if no trial passed; both are errors here.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
import yaml
from torch import Tensor, nn

from ovit_engine.modifiers.quantize import Quantize
from ovit_engine.quant import Scheme, layer_sensitivity
from ovit_engine.utils.console import errors_only

# our name of an observer -> its name of one that takes the same range: its "kl" minimizes the squared error
_OBSERVERS = {"moving_average": "minmax", "mse": "kl"}


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One configuration: an observer of activations, and the layers that stay float."""

    observer: str
    exclude: tuple[str, ...] = ()

    def describe(self) -> str:
        """Return the configuration in one line."""
        return f"observer {self.observer}, {len(self.exclude)} layers float"


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search picked; accuracies are top-1 on `images` training images that no range was taken from."""

    picked: Configuration
    trials: tuple[tuple[Configuration, float], ...]
    float_accuracy: float
    images: int

    def lines(self) -> list[str]:
        """Return a line for each trial, and one for the choice."""
        found = [
            f"trial {number}: {candidate.describe()}: accuracy {accuracy:.2%} "
            f"(float {self.float_accuracy:.2%}, {self.images} images)"
            for number, (candidate, accuracy) in enumerate(self.trials, 1)
        ]
        dumped = yaml.safe_dump(list(self.picked.exclude), default_flow_style=True, width=10**6).strip()
        names = f", exclude: {dumped}" if self.picked.exclude else ""
        return [*found, f"picked: activations: {{observer: {self.picked.observer}}}{names}"]


def search(
    model: nn.Module,
    quantize: Quantize,
    batches: Sequence[tuple[Tensor, ...]],
    labelled: Sequence[tuple[Tensor, Tensor]],
) -> SearchResult:
    """Return the first configuration within the tolerable loss; the model stays as it is.

    Args:
        quantize: a modifier with `ptq: {search: neural_compressor}`.
        batches: calibration images, one tuple for each batch.
        labelled: (images, classes) batches on which trials are measured.

    Raises:
        ValueError: no trial passed, Neural Compressor quantized other layers than asked, or the float model gets no
            image right.
    """
    limits = quantize.search
    assert limits is not None
    if any(len(batch) != 1 for batch in batches):
        raise ValueError("a search takes models of one input")
    layers = _by_sensitivity(model, quantize, batches)
    candidates = make_candidates(layers, _observers(quantize), limits.max_trials)
    calibration = [batch for (batch,) in batches]
    images = sum(len(labels) for _, labels in labelled)
    accuracies: list[float] = []  # of the float model, then of each trial

    def evaluate(trial: nn.Module) -> float:
        accuracies.append(_correct(trial, labelled, len(calibration[0])) / images)
        if len(accuracies) > 1:
            _check_layers(quantized_layers(trial), set(layers) - set(candidates[len(accuracies) - 2].exclude))
        elif not accuracies[0]:
            raise ValueError(f"the float model gets none of {images} images right: there is no accuracy to keep")
        return accuracies[-1]

    with errors_only("neural_compressor", "torch.utils._pytree"):  # a warning of torchao's import
        from neural_compressor.torch.export import export  # type: ignore[import-untyped]
        from neural_compressor.torch.quantization import TuningConfig, autotune  # type: ignore[import-untyped]

        configs = [_config(layers, candidate, quantize.post_training_scheme) for candidate in candidates]
        autotune(
            export(deepcopy(model).cpu().eval(), (calibration[0],)),
            TuningConfig(config_set=configs, tolerable_loss=limits.tolerable_loss, max_trials=len(configs)),
            eval_fn=evaluate,
            run_fn=lambda trial: [trial(_filled(batch, len(calibration[0]))) for batch in calibration],
            example_inputs=(calibration[0],),
        )
    trials = tuple(zip(candidates, accuracies[1:], strict=False))  # it stops at the first that passes
    passing = [candidate for candidate, accuracy in trials if passes(accuracy, accuracies[0], limits.tolerable_loss)]
    if not passing:
        candidate, accuracy = max(trials, key=lambda trial: trial[1])
        raise ValueError(
            f"none of {len(trials)} trials of Neural Compressor keeps the accuracy of {accuracies[0]:.2%} within a "
            f"relative loss of {limits.tolerable_loss:g}; the best keeps {accuracy:.2%} ({candidate.describe()}): "
            "raise 'ptq.max_trials' or 'ptq.tolerable_loss', or ask ovit diagnose which layer costs it"
        )
    return SearchResult(picked=passing[0], trials=trials, float_accuracy=accuracies[0], images=images)


def make_candidates(ranked: Sequence[str], observers: Sequence[str], count: int) -> list[Configuration]:
    """Return the first `count` of: no layer float, the most sensitive one, two, four ..., each with every observer."""
    found: list[Configuration] = []
    spared = 0
    while len(found) < count and spared < len(ranked):
        found += [Configuration(observer=observer, exclude=tuple(ranked[:spared])) for observer in observers]
        spared = max(1, 2 * spared)
    return found[:count]


def passes(accuracy: float, float_accuracy: float, tolerable_loss: float) -> bool:
    """Return whether the loss, relative to the float accuracy, is tolerable: Neural Compressor's own rule."""
    return accuracy >= float_accuracy * (1 - tolerable_loss)


def quantized_layers(exported: nn.Module) -> set[str]:
    """Return the modules whose Linear or Conv2d reads a rounded weight and a rounded input, in a converted graph."""
    operators = (torch.ops.aten.linear.default, torch.ops.aten.conv2d.default)
    found = set()
    for node in cast(torch.fx.GraphModule, exported).graph.nodes:
        if node.op != "call_function" or node.target not in operators:
            continue
        if all("dequantize" in str(argument.target) for argument in node.args[:2]):
            stack = list((node.meta.get("nn_module_stack") or {"": ("", None)}).values())
            found.add(str(stack[-1][0]))
    return found


def _by_sensitivity(model: nn.Module, quantize: Quantize, batches: Sequence[tuple[Tensor, ...]]) -> list[str]:
    """Return the layers that `quantize` rounds, the most sensitive first."""
    rounded = deepcopy(model)
    quantize.quantize(rounded, batches)
    sensitivity = layer_sensitivity(rounded, batches[:2])
    return sorted(sensitivity, key=lambda name: -sensitivity[name])


def _observers(quantize: Quantize) -> list[str]:
    given = quantize.activations.observer
    if given is not None and given not in _OBSERVERS:
        known = " or ".join(map(repr, _OBSERVERS))
        raise ValueError(f"Neural Compressor has no observer {given!r}: take {known}, or omit it")
    return list(_OBSERVERS) if given is None else [given]


def _config(layers: Sequence[str], candidate: Configuration, scheme: Scheme) -> Any:
    """Return its configuration, in which everything is float but the layers named."""
    from neural_compressor.torch.quantization import StaticQuantConfig

    config = StaticQuantConfig(w_dtype="fp32", act_dtype="fp32")
    symmetric = scheme.activations.symmetric
    int8 = {
        "w_granularity": "per_channel" if scheme.per_channel else "per_tensor",
        "act_dtype": "int8" if symmetric else "uint8",
        "act_sym": symmetric,
        "act_algo": _OBSERVERS[candidate.observer],
    }
    for name in layers:
        if name not in candidate.exclude:
            config.set_local(name, StaticQuantConfig(**int8))
    return config


@torch.no_grad()
def _correct(model: nn.Module, labelled: Sequence[tuple[Tensor, Tensor]], size: int) -> int:
    """Return how many images an exported model for batches of `size` classifies correctly."""
    return sum(
        int((model(_filled(images, size))[: len(images)].argmax(-1) == labels).sum()) for images, labels in labelled
    )


def _check_layers(found: set[str], wanted: set[str]) -> None:
    """Raise ValueError if Neural Compressor ignored an option."""
    left, more = sorted(wanted - found), sorted(found - wanted)
    if left or more:
        parts = [f"left {', '.join(left)} float"] * bool(left) + [f"quantized {', '.join(more)} too"] * bool(more)
        raise ValueError(f"Neural Compressor ignored an option: it {' and '.join(parts)}; name those in 'exclude'")


def _filled(batch: Tensor, size: int) -> Tensor:
    """Return `batch` with its last image repeated: the exported model takes batches of one size."""
    missing = max(0, size - len(batch))
    return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])]) if missing else batch
