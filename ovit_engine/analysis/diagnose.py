"""``diagnose``: which layer, and which part of it, costs an int8 file its accuracy. NumPy, onnx and onnxruntime alone.

Everything is measured by running the file again with some of it in float. A layer's cost is the error that it alone
makes in an otherwise float file: the gain of leaving one float in the int8 file would hide a broken layer behind
another. Layers are found by halving groups; one that makes less than 5 % of the file's error is not looked into.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ovit_engine.analysis.diagnosis import Diagnosis, LayerCost, Mend, PartCost, Score
from ovit_engine.analysis.qdq import (
    OBSERVERS,
    Layer,
    Weight,
    find_layers,
    quantizer_range,
    rerange,
    rewrite,
    with_twins,
)
from ovit_engine.certificate.check import MIN_AGREEMENT
from ovit_engine.certificate.kernels import open_session, run_outputs
from ovit_engine.certificate.measure import input_types
from ovit_engine.certificate.parity import Sample, take_sample


def match_weights(layers: Sequence[Layer], reference: Sequence[Layer]) -> dict[str, np.ndarray] | str:
    """The float weight of each layer as that layer reads it, by the layer's output; a line where there is none.

    By name; by order where names differ and both files have as many weights.
    """
    wanted = [layer for layer in layers if layer.weight is not None]
    offered = [layer for layer in reference if layer.weight is not None]
    by_name = {layer.name: layer for layer in offered}
    pairs = [(layer, by_name.get(layer.name)) for layer in wanted]
    if any(other is None for _, other in pairs):
        if len(wanted) != len(offered):
            missing = next(layer.name for layer, other in pairs if other is None)
            return f"the reference has no weight {missing!r}"
        pairs = list(zip(wanted, offered, strict=True))
    found = {}
    for layer, other in pairs:
        assert other is not None
        assert layer.weight is not None
        assert other.weight is not None
        values = other.weight.values
        if _is_in_out(layer) != _is_in_out(other):
            values = np.swapaxes(values, -1, -2)
        if values.shape != layer.weight.values.shape:
            return f"{layer.name!r} is {list(layer.weight.values.shape)}, in the reference {list(values.shape)}"
        found[layer.output] = values
    return found


def others(weight: Weight, reference: np.ndarray) -> np.ndarray:
    """bool: elements that are neither the reference's value, rounded or cut off at the last level, nor pruned."""
    distance = np.abs(weight.values - reference)
    least, is_inside = 1e-6 * np.abs(reference).max(), np.True_
    if weight.scale is not None:
        levels = np.abs(weight.values / weight.scale)
        least, is_inside = 0.51 * weight.scale, levels < levels.max() - 0.5
    is_other: np.ndarray = (weight.values != 0) & (distance > least) & is_inside
    return is_other


def pruned_by(weight: Weight, reference: np.ndarray) -> np.ndarray:
    """bool: zeros of the file that rounding does not explain: the reference's value is more than half a level."""
    least = 0.0 if weight.scale is None else 0.5 * weight.scale * (1 + 1e-5)
    pruned: np.ndarray = (weight.values == 0) & (np.abs(reference) > least)
    return pruned


def _is_in_out(layer: Layer) -> bool:
    """Whether its operator reads the weight as [in, out]."""
    assert layer.weight is not None
    if layer.op == "MatMul":
        return layer.weight.position == 1
    return layer.op == "Gemm" and not layer.transposed


_IMAGES = 256

_RANGE_IMAGES = 64

_BATCH = 32

# of one activation and one batch that ranges are searched on
_VALUES = 2**16

# what a group must make of the whole error to be halved further
_SHARE = 0.05

# the error that the file may have left with the weights of its reference, of which biases may have been corrected
_LEFT = 0.01

# share of weights that may differ from the reference by more than rounding
_UNLIKE = 0.02


def diagnose(path: str | Path, data: Any, *, reference: str | Path | None = None) -> Diagnosis:
    """Measure what each part and each layer of an int8 file costs, and what mends it.

    Args:
        data: as for ``verify_file``; the first 256 images are used.
        reference: the float file that the int8 one was made from. Without it the file itself in float takes its place,
            and what the rounding of weights and sparsity cost can't be told.

    Raises:
        FileNotFoundError: a file that is not there.
        ValueError: no file with QuantizeLinear/DequantizeLinear pairs, outputs or data that do not fit.
    """
    model = _load(Path(path))
    layers = find_layers(model)
    if not any(layer.roundings for layer in layers) and reference is None:
        raise ValueError(f"{Path(path).name} rounds no activations: give the float file with --reference")
    sample = take_sample(data, *input_types(model), limit=_IMAGES)
    bench = _Bench(model, layers, sample)
    notes = []
    if reference is not None:
        notes += bench.take_reference(_load(Path(reference)), Path(reference))
    else:
        notes.append("what the rounding of weights and sparsity cost needs the float file: --reference float.onnx")
    changed = bench.changed()
    outputs = [layer.output for layer in changed]
    whole = bench.run(rounded=outputs)
    cosines = bench.twins()
    costs = _bisect(outputs, lambda group: bench.run(rounded=group).noise, whole.noise)
    suspects = sorted((output for output in costs if costs[output]), key=lambda output: -costs[output])
    gains = {
        output: bench.run(rounded=[o for o in outputs if o != output]).agreement - whole.agreement
        for output in suspects
    }
    rows = [
        LayerCost(
            name=layer.name,
            op=layer.op,
            cosine=cosines.get(layer.output, (None, None))[0],
            sqnr=cosines.get(layer.output, (None, None))[1],
            share=costs[layer.output] / whole.noise if layer.output in gains else None,
            gain=gains.get(layer.output),
        )
        for layer in changed
    ]
    mends = [] if whole.agreement >= MIN_AGREEMENT else _mends(bench, suspects, whole)
    if whole.agreement < MIN_AGREEMENT and not suspects:
        notes.append(f"no layer alone makes {_SHARE:.0%} of the error: it is spread over all of them")
    return Diagnosis(
        file=Path(path).name,
        images=len(sample),
        reference=None if reference is None else Path(reference).name,
        whole=whole,
        float_accuracy=bench.float_accuracy,
        parts=tuple(bench.parts()),
        layers=tuple(rows),
        mends=tuple(mends),
        notes=tuple(notes),
    )


class _Bench:
    """The file, its layers, the images, and the float logits that everything is compared with."""

    def __init__(self, model: onnx.ModelProto, layers: Sequence[Layer], sample: Sample) -> None:
        self.model, self.layers, self.sample = model, layers, sample
        # what a layer has for a weight where it is left float
        self.weights = {layer.output: layer.weight.values for layer in layers if layer.weight is not None}
        self.has_reference = False
        self.exact = self.logits(self._floated(self._all()))

    def take_reference(self, reference: onnx.ModelProto, path: Path) -> list[str]:
        """Compare with another float file from now on; its weights too, where they are the file's before rounding."""
        shape = self.exact.shape
        found = run_outputs(open_session(path), self.sample.inputs)
        if found.shape != shape:
            raise ValueError(f"{path.name} gives outputs of shape {found.shape}, the file {shape}")
        self.exact = found
        weights = match_weights(self.layers, find_layers(reference))
        if isinstance(weights, str):
            return [f"weights can't be compared: {weights}"]
        pairs = [(layer.weight, weights[layer.output]) for layer in self.layers if layer.weight is not None]
        unlike = sum(int(others(*pair).sum()) for pair in pairs) / max(1, sum(other.size for _, other in pairs))
        if unlike > _UNLIKE:
            return [f"weights can't be compared: {unlike:.0%} of them are others (trained, smoothed or folded since?)"]
        swapped = self._variant(self._all(), {**self.weights, **weights})
        if swapped.noise > _LEFT:
            return [
                "weights can't be compared: with those of the reference the file does not compute what it computes "
                "(trained, smoothed or folded since?)"
            ]
        self.weights |= weights
        self.has_reference = True
        return []

    @property
    def float_accuracy(self) -> float | None:
        """Top-1 of what everything is compared with."""
        return self.score(self.exact).accuracy

    def run(self, *, rounded: Collection[str]) -> Score:
        """The file with only the layers `rounded` as they are and all others in float."""
        return self.measure(self._floated([output for output in self._all() if output not in rounded]))

    def changed(self) -> list[Layer]:
        """The layers that are not the same in float."""
        return [
            layer
            for layer in self.layers
            if layer.roundings
            or (
                layer.weight is not None
                and (
                    layer.weight.scale is not None
                    or not np.array_equal(layer.weight.values, self.weights[layer.output])
                )
            )
        ]

    def measure(self, model: onnx.ModelProto) -> Score:
        """Score of a variant."""
        return self.score(self.logits(model))

    def score(self, logits: np.ndarray) -> Score:
        """Logits beside the exact ones."""
        exact, labels = self.exact.astype(np.float64), self.sample.labels
        with np.errstate(invalid="ignore", over="ignore"):
            noise = float(np.square(logits - exact).sum() / max(np.square(exact).sum(), 1e-30))
        accuracy = None if labels is None or logits.ndim != 2 else float((logits.argmax(1) == labels).mean())
        return Score(
            agreement=float((logits.argmax(-1) == exact.argmax(-1)).mean()),
            noise=noise if np.isfinite(noise) else float("inf"),
            accuracy=accuracy,
        )

    def logits(self, model: onnx.ModelProto) -> np.ndarray:
        """First output for all images."""
        with tempfile.TemporaryDirectory() as folder:
            return run_outputs(_session(model, Path(folder)), self.sample.inputs)

    def twins(self) -> dict[str, tuple[float, float]]:
        """(cosine, signal to noise in dB) of each layer's output beside its float twin's on the same input."""
        wide = with_twins(self.model, self.layers, self.weights)
        names = [value.name for value in wide.graph.output if value.name.endswith(".sums")]
        sums = self._collect(wide, names, len(self.sample), lambda values: values.astype(np.float64))
        found = {}
        for name in names:
            noise, twin, own, dot = np.sum(sums[name], axis=0)
            cosine = dot / np.sqrt(twin * own) if twin > 0 and own > 0 else float(twin == own)
            ratio = 10 * np.log10(twin / noise) if noise > 0 and twin > 0 else np.inf
            found[name.removesuffix(".sums")] = (float(cosine), float(ratio))
        return found

    def parts(self) -> list[PartCost]:
        """What activations, rounded weights and sparsity cost: each alone, and what the file is without it."""
        outputs = self._all()
        if not self.has_reference:
            return [PartCost("activations", self.run(rounded=outputs), self.run(rounded=[]))]
        stored = {layer.output: layer.weight for layer in self.layers if layer.weight is not None}
        pruned = {output: pruned_by(weight, self.weights[output]) for output, weight in stored.items()}
        kinds = {  # weights with one part alone, and with the other parts
            "weights": (
                {o: np.where(pruned[o], self.weights[o], stored[o].values) for o in stored},
                {o: np.where(pruned[o], 0, self.weights[o]) for o in stored},
            )
        }
        if any(mask.any() for mask in pruned.values()):
            kinds["sparsity"] = kinds["weights"][1], kinds["weights"][0]
        file = {output: weight.values for output, weight in stored.items()}
        found = [PartCost("activations", self._variant([], self.weights), self._variant(outputs, file))]
        for name, (alone, without) in kinds.items():
            found.append(PartCost(name, self._variant(outputs, alone), self._variant([], without)))
        return found

    def reranged(self, outputs: Collection[str], observer: str) -> Score:
        """The file with other ranges of the inputs of layers `outputs`."""
        names = {name for layer in self.layers if layer.output in outputs for _, _, name in layer.roundings}
        nodes = [node for node in self.model.graph.node if node.op_type == "QuantizeLinear" and node.output[0] in names]
        wide = self._floated(self._all())
        sources = {node.output[0]: _source(self.model, node.input[0]) for node in nodes}
        present = {output for node in wide.graph.node for output in node.output} | {v.name for v in wide.graph.input}
        for value in sorted(set(sources.values()) & present - {v.name for v in wide.graph.output}):
            wide.graph.output.append(onnx.helper.make_empty_tensor_value_info(value))
        seen = self._collect(wide, list(set(sources.values()) & present), _RANGE_IMAGES, _thin)
        ranges = {}
        for node in nodes:
            if sources[node.output[0]] in seen:
                values = np.concatenate(seen[sources[node.output[0]]])
                ranges[node.output[0]] = quantizer_range(values, _integers(self.model, node), observer)
        return self.measure(rerange(self.model, ranges))

    def _floated(self, outputs: Collection[str]) -> onnx.ModelProto:
        """The file with layers `outputs` in float. Their weights are dequantized here: with a DequantizeLinear before
        a float product ONNX Runtime may choose a kernel that rounds the activations all the same."""
        weights = {output: self.weights[output] for output in outputs if output in self.weights}
        return rewrite(self.model, float_inputs=outputs, weights=weights, layers=self.layers)

    def _variant(self, float_inputs: Collection[str], weights: Mapping[str, np.ndarray]) -> Score:
        return self.measure(rewrite(self.model, float_inputs=float_inputs, weights=weights, layers=self.layers))

    def _collect(
        self, model: onnx.ModelProto, names: Sequence[str], images: int, take: Callable[[np.ndarray], np.ndarray]
    ) -> dict[str, list[np.ndarray]]:
        """Values `names` of a variant, a list entry for each batch."""
        found: dict[str, list[np.ndarray]] = {name: [] for name in names}
        with tempfile.TemporaryDirectory() as folder:
            session = _session(model, Path(folder))
            first = session.get_inputs()[0].shape[0]
            size = first if isinstance(first, int) else _BATCH
            inputs = [value.name for value in session.get_inputs()]
            images = min(images, len(self.sample))
            for start in range(0, max(images - size + 1, 1), size):  # a file of fixed batch takes whole ones only
                feeds = {n: array[start : start + size] for n, array in zip(inputs, self.sample.inputs, strict=True)}
                for name, values in zip(names, session.run(list(names), feeds), strict=True):
                    found[name].append(take(values))
        return found

    def _all(self) -> list[str]:
        return [layer.output for layer in self.layers]


def _bisect(outputs: Sequence[str], noise_of: Callable[[Sequence[str]], float], total: float) -> dict[str, float]:
    """Error of each layer alone; 0 where it, or a group that it is in, makes less than a twentieth of ``total``."""
    costs = dict.fromkeys(outputs, 0.0)
    groups = [list(outputs)]
    while groups:
        group = groups.pop()
        noise = noise_of(group)
        if not noise or noise < _SHARE * total:
            continue
        if len(group) == 1:
            costs[group[0]] = noise
        else:
            groups += [group[: len(group) // 2], group[len(group) // 2 :]]
    return costs


def _mends(bench: _Bench, suspects: Sequence[str], whole: Score) -> list[Mend]:
    """What brings agreement back: the fewest suspects left float, the costliest first; other ranges of their inputs.

    The best comes first. Without suspects the ranges of all layers are tried.
    """
    changed = bench.changed()
    outputs = [layer.output for layer in changed]
    chosen, found = outputs, []
    if suspects:
        count, score = _fewest(
            len(suspects), lambda count: bench.run(rounded=[o for o in outputs if o not in suspects[:count]])
        )
        chosen = list(suspects[:count])
        found.append(Mend(layers=_recipe_names(changed, chosen), observer=None, score=score))
    for observer in OBSERVERS:
        score = bench.reranged(chosen, observer)
        if score.agreement > whole.agreement:
            found.append(Mend(layers=_recipe_names(changed, chosen), observer=observer, score=score))
    return sorted(found, key=lambda mend: -mend.score.agreement)


def _fewest(total: int, spare: Callable[[int], Score]) -> tuple[int, Score]:
    """The smallest count in 1..total that is enough, by halving, and its score; `total` where nothing is."""
    low, high, best = 1, total, spare(total)
    while low < high and best.agreement >= MIN_AGREEMENT:
        middle = (low + high) // 2
        score = spare(middle)
        low, high, best = (low, middle, score) if score.agreement >= MIN_AGREEMENT else (middle + 1, high, best)
    return high, best


def _recipe_names(layers: Sequence[Layer], outputs: Collection[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(layer.recipe_name or layer.name for layer in layers if layer.output in outputs))


def _thin(values: np.ndarray) -> np.ndarray:
    """Some of the values, drawn from all of them, and their extremes: a stride would see few of the channels."""
    flat = values.ravel()
    if flat.size <= _VALUES:
        return flat
    return np.append(np.random.default_rng(0).choice(flat, _VALUES), [flat.min(), flat.max()])


def _session(model: onnx.ModelProto, folder: Path) -> Any:
    """A session of a model in memory, by way of a file that can be deleted afterwards."""
    file = folder / "variant.onnx"
    onnx.save(model, file)
    return open_session(file)


def _source(model: onnx.ModelProto, value: str) -> str:
    """The value that a chain of QuantizeLinear and DequantizeLinear begins with."""
    producers = {output: node for node in model.graph.node for output in node.output}
    while value in producers and producers[value].op_type in ("QuantizeLinear", "DequantizeLinear"):
        value = producers[value].input[0]
    return value


def _integers(model: onnx.ModelProto, node: onnx.NodeProto) -> tuple[Any, bool]:
    """(integer type of a QuantizeLinear, whether its zero point is 0)."""
    zero = next((t for t in model.graph.initializer if len(node.input) > 2 and t.name == node.input[2]), None)
    if zero is None:
        return np.uint8, False
    value = onnx.numpy_helper.to_array(zero)
    return value.dtype.type, value.dtype == np.int8 and not value.any()


def _load(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return onnx.load(path)
    except DecodeError:
        raise ValueError(f"{str(path)!r} is no ONNX file") from None
