"""What modifiers that switch heads and units off share: the surgery, scores from training, and the gates' state."""

from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from ovit_engine import Coordinated, Deployable, Exclusive, Modifier, Patterned, Run, Scheduled, Surgical, Synchronized
from ovit_engine.core.capabilities import having
from ovit_engine.masking.parameters import is_scorer
from ovit_engine.structured.gates import GateSite, Kind, copy_gates, find_sites, install, installed, set_gate
from ovit_engine.structured.groups import Groups, tiles_of
from ovit_engine.structured.recording import (
    GateScores,
    GradientTally,
    Tally,
    check_sums,
    is_recording,
    start_recording,
    stop_recording,
    take_sums,
)
from ovit_engine.structured.shrink_model import manifest_of


class GateModifier(Scheduled, Surgical, Deployable, Exclusive, Coordinated, Synchronized):
    """Switches heads and units on and off. A subclass states when, and which.

    Scores come from the loop's own backward passes in the steps before an event, and nothing is recorded otherwise.
    """

    removes_units = True

    _sites: list[GateSite] = PrivateAttr(default_factory=list)
    _model: nn.Module | None = PrivateAttr(default=None)
    _done: int = PrivateAttr(default=-1)  # the last of its times at which it acted
    _sums: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # of the present window, over all processes
    _loaded: bool = PrivateAttr(default=False)  # whether a state was loaded
    _gates: dict[str, Tensor] = PrivateAttr(default_factory=dict)  # in force, by site; one for all gate modifiers
    _written_at: int = PrivateAttr(default=-1)  # the step at which it last wrote gates
    _scored: list[int] = PrivateAttr(default_factory=list)  # steps at whose end scores are needed, in order
    _is_rehearsal: bool = PrivateAttr(default=False)
    _window: int = PrivateAttr(default=0)  # steps that are recorded before each of them
    _records: bool = PrivateAttr(default=False)  # whether the tallies at the gates are its own

    _groups: dict[str, Groups] = PrivateAttr(default_factory=dict)  # heads and units that go together, by site

    @abstractmethod
    def kinds(self) -> Sequence[Kind]:
        """What it switches."""

    @abstractmethod
    def _act(self, run: Run) -> None:
        """Do what is due, at ATTACH and after every step."""

    def recorded(self) -> Sequence[GateSite]:
        """The sites of which windows record something."""
        return self._sites

    def tally(self, site: GateSite) -> Tally:
        """What records a site: its gradients."""
        return GradientTally(site)

    def prepare(self, run: Run) -> None:
        with self.errors_at():
            self._sites = find_sites(run.model, self.kinds())
        install(self._sites)
        self._model = run.model

    def coordinate(self, run: Run, modifiers: Sequence[Modifier]) -> None:
        tiles = tiles_of(modifier.patterns() for modifier in having(modifiers, Patterned))
        self._groups = {site.name: Groups.of(site, tiles) for site in self._sites}
        self._gates = having(modifiers, GateModifier)[0]._gates  # several may write a gate, each in its time

    def groups(self, site: GateSite) -> Groups:
        """Which neighbours go together, once PREPARE is over: a 2:4 pattern of `fc2` holds units by fours."""
        return self._groups[site.name]

    def check_reach(self, sites: Sequence[GateSite], share: float, option: str) -> None:
        """Raise a RecipeError where so large a share of `sites` together can't go, by more than rounding."""
        total, sizes = sum(site.count for site in sites), [self.groups(site).size for site in sites]
        if 2 * (sum(sizes) - total * (1 - share)) >= max(sizes):
            most, what = 1 - sum(sizes) / total, sites[0].kind
            left = "one left" if max(sizes) == 1 else f"one group of {max(sizes)} left, which a pattern holds together,"
            raise self.error(
                f"{share:g} is out of reach: with {left} in each block {most:.4f} of the {total} {what} are gone",
                option,
            )

    def kept_each(self, run: Run) -> dict[str, int]:
        """How many heads or units of each site will be on, by site name, where that does not depend on scores."""
        return {}

    def outcome(self, run: Run) -> Iterable[str]:
        kept = self.kept_each(run)
        for kind in self.kinds():
            sites = [site for site in self.sites(kind) if site.name in kept]
            if sites:
                yield spell_kept(kind, [kept[site.name] for site in sites], [site.count for site in sites])

    def attach(self, run: Run) -> None:
        self._is_rehearsal = run.is_rehearsal
        if self._loaded:
            self._check_model_came_too(run)
            begin = self._begin(run.step)
            if begin is not None and begin < run.step and not self._sums:
                raise self.error(f"half a state was loaded: it lacks the scores recorded since step {begin}")
        places = {site.name: site.gate.device for site in self._sites}  # the model may have moved since a load
        self._sums = {name: sums.to(places[name]) for name, sums in self._sums.items()}
        self._act(run)
        self._record(run)

    def step_end(self, run: Run) -> None:
        if self._is_recording():
            for name, sums in take_sums(self.recorded()).items():
                before = self._sums.get(name)
                self._sums[name] = sums if before is None else before + sums
        self._act(run)
        self._record(run)

    def detach(self, run: Run) -> None:
        self._stop()
        for site in self._sites:  # the model may be shrunk from now on
            self._gates.setdefault(site.name, site.gate.clone())

    def check(self, model: nn.Module) -> None:
        sites = {site.name: site for site in installed(model)}
        if not sites and manifest_of(model):  # shrunk since
            return
        for name in (site.name for site in self._sites if site.name in self._gates):
            if name not in sites or not torch.equal(sites[name].gate.cpu(), self._gates[name].cpu()):
                raise RuntimeError(
                    f"{self.name}: the gate of {name!r} is not as training left it: load the model's whole state, with "
                    "its gates, before the export"
                )

    def reloaded(self, run: Run) -> None:
        for site in self._sites:
            if site.name in self._gates:
                set_gate(site, self._gates[site.name])

    def copies_are_behind(self, run: Run) -> bool:
        return self._written_at == run.step

    def synchronized(self, run: Run) -> Mapping[str, Tensor]:
        written = self._sites if self._written_at == run.step else ()
        return {f"the gate of {site.name!r}": site.gate for site in written}

    def apply_to(self, model: nn.Module) -> None:
        assert self._model is not None
        copy_gates(self._model, model)

    def sites(self, kind: Kind) -> list[GateSite]:
        """The sites of one kind."""
        return [site for site in self._sites if site.kind == kind]

    def scores(self, site: GateSite) -> GateScores:
        """What the window that ends now says of a site; RecipeError where it saw no gradient."""
        if self._is_rehearsal:  # which skips the windows: all the same
            return GateScores.of(site, torch.ones_like(self.tally(site).sums))
        if site.name not in self._sums:
            raise self.error("no gradients were recorded: training ended before the steps that would have told scores")
        with self.errors_at():
            return GateScores.of(site, self._sums[site.name])

    def write(self, run: Run, keeps: Mapping[str, Tensor]) -> None:
        """Put gates in force, by site name; a window that led to them is over."""
        for site in self._sites:
            set_gate(site, keeps.get(site.name, site.gate))
            self._gates[site.name] = site.gate.clone()
        self._written_at = run.step
        self._sums = {}
        for kind in self.kinds():
            off = sum(int((~site.gate).sum()) for site in self.sites(kind))
            run.log(f"{self.name}/{kind}_off", off / sum(site.count for site in self.sites(kind)))

    def state_dict(self) -> dict[str, Any]:
        absent = [site for site in self._sites if site.name not in self._gates]
        present = {**self._gates, **{site.name: site.gate for site in absent}}
        return {
            "done": self._done,
            "gates": {site.name: present[site.name].clone() for site in self._sites},
            "sums": {name: sums.clone() for name, sums in self._sums.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        sites = {site.name: site for site in self._sites}
        for name in {**state["gates"], **state["sums"]}:
            if name not in sites:
                raise ValueError(f"the checkpoint's gate of {name!r} is of no layer here")
        for name, site in sites.items():
            gate = state["gates"].get(name)
            if gate is None or gate.shape != (site.count,):
                found = "missing" if gate is None else list(gate.shape)
                raise ValueError(f"the checkpoint's gate of {name!r} must be [{site.count}], it is {found}")
        for name, sums in state["sums"].items():
            check_sums(sites[name], sums, self.tally)
        self._done = state["done"]
        self._loaded = True
        self._gates.update({name: gate.clone() for name, gate in state["gates"].items()})
        self._sums = {name: sums.to(sites[name].gate.device, copy=True) for name, sums in state["sums"].items()}

    def _check_model_came_too(self, run: Run) -> None:
        """Gates are the model's own: without its state a resumed run would go on with all heads and units."""
        for site in self._sites:
            if not bool((site.gate.cpu() == self._gates[site.name].cpu()).all()):
                raise RuntimeError(
                    f"{self.name}: at step {run.step} the gate of {site.name!r} is not that of the loaded state: load "
                    f"the model's state of that step, with its {f'{site.name}.input_gate'!r}, once "
                    "engine.load_state_dict(...) has made the gates"
                )

    def _begin(self, step: int) -> int | None:
        """The step at whose end the window began in which training is after `step`; None outside windows."""
        place = bisect_right(self._scored, step)
        if place == len(self._scored):
            return None
        begin = max(self._scored[place] - self._window, self._scored[place - 1] if place else 0)
        return begin if begin <= step else None

    def _record(self, run: Run) -> None:
        """Begin a window, or end one."""
        wanted, now = self._begin(run.step) is not None, self._is_recording()
        if wanted and not now:
            start_recording(self.recorded(), self.tally)
            self._records = True
        elif now and not wanted:
            self._stop()

    def _stop(self) -> None:
        if self._records:
            stop_recording(self._sites)
        self._records = False

    def _is_recording(self) -> bool:
        return self._records and any(map(is_recording, self.recorded()))

    def window_start(self, event: int) -> int:
        """The step from which the first event at `event` needs the gates for itself: its scores are recorded there."""
        return max(0, event - self._window) if self._scored else event


def spell_kept(kind: Kind, kept: Sequence[int], counts: Sequence[int]) -> str:
    """What stays, `kept` of `counts` in each block, in words: "1 of 3 heads left in each block, 66.67% off"."""
    off = f"{1 - sum(kept) / sum(counts):.2%} off"
    if len(set(counts)) > 1:
        return f"{sum(kept)} of {sum(counts)} {kind} left in all blocks together, {off}"
    each = f"{min(kept)}" if len(set(kept)) == 1 else f"{min(kept)} to {max(kept)}"
    return f"{each} of {counts[0]} {kind} left in each block, {off}"


def count_parameters(model: nn.Module) -> int:
    """All parameters of the model as the user made it: without those that score tokens, whoever prepares first."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not is_scorer(name))
