"""Rankers of heads and units: by hand, and what the registry says."""

import pytest
import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn

from ovit_engine.structured.gates import GateSite, find_sites, install, set_gate
from ovit_engine.structured.ranking import RANKERS, Ranker, Statistics, find_ranker, register_ranker
from ovit_engine.structured.recording import GateScores

MODEL = nn.Sequential(Attention(12, 3, qkv_bias=True), Mlp(12, 10))
HEADS, UNITS = find_sites(MODEL)


def scores(name: str, site: GateSite, **known: object) -> list[float]:
    ranker = find_ranker(name)
    assert site.kind in ranker.kinds
    found: Tensor = ranker.score(site, Statistics(**known))  # type: ignore[arg-type]
    assert found.shape == (site.count,)
    assert found.dtype == torch.float32
    return found.tolist()


def test_l1_by_hand() -> None:
    attn, mlp = MODEL[0], MODEL[1]
    with torch.no_grad():
        for head in range(3):
            rows = [part * 12 + 4 * head + i for part in range(3) for i in range(4)]
            expected = sum(float(attn.qkv.weight[row].abs().sum()) for row in rows)
            expected += sum(float(attn.proj.weight[:, 4 * head + i].abs().sum()) for i in range(4))
            assert scores("l1", HEADS)[head] == pytest.approx(expected)
        for unit in (0, 9):
            expected = float(mlp.fc1.weight[unit].abs().sum() + mlp.fc2.weight[:, unit].abs().sum())
            assert scores("l1", UNITS)[unit] == pytest.approx(expected)


def test_random_depends_on_seed_and_name_alone() -> None:
    install(find_sites(MODEL))
    assert scores("random", HEADS, seed=1) == scores("random", HEADS, seed=1)
    assert scores("random", HEADS, seed=1) != scores("random", HEADS, seed=2)
    assert scores("random", HEADS)[:3] != scores("random", UNITS)[:3]
    values = torch.tensor(scores("random", UNITS))
    assert ((values >= 0) & (values < 1)).all()
    assert len(values.unique()) == 10


def test_those_by_gradient_take_their_part() -> None:
    gradients = GateScores(torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 5, 6]), torch.tensor([7.0, 8, 9]), 5)
    assert scores("taylor", HEADS, gradients=gradients) == [1, 2, 3]
    assert scores("salience", HEADS, gradients=gradients) == [7, 8, 9]
    with pytest.raises(ValueError, match=r"ranking '0.proj' needs gradients, and none were recorded"):
        scores("taylor", HEADS)


def test_graph_is_a_walk_over_the_heads_that_are_on() -> None:
    model = nn.Sequential(Attention(12, 3, qkv_bias=True))
    (site,) = find_sites(model, ["heads"])
    install([site])
    similarity = torch.tensor([[1.0, 0.9, 0.1], [0.9, 1.0, 0.9], [0.1, 0.9, 1.0]])
    ranker = find_ranker("graph")
    assert (ranker.needs, ranker.kinds, ranker.additive) == ("outputs", ("heads",), False)
    found = ranker.score(site, Statistics(similarity=similarity))
    assert found.tolist() == pytest.approx([2.0 / 6.8, 2.8 / 6.8, 2.0 / 6.8])
    set_gate(site, torch.tensor([True, False, True]))
    assert ranker.score(site, Statistics(similarity=similarity)).tolist() == pytest.approx([0.5, 0, 0.5])
    with pytest.raises(ValueError, match=r"'0.proj' needs similarities of head outputs, and none were measured"):
        ranker.score(site, Statistics())


def test_what_they_need() -> None:
    needs = {name: RANKERS[name].needs for name in ("taylor", "salience", "l1", "random")}
    assert needs == {"taylor": "gradients", "salience": "gradients", "l1": "nothing", "random": "nothing"}


def test_a_wrong_name_tells_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"^there is no ranker 'tailor'; did you mean 'taylor'\?"):
        find_ranker("tailor")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="ranker 'l1' is registered twice"):
        register_ranker("l1", needs="nothing")(lambda site, statistics: torch.zeros(site.count))
    assert find_ranker("l1").score.__module__ == "ovit_engine.structured.ranking"


def test_what_a_ranker_of_yours_gets_wrong() -> None:
    with pytest.raises(ValueError, match=r"^ranker 'x': there is no 'gradiens'; did you mean 'gradients'\?"):
        register_ranker("x", needs="gradiens")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^ranker 'x': there is no 'head'; did you mean 'heads'\?"):
        register_ranker("x", needs="nothing", kinds=["head"])  # type: ignore[list-item]
    assert "x" not in RANKERS


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (torch.zeros(12), r"torch.float32 \[12\]"),
        (torch.zeros(3, 1), r"torch.float32 \[3, 1\]"),
        (torch.zeros(()), r"torch.float32 \[\]"),
        ([1.0, 2.0, 3.0], "list"),
    ],
)
def test_scores_of_another_shape_are_told(found: object, words: str) -> None:
    ranker = Ranker("mine", lambda site, known: found, "nothing", ("heads",), True, False)  # type: ignore[arg-type,return-value]
    with pytest.raises(
        ValueError, match=rf"^ranker 'mine' must give '0.proj' a tensor of \[3\] scores, .*not {words}$"
    ):
        ranker.scores(HEADS, Statistics())
