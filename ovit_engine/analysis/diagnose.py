"""`diagnose_file`: which layer and which part of it costs an int8 file its accuracy. Needs no PyTorch.

How much rounding changes an activation or a weight is measured by ONNX Runtime's `qdq_loss_debug`. What that costs the
logits is measured by running the file again with some of it in float. A layer's cost is the error that it alone makes
in an otherwise float file: the gain of leaving one in float in the int8 file would hide a broken layer behind another.
Layers are found by halving groups; one that makes less than 5 % of the file's error is not looked into.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from ovit_engine.analysis.diagnosis import Diagnosis, LayerCost, NotCompared, PartCost, RecipeChange, Score
from ovit_engine.analysis.qdq import (
    OBSERVERS,
    LayerWeight,
    QdqLayer,
    find_layers,
    rewrite,
    with_ranges,
)
from ovit_engine.analysis.qdq_errors import Feeds, input_errors, qdq_activations, weight_errors
from ovit_engine.certificate.check import MIN_AGREEMENT
from ovit_engine.certificate.kernels import open_session, run_outputs
from ovit_engine.certificate.measure import input_types
from ovit_engine.certificate.parity import Sample, same_class, take_sample, top1
from ovit_engine.certificate.stored import load_onnx

_IMAGES = 256

_RANGE_IMAGES = 64

# whose activations are in memory at once
_BATCH = 8

# of one activation and one batch that ranges are searched on
_VALUES = 2**15

# what a group must make of the whole error to be halved further
_SHARE = 0.05

# the error that the file may have left with the weights of its reference, of which biases may have been corrected
_LEFT = 0.01

# share of weights that may differ from the reference by more than rounding
_UNLIKE = 0.02


def diagnose_file(
    path: str | Path, data: Any, *, reference: str | Path | None = None, progress: Callable[[int], None] | None = None
) -> Diagnosis:
    """Measure what each part and each layer of an int8 file costs, and which changes of the recipe help.

    Args:
        data: as for `verify_file`; the first 256 images are used.
        reference: the float file that the int8 one was made from. Without it the file itself in float takes its place,
            and the cost of rounded weights and of sparsity can't be measured.
        progress: called before each run of the file or of a variant of it, with the number of runs so far.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: the file has no QuantizeLinear/DequantizeLinear pairs, or outputs or data do not fit.
    """
    model = load_onnx(Path(path))
    layers = find_layers(model)
    if not any(layer.roundings for layer in layers) and reference is None:
        raise ValueError(f"{Path(path).name} rounds no activations: give the float file with --reference")
    variants = _Variants(model, layers, take_sample(data, *input_types(model), limit=_IMAGES), progress)
    not_compared: NotCompared | None = "no reference"
    if reference is not None:
        not_compared = variants.take_reference(load_onnx(Path(reference)), Path(reference))
    outputs = [layer.output for layer in layers]
    whole = variants.run(rounded=outputs)
    costs = _bisect(outputs, lambda group: variants.run(rounded=group).noise, _SHARE * whole.noise)
    suspects = sorted((output for output in costs if costs[output]), key=lambda output: -costs[output])
    gains = {each: variants.run(rounded=set(outputs) - {each}).agreement - whole.agreement for each in suspects}
    inputs = input_errors(model, variants.floated(outputs), layers, next(variants.batches(_BATCH)))
    weights = {} if not_compared else weight_errors(layers, variants.weights)
    rows = [
        LayerCost(
            name=layer.name,
            op=layer.op,
            weight_sqnr=weights.get(layer.output),
            input_sqnr=inputs.get(layer.output, (None, None))[0],
            total_sqnr=inputs.get(layer.output, (None, None))[1],
            share=costs[layer.output] / whole.noise if layer.output in gains else None,
            gain=gains.get(layer.output),
        )
        for layer in layers
    ]
    return Diagnosis(
        file=Path(path).name,
        images=len(variants.sample),
        reference=None if reference is None else Path(reference).name,
        whole=whole,
        float_accuracy=variants.score(variants.exact).accuracy,
        parts=tuple(variants.parts(with_weights=not_compared is None)),
        layers=tuple(rows),
        changes=() if whole.agreement >= MIN_AGREEMENT else tuple(_find_changes(variants, suspects, whole)),
        not_compared=not_compared,
    )


class _Variants:
    """The file with some of it in float, run on the images and compared with the float logits."""

    def __init__(
        self,
        model: onnx.ModelProto,
        layers: Sequence[QdqLayer],
        sample: Sample,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self._progress, self._runs = progress, 0
        self.model, self.layers, self.sample = model, layers, sample
        self.outputs = [layer.output for layer in layers]
        self.stored = {layer.output: layer.weight for layer in layers if layer.weight is not None}
        # what a layer has for a weight where it is left in float
        self.weights = {output: weight.values for output, weight in self.stored.items()}
        self.exact = self._logits(self.floated(self.outputs))

    def take_reference(self, reference: onnx.ModelProto, path: Path) -> NotCompared | None:
        """Compare with another float file from now on; its weights too, if the file's were made by rounding them."""
        found = run_outputs(open_session(path), self.sample.inputs)
        if found.shape != self.exact.shape:
            raise ValueError(f"{path.name} gives outputs of shape {found.shape}, the file {self.exact.shape}")
        self.exact = found
        weights = match_weights(self.layers, find_layers(reference))
        if isinstance(weights, str):
            return weights
        unlike = sum(int(is_other(self.stored[output], weights[output]).sum()) for output in weights)
        if unlike > _UNLIKE * sum(weight.size for weight in weights.values()):
            return "other weights"
        if self._variant(self.outputs, {**self.weights, **weights}).noise > _LEFT:
            return "other outputs"
        self.weights |= weights
        return None

    def run(self, *, rounded: Collection[str]) -> Score:
        """The file with only the layers `rounded` as they are and all others in float."""
        return self.score(self._logits(self.floated(set(self.outputs).difference(rounded))))

    def score(self, logits: np.ndarray) -> Score:
        """Logits compared with the exact ones."""
        exact, labels = self.exact.astype(np.float64), self.sample.labels
        with np.errstate(invalid="ignore", over="ignore"):
            noise = float(np.square(logits - exact).sum() / max(np.square(exact).sum(), 1e-30))
        return Score(
            agreement=same_class(logits, exact),
            noise=noise if np.isfinite(noise) else float("inf"),
            accuracy=top1(logits, labels),
        )

    def parts(self, *, with_weights: bool) -> Iterator[PartCost]:
        """What activations, rounded weights and sparsity cost: each alone, and what the file is without it."""
        if not with_weights:
            yield PartCost("activations", self.run(rounded=self.outputs), self.run(rounded=[]))
            return
        file = {output: weight.values for output, weight in self.stored.items()}
        pruned = {output: is_pruned(weight, self.weights[output]) for output, weight in self.stored.items()}
        rounded = {output: np.where(pruned[output], self.weights[output], file[output]) for output in file}
        sparse = {output: np.where(pruned[output], 0, self.weights[output]) for output in file}
        yield PartCost("activations", self._variant([], self.weights), self._variant(self.outputs, file))
        yield PartCost("weights", self._variant(self.outputs, rounded), self._variant([], sparse))
        if any(mask.any() for mask in pruned.values()):
            yield PartCost("sparsity", self._variant(self.outputs, sparse), self._variant([], rounded))

    def with_observer(self, outputs: Collection[str], observer: str) -> Score:
        """The file with the ranges of another observer at the inputs of layers `outputs`."""
        chosen = [layer for layer in self.layers if layer.output in outputs]
        taps = {rounding.quantizer: rounding.tap for layer in chosen for rounding in layer.roundings}
        seen: dict[str, list[np.ndarray]] = {quantizer: [] for quantizer in taps}
        for found in qdq_activations(self.floated(self.outputs), chosen, self.batches(_RANGE_IMAGES)):
            for quantizer, tap in taps.items():
                seen[quantizer].append(thin(found[tap][0]))
        values = {quantizer: np.concatenate(parts) for quantizer, parts in seen.items()}
        return self.score(self._logits(with_ranges(self.model, values, observer)))

    def floated(self, outputs: Collection[str]) -> onnx.ModelProto:
        """The file with layers `outputs` in float. Their weights are dequantized here: with a DequantizeLinear before
        a float product ONNX Runtime may choose a kernel that rounds the activations all the same."""
        weights = {output: self.weights[output] for output in outputs if output in self.weights}
        return rewrite(self.model, float_inputs=outputs, weights=weights, layers=self.layers)

    def _variant(self, float_inputs: Collection[str], weights: Mapping[str, np.ndarray]) -> Score:
        changed = rewrite(self.model, float_inputs=float_inputs, weights=weights, layers=self.layers)
        return self.score(self._logits(changed))

    def _logits(self, model: onnx.ModelProto) -> np.ndarray:
        """The first output for all images."""
        if self._progress is not None:
            self._progress(self._runs)
        self._runs += 1
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "variant.onnx"
            onnx.save(model, file)
            return run_outputs(open_session(file), self.sample.inputs)

    def batches(self, images: int) -> Iterator[Feeds]:
        """The first images; of a file of fixed batch at least one batch, and whole ones only."""
        shapes, _ = input_types(self.model)
        size, names = shapes[0][0] or _BATCH, [value.name for value in self.model.graph.input]
        for start in range(0, max(min(images, len(self.sample)) - size + 1, 1), size):
            arrays = (array[start : start + size] for array in self.sample.inputs)
            yield dict(zip(names, arrays, strict=True))


def match_weights(layers: Sequence[QdqLayer], reference: Sequence[QdqLayer]) -> dict[str, np.ndarray] | NotCompared:
    """The float weight of each layer, by the layer's output.

    Layers are matched by name; by order where names differ and both files have as many weights.
    """
    wanted = [layer for layer in layers if layer.weight is not None]
    offered = {layer.name: layer.weight.values for layer in reference if layer.weight is not None}
    names = [layer.name for layer in wanted]
    if not offered.keys() >= set(names):
        if len(names) != len(offered):
            return "missing layer"
        names = list(offered)
    found = {layer.output: offered[name] for layer, name in zip(wanted, names, strict=True)}
    fits = all(layer.weight is None or layer.weight.values.shape == found[layer.output].shape for layer in wanted)
    return found if fits else "other shape"


def is_other(weight: LayerWeight, reference: np.ndarray) -> np.ndarray:
    """bool: elements that are neither the reference's value, rounded or cut off at the last level, nor pruned."""
    distance = np.abs(weight.values - reference)
    least, is_inside = 1e-6 * np.abs(reference).max(), np.True_
    if weight.level is not None:
        levels = np.abs(weight.values / weight.level)
        least, is_inside = 0.51 * weight.level, levels < levels.max() - 0.5
    found: np.ndarray = (weight.values != 0) & (distance > least) & is_inside
    return found


def is_pruned(weight: LayerWeight, reference: np.ndarray) -> np.ndarray:
    """bool: zeros of the file that rounding does not explain: the reference's value is more than half a level."""
    least = 0.0 if weight.level is None else 0.5 * weight.level * (1 + 1e-5)
    found: np.ndarray = (weight.values == 0) & (np.abs(reference) > least)
    return found


def _bisect(outputs: Sequence[str], noise_of: Callable[[Sequence[str]], float], least: float) -> dict[str, float]:
    """Error of each layer alone; 0 where it, or a group that it is in, makes less than `least`."""
    costs = dict.fromkeys(outputs, 0.0)
    groups = [list(outputs)]
    while groups:
        group = groups.pop()
        noise = noise_of(group)
        if not noise or noise < least:
            continue
        if len(group) == 1:
            costs[group[0]] = noise
        else:
            groups += [group[: len(group) // 2], group[len(group) // 2 :]]
    return costs


def _find_changes(variants: _Variants, suspects: Sequence[str], whole: Score) -> list[RecipeChange]:
    """What brings agreement back: the fewest suspects in float, the costliest first; other ranges of their inputs.

    The best comes first. Without suspects the ranges of all layers are tried.
    """
    chosen, score = variants.outputs, whole
    for count in range(1, len(suspects) + 1):
        chosen = list(suspects[:count])
        score = variants.run(rounded=set(variants.outputs).difference(chosen))
        if score.agreement >= MIN_AGREEMENT:
            break
    names = tuple(dict.fromkeys(layer.recipe_name or layer.name for layer in variants.layers if layer.output in chosen))
    scores: dict[str | None, Score] = {None: score}
    scores |= {observer: variants.with_observer(chosen, observer) for observer in OBSERVERS}
    found = [RecipeChange(layers=names, observer=observer, score=score) for observer, score in scores.items()]
    helpful = [change for change in found if change.score.agreement > whole.agreement]
    return sorted(helpful, key=lambda change: -change.score.agreement)


def layer_costs(model: onnx.ModelProto, sample: Sample, *, least: float) -> dict[str, float]:
    """Return the error of the logits that each layer of an int8 file makes alone, by the name of its weight.

    0 for those that make less than `least`, as a share of the squares of the logits.
    """
    layers = find_layers(model)
    variants = _Variants(model, layers, sample)
    costs = _bisect([layer.output for layer in layers], lambda group: variants.run(rounded=group).noise, least)
    return {layer.weight.name: costs[layer.output] for layer in layers if layer.weight is not None}


def thin(values: np.ndarray) -> np.ndarray:
    """Return some of the values, drawn from all of them, and their extremes: a stride would see few of the channels."""
    flat = values.ravel()
    if flat.size <= _VALUES:
        return flat
    return np.append(np.random.default_rng(0).choice(flat, _VALUES), [flat.min(), flat.max()])
