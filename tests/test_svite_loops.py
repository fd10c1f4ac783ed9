"""Dynamic sparsity in every kind of loop: exact in number after each step, moved at updates, dense gradients seen."""

import pytest

from ovit_engine import Engine, Recipe, RecipeError
from tests.loop_matrix import LOOPS, STEPS, TARGETS

RECIPE = Recipe.parse(f"""
name: svite_matrix
modifiers:
  - svite: {{every: 6st, end: 20st, sparsity: 0.5, gradients: 2, {TARGETS}}}
""")
SLOW = ("compiled model", "compiled step")  # to compile


@pytest.mark.parametrize("name", [pytest.param(each, marks=[pytest.mark.slow] * (each in SLOW)) for each in LOOPS])
def test_every_loop(name: str) -> None:
    loop, make = LOOPS[name]
    model = make()
    engine = Engine(model, RECIPE, steps_per_epoch=STEPS // 2, epochs=2)
    steps = loop(model, engine)
    if name == "frozen parameters":
        with pytest.raises(RecipeError, match=r"svite.targets: 'blocks.0.attn.qkv.weight' is frozen"):
            next(steps)
        return
    next(steps)
    masks = engine.run.masks
    before = {each: masks.get(each).clone() for each in masks.names()}
    counts = {each: int(mask.sum()) for each, mask in before.items()}
    moved, applied = [], 0
    for was_applied in steps:
        applied += was_applied
        assert engine.run.step == applied
        now = {each: masks.get(each).clone() for each in masks.names()}
        assert {each: int(mask.sum()) for each, mask in now.items()} == counts
        if any(not now[each].equal(before[each]) for each in now):
            moved.append(applied)
        before = now
        weights = dict(model.named_parameters())
        for each, mask in now.items():
            assert not weights[each][~mask].any(), each
    assert moved == [6, 12, 18]
    engine.detach()
