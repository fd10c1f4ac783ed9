"""A training that is killed by SIGKILL, anywhere, ends as one that is not; and where it does not, that is seen."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ovit_engine.training.verify_resume import state_differences, verify_resume
from ovit_engine.training.verify_resume.killed_and_unbroken import event_steps, start_training
from ovit_engine.training.verify_resume.resumable_loop import checkpoints, newest
from ovit_engine.training.verify_resume.scheduled_kills import ScheduledKill, schedule_kills
from tests.resumable import TARGETS, build_counting, build_nothing, job

OVIT = (
    f"ovit_prune: {{start: 6st, end: 12st, every: 3st, sparsity: {{from: 0.3, to: 0.6}}, {TARGETS}, block: 16, "
    "gradients: 4, images_per_gradient: 4, damp: 1.0e-4}"
)
LR = "cyclic_lr: {max: 4.0e-3, min: 1.0e-3, period: 6st}"
RECIPES = {
    "ovit, cyclic LR, int8": [OVIT, LR, "quantize: {start_observers: 13st, start: 15st, freeze_observers: 20st}"],
    "movement": [f"movement_prune: {{start: 4st, end: 20st, every: 4st, sparsity: {{from: 0.2, to: 0.6}}, {TARGETS}}}"],
    "svite": [f"svite: {{every: 4st, sparsity: 0.6, gradients: 3, {TARGETS}}}"],
    "ac/dc": [f"acdc: {{start: 0st, every: 4st, sparsity: 0.5, {TARGETS}}}", LR],
    "sweep": [OVIT.replace("damp", "sweep: [0.3, 0.45, 0.6], damp"), "quantize: {start: 16st}"],
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_killed_training_ends_as_one_that_is_not(name: str, tmp_path: Path) -> None:
    verdict = verify_resume(job(*RECIPES[name]), tmp_path, kills=5)
    assert verdict.identical, verdict
    assert len(verdict.restarts) == 5
    assert sum(each.kill.place == "events" for each in verdict.restarts) == 3
    for each in verdict.restarts:
        place = "attach" if each.kill.step == 0 else f"step {each.kill.step}"
        assert re.search(rf"{place}\b", each.where)
        assert each.resumed <= each.kill.step
        assert each.resumed >= 5 * ((each.kill.step - 1) // 5)  # at most the steps since the last checkpoint are lost
    assert [name for name in verdict.compared if not name.startswith("sweep")] == [
        f"step-{step:08d}.pt" for step in (5, 10, 15, 20, 24)
    ]
    points = [name for name in verdict.compared if name.startswith("sweep")]
    assert points == (["sweep/0.3.pt", "sweep/0.45.pt", "sweep/0.6.pt"] if name == "sweep" else [])


def test_what_is_in_no_state_is_found(tmp_path: Path) -> None:
    verdict = verify_resume(job(LR, build=build_counting), tmp_path, kills=2, seed=1)
    assert not verdict.identical
    assert verdict.differs in verdict.compared
    first = verdict.restarts[0].resumed
    assert int(str(verdict.differs)[5:13]) > first
    assert any(each.where.startswith("model.inner.blocks.0") for each in verdict.differences)
    assert "entries differ, by up to" in str(verdict.differences[0])


def test_an_error_of_the_training_is_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^there are no images$"):
        verify_resume(job(LR, build=build_nothing), tmp_path, kills=1)


PLUGIN = '''
"""Movement pruning that loses its scores."""

from ovit_engine import register
from ovit_engine.modifiers.movement_prune import MovementPrune


@register("forgetful")
class Forgetful(MovementPrune):
    def state_dict(self):
        state = super().state_dict()
        return {**state, "scores": {name: score * 0 for name, score in state["scores"].items()}}
'''
FORGETFUL = f"""
training: {{model: vit_tiny_patch16_224, epochs: 3,
           model_args: {{img_size: 8, patch_size: 4, in_chans: 1, num_classes: 4, embed_dim: 16, depth: 1,
                        num_heads: 2}}}}
modifiers:
  - forgetful: {{start: 1ep, end: 3ep, every: 1ep, sparsity: {{from: 0.3, to: 0.6}}, {TARGETS}}}
"""


def test_a_modifier_that_does_not_save_its_state_is_found(tmp_path: Path) -> None:
    """As a package of somebody else's, which children find as users' processes do."""
    (tmp_path / "forgetful.py").write_text(PLUGIN)
    info = tmp_path / "forgetful-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: forgetful\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ovit_engine.modifiers]\nforgetful = forgetful\n")
    (tmp_path / "recipe.yaml").write_text(FORGETFUL)
    command = [sys.executable, "-m", "ovit_engine", "verify-resume", str(tmp_path / "recipe.yaml"), "--steps", "12"]
    environment = {**os.environ, "PYTHONPATH": f"{Path(__file__).parents[2]}:{tmp_path}", "COLUMNS": "200"}
    done = subprocess.run([*command, "--kills", "2"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (1, ""), done
    lines = done.stdout.splitlines()
    assert lines[0] == "recipe on vit_tiny_patch16_224: 12 steps, a checkpoint every 1"
    assert lines[1].split() == ["killed", "resumed", "at"]
    assert "NOT the same after 2 kills: of 12 checkpoints the first that differs is" in lines
    assert any(line.startswith(("  engine.masks.blocks.0.", "  model.")) for line in lines)


# --- the parts


@pytest.mark.parametrize(
    ("one", "two", "found"),
    [
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), []),
        (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), [": 1 of 2 entries differ, by up to 0"]),
        (torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.5, 1.0, 1.0]), [": 2 of 3 entries differ, by up to 1"]),
        (torch.tensor(3), torch.tensor(5), [": 1 of 1 entries differ, by up to 2"]),
        (torch.tensor(True), torch.tensor(True), []),
        (torch.tensor(1.0), torch.tensor(1), [": torch.float32 [] in one, torch.int64 [] in the other"]),
        (torch.zeros(2), torch.zeros(3), [": torch.float32 [2] in one, torch.float32 [3] in the other"]),
        (torch.zeros(0), torch.zeros(0), []),
        (torch.zeros(2, 2).t(), torch.zeros(2, 2), []),
        (torch.tensor([1j]), torch.tensor([2j]), [": 1 of 1 entries differ"]),
        ({"a": 1, "b": [1, 2]}, {"a": 1, "b": [1, 3]}, ["b[1]: 2 in one, 3 in the other"]),
        ({"a": 1}, {"b": 1}, ["a: only in the first", "b: only in the second"]),
        ({"a": {"b": (1,)}}, {"a": {"b": (1, 2)}}, ["a.b: 1 entries in one, 2 in the other"]),
        (1, 1.0, [": int in one, float in the other"]),
        (math.nan, math.nan, []),
        (0.1 + 0.2, 0.3, [": 0.30000000000000004 in one, 0.3 in the other"]),
        (None, None, []),
    ],
)
def test_differences(one: Any, two: Any, found: list[str]) -> None:
    assert [str(each) for each in state_differences(one, two)] == found


@given(
    count=st.integers(1, 30),
    total=st.integers(1, 200),
    every=st.integers(1, 300),
    events=st.sets(st.integers(0, 200), max_size=6),
    seed=st.integers(0, 1000),
)
def test_kills(count: int, total: int, every: int, events: set[int], seed: int) -> None:
    events = {step for step in events if step <= total}
    kills = schedule_kills(count, total=total, every=every, events=events, seed=seed)
    assert kills == schedule_kills(count, total=total, every=every, events=events, seed=seed)
    assert len(kills) == count
    assert [kill.step for kill in kills] == sorted(kill.step for kill in kills)
    for kill in kills:
        assert (0 if kill.place == "events" else 1) <= kill.step <= total
        assert kill.place != "events" or kill.step in events
        assert kill.place != "checkpoint" or kill.step % every == 0
        assert 1 <= kill.operation < 3163
    inside = [kill.step for kill in kills if kill.place == "events"]
    assert len(inside) == ((count + 1) // 2 if events else 0)
    assert len(set(inside)) == min(len(inside), len(events))


def test_steps_of_a_recipe_are_told() -> None:
    assert event_steps(job(*RECIPES["ovit, cyclic LR, int8"])) == [0, 6, 9, 12, 13, 15, 18, 20]
    assert ScheduledKill(3, "start", 0.0).operation == 1


@given(steps=st.integers(1, 9), epochs=st.integers(1, 4), batch=st.integers(1, 5), seed=st.integers(0, 5))
def test_each_epoch_takes_every_image_once(steps: int, epochs: int, batch: int, seed: int) -> None:
    training = job(LR, steps_per_epoch=steps, epochs=epochs, batch_size=batch, seed=seed)
    for epoch in range(epochs):
        numbers = range(epoch * steps + 1, (epoch + 1) * steps + 1)
        assert sorted(image for step in numbers for image in training.indices(step)) == list(range(steps * batch))
        assert {len(training.indices(step)) for step in numbers} == {batch}


def test_epochs_and_seeds_differ_in_order() -> None:
    training, other = job(LR, steps=24), job(LR, steps=24, seed=1)
    assert training.indices(1) == job(LR, steps=24).indices(1)
    assert training.indices(1) != training.indices(5)  # the first step of the next epoch
    assert training.indices(1) != other.indices(1)


def test_the_newest_checkpoint_is_the_last_in_time(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    for name in ("step-00000900.pt", "step-00000011.pt", "step-00001000.pt", ".step-00002000.pt.0123.tmp"):
        (tmp_path / name).touch()
    assert list(checkpoints(tmp_path)) == ["step-00000011.pt", "step-00000900.pt", "step-00001000.pt"]
    assert newest(tmp_path) == tmp_path / "step-00001000.pt"


@pytest.mark.parametrize("place", ["start", "gradients", "events", "checkpoint"])
def test_where_a_process_is_killed(place: Any, tmp_path: Path) -> None:
    """By the signal itself: a checkpoint that was being written is not there."""
    prune = f"magnitude_prune: {{start: 4st, sparsity: 0.5, {TARGETS}}}"
    start_training(job(prune, every=2, steps=8), tmp_path, ScheduledKill(4, place, 0.5))
    assert list(checkpoints(tmp_path)) == ["step-00000002.pt"]
    (line,) = (tmp_path / "journal.txt").read_text().splitlines()
    expected = {
        "start": "before step 4",
        "gradients": "in step 4, before its update",
        "events": "inside the events of step 4, at operation 56",
        "checkpoint": "writing the checkpoint of step 4, ",
    }
    assert line.startswith(expected[place])
    halves = list(tmp_path.glob(".step-00000004.pt.*.tmp/*"))
    if place == "checkpoint":
        (half,) = halves
        assert 0.4 < half.stat().st_size / (tmp_path / "step-00000002.pt").stat().st_size < 0.6
    else:
        assert not halves
