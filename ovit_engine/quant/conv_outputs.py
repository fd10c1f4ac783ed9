"""Where a convolution's output must be rounded, and which batch-norm belongs to it.

ONNX Runtime runs a convolution in int8 (QLinearConv) only when batch-norm is folded in and a quantizer follows, with
a ReLU between them at most. Each tensor is best rounded once: if it goes to one quantized layer and nowhere else, that
layer's input quantizer is the one. The graph comes from `torch.fx`, of the largest module around the convolution that
it can trace. A batch-norm is folded only where that graph shows that it takes the convolution's output, and nothing
else does.
"""

import warnings
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from ovit_engine.quant.batch_norm import has_activation, is_foldable
from ovit_engine.quant.layers import has_hooks
from ovit_engine.utils.copying import copy_model

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
    # whether a graph shows what follows
    traced: bool = True


def find_conv_outputs(model: nn.Module, convs: Collection[str], quantized: Collection[str]) -> dict[str, ConvOutput]:
    """For each name in `convs` what follows it; `quantized` names all layers that get an input quantizer.

    A copy of the model is traced, in eval mode, since that is what is exported.
    """
    # a convolution that no graph shows, or that is called twice, has a quantizer of its own, and nothing is folded
    found = {name: ConvOutput(norm=None, rounded_at=name, traced=False) for name in convs}
    try:
        # parameters are never assigned while fx traces; buffers are, and are copied
        traced = copy_model(model, {id(parameter): parameter for parameter in model.parameters()}).eval()
    except Exception:  # whatever the model's own __deepcopy__ raises
        return found
    paths = Counter(id(module) for _, module in traced.named_modules(remove_duplicate=False))
    shared = {name for name, module in traced.named_modules(remove_duplicate=False) if paths[id(module)] > 1}
    graphs: dict[str, fx.Graph | None] = {}
    for name in convs:
        for scope in _scopes(name):
            if scope not in graphs:
                graphs[scope] = _trace(traced.get_submodule(scope), _inside(scope, quantized))
            graph = graphs[scope]
            if graph is not None and (scope == "" or name not in shared):
                found[name] = _follow(traced, scope, graph, name, quantized, shared)
                break
    return found


def _scopes(name: str) -> list[str]:
    """Return the modules around a layer, the model ("") first."""
    parts = name.split(".")[:-1]
    return [".".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _inside(scope: str, names: Collection[str]) -> set[str]:
    """Return the names below `scope`, as it knows them."""
    prefix = f"{scope}." if scope else ""
    return {name.removeprefix(prefix) for name in names if name.startswith(prefix)}


def _follow(
    model: nn.Module, scope: str, graph: fx.Graph, name: str, quantized: Collection[str], shared: Collection[str]
) -> ConvOutput:
    prefix = f"{scope}." if scope else ""
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    once = {target for target, count in calls.items() if count == 1}
    if scope:
        once -= _inside(scope, shared)
    local = name.removeprefix(prefix)
    if local not in once:
        return ConvOutput(norm=None, rounded_at=name)
    node = next(node for node in graph.nodes if node.op == "call_module" and node.target == local)
    output = _Walker(model.get_submodule(scope), once, _inside(scope, quantized)).follow(local, node)
    norm, rounded_at = (None if place is None else prefix + place for place in (output.norm, output.rounded_at))
    return ConvOutput(norm=norm, rounded_at=rounded_at)


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
        layer, norm = self.model.get_submodule(conv), self.model.get_submodule(str(node.target))
        if not isinstance(layer, nn.Conv2d) or not is_foldable(norm) or has_hooks(layer) or has_hooks(norm):
            return False
        return bool(norm.num_features == layer.out_channels)

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


class _Tracer(fx.Tracer):
    """Keeps layers and batch-norms whole, those of a subclass too; all other modules as fx does."""

    def __init__(self, leaves: Collection[nn.Module]) -> None:
        super().__init__()
        self._leaves = {id(leaf) for leaf in leaves}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        is_layer = isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))  # timm's Conv2dSame computes with sizes
        return (
            id(m) in self._leaves or is_layer or has_activation(m) or super().is_leaf_module(m, module_qualified_name)
        )


def _trace(model: nn.Module, quantized: Collection[str]) -> fx.Graph | None:
    """The graph of `model`, or None where fx cannot follow its Python (it raises whatever the model's code does)."""
    leaves = [model.get_submodule(name) for name in quantized]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _Tracer(leaves).trace(model)
        except Exception:
            return None
