"""A loop of Hugging Face's Accelerate under a recipe."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import GradientAccumulationPlugin
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from ovit_engine import Calibration, Engine, Recipe
from ovit_engine.integrations.accelerate import accelerate_engine, attach_accelerate
from tests.integrations import small


def accelerator(**options: Any) -> Accelerator:
    for state in (AcceleratorState, GradientState, PartialState):  # settings are singletons
        state._reset_state()
    return Accelerator(cpu=True, **options)


class Training:
    """All that a script makes anew when it starts again."""

    def __init__(self, recipe: Recipe | None = None, **options: Any) -> None:
        self.accelerator = accelerator(**options)
        loader = DataLoader(small.TRAIN, batch_size=small.BATCH)
        self.loader = self.accelerator.prepare(loader)
        self.raw = small.vit()
        self.engine = accelerate_engine(
            self.accelerator, self.raw, recipe or small.recipe(), self.loader, epochs=small.EPOCHS
        )
        inner = small.RecordingAdamW(self.raw.parameters(), lr=1e-3)
        self.model, self.optimizer = self.accelerator.prepare(self.raw, inner)

    def attach(self) -> "Training":
        attach_accelerate(self.engine, self.optimizer, calibration=Calibration(small.TRAIN, cross_entropy))
        return self

    def train(self, epochs: range, after: Callable[[int], None] = lambda epoch: None) -> "Training":
        for epoch in epochs:
            for images, classes in self.loader:
                with self.accelerator.accumulate(self.model):
                    loss = cross_entropy(self.model(images), classes)
                    self.accelerator.backward(loss)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
            after(epoch)
        return self

    def finish(self) -> "Training":
        self.engine.detach()
        small.check_trained(self.engine)
        return self


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_ends_in_a_verified_file(tmp_path: Path, precision: str) -> None:
    training = Training(mixed_precision=precision).attach().train(range(4)).finish()
    rates = training.optimizer.optimizer.rates
    assert rates == pytest.approx([small.lr_of(step) for step in range(1, 41)])
    certificate = training.engine.export(tmp_path / "model.onnx", small.IMAGES[:2], data=DataLoader(small.VAL, 64))
    assert certificate.parity.cosine > 0.999  # float32 all through, whatever it was trained in
    training.model(small.IMAGES[:2])  # and the model trains on as Accelerate prepared it
    assert ("_original_forward" in vars(training.raw)) == (precision == "bf16")


@pytest.mark.parametrize(
    ("options", "steps", "total"),
    [
        ({"gradient_accumulation_steps": 4}, 3, 12),  # 4 + 4 + 2 of 10 micro-batches
        (
            {"gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=4, sync_with_dataloader=False)},
            2,
            10,
        ),
    ],
)
def test_accumulation_counts_optimizer_steps(options: dict[str, Any], steps: int, total: int) -> None:
    training = Training(**options).attach()
    assert (training.engine.run.steps_per_epoch, training.engine.run.total_steps) == (steps, total)
    training.train(range(4)).finish()


def test_resuming_from_save_state_is_bit_exact(tmp_path: Path) -> None:
    saved = Training().attach()
    saved.train(range(4), lambda epoch: saved.accelerator.save_state(str(tmp_path / str(epoch)))).finish()
    for epoch in (0, 1, 2):
        resumed = Training()
        resumed.accelerator.load_state(str(tmp_path / str(epoch)))
        resumed.attach().train(range(epoch + 1, 4)).finish()
        assert small.equal(resumed.raw, saved.raw), epoch


def test_calibration_takes_no_part_in_mixed_precision() -> None:
    recipe = Recipe.parse(
        "modifiers: [{ovit_prune: {sparsity: 0.5, targets: ['re:.*(qkv|fc1).weight'], block: 16, gradients: 8}}]"
    )
    one, two = (Training(recipe, mixed_precision=precision).attach() for precision in ("no", "bf16"))
    assert small.equal(one.raw, two.raw)


def test_the_accelerators_trackers_take_what_is_measured(tmp_path: Path) -> None:
    training = Training(log_with="tensorboard", project_dir=tmp_path)
    training.accelerator.init_trackers("run")
    training.engine.log_to(training.accelerator.log, every=10)
    training.attach().train(range(4)).finish()
    training.accelerator.end_training()
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_what_is_not_prepared_is_refused() -> None:
    with pytest.raises(TypeError, match=r"give the loader that accelerator.prepare\(loader\) returns"):
        accelerate_engine(accelerator(), small.vit(), small.recipe(), DataLoader(small.TRAIN), epochs=1)
    training = Training()
    engine = Engine(training.raw, Recipe.parse("modifiers: []"), steps_per_epoch=1, epochs=1)
    engine.attach(training.optimizer)  # without attach_accelerate, it is the inner one that counts
    assert engine.run.optimizers == [training.optimizer.optimizer]
    other = Training()  # attached to no engine, though torch patched the class of its optimizer
    other.optimizer.step()
