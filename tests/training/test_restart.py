"""Runs of the bundled trainer that are killed at any step, and go on as if nothing had been."""

import math
import random
import signal
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from ovit_engine import Recipe
from ovit_engine.cli import main
from ovit_engine.training import steps, trainer
from ovit_engine.training.api import SILENT, Trained, train, with_training
from ovit_engine.training.checkpoint import LAST, PREVIOUS, last_whole, load_checkpoint
from tests.processes import started
from tests.training.conftest import tiny_recipe

ALL = r"""
  - magnitude_prune:
      {start: 1ep, end: 2ep, every: 1ep, sparsity: {from: 0.3, to: 0.6}, targets: ['re:blocks.*(qkv|fc1)\.weight']}
  - cyclic_lr: {max: 2.0e-3, min: 1.0e-5, period: 1ep}
  - quantize: {start: 1.4ep, freeze_observers: 2.4ep}
"""
COLOUR = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2, "drop_rate": 0.1}


class KilledError(Exception):
    pass


def run(recipe: Recipe, output: Path, *, stop_after: int | None = None, **options: Any) -> Trained:
    """Train with a checkpoint a step; `stop_after` that many steps of the whole training it is broken off."""
    seen = 0

    def begin(epoch: int, epochs: int, steps: int) -> None:
        nonlocal seen
        seen = (epoch - 1) * steps

    def step() -> None:
        nonlocal seen
        seen += 1
        if seen == stop_after:
            raise KilledError

    options = {"data": "digits", "save_every": 0.0, **options}
    return train(recipe, output=output, device="cpu", progress=replace(SILENT, begin=begin, step=step), **options)


def broken(recipe: Recipe, output: Path, stops: list[int], **options: Any) -> Trained:
    """The same run, broken off after each of `stops` and resumed."""
    resume = None
    for stop in stops:
        with pytest.raises(KilledError):
            run(recipe, output, stop_after=stop, resume=resume, **options)
        resume = output
    return run(recipe, output, resume=resume, **options)


def check_same(one: Trained, two: Trained) -> None:
    assert [replace(row, seconds=0.0) for row in one.metrics] == [replace(row, seconds=0.0) for row in two.metrics]
    files = [load_checkpoint(each.checkpoint) for each in (one, two)]
    for key in ("model", "ema"):
        states = [file.get(key, {}) for file in files]
        assert states[0].keys() == states[1].keys()
        for name in states[0]:
            assert torch.equal(states[0][name], states[1][name]), name
    for name, tensor in one.model.state_dict().items():
        assert torch.equal(tensor, two.model.state_dict()[name]), name


@pytest.mark.parametrize("workers", [0, 2])
def test_mixed_erased_repeated_and_dropped_images_come_again_bit_for_bit(
    tmp_path: Path, jpeg_folder: Path, workers: int
) -> None:
    """20 images in 5 steps an epoch; broken off within epochs, at their ends, around pruning and quantization."""
    recipe = with_training(
        tiny_recipe(ALL, epochs=3, extra="batch_size: 4, accumulate: 2, augmentation: deit, ema: 0.9, clip_grad: 1.0"),
        model_args=COLOUR,
    )
    unbroken = run(recipe, tmp_path / "unbroken", data=jpeg_folder)
    stops = [1, 5, 6, 7, 8, 13] if workers == 0 else [7]
    resumed = broken(recipe, tmp_path / "broken", stops, data=jpeg_folder, workers=workers)
    check_same(resumed, unbroken)
    assert resumed.engine.run.masks.sparsity() == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize(
    ("modifiers", "extra"),
    [
        ("[]", "optimizer: sgd, scheduler: cosine, scheduler_args: {warmup_epochs: 1}"),
        (
            "[{ovit_prune: {start: 1.5ep, sparsity: 0.5, targets: ['re:.*qkv.weight'], block: 16, gradients: 8}}]",
            "augmentation: noise",
        ),
    ],
)
def test_at_any_step(tmp_path: Path, modifiers: str, extra: str) -> None:
    recipe = tiny_recipe(modifiers, epochs=2, extra=f"batch_size: 256, lr: 1.0e-3, {extra}")
    stops = sorted(random.Random(0).sample(range(1, 10), 3))
    check_same(broken(recipe, tmp_path / "broken", stops), run(recipe, tmp_path / "unbroken"))


@pytest.mark.parametrize("scale", [2.0**127, 2.0**10], ids=["overflows", "grows"])
def test_scaled_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """The scaler of a GPU, here on the CPU, where powers of two change no bit of float32."""
    recipe = tiny_recipe(epochs=3, extra="batch_size: 256, lr: 1.0e-3, clip_grad: 0.5, ema: 0.5")
    plain = run(recipe, tmp_path / "plain")
    scaler = torch.amp.GradScaler
    scales = []

    class Growing(scaler):  # type: ignore[misc, valid-type]
        def __init__(self, device: str, enabled: bool) -> None:
            super().__init__(device, init_scale=scale, growth_interval=2)

        def update(self, *arguments: Any) -> None:
            super().update(*arguments)
            scales.append(self.get_scale())

    monkeypatch.setattr(torch.amp, "GradScaler", Growing)
    unbroken = run(recipe, tmp_path / "unbroken")
    expected, applied = list(scales), unbroken.engine.run.step
    scales.clear()
    check_same(broken(recipe, tmp_path / "broken", [2, 9]), unbroken)
    assert scales == expected
    if scale == 2.0**10:
        assert (applied, expected[-1]) == (15, 2.0**17)
        check_same(unbroken, plain)
    else:
        assert 0 < applied < 15  # the first steps overflow, and are none


def test_half_precision_as_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 with a scaler, in parts, clipped, averaged: here on the CPU. The first step overflows and is skipped."""
    seen: list[torch.dtype] = []
    scalers: list[Any] = []

    class HalfSteps(steps.Steps):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            assert self.scaler.is_enabled()
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**11)
            scalers.append(self.scaler)
            self._network.register_forward_hook(lambda network, inputs, output: seen.append(output.dtype))
            parameter = self._engine.model.get_parameter("head.bias")
            parameter.register_hook(lambda grad: grad * (math.inf if self.scaler.get_scale() == 2.0**11 else 1.0))

    monkeypatch.setattr(steps, "mixed_precision", lambda device: (torch.float16, True))
    monkeypatch.setattr(trainer, "Steps", HalfSteps)
    extra = "batch_size: 256, accumulate: 2, clip_grad: 0.5, ema: 0.5, augmentation: noise"
    recipe = tiny_recipe(ALL, epochs=3, extra=extra)
    unbroken = run(recipe, tmp_path / "unbroken", amp=True)
    assert unbroken.engine.run.step == 14
    assert set(seen[: 2 * 5]) == {torch.float16}
    resumed = broken(recipe, tmp_path / "broken", [1, 8], amp=True)
    check_same(resumed, unbroken)
    assert [scaler.get_scale() for scaler in scalers] == [2.0**10] * 4  # a new one would skip again
    assert unbroken.engine.run.masks.sparsity() == pytest.approx(0.6, abs=1e-3)


def test_what_is_lost_is_what_was_not_saved(tmp_path: Path) -> None:
    recipe = tiny_recipe(epochs=3)
    with pytest.raises(KilledError):
        run(recipe, tmp_path, stop_after=8, save_every=3600.0)
    state = load_checkpoint(tmp_path)
    assert (state["epoch"], state["loop"]["step"]) == (1, 0)
    with pytest.raises(KilledError):
        run(recipe, tmp_path, stop_after=8, resume=tmp_path)
    state = load_checkpoint(tmp_path)
    assert (state["epoch"], state["loop"]["step"], state["engine"]["step"]) == (1, 3, 8)


# --- `ovit train --resume auto`

RECIPE = f"""
name: tiny
training:
  model: vit_tiny_patch16_224
  model_args: {{img_size: 8, patch_size: 2, in_chans: 1, embed_dim: 16, depth: 1, num_heads: 2, drop_path_rate: 0.1}}
  epochs: 4
  batch_size: 128
  augmentation: noise
  ema: 0.9
modifiers: {ALL}
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`ovit train`, but for the output, in an empty folder with its recipe."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(RECIPE)
    return ["train", "--recipe", "tiny.yaml", "--data", "digits", "--device", "cpu", "--checkpoint-every", "0"]


def ovit(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments)


def test_sigkill_at_random_times(command: list[str]) -> None:
    again = [*command, "--resume", "auto", "--output", "broken"]
    last, draw = Path("broken") / LAST, random.Random()
    for _ in range(2):
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = started(ovit, *again)
        while process.is_alive() and (last.stat().st_mtime_ns if last.exists() else 0) == before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert load_checkpoint(last_whole(Path("broken")) or last)["engine"]["step"] > 0
    (Path("broken") / f".{LAST}.12345678.tmp").write_bytes(b"half of a checkpoint")
    resumed, unbroken = ovit(*again), ovit(*command, "--output", "unbroken")
    assert (resumed.exit_code, unbroken.exit_code) == (0, 0), resumed.output + unbroken.output
    assert resumed.output.startswith("going on from broken/last.pt")
    states = [load_checkpoint(Path(folder)) for folder in ("broken", "unbroken")]
    for key in ("model", "ema"):
        for name, tensor in states[0][key].items():
            assert torch.equal(tensor, states[1][key][name]), name
    assert states[0]["engine"]["masks"].keys() == states[1]["engine"]["masks"].keys()
    assert sorted(path.name for path in Path("broken").iterdir()) == [LAST, "metrics.csv", PREVIOUS]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3000])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as parts:
        largest = max(parts.infolist(), key=lambda part: part.file_size)
    content[largest.header_offset + largest.file_size] ^= 1  # not in the padding before it, which nobody misses
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe(epochs=2, extra="batch_size: 256, augmentation: noise")
    with pytest.raises(KilledError):
        run(recipe, tmp_path / "broken", stop_after=7)
    last, previous = tmp_path / "broken" / LAST, tmp_path / "broken" / PREVIOUS
    assert [load_checkpoint(file)["engine"]["step"] for file in (previous, last)] == [6, 7]
    assert last_whole(last.parent) == last
    damage(last)
    assert last_whole(last.parent) == previous
    assert f"going on from {previous}" in caplog.text
    assert caplog.text.count(str(last)) == 1
    with pytest.raises(KilledError):
        run(recipe, last.parent, resume=previous, stop_after=7)
    assert load_checkpoint(previous)["engine"]["step"] == 6  # what was damaged does not take its place
    assert load_checkpoint(last)["engine"]["step"] == 7
    resumed = run(recipe, last.parent, resume=last)
    check_same(resumed, run(recipe, tmp_path / "unbroken"))


def test_auto_says_which_files_are_damaged(command: list[str]) -> None:
    auto = [*command, "--resume", "auto", "--output", "out", "--epochs", "3"]
    assert ovit(*auto).exit_code == 0  # nothing to resume: it starts
    finished = ovit(*auto)
    assert finished.exit_code == 0
    assert "the run in 'out/last.pt' is finished: all 3 epochs are done" in finished.output
    flip(Path("out") / LAST)
    warned = ovit(*auto)
    assert warned.exit_code == 0
    assert warned.stderr.startswith("ovit: warning: 'out/last.pt' is damaged: the checksum of its ")
    assert warned.stderr.endswith("is wrong: going on from out/previous.pt\n")
    for name in (LAST, PREVIOUS):
        cut(Path("out") / name)
    lost = ovit(*auto)
    assert lost.exit_code == 1
    assert lost.stderr.startswith("ovit: error: no whole checkpoint to go on from: 'out/last.pt' is damaged")
    assert "'out/previous.pt' is damaged" in lost.stderr


def test_mixed_precision_stays_as_the_run_began(command: list[str]) -> None:
    recipe = Recipe.load("tiny.yaml")
    with pytest.raises(KilledError):
        run(recipe, Path("out"), stop_after=2)
    refused = ovit(*command, "--resume", "auto", "--output", "out", "--amp")
    assert "the run in 'out/last.pt' began with no mixed precision" in refused.stderr
    with pytest.raises(KilledError):
        run(recipe, Path("half"), stop_after=2, amp=True)
    with pytest.raises(KilledError):
        run(recipe, Path("half"), stop_after=4, resume=Path("half"))
    assert load_checkpoint(Path("half"))["loop"]["amp"] is True
