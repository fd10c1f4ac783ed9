"""How heads and units are ranked: pure functions, in one small registry.

A ranker gives a site [count] scores, the lowest of which go first. It says what it needs to know, and who asks for it
collects that: `gradients` are recorded in training (recording.py), `outputs` are similarities of head outputs.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ovit_engine.structured.gates import KINDS, GateSite, Kind
from ovit_engine.structured.recording import GateScores
from ovit_engine.structured.similarity import stationary_distribution
from ovit_engine.utils.random_states import mixed
from ovit_engine.utils.suggest import suggest

Needs = Literal["nothing", "gradients", "outputs"]


@dataclass(frozen=True)
class Statistics:
    """What is known about a site when it is ranked; what the ranker does not need may be None."""

    gradients: GateScores | None = None
    similarity: Tensor | None = None  # of the outputs of heads, [count, count]
    seed: int = 0


ScoreFunction = Callable[[GateSite, Statistics], Tensor]


@dataclass(frozen=True)
class Ranker:
    """One way to rank what a gate switches."""

    name: str
    score: ScoreFunction  # scores [count] of a site; the lowest go first, and ties by index
    needs: Needs
    kinds: tuple[Kind, ...]  # what it can rank
    additive: bool  # whether a score grows with the parameters that it stands for
    seeded: bool  # whether it may use the seed

    def scores(self, site: GateSite, statistics: Statistics) -> Tensor:
        """Return the scores of a site; ValueError unless the ranker gives a number for each head or unit."""
        found = self.score(site, statistics)
        if not isinstance(found, Tensor) or found.shape != (site.count,) or found.is_complex():
            got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"ranker {self.name!r} must give {site.name!r} a tensor of [{site.count}] scores, one for each of its "
                f"{site.kind}, not {got}"
            )
        return found


RANKERS: dict[str, Ranker] = {}


def register_ranker(
    name: str, *, needs: Needs, kinds: Iterable[Kind] = KINDS, additive: bool = True, seeded: bool = True
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Register a function that scores heads or units as a ranker called `name`.

    Where heads and units compete for one budget, `additive` scores are compared per parameter. Of a ranker that is not
    `seeded` a recipe may give no seed.

    Raises:
        ValueError: the name is taken, or `needs` or a kind is none that there is.
    """
    kinds = tuple(kinds)
    for word, known in ((needs, get_args(Needs)), *((kind, KINDS) for kind in kinds)):
        if word not in known:
            raise ValueError(f"ranker {name!r}: there is no {word!r}{suggest(str(word), known)}")

    def add(score: ScoreFunction) -> ScoreFunction:
        if name in RANKERS:
            raise ValueError(f"ranker {name!r} is registered twice: by {RANKERS[name].score!r} and {score!r}")
        RANKERS[name] = Ranker(name, score, needs, kinds, additive, seeded)
        return score

    return add


def find_ranker(name: str) -> Ranker:
    """Return the ranker of that name; ValueError with the closest one."""
    if name not in RANKERS:
        raise ValueError(f"there is no ranker {name!r}{suggest(name, RANKERS)}")
    return RANKERS[name]


@register_ranker("taylor", needs="gradients", seeded=False)
def taylor(site: GateSite, statistics: Statistics) -> Tensor:
    """Return the loss's first-order change without it: mean over samples of |dL/dgate| (Michel et al. 2019, §4)."""
    return _gradients(site, statistics).importance


@register_ranker("salience", needs="gradients", seeded=False)
def salience(site: GateSite, statistics: Statistics) -> Tensor:
    """Return the mean over samples of the sum of |activation x gradient|: as Taylor, but nothing cancels out.

    Our reading of SSP, the salience-based baseline of the SViTE paper, of which no code is public.
    """
    return _gradients(site, statistics).salience


@register_ranker("l1", needs="nothing", seeded=False)
def l1(site: GateSite, statistics: Statistics) -> Tensor:
    """Return the sum of absolute weights in the rows that compute it and the columns that read it, without biases."""
    return torch.stack([layout.sums(slot.gather().abs()) for slot, layout in site.weights]).sum(0)


@register_ranker("random", needs="nothing", additive=False)
def random(site: GateSite, statistics: Statistics) -> Tensor:
    """Return uniform numbers from the seed and the site's name: the same in every process, with any number of sites."""
    generator = torch.Generator().manual_seed(mixed(statistics.seed, *site.name.encode()))
    return torch.rand(site.count, generator=generator, device="cpu").to(site.linear.weight.device)


@register_ranker("graph", needs="outputs", kinds=["heads"], additive=False, seeded=False)
def graph(site: GateSite, statistics: Statistics) -> Tensor:
    """Return the share of time that a walk over the heads of a block spends at each (GOHSP; similarity.py).

    Heads whose outputs are like those of the others rank high. What is off already is no part of the walk.
    """
    if statistics.similarity is None:
        raise ValueError(f"ranking {site.name!r} needs similarities of head outputs, and none were measured")
    on = site.gate.to(statistics.similarity.device)
    scores = torch.zeros(site.count, dtype=torch.float64, device="cpu")
    scores[on.cpu()] = stationary_distribution(statistics.similarity[on][:, on])
    return scores


def _gradients(site: GateSite, statistics: Statistics) -> GateScores:
    if statistics.gradients is None:
        raise ValueError(f"ranking {site.name!r} needs gradients, and none were recorded")
    return statistics.gradients
