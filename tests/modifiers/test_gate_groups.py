"""Heads and units that a pattern of the weights beside them holds together go together, and so can really leave."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ovit_engine import Calibration, Engine, RecipeError
from ovit_engine.core.capabilities import having
from ovit_engine.modifiers._gates import GateModifier
from ovit_engine.pruning.patterns import NM, Block, parse_pattern
from ovit_engine.structured.gates import GateSite, find_sites, install, installed, set_gate
from ovit_engine.structured.groups import Groups, tile_of, tiles_of
from ovit_engine.structured.ranking import RANKERS, register_ranker
from ovit_engine.structured.shrink_model import shrink
from tests.loops import recipe
from tests.modifiers.gated import IMAGES, LABELS, engine_for, gates_of, train, vit

CALIBRATION = Calibration(TensorDataset(IMAGES, LABELS), nn.functional.cross_entropy)
GATES = [
    "s2vite: {unit_sparsity: 0.3, every: 1st, end: 3st}",
    "structured_prune: {unit_sparsity: 0.3, start: 3st}",
    "structured_prune: {unit_sparsity: 0.3, start: 1st, score: l1, scope: layer}",
    "structured_prune: {parameter_sparsity: 0.3, start: 3st}",
    "gohsp: {unit_sparsity: 0.3, end: 3st, every: 1st}",
    "gohsp: {parameter_sparsity: 0.3, end: 3st, every: 1st}",
]


def pattern(spelling: str = "'2:4'", targets: str = "re:.*(fc1|fc2|attn.proj)\\.weight", sparsity: str = "") -> str:
    return f"magnitude_prune: {{start: 4st, pattern: {spelling}, {sparsity}targets: ['{targets}']}}"


def trained(*modifiers: str, **options: Any) -> tuple[Any, Engine]:
    model = vit(**options)
    engine = Engine(model, recipe(*modifiers), steps_per_epoch=6, epochs=1).prepare()
    train(model, engine, 6, calibration=CALIBRATION)
    return model, engine


def fours_of(gate: Tensor) -> set[int]:
    return {int(four.sum()) for four in gate.view(-1, 4)}


@pytest.mark.parametrize("gates", GATES)
def test_every_unit_that_is_off_leaves_where_two_of_four_stay(gates: str) -> None:
    model, engine = trained(gates, pattern())
    engine.detach()
    units = [site for site in installed(model) if site.kind == "units"]
    off = sum(int((~site.gate).sum()) for site in units)
    assert off >= 24  # of 192
    for site in units:
        assert fours_of(site.gate) <= {0, 4}
    manifest = shrink(model, masks=engine.run.masks)
    assert sum(part.of - len(part.kept) for part in manifest.parts if part.kind == "units") == off
    for block in model.blocks:
        fours = block.mlp.fc2.weight.view(24, -1, 4)
        assert ((fours != 0).sum(-1) == 2).all()


def test_patterns_are_known_whichever_line_stands_first(tmp_path: Path) -> None:
    model, engine = trained(pattern(), GATES[1])
    engine.detach()
    certificate = engine.export(tmp_path / "model.onnx", IMAGES[:1])
    assert str(certificate.manifest) == f"{sum(map(len, gates_of(model).values()))} of 192 units"
    assert [fours_of(site.gate) for site in installed(model)] == [{0, 4}] * 2
    told = [value for _, name, value in engine.run.history if name == "magnitude_prune/sparsity"]
    assert told == [certificate.sparsity] == [0.5]  # of what gates leave, which is the file


def in_twos_of_four(model: Any) -> None:
    with torch.no_grad():
        for block in model.blocks:
            weight = block.mlp.fc2.weight
            weight.mul_(parse_pattern("2:4").mask(weight.abs()))


def test_zeros_that_a_checkpoint_has_in_fours_are_held_too() -> None:
    model = vit()
    in_twos_of_four(model)
    engine = Engine(model, recipe(GATES[1], "constant_mask: {}"), steps_per_epoch=6, epochs=1).prepare()
    train(model, engine, 6, calibration=CALIBRATION)
    engine.detach()
    assert [fours_of(site.gate) for site in installed(model)] == [{0, 4}] * 2
    shrink(model, masks=engine.run.masks)
    for block in model.blocks:
        assert ((block.mlp.fc2.weight.view(24, -1, 4) != 0).sum(-1) <= 2).all()


def test_a_checkpoint_in_fours_that_comes_after_the_gates_is_refused() -> None:
    model = vit()
    engine = Engine(model, recipe(GATES[1], "constant_mask: {}"), steps_per_epoch=6, epochs=1).prepare()
    in_twos_of_four(model)
    with pytest.raises(RecipeError, match=r"'blocks.0.mlp.fc2.weight' is 2:4, .*: load the sparse checkpoint before"):
        train(model, engine, 6, calibration=CALIBRATION)


def parameters_off(model: Any) -> int:
    """Weights and biases of what is off, by hand: width 24, heads of 6."""
    each = {"units": 2 * 24 + 1, "heads": 3 * 6 * (24 + 1) + 24 * 6}
    return sum(int((~site.gate).sum()) * each[site.kind] for site in installed(model))


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_a_budget_of_parameters_is_used_up_to_a_group(share: float) -> None:
    gates = f"structured_prune: {{parameter_sparsity: {share}, start: 3st, score: l1}}"
    model, _ = trained(gates, pattern(targets="re:.*fc2\\.weight"))
    total = sum(parameter.numel() for parameter in model.parameters())
    assert share * total - 594 < parameters_off(model) <= share * total  # of a head, the largest that goes at once
    assert any(not site.gate.all() for site in installed(model) if site.kind == "units")


def test_a_budget_of_parameters_that_groups_put_out_of_reach() -> None:
    lines = ("structured_prune: {parameter_sparsity: 0.97, score: l1}", pattern())
    with pytest.raises(RecipeError, match="out of reach: with one head and one unit left") as at:
        Engine(vit(), recipe(*lines), steps_per_epoch=6, epochs=1).prepare()
    reach = float(str(at.value).rpartition("block ")[2].split()[0])
    with pytest.raises(RecipeError, match="out of reach") as at:
        Engine(vit(), recipe(lines[0]), steps_per_epoch=6, epochs=1).prepare()
    assert reach < float(str(at.value).rpartition("block ")[2].split()[0])


def test_a_unit_that_was_off_in_a_four_that_stays_does_not_come_back() -> None:
    model = vit()
    engine = Engine(model, recipe(GATES[2], pattern()), steps_per_epoch=6, epochs=1).prepare()
    before = torch.arange(96) % 4 != 1
    for site in installed(model):
        set_gate(site, before)
    train(model, engine, 6, calibration=CALIBRATION)
    for site in installed(model):
        assert not (site.gate & ~before).any()
        assert site.gate.any()


def test_units_of_s2vite_move_by_fours() -> None:
    model = vit()
    text = ["s2vite: {unit_sparsity: 0.5, every: 1st, end: 5st, seed: 3}", pattern().replace("4st", "6st")]
    engine = Engine(model, recipe(*text), steps_per_epoch=8, epochs=1).prepare()
    seen = []

    def check(step: int) -> None:
        for site in installed(model):
            assert fours_of(site.gate) == {0, 4}
            assert int(site.gate.sum()) == 48
        seen.append(gates_of(model))

    train(model, engine, 8, each=check)
    assert len({str(each) for each in seen}) > 2


def by_index(site: GateSite, known: object) -> Tensor:
    """Unit 0 of each four is the worst of all, its neighbours the best: a four is worth its mean."""
    four = torch.arange(site.count) // 4
    return torch.where(torch.arange(site.count) % 4 == 0, 0.0, 10.0 + four)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_group_is_worth_the_mean_of_its_units(scope: str) -> None:
    register_ranker("by index", needs="nothing", seeded=False)(by_index)
    try:
        gates = f"structured_prune: {{unit_sparsity: 0.25, score: by index, scope: {scope}}}"
        grouped, _ = trained(gates, pattern())
        single, _ = trained(gates)
    finally:
        del RANKERS["by index"]
    for site in installed(grouped):
        assert (~site.gate).nonzero().flatten().tolist() == list(range(24))
    for site in installed(single):
        assert (~site.gate).nonzero().flatten().tolist() == list(range(0, 96, 4))


def test_only_the_weights_that_have_the_pattern_count() -> None:
    for targets, grouped in (
        ("re:.*fc1\\.weight", [False, False]),  # its columns are not those of units
        ("re:blocks\\.1\\.mlp\\.fc2\\.weight", [False, True]),
        ("re:.*qkv\\.weight", [False, False]),
    ):
        model, _ = trained("structured_prune: {unit_sparsity: 0.3, score: l1}", pattern(targets=targets))
        assert [fours_of(site.gate) <= {0, 4} for site in installed(model)] == grouped, targets
    model, _ = trained(
        "structured_prune: {unit_sparsity: 0.3, score: l1}", pattern("unstructured", sparsity="sparsity: 0.5, ")
    )
    assert [fours_of(site.gate) <= {0, 4} for site in installed(model)] == [False, False]


def test_heads_narrower_than_a_group_go_together() -> None:
    """Four features in a head of 6: the groups of two heads are three fours."""
    model, _ = trained("structured_prune: {head_sparsity: 0.5, score: l1}", pattern())
    for site in installed(model):
        pairs = site.gate.view(-1, 2)
        assert torch.equal(pairs[:, 0], pairs[:, 1])
    model, _ = trained("structured_prune: {head_sparsity: 0.5, score: l1}", pattern(), num_heads=6)
    assert {site.width for site in installed(model)} == {4}
    assert [int(site.gate.sum()) % 2 for site in installed(model)] != [0, 0]


@pytest.mark.parametrize(
    "gates",
    [
        "s2vite: {unit_sparsity: 0.98, every: 1st, end: 3st}",
        "structured_prune: {unit_sparsity: 0.98, score: l1}",
        "structured_prune: {unit_sparsity: 0.98, score: l1, scope: layer}",
        "gohsp: {unit_sparsity: 0.98, end: 3st}",
    ],
)
def test_what_groups_put_out_of_reach_is_told_at_prepare(gates: str) -> None:
    engine_for(vit(), gates)  # two of 96 stay
    with pytest.raises(
        RecipeError,
        match=r"^r.yaml:2:\d+: .*unit_sparsity: 0.98 is out of reach: with one group of 4 left, which a pattern holds "
        r"together, in each block 0.9583 of the (96|192) units are gone",
    ):
        Engine(vit(), recipe(gates, pattern()), steps_per_epoch=6, epochs=1).prepare()


def test_tiles_of_patterns() -> None:
    spelled = ["unstructured", "2:4", "1:8", {"block": [2, 3]}]
    assert [tile_of(parse_pattern(each)) for each in spelled] == [(1, 1), (1, 4), (1, 8), (2, 3)]
    both = tiles_of([{"fc2.weight": NM(2, 4)}, {"fc2.weight": Block(2, 6)}])
    assert both == {"fc2.weight": (2, 12)}


def test_two_patterns_of_one_weight_hold_groups_of_both() -> None:
    blocks = "magnitude_prune: {start: 5st, pattern: {block: [1, 6]}, sparsity: 0.75, targets: ['re:.*fc2.weight']}"
    for lines in ((pattern(), blocks), (blocks, pattern())):
        engine = Engine(vit(), recipe(GATES[1], *lines), steps_per_epoch=6, epochs=1).prepare()
        gates = next(iter(having(engine.modifiers, GateModifier)))
        assert gates.groups(next(site for site in gates.sites("units"))).size == 12


def test_groups_by_hand() -> None:
    heads, units = find_sites(vit(depth=1))
    install([heads, units])
    tiles = {"blocks.0.mlp.fc1.weight": (2, 4), "blocks.0.mlp.fc2.weight": (1, 6), "blocks.0.attn.qkv.weight": (4, 1)}
    assert Groups.of(units, tiles) == Groups(96, 6)
    assert Groups.of(heads, tiles) == Groups(4, 2)
    assert Groups.of(units, {}) == Groups(96, 1)
    last_is_smaller = Groups(5, 2)
    assert last_is_smaller.number == 3
    assert last_is_smaller.of_scores(torch.tensor([1.0, 3.0, 5.0, 5.0, 7.0])).tolist() == [2, 5, 7]
    gate = last_is_smaller.of_gate(torch.tensor([False, True, False, False, True]))
    assert gate.tolist() == [True, False, True]
    assert last_is_smaller.spread(gate).tolist() == [True, True, False, False, True]


def test_gohsp_keeps_the_groups_of_largest_norm() -> None:
    """The Euclidean projection: by sums of squares, not by the mean of norms."""
    model = vit()
    with torch.no_grad():
        for block in model.blocks:
            block.mlp.fc1.weight.zero_()
            block.mlp.fc2.weight.zero_()
            block.mlp.fc2.weight[0] = 1.0
            block.mlp.fc2.weight[0, :48] = torch.tensor([1.9, 0.0, 0.0, 0.0]).repeat(12)  # squares 3.6, mean 0.475
            block.mlp.fc2.weight[0, 48:] = 0.9  # squares 3.2, mean 0.9
    lines = ("gohsp: {unit_sparsity: 0.5, end: 3st}", pattern())
    engine = Engine(model, recipe(*lines), steps_per_epoch=6, epochs=1).prepare()
    engine.attach(torch.optim.SGD(model.parameters(), 0.1))
    for keep in engine.modifiers[0]._soft_phase.plan.values():  # type: ignore[attr-defined]
        assert keep.nonzero().flatten().tolist() == list(range(48))


@pytest.mark.parametrize(("block", "layer"), [("[1, 8]", "fc2"), ("[8, 1]", "fc1")])
def test_a_gate_that_takes_a_part_of_a_block_is_refused(block: str, layer: str) -> None:
    """Export would find the unit neither removed nor in a block of zeros."""
    model = vit()
    (first, *_) = sites = find_sites(model, ("units",))
    install(sites)
    gate = torch.ones(first.count, dtype=torch.bool)
    gate[8:16] = False
    set_gate(first, gate)
    line = pattern(f"{{block: {block}}}", f"re:.*{layer}\\.weight", "sparsity: 0.5, ")
    Engine(
        copy.deepcopy(model), recipe(line, "shrink: {}"), steps_per_epoch=6, epochs=1
    ).prepare()  # whole groups may go
    gate[[1, 2]] = False
    set_gate(first, gate)
    with pytest.raises(
        RecipeError, match=r"r.yaml:2:.*pattern: 2 of \d+ units of blocks.0.mlp are off in groups of 8 that \{block: "
    ):
        Engine(model, recipe(line), steps_per_epoch=6, epochs=1).prepare()
