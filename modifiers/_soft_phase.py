"""The soft phase of GOHSP on a model: which heads and units are drawn to zero, and how hard."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ovit_engine import Run, Slot
from ovit_engine.core.saved import place_saved
from ovit_engine.distributed.sharding import gathered, is_shard, local_part
from ovit_engine.modifiers._gohsp_options import Penalty
from ovit_engine.structured import soft_pruning
from ovit_engine.structured.gates import GateSite, GroupLayout, Kind
from ovit_engine.structured.groups import Groups
from ovit_engine.structured.selection import keep_best

_FALLBACK = 1e-3  # first value of a penalty where gradients or weights are all zero


class Piece(NamedTuple):
    """A tensor in which heads or units of a site lie."""

    site: GateSite
    slot: Slot
    layout: GroupLayout


class SoftPhase:
    """Plan, penalties, and what the units are drawn to. `clear` frees all of it.

    Args:
        sites: whose heads and units go.
        groups: which heads and units of each site go together, by its name.
        kept: how many groups of each stay.
        penalty: how hard it pulls.
    """

    def __init__(
        self, sites: Sequence[GateSite], groups: Mapping[str, Groups], kept: Mapping[str, int], penalty: Penalty
    ) -> None:
        self.plan: dict[str, Tensor] = {}  # which stay, by site; empty outside the phase
        self.rates: dict[Kind, float] = {}  # lambda of heads, rho of units; empty before its first step
        self._targets: dict[str, Tensor] = {}  # Z - U of the units' weights, by name
        self._growth: dict[Kind, float] = {}  # how often their first value the rates are
        self._sites, self._groups, self._kept, self._penalty = sites, groups, kept, penalty
        self._pieces = {site.name: [Piece(site, *part) for part in site.parts] for site in sites}

    def begin(self, head_scores: Mapping[str, Tensor]) -> None:
        """Plan: heads of lowest score go, and units of smallest norm, which are drawn to zero from here on."""
        for site in self._sites:
            own = self._pieces[site.name]
            weights = [piece.slot.gather() for piece in own]
            self._choose(site, head_scores[site.name] if site.kind == "heads" else _norms(own, weights))
            for piece, weight in zip(own, weights, strict=True) if site.kind == "units" else ():
                self._targets[piece.slot.name] = soft_pruning.first_target(weight, self._stays(piece, weight))

    def _choose(self, site: GateSite, scores: Tensor) -> None:
        groups = self._groups[site.name]
        (keep,) = keep_best([groups.of_gate(site.gate)], [groups.of_scores(scores)], self._kept[site.name])
        self.plan[site.name] = site.gate & groups.spread(keep)

    def start_rates(self, run: Run) -> None:
        """Penalties as given, or such that what goes is drawn by a share of what the training loss does to it."""
        for kind in self._kinds():
            given = self._penalty.heads if kind == "heads" else self._penalty.units
            self.rates[kind], self._growth[kind] = given or self._first_rate(run, kind), 1.0

    def _first_rate(self, run: Run, kind: Kind) -> float:
        task = pull = 0.0
        for piece in self._of(kind):
            gradient = run.gradient(piece.slot)
            if gradient is not None:
                stays, weight = self._stays(piece, gradient), piece.slot.gather()
                task += float(gathered(gradient).float().masked_fill(stays, 0.0).square().sum())
                pull += float(weight.float().masked_fill(stays, 0.0).square().sum())
        return self._penalty.share * math.sqrt(task / pull) if task > 0 and pull > 0 else _FALLBACK

    def add_gradients(self, scale: Tensor | float) -> None:
        """Add those of the penalties, times `scale`, which a fused optimizer divides by.

        Raises:
            ValueError: a weight has no gradient.
        """
        for kind in self._kinds():
            for piece in self._of(kind):
                weight = piece.slot.tensor
                if weight.grad is None:
                    raise ValueError(f"{piece.slot.name!r} gets no gradient from the training loss")
                gradient = local_part(weight.grad)
                gradient.add_((self._pull(piece, weight) * (self.rates[kind] * scale)).to(gradient.dtype))

    def _pull(self, piece: Piece, weight: Tensor) -> Tensor:
        """The gradient of 1/2 ||M W||^2 of heads, of 1/2 ||W - Z + U||^2 of units, as far as this process holds it."""
        own = local_part(weight).float()
        if piece.site.kind == "heads":
            return own.masked_fill(_held(piece, self._stays(piece, weight)), 0.0)
        return own - _held(piece, self._targets[piece.slot.name])

    def update(self) -> dict[Kind, float]:
        """Bring Z and U up to the weights, let penalties grow where much is left; returns what is left of each kind."""
        for site in self._sites:
            if site.kind == "units":
                self._update_site(site, self._pieces[site.name])
        left = self.residuals()
        for kind in self.rates:
            factor = min(self._penalty.ramp, self._penalty.limit / self._growth[kind])
            if left[kind] > self._penalty.tolerance and factor > 1:
                self._grow(kind, factor)
        return left

    def _update_site(self, site: GateSite, own: Sequence[Piece]) -> None:
        shifted = []
        for piece in own:
            weight, target = piece.slot.gather().float(), self._targets[piece.slot.name]
            shifted.append(weight + soft_pruning.dual(target, self._stays(piece, weight)))
        self._choose(site, _norms(own, shifted))
        for piece, each in zip(own, shifted, strict=True):
            self._targets[piece.slot.name] = soft_pruning.next_target(each, self._stays(piece, each))

    def _grow(self, kind: Kind, factor: float) -> None:
        self.rates[kind] *= factor
        self._growth[kind] *= factor
        for piece in self._of(kind) if kind == "units" else ():
            target = self._targets[piece.slot.name]
            self._targets[piece.slot.name] = soft_pruning.rescaled(target, self._stays(piece, target), factor)

    def residuals(self) -> dict[Kind, float]:
        """By kind ||W - Z|| / ||W||; of heads Z is W without those that go."""
        found: dict[Kind, float] = {}
        for kind in self._kinds():
            off = whole = 0.0
            for piece in self._of(kind):
                weight = piece.slot.gather().float()
                target = self._targets.get(piece.slot.name, weight)
                off += float(soft_pruning.distance(weight, target, self._stays(piece, weight)))
                whole += float(weight.square().sum())
            found[kind] = math.sqrt(off / whole) if whole else 0.0
        return found

    def clear(self) -> None:
        """Forget everything."""
        self.plan, self.rates, self._targets, self._growth = {}, {}, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """All of it, as tensors and numbers."""
        return {
            "plan": {name: keep.clone() for name, keep in self.plan.items()},
            "targets": {name: target.clone() for name, target in self._targets.items()},
            "rates": dict(self.rates),
            "growth": dict(self._growth),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state; ValueError where it is of other layers."""
        gates, weights = self._gates_and_weights()
        self.plan, self._targets = _placed(state["plan"], gates), _placed(state["targets"], weights)
        self.rates, self._growth = dict(state["rates"]), dict(state["growth"])

    def place(self) -> None:
        """Follow the model to where it is now: a state is loaded before it moves."""
        gates, weights = self._gates_and_weights()
        self.plan, self._targets = _placed(self.plan, gates), _placed(self._targets, weights)

    def _gates_and_weights(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the plan and the targets are of, by the names that both have."""
        weights = {piece.slot.name: piece.slot.tensor for piece in self._of("units")}
        return {site.name: site.gate for site in self._sites}, weights

    def _kinds(self) -> list[Kind]:
        return list(dict.fromkeys(site.kind for site in self._sites))

    def _of(self, kind: Kind) -> list[Piece]:
        return [piece for site in self._sites if site.kind == kind for piece in self._pieces[site.name]]

    def _stays(self, piece: Piece, like: Tensor) -> Tensor:
        return piece.layout.spread(self.plan[piece.site.name], like)


def _norms(pieces: Sequence[Piece], tensors: Sequence[Tensor]) -> Tensor:
    """Squared, so that those of units add up to the norm of a group of them."""
    return soft_pruning.group_norms([piece.layout for piece in pieces], tensors).double().square()


def _held(piece: Piece, whole: Tensor) -> Tensor:
    """Of a tensor as the weight, or one that broadcasts over it, the part that this process holds."""
    weight = piece.slot.tensor
    if not is_shard(weight):
        return whole
    return local_part(piece.slot.scatter(whole.expand(weight.shape)))


def _placed(saved: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return place_saved(saved, here, "soft pruning", complete=bool(saved))
