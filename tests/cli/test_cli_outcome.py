"""What `ovit validate` says is left of a model: whole heads, units and tokens, where a recipe gives shares."""

import logging
import math
from pathlib import Path

import pytest

from ovit_engine import Engine
from ovit_engine.structured.gates import installed
from tests.cli.conftest import Ovit
from tests.loops import recipe
from tests.modifiers.gated import engine_for, train, vit

MODEL = """
training:
  model: vit_tiny_patch16_224
  model_args: {img_size: 32, patch_size: 8, embed_dim: 24, depth: 4, num_heads: 3, num_classes: 5}
modifiers:
"""


@pytest.mark.parametrize(
    ("modifiers", "lines"),
    [
        (
            ["s2vite: {head_sparsity: 0.34, unit_sparsity: 0.4, every: 1ep}"],
            [
                "s2vite: 1 of 3 heads left in each block, 66.67% off",
                "s2vite: 57 of 96 units left in each block, 40.62% off",
            ],
        ),
        (
            ["structured_prune: {start: 1ep, head_sparsity: 0.4, unit_sparsity: 0.5}"],
            [
                "structured_prune: 7 of 12 heads left in all blocks together, 41.67% off",
                "structured_prune: 192 of 384 units left in all blocks together, 50.00% off",
            ],
        ),
        (
            ["structured_prune: {scope: layer, unit_sparsity: {1ep: 0.2, 2ep: 0.4}}"],
            ["structured_prune: 57 of 96 units left in each block, 40.62% off"],
        ),
        (
            ["gohsp: {end: 2ep, head_sparsity: 0.3}"],
            ["gohsp: 2 of 3 heads left in each block, 33.33% off"],
        ),
        (
            [
                "s2vite: {unit_sparsity: 0.4, every: 1ep}",
                "magnitude_prune: {start: 9ep, pattern: '2:4', targets: ['re:.*fc2.weight']}",
            ],
            [
                "modifier targets tensors weights",
                "magnitude_prune re:.*fc2.weight 4 9,216",
                "s2vite: 56 of 96 units left in each block, 41.67% off",
            ],
        ),
        (["dynamic_vit: {keep: 0.7}"], ["dynamic_vit: tokens 17 -> 12, 8, 6 before the attention of blocks 1, 2, 3"]),
        (["evit: {keep: 0.5, fuse: false, blocks: [1]}"], ["evit: tokens 17 -> 9 before the attention of block 2"]),
    ],
)
def test_validate_tells_what_is_left(ovit: Ovit, modifiers: list[str], lines: list[str]) -> None:
    Path("r.yaml").write_text(MODEL + "\n".join(f"  - {modifier}" for modifier in modifiers))
    result = ovit("validate", "r.yaml")
    assert result.exit_code == 0, result.output
    assert [" ".join(line.split()) for line in result.stdout.splitlines()] == [
        *lines,
        "r: ok on vit_tiny_patch16_224",
    ]


@pytest.mark.parametrize(
    ("modifier", "heads", "units"),
    [
        ("s2vite: {head_sparsity: 0.3, unit_sparsity: 0.4, every: 1st, end: 3st}", 4, 114),
        ("structured_prune: {start: 2st, head_sparsity: 0.3, unit_sparsity: 0.4}", 5, 115),
        ("structured_prune: {start: 2st, head_sparsity: 0.3, unit_sparsity: 0.4, scope: layer}", 4, 114),
    ],
)
def test_that_is_what_training_leaves(modifier: str, heads: int, units: int, caplog: pytest.LogCaptureFixture) -> None:
    model = vit()
    with caplog.at_level(logging.INFO, "ovit_engine"):
        engine = engine_for(model, modifier, 4)
    (told,) = engine.modifiers
    assert [line for line in caplog.messages if " left in " in line] == [
        f"{told.name}: {line}" for line in told.outcome(engine.run)
    ]
    spelled = " ".join(told.outcome(engine.run))
    train(model, engine, 4).detach()
    for kind, left, of in (("heads", heads, 8), ("units", units, 192)):
        assert sum(int(site.gate.sum()) for site in installed(model) if site.kind == kind) == left
        assert f"{left} of {of} {kind}" in spelled or f"{left // 2} of {of // 2} {kind}" in spelled


@pytest.mark.parametrize("share", [0.4, 0.402])
def test_units_of_a_soft_phase_differ_by_one(share: float) -> None:
    model = vit()
    total = sum(parameter.numel() for parameter in model.parameters())
    # of two blocks: 2 heads of width 6 each go, and units make up the rest
    units = math.ceil((share * total - 4 * (18 * 24 + 18 + 6 * 24)) / (24 + 1 + 24))
    left = {96 - units // 2, 96 - (units + 1) // 2}
    options = f"end: 4st, every: 1st, parameter_sparsity: {share}"
    engine = Engine(model, recipe(f"gohsp: {{{options}}}"), steps_per_epoch=20, epochs=1)
    (gohsp,) = engine.prepare().modifiers
    assert list(gohsp.outcome(engine.run)) == [
        "2 of 4 heads left in each block, 50.00% off",
        f"{' to '.join(map(str, sorted(left)))} of 96 units left in each block, {units / 192:.2%} off",
    ]


def test_a_share_of_all_parameters_is_a_number_of_them() -> None:
    model = vit()
    total = sum(parameter.numel() for parameter in model.parameters())
    engine = engine_for(model, "structured_prune: {start: 9st, parameter_sparsity: 0.25}")
    (told,) = engine.modifiers
    assert list(told.outcome(engine.run)) == [f"{total // 4:,} of {total:,} parameters go at most"]
