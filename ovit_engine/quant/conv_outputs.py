"""Where a convolution's output must be rounded, and which batch-norm belongs to it.

ONNX Runtime runs a convolution in int8 (QLinearConv) only when batch-norm is folded in and a quantizer follows, with
a ReLU between them at most. Each tensor is best rounded once: if it goes to one quantized layer and nowhere else, that
layer's input quantizer is the one. The graph comes from `torch.fx`; models that cannot be traced are paired by
order of registration, and every tensor gets its own quantizer.
"""

import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from ovit_engine.quant.batch_norm import has_activation, is_foldable

_RELU_MODULES = (nn.ReLU, nn.ReLU6)

_RELU_FUNCTIONS = {torch.relu, torch.relu_, F.relu, F.relu6, F.relu_}

_RELU_METHODS = {"relu", "relu_"}


@dataclass(frozen=True, kw_only=True)
class ConvOutput:
    """What follows one convolution."""

    # the batch-norm that is folded into it at bake
    norm: str | None
    # the module whose output is rounded: the convolution itself, its batch-norm, a ReLU; None: the next layer does it
    rounded_at: str | None


def find_conv_outputs(model: nn.Module, convs: Collection[str], quantized: Collection[str]) -> dict[str, ConvOutput]:
    """For each name in `convs` what follows it; `quantized` names all layers that get an input quantizer."""
    graph = _trace(model, quantized)
    if graph is None:
        return {name: _by_registration(model, name) for name in convs}
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    nodes = {str(node.target): node for node in graph.nodes if node.op == "call_module"}
    once = {name for name, count in calls.items() if count == 1}
    walker = _Walker(model, once, set(quantized))
    # a convolution called twice has two outputs: its own quantizer sees both, and nothing can be folded
    own = {name: ConvOutput(norm=None, rounded_at=name) for name in convs}
    return own | {name: walker.follow(name, nodes[name]) for name in convs if name in once}


@dataclass(frozen=True)
class _Walker:
    model: nn.Module
    once: Collection[str]
    quantized: Collection[str]

    def follow(self, name: str, node: fx.Node) -> ConvOutput:
        """Walk from the convolution over its batch-norm and ReLU to the place where rounding is due."""
        place, norm = name, None
        user = self._only_user(node)
        if user is not None and self._is_norm_of(name, user):
            norm, node = str(user.target), user
            place = place_after_norm(self.model, norm)
            user = self._only_user(node)
        relu_fused = norm is not None and has_activation(self.model.get_submodule(norm)) and place == norm
        if user is not None and not relu_fused and self._is_relu(user):
            node, after = user, self._only_user(user)
            if after is not None and self._rounds_input(after):
                return ConvOutput(norm=norm, rounded_at=None)
            own_module = user.op == "call_module" and str(user.target) in self.once
            return ConvOutput(norm=norm, rounded_at=str(user.target) if own_module else place)
        direct = place in (name, norm)
        if direct and user is not None and self._rounds_input(user):
            return ConvOutput(norm=norm, rounded_at=None)
        return ConvOutput(norm=norm, rounded_at=place)

    def _only_user(self, node: fx.Node) -> fx.Node | None:
        """Return the one node that takes this output, looking through `nn.Identity`; None if there are several."""
        while len(node.users) == 1:
            (user,) = node.users
            if not (user.op == "call_module" and type(self.model.get_submodule(str(user.target))) is nn.Identity):
                return user
            node = user
        return None

    def _is_norm_of(self, conv: str, node: fx.Node) -> bool:
        if node.op != "call_module" or str(node.target) not in self.once:
            return False
        return _fits(self.model.get_submodule(conv), self.model.get_submodule(str(node.target)))

    def _is_relu(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.model.get_submodule(str(node.target)), _RELU_MODULES)
        return node.target in (_RELU_FUNCTIONS if node.op == "call_function" else _RELU_METHODS)

    def _rounds_input(self, node: fx.Node) -> bool:
        return node.op == "call_module" and str(node.target) in self.quantized and str(node.target) in self.once


def place_after_norm(model: nn.Module, norm: str) -> str:
    """Return where the output of a batch-norm can be rounded so that the runtime still fuses the convolution.

    After a fused ReLU; but before any other activation: timm's modules call `drop` between the two.
    """
    module = model.get_submodule(norm)
    if not has_activation(module):
        return norm
    fuses = isinstance(module.get_submodule("act"), (*_RELU_MODULES, nn.Identity))
    return norm if fuses else f"{norm}.drop"


def _fits(conv: nn.Module, norm: nn.Module) -> bool:
    return isinstance(conv, nn.Conv2d) and is_foldable(norm) and bool(norm.num_features == conv.out_channels)


def _by_registration(model: nn.Module, name: str) -> ConvOutput:
    """Return the batch-norm registered right after the convolution in the same parent, if it fits."""
    parent, _, child = name.rpartition(".")
    siblings = list(model.get_submodule(parent).named_children())
    after = siblings[[sibling for sibling, _ in siblings].index(child) + 1 :]
    if after and _fits(model.get_submodule(name), after[0][1]):
        norm = f"{parent}.{after[0][0]}" if parent else after[0][0]
        return ConvOutput(norm=norm, rounded_at=place_after_norm(model, norm))
    return ConvOutput(norm=None, rounded_at=name)


class _Tracer(fx.Tracer):
    """Keeps quantized layers and batch-norms whole; all other modules as fx does."""

    def __init__(self, leaves: Collection[nn.Module]) -> None:
        super().__init__()
        self._leaves = {id(leaf) for leaf in leaves}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return id(m) in self._leaves or has_activation(m) or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module, quantized: Collection[str]) -> fx.Graph | None:
    """The graph of `model`, or None where fx cannot follow its Python (it raises whatever the model's code does)."""
    leaves = [model.get_submodule(name) for name in quantized]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _Tracer(leaves).trace(model)
        except Exception:
            return None
