"""SmoothQuant: divide wide activations, multiply the weights that read them; LayerNorm does the dividing.

`LN(x) W^T == (LN(x) / s) (W s)^T`: with `s` folded into the LayerNorm's gain and bias the float model computes what
it did, and both factors round better. Xiao et al., 2023, eq. 4, https://arxiv.org/abs/2211.10438.
"""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ovit_engine.quant.prepare import run_watched

# the least reach a channel may have, against the widest: below, 1 / s would be noise, or infinite
_FLOOR = 1e-5
# in float64 the folded model differs by 1e-12; whatever is above this is a wrong fold
_TOLERANCE = 1e-5
_PROOF = 4  # images


@dataclass(frozen=True, kw_only=True)
class Smoothed:
    """What `smooth` did."""

    # LayerNorm -> layers whose weights took its factors
    folded: dict[str, tuple[str, ...]]
    # LayerNorm -> why it was left
    left: dict[str, str]
    # largest difference of the float model's outputs, before and after, over the largest output
    difference: float

    def describe(self) -> str:
        """Return one line."""
        done = f"smoothed {sum(map(len, self.folded.values()))} layers behind {len(self.folded)} LayerNorms"
        left = "".join(f"; left {name}: {reason}" for name, reason in self.left.items())
        return f"{done}, float outputs equal to {self.difference:.0e}{left}"


def smoothing_factors(reach: Tensor, weights: Sequence[Tensor], strength: float) -> Tensor:
    """`s` [in]: `max|x_j| ** strength / max|w_j| ** (1 - strength)`; 1 for a channel that nothing reads or fills.

    Args:
        reach: largest absolute activation of each channel [in].
        weights: of all layers that read them, each [out, in].
    """
    heights = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).double()
    reach = reach.double()
    factors = reach.clamp(min=_FLOOR * float(reach.max())) ** strength
    factors = factors / heights.clamp(min=_FLOOR * float(heights.max())) ** (1 - strength)
    usable = (reach > 0) & (heights > 0) & torch.isfinite(factors) & (factors > 0)
    return torch.where(usable, factors, torch.ones_like(factors))


@torch.no_grad()
def smooth(model: nn.Module, names: Collection[str], batches: Sequence[tuple[Any, ...]], strength: float) -> Smoothed:
    """Smooth every LayerNorm of `model` whose output goes to Linear layers among `names` and nowhere else.

    In place, in eval mode, before quantizers are put in. The model is run on the first images before and after, in
    float64: unless its outputs are equal, it is as it was.

    Raises:
        ValueError: no such LayerNorm, or unequal outputs.
    """
    model.eval()
    readers, left = _readers(model, names, batches[0])
    if not readers:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left.items())
        raise ValueError(f"no LayerNorm to smooth{f' ({reasons})' if reasons else ''}")
    reach = _reach(model, list(readers), batches)
    before = copy.deepcopy(model.state_dict())
    proof = tuple(value[:_PROOF] if isinstance(value, Tensor) else value for value in batches[0])
    expected = _exact_output(model, proof)
    for name, layers in readers.items():
        _fold(model.get_submodule(name), [model.get_submodule(layer) for layer in layers], reach[name], strength)
    got = _exact_output(model, proof)
    difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(torch.float64).tiny))
    if not difference <= _TOLERANCE:
        model.load_state_dict(before)
        raise ValueError(f"smoothing changes the float model by {difference:.1e} of its largest output: left as it was")
    return Smoothed(folded={name: tuple(layers) for name, layers in readers.items()}, left=left, difference=difference)


def _fold(norm: nn.Module, layers: Sequence[nn.Module], reach: Tensor, strength: float) -> None:
    weights = [layer.weight for layer in layers]
    factors = smoothing_factors(reach, [w.detach() for w in weights if isinstance(w, Tensor)], strength)
    for values in (norm.weight, norm.bias):
        if isinstance(values, Tensor):
            values.copy_(values.double() / factors)
    for weight in weights:
        assert isinstance(weight, Tensor)
        weight.copy_(weight.double() * factors)


def _exact_output(model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
    """Return the first output in float64, of a copy."""
    exact = copy.deepcopy(model).double()
    output = exact(*(value.double() if _is_float(value) else value for value in batch))
    return next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _reach(model: nn.Module, norms: Sequence[str], batches: Sequence[tuple[Any, ...]]) -> dict[str, Tensor]:
    """Largest absolute output of each channel of each LayerNorm."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def watch(module: nn.Module, inputs: Any, output: Tensor) -> None:
            seen = output.abs().flatten(0, -2).amax(0)
            found[name] = torch.maximum(found[name], seen) if name in found else seen

        return watch

    run_watched(model, batches, [model.get_submodule(name).register_forward_hook(hook(name)) for name in norms])
    return found


@dataclass
class _NormReaders:
    """Who takes the output of one LayerNorm."""

    output: Tensor
    layers: list[str] = field(default_factory=list)
    other: str | None = None


class _CallRecorder(TorchFunctionMode):
    """Notes which calls take a watched tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.uses: dict[str, _NormReaders] = {}
        self.calls: dict[str, int] = {}
        self.layer: str | None = None  # the Linear that runs now

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(value, Tensor) for value in tree_leaves(result)):  # not where a shape or a type is asked for
            for value in tree_leaves((args, kwargs)):
                self._note(func, value)
        return result

    def _note(self, func: Any, value: Any) -> None:
        for use in self.uses.values():
            if use.output is value:
                if func is F.linear and self.layer is not None:
                    use.layers.append(self.layer)
                else:
                    use.other = use.other or getattr(func, "__name__", str(func))


def _readers(
    model: nn.Module, names: Collection[str], batch: tuple[Any, ...]
) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return (LayerNorm -> layers that read it, LayerNorm -> why it is left), seen in one run."""
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.LayerNorm)}
    linears = {name: m for name, m in model.named_modules() if type(m) is nn.Linear}
    watch, handles = _CallRecorder(), []

    def after_norm(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            watch.calls[name] = watch.calls.get(name, 0) + 1
            watch.uses[name] = _NormReaders(output)

        return hook

    def before_linear(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any) -> None:
            watch.calls[name] = watch.calls.get(name, 0) + 1
            watch.layer = name

        return hook

    def after_linear(module: nn.Module, inputs: Any, output: Any) -> None:
        watch.layer = None

    for name, norm in norms.items():
        handles.append(norm.register_forward_hook(after_norm(name)))
    for name, linear in linears.items():
        handles += [linear.register_forward_pre_hook(before_linear(name)), linear.register_forward_hook(after_linear)]
    try:
        with watch:
            output = model(*batch)
    finally:
        for handle in handles:
            handle.remove()
    for use in watch.uses.values():
        if any(value is use.output for value in tree_leaves(output)):
            use.other = use.other or "the model's output"
    readers, left = {}, {}
    for name, use in watch.uses.items():
        reason = _why_left(model, name, use, names, watch.calls)
        if reason is None:
            readers[name] = use.layers
        else:
            left[name] = reason
    return readers, left


def _why_left(
    model: nn.Module, name: str, use: _NormReaders, names: Collection[str], calls: dict[str, int]
) -> str | None:
    weight = model.get_submodule(name).weight
    float_layers = [layer for layer in use.layers if layer not in names]
    if not isinstance(weight, Tensor):
        return "it has no gain to fold into"
    if use.other is not None:
        return f"its output goes to {use.other}"
    if float_layers:
        return f"{float_layers[0]} stays float"
    if not use.layers:
        return "no layer reads it"
    again = next((each for each in (name, *use.layers) if calls[each] > 1), None)
    if again is not None:
        return f"{again} is called more than once"
    owners = [weight, *(model.get_submodule(layer).weight for layer in use.layers)]
    uses = [sum(p is value for m in model.modules() for p in m._parameters.values()) for value in owners]
    return "a weight is shared" if any(count > 1 for count in uses) else None
