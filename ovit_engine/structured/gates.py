"""Gates: attention heads and MLP units switched off by a boolean on the input of the layer that reads them.

A gate multiplies; weights stay as they are. So a disabled unit still gets a gradient at its gate, by which it may be
enabled again, and a gated model computes exactly what the model without those heads and units does, with nothing to
fold into biases (specs/structured-and-tokens.md §3.3).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ovit_engine.masking.parameters import Slot, clean_name
from ovit_engine.quant import FakeQuantize

Kind = Literal["heads", "units"]

GATE = "input_gate"

TALLY = "input_gate_tally"

KINDS: tuple[Kind, ...] = ("heads", "units")

_EXPECTED = {
    "heads": {"qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop"},
    "units": {"fc1", "act", "drop1", "drop", "norm", "fc2", "drop2"},
}


@dataclass(frozen=True)
class GroupLayout:
    """Where heads or units lie in a tensor: `axis` holds `repeats` runs of `count` groups of `width` slices each."""

    axis: int
    count: int
    width: int = 1
    repeats: int = 1

    def along(self, values: Tensor) -> Tensor:
        """Return values [count] of the groups, one for each index of the axis."""
        return values.repeat_interleave(self.width).repeat(self.repeats)

    def spread(self, values: Tensor, like: Tensor) -> Tensor:
        """Return values [count] of the groups, shaped to broadcast over a tensor of the shape of `like`."""
        shape = [1] * like.ndim
        shape[self.axis] = -1
        return self.along(values).view(shape)

    def sums(self, tensor: Tensor) -> Tensor:
        """Return the sum of each group's entries, float32 [count]."""
        slices = tensor.detach().float().movedim(self.axis, 0).reshape(tensor.shape[self.axis], -1).sum(1)
        return slices.view(self.repeats, self.count, self.width).sum((0, 2))


@dataclass(frozen=True)
class GateSite:
    """A layer whose input can be gated.

    `linear` reads `count` groups of `width` consecutive features: the heads of `owner` (timm's Attention; `linear` is
    its `proj`, `width` its `head_dim`), or the hidden units of an MLP (`linear` is its `fc2`, `width` is 1).
    """

    name: str  # of `linear`, without the prefixes of wrappers
    kind: Kind
    owner: nn.Module
    linear: nn.Linear
    count: int
    width: int

    @property
    def owner_name(self) -> str:
        """Name of the attention or MLP module."""
        return self.name.rpartition(".")[0]

    @property
    def source(self) -> nn.Linear:
        """The layer that computes what is gated: `qkv` (three times count x width rows), or `fc1` (count rows)."""
        return cast(nn.Linear, self.owner.get_submodule("qkv" if self.kind == "heads" else "fc1"))

    @property
    def source_name(self) -> str:
        """Name of `source`."""
        return f"{self.owner_name}.{'qkv' if self.kind == 'heads' else 'fc1'}".lstrip(".")

    @property
    def weights(self) -> list[tuple[Slot, GroupLayout]]:
        """The weights in which the heads or units lie: rows of `source`, columns of `linear`."""
        rows = GroupLayout(0, self.count, self.width, 3 if self.kind == "heads" else 1)
        columns = GroupLayout(1, self.count, self.width)
        return [
            (Slot(f"{self.source_name}.weight", self.source, "weight"), rows),
            (Slot(f"{self.name}.weight", self.linear, "weight"), columns),
        ]

    @property
    def parts(self) -> list[tuple[Slot, GroupLayout]]:
        """All parameters in which they lie: `weights`, and the bias of `source` if it has one."""
        (source, rows), linear = self.weights
        bias = [] if self.source.bias is None else [(Slot(f"{self.source_name}.bias", self.source, "bias"), rows)]
        return [(source, rows), *bias, linear]

    @property
    def parameters(self) -> int:
        """How many parameters one head or unit has."""
        return sum(slot.tensor.numel() for slot, _ in self.parts) // self.count

    @property
    def gate(self) -> Tensor:
        """The gate itself, bool [count], True = kept; AttributeError where none is installed."""
        return cast(Tensor, getattr(self.linear, GATE))


def gate_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Zero what the gate of `module` switches off, [..., count x width].

    A forward pre-hook. It reads the gate through its argument, so that copies of the model (EMA, pickle) use their own.
    Zeros are filled in: a product would spread NaN and infinity from disabled units. While scores are recorded
    (recording.py), the site's tally gets the features before and after.
    """
    features, *others = args
    gate = cast(Tensor, getattr(module, GATE))
    gated = features.unflatten(-1, (gate.numel(), -1)).masked_fill(~gate.unsqueeze(-1), 0).flatten(-2)
    tally = getattr(module, TALLY, None)
    if tally is not None and module.training:
        gated = tally(gated, features)
    return (gated, *others)


def find_sites(model: nn.Module, kinds: Iterable[Kind] = KINDS) -> list[GateSite]:
    """Return every layer of `model` whose input can be gated, in the model's order.

    Attention has `qkv` and `proj`, an MLP `fc1` and `fc2`.

    Raises:
        ValueError: there is none of a kind, or one of a layout from which removal would not be exact, such as a norm
            over all heads, a bias for each head, or hidden units that are computed in pairs (GLU).
    """
    kinds = tuple(kinds)
    found = list(_candidates(model, kinds))
    for kind in kinds:
        if not any(site.kind == kind for site in found):
            what = "attention with qkv and proj" if kind == "heads" else "MLP with fc1 and fc2"
            raise ValueError(f"{type(model).__name__} has no {kind} to gate: it has no {what}, as timm's have")
    return found


def installed(model: nn.Module) -> list[GateSite]:
    """Return the sites of `model` that have a gate, in the model's order; there may be none."""
    return [
        _site(name, kind, owner)
        for name, kind, owner in _owners(model)
        if GATE in owner.get_submodule(_reader(kind))._buffers
    ]


def install(sites: Iterable[GateSite]) -> None:
    """Put a gate that keeps all on each site; those that have one stay as they are."""
    for site in sites:
        if GATE in site.linear._buffers:
            continue
        gate = torch.ones(site.count, dtype=torch.bool, device=site.linear.weight.device)
        site.linear.register_buffer(GATE, gate)
        site.linear.register_forward_pre_hook(gate_input)
        site.linear.register_load_state_dict_pre_hook(_keep_own)  # type: ignore[no-untyped-call]


def uninstall(model: nn.Module) -> None:
    """Remove every gate, so that all heads and units work again."""
    for site in installed(model):
        delattr(site.linear, GATE)
        for hooks in (site.linear._forward_pre_hooks, site.linear._load_state_dict_pre_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) in (gate_input, _keep_own)]:
                del hooks[key]


@torch.no_grad()
def set_gate(site: GateSite, keep: Tensor) -> None:
    """Keep what is True in `keep` [count] and switch the rest off.

    Raises:
        ValueError: `keep` is not boolean of that shape, or keeps nothing: attention without a head is no layer.
    """
    if keep.dtype != torch.bool or keep.shape != (site.count,):
        raise ValueError(
            f"the gate of {site.name!r} must be boolean of shape [{site.count}], not {keep.dtype} of {list(keep.shape)}"
        )
    if not keep.any():
        raise ValueError(f"the gate of {site.name!r} would switch off all {site.count} {site.kind}: keep at least one")
    site.gate.copy_(keep)


def copy_gates(model: nn.Module, copy: nn.Module) -> None:
    """Copy the gates of `model` to another copy of it, such as an EMA copy.

    Raises:
        RuntimeError: the copy has no such gate: it was made before they were installed.
    """
    theirs = {site.name: site for site in installed(copy)}
    for site in installed(model):
        if site.name not in theirs:
            raise RuntimeError(
                f"the EMA copy has no gate of {site.name!r}: call engine.prepare() before the copy is made"
            )
        set_gate(theirs[site.name], site.gate.to(theirs[site.name].gate.device))


def live_mask(model: nn.Module) -> dict[str, Tensor]:
    """Return which weights and biases the gates of `model` keep alive, by parameter name (True = alive).

    Only for layers next to a gate: rows of `qkv` and `fc1` that compute kept features, columns of `proj` and `fc2` that
    read them. What is False is removed when the model is shrunk, and has no effect until then.
    """
    alive = {}
    for site in installed(model):
        for slot, layout in site.parts:
            alive[slot.name] = layout.spread(site.gate, slot.tensor).expand(slot.tensor.shape).clone()
    return alive


def _keep_own(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Keep the present gate where a checkpoint that is loaded has none, since it was made before the surgery."""
    state.setdefault(f"{prefix}{GATE}", getattr(module, GATE))


def _reader(kind: str) -> str:
    return "proj" if kind == "heads" else "fc2"


def _owners(model: nn.Module) -> Iterator[tuple[str, Kind, nn.Module]]:
    """Yield modules that look like attention (heads) or an MLP (units), whether we know their layout or not."""
    for name, module in model.named_modules():
        children = module._modules
        if "qkv" in children and "proj" in children:
            yield clean_name(name), "heads", module
        elif "fc1" in children and "fc2" in children:
            yield clean_name(name), "units", module


def _candidates(model: nn.Module, kinds: tuple[Kind, ...]) -> Iterator[GateSite]:
    for name, kind, owner in _owners(model):
        if kind not in kinds:
            continue
        problem = _problem_of_attention(owner) if kind == "heads" else _problem_of_mlp(owner)
        problem = problem or _problem_of_parts(kind, owner)
        if problem:
            what = name or type(model).__name__
            raise ValueError(
                f"{what} ({type(owner).__name__}) {problem}: its {kind} can't be taken out without changing the rest"
            )
        yield _site(name, kind, owner)


def _site(name: str, kind: Kind, owner: nn.Module) -> GateSite:
    linear = cast(nn.Linear, owner.get_submodule(_reader(kind)))
    heads = kind == "heads"
    count = cast(int, owner.num_heads) if heads else linear.in_features
    width = cast(int, owner.head_dim) if heads else 1
    return GateSite(f"{name}.{_reader(kind)}".lstrip("."), kind, owner, linear, count, width)


def _problem_of_attention(owner: nn.Module) -> str | None:
    heads, width = getattr(owner, "num_heads", None), getattr(owner, "head_dim", None)
    if not isinstance(heads, int) or not isinstance(width, int):
        return "has no num_heads and head_dim"
    qkv, proj = owner.get_submodule("qkv"), owner.get_submodule("proj")
    if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear):
        return "has a qkv or proj that is no Linear"
    if (qkv.out_features, proj.in_features) != (3 * heads * width, heads * width):
        return f"computes {qkv.out_features} features of q, k and v for {heads} heads of {width}"
    if getattr(owner, "gate", None) is not None:
        return "gates its output by a layer of its own"
    return None


def _problem_of_mlp(owner: nn.Module) -> str | None:
    fc1, fc2 = owner.get_submodule("fc1"), owner.get_submodule("fc2")
    if not isinstance(fc1, nn.Linear) or not isinstance(fc2, nn.Linear):
        return "has an fc1 or fc2 that is no Linear"
    if fc1.out_features != fc2.in_features:
        return f"computes {fc1.out_features} features for {fc2.in_features} hidden units"
    act = getattr(owner, "act", None)
    if isinstance(act, nn.Module) and any(True for _ in act.parameters()):
        return "has parameters in its activation"
    return None


def _problem_of_parts(kind: Kind, owner: nn.Module) -> str | None:
    """Return which part may belong to single heads or units, in addition to their rows and columns: an unknown one."""
    if not isinstance(owner._modules.get("norm"), nn.Identity | None):
        return f"has a norm over all {kind}"
    own = [name for name, _ in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False))]
    parts = [name for name, part in owner.named_children() if not isinstance(part, FakeQuantize)]
    unknown = [*own, *(name for name in parts if name not in _EXPECTED[kind])]
    return f"has a part that we do not know, {unknown[0]!r}" if unknown else None
