"""SViTE in loops of all kinds, after restarts, beside other modifiers, and what it refuses."""

import copy
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from ovit_engine import Engine, RecipeError
from ovit_engine.training.verify_resume import state_differences
from tests.loops import X, Y, closure, mlp, plain, recipe
from tests.modifiers.test_svite import STEPS, masks_of, started

# --- loops


def test_a_step_that_overflows_changes_nothing() -> None:
    """U10."""
    for fused in (False, True):
        model, optimizer, engine = started(
            "every: 2st, sparsity: 0.5", lambda p, lr, fused=fused: torch.optim.AdamW(p, lr, fused=fused)
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        applied = 0
        for number in range(8):
            overflows = number in (1, 4)
            before = (copy.deepcopy(model.state_dict()), masks_of(engine), engine.run.step)
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(X), Y)
            scaler.scale(loss * (math.inf if overflows else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            if overflows:
                assert engine.run.step == before[2]
                assert masks_of(engine)["0.weight"].equal(before[1]["0.weight"])
                assert model[0].weight.equal(before[0]["0.weight"])
            else:
                applied += 1
                expected = applied % 2 == 0
                assert masks_of(engine)["0.weight"].equal(before[1]["0.weight"]) != expected
            assert bool(model[0].weight.isfinite().all())


def test_a_loss_scale_does_not_matter() -> None:
    """Gradients over two steps are those of the loss, though the scale changes in between."""
    masks = []
    for scales in ((1.0, 1.0), (1.0, 2.0**12)):
        model, optimizer, engine = started(
            "every: 2st, gradients: 2, sparsity: 0.5", lambda p, lr: torch.optim.AdamW(p, lr, fused=True)
        )
        for scale in scales:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(model(X), Y)).backward()
            scaler.step(optimizer)
        masks.append(masks_of(engine)["0.weight"])
    assert masks[0].equal(masks[1])


def test_accumulation_is_a_larger_batch() -> None:
    """U11."""
    found = []
    for parts in (1, 4):
        model, optimizer, engine = started("every: 3st, sparsity: 0.5", torch.optim.SGD)
        for _ in range(STEPS):
            optimizer.zero_grad()
            for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
                (nn.functional.mse_loss(model(x), y) / parts).backward()
            optimizer.step()
        found.append(masks_of(engine)["0.weight"])
    assert found[0].equal(found[1])


def test_an_average_is_as_sparse() -> None:
    """U12: what was dropped leaves the averaged copy at once."""
    model = mlp()
    ema = ModelEmaV3(model, decay=0.99)
    optimizer = torch.optim.AdamW(model.parameters(), 0.05)
    text = "svite: {every: 2st, end: 100%, sparsity: 0.5, targets: [0.weight]}"
    engine = Engine(model, recipe(text), steps_per_epoch=STEPS, epochs=1).attach(optimizer, ema=ema)
    for _ in range(STEPS):
        plain(model, optimizer)
        assert not ema.module[0].weight[~masks_of(engine)["0.weight"]].any()
        ema.update(model)
    engine.detach()
    assert int((ema.module[0].weight == 0).sum()) >= int((model[0].weight == 0).sum()) == 64


def test_a_closure_sees_sparse_weights_and_gives_dense_gradients() -> None:
    model, optimizer, engine = started("every: 2st, sparsity: 0.5", torch.optim.SGD)
    starts = masks_of(engine)["0.weight"]
    for _ in range(4):
        before = masks_of(engine)["0.weight"]
        closure(model, optimizer)
        assert not model[0].weight[~(before & masks_of(engine)["0.weight"])].any()
    assert not masks_of(engine)["0.weight"].equal(starts)


# --- states


class Training:
    """All that a script makes anew when it starts again; 160 steps."""

    def __init__(self, options: str) -> None:
        self.model = mlp()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 0.01)
        text = f"svite: {{targets: ['re:.*weight'], {options}}}"
        self.engine = Engine(self.model, recipe(text), steps_per_epoch=16, epochs=10)

    def train(self, steps: int) -> "Training":
        self.engine.attach(self.optimizer)
        for _ in range(steps):
            batch = torch.randint(64, (16,))
            self.optimizer.zero_grad()
            nn.functional.mse_loss(self.model(X[batch]), Y[batch]).backward()
            self.optimizer.step()
        return self

    @property
    def parts(self) -> list[Any]:
        return [self.engine, self.model, self.optimizer]


@pytest.mark.parametrize("cut", [137, 138])
@pytest.mark.parametrize("grow", ["grow: gradient, gradients: 3", "grow: random"])
def test_a_run_that_was_broken_off_goes_on_bit_for_bit(cut: int, grow: str) -> None:
    """U8: between two updates, and inside of the steps whose gradients count."""
    options = f"every: 10st, end: 150st, sparsity: 0.5, {grow}"
    torch.manual_seed(5)
    whole = Training(options).train(160)
    torch.manual_seed(5)
    first = Training(options).train(cut)
    file = io.BytesIO()
    torch.save([*(part.state_dict() for part in first.parts), torch.get_rng_state()], file)
    *states, random = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert bool(states[0]["modifiers"][0]["gains"]) == (cut == 138 and "gradients" in grow)
    again = Training(options)
    for part, state in zip(again.parts, states, strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(random)
    again.train(160 - cut)
    ends = [[part.state_dict() for part in each.parts] for each in (whole, again, first)]
    assert not list(state_differences(ends[0], ends[1]))
    assert list(state_differences(ends[0], ends[2]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gains": {"0.weight": torch.zeros(2, 2)}}, r"gradients of '0.weight' \[2, 2\] fits nothing here"),
        ({"gains": {"nope": torch.zeros(2, 2)}}, "gradients of 'nope'"),
        ({"ever": {"nope": {}}}, "the checkpoint's record of 'nope' fits no target here"),
        ({"ever": {"0.weight": {}}}, "mask of '0.weight' is damaged: it has no shape and bits"),
        ({"ever": {"0.weight": {"shape": [1], "bits": torch.zeros(1)}}}, r"mask of '0.weight' is \[1\], the weight"),
    ],
)
def test_a_state_of_something_else_is_refused(change: dict[str, Any], words: str) -> None:
    model, optimizer, engine = started("every: 4st, sparsity: 0.5")
    plain(model, optimizer)
    state = engine.state_dict()
    state["modifiers"][0] |= change
    fresh = Engine(mlp(), engine.recipe, steps_per_epoch=STEPS, epochs=1)
    with pytest.raises(ValueError, match=words):
        fresh.load_state_dict(state)


def test_a_training_that_is_far_too_short_is_told() -> None:
    model, optimizer, engine = started("every: 4st, sparsity: 0.5")
    for _ in range(13):
        plain(model, optimizer)
    with pytest.raises(RuntimeError, match="svite: training ended before the last update at step 16"):
        engine.detach()


def test_updates_that_skipped_steps_left_out_are_not_made_up_for() -> None:
    """A connection that came after the last step would stay zero."""
    model, optimizer, engine = started("every: 1st, end: 100%, sparsity: 0.5, drop_end: 0.4")
    for _ in range(STEPS - 1):
        plain(model, optimizer)
    engine.modifiers[0]._done -= 1  # type: ignore[attr-defined]
    before = masks_of(engine)["0.weight"]
    engine.detach()
    assert masks_of(engine)["0.weight"].equal(before)


# --- what is refused

ERRORS = [
    ("every: 0.01ep", "svite.every: '0.01ep' is less than a step of 24 steps an epoch"),
    ("every: 20st", "svite.every: no update comes before the end at '80%', step 19: update more often"),
    ("every: 2st, end: 3ep", "svite.end: '3ep' is step 72, past the end of training at step 24"),
    ("every: 2st, gradients: 3", "svite.gradients: 3 gradients are more than the 2 steps between updates"),
    ("every: 2st, drop: 0.1, drop_end: 0.2", "svite: the share that moves falls: 'drop' is 0.1, 'drop_end' 0.2"),
    ("every: 2st, drop: 1.5", "svite.drop"),
    ("every: 2st, grow: random, gradients: 2", "svite: 'gradients' does not go with 'grow: random', which takes none"),
    ("every: 2st, grow: magic", "svite.grow"),
    ("every: 2st, init: magnitude, seed: 1", "svite: 'seed' does not go with 'init: magnitude' and 'grow: gradient'"),
    ("every: 2st, pattern: '1:4'", "svite: pattern 1:4 is a sparsity of 0.75: sparsity 0.5 contradicts it"),
    ("end: 2ep", "svite"),
]


@pytest.mark.parametrize(("options", "words"), ERRORS)
def test_options_that_make_no_sense(options: str, words: str) -> None:
    with pytest.raises(RecipeError, match=rf"^r.yaml:2:\d+: {words}") as raised:
        started(f"sparsity: 0.5, {options}")
    assert "\n" not in str(raised.value)


def test_a_frozen_weight_can_only_grow_at_random() -> None:
    model = mlp()
    model[0].weight.requires_grad_(False)
    with pytest.raises(RecipeError, match=r"^r.yaml:2:\d+: svite.targets: '0.weight' is frozen, so there is no grad"):
        started("every: 2st, sparsity: 0.5", model=model)
    _, optimizer, engine = started("every: 2st, sparsity: 0.5, grow: random", model=copy.deepcopy(model))
    before = masks_of(engine)["0.weight"]
    for _ in range(2):
        plain(engine.model, optimizer)
    assert not masks_of(engine)["0.weight"].equal(before)


def test_a_loss_that_is_nan_is_an_error_and_no_topology() -> None:
    model, optimizer, engine = started("every: 2st, sparsity: 0.5", torch.optim.SGD)
    plain(model, optimizer)
    before = masks_of(engine)["0.weight"]
    with torch.no_grad():
        model[2].weight[0, 3] = torch.nan
    with pytest.raises(FloatingPointError, match=r"^0\.weight: a weight is NaN"):
        plain(model, optimizer)
    assert masks_of(engine)["0.weight"].equal(before)


def engine_of(*modifiers: str) -> Engine:
    return Engine(mlp(), recipe(*modifiers), steps_per_epoch=10, epochs=10).prepare()


SVITE = "svite: {every: 10st, end: 50st, sparsity: 0.5, targets: [0.weight]}"


@pytest.mark.parametrize("first", [True, False])
def test_quantization_waits_for_the_last_update(first: bool) -> None:
    """§11: the topology is fixed before weights are rounded."""
    both = [SVITE, "quantize: {start: 3ep, targets: ['0']}"]
    what = "the quantization of 0 from step "
    words = (
        rf"^r.yaml:3:\d+: quantize: {what}30 to 100 does not go with svite \(r.yaml:2:\d+\) from 0 to 40: what is"
        if first
        else rf"^r.yaml:3:\d+: svite: {what}0 to 40 does not go with quantize \(r.yaml:2:\d+\) from 30 to 100: what is"
    )
    with pytest.raises(RecipeError, match=f"{words} rounded must be what is deployed, so quantize after the last"):
        engine_of(*(both if first else both[::-1]))
    engine_of(SVITE, "quantize: {start: 3ep, targets: ['2']}")  # another layer
    engine_of(SVITE, "quantize: {start: 5ep, targets: ['0']}")


@pytest.mark.parametrize(
    "other",
    ["magnitude_prune: {start: 4ep, sparsity: 0.75, targets: [0.weight]}", "constant_mask: {targets: [0.weight]}"],
)
def test_another_writer_of_its_masks_is_refused(other: str) -> None:
    with pytest.raises(
        RecipeError, match=r"writes the mask of 0.weight .* svite \(r.yaml:2:\d+\) writes it from 0 to 40"
    ):
        engine_of(SVITE, other)
    engine_of(SVITE, other.replace("0.weight", "2.weight"))


def test_pruning_may_go_on_where_it_ended() -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    text = [SVITE, "magnitude_prune: {start: 8ep, sparsity: 0.75, targets: [0.weight]}"]
    with Engine(model, recipe(*text), steps_per_epoch=10, epochs=10).attach(optimizer):
        for _ in range(100):
            plain(model, optimizer)
    assert int((model[0].weight == 0).sum()) == 96


def test_its_file_holds_what_it_promises(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    text = [SVITE, "quantize: {start: 50st, targets: ['0']}"]
    with Engine(model, recipe(*text), steps_per_epoch=10, epochs=10).attach(optimizer) as engine:
        for _ in range(100):
            plain(model, optimizer)
    certificate = engine.export(tmp_path / "model.onnx", X[:2])
    (layer,) = [layer for layer in certificate.layers if layer.name == "0.weight"]
    assert layer.sparsity >= 0.5
    assert layer.quantized
