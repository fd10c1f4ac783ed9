"""The teacher of a run of the bundled trainer: whose weights it has, in a resumed run too."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from ovit_engine import Recipe, RecipeError
from ovit_engine.training.api import with_training
from ovit_engine.training.runs import restore
from ovit_engine.training.teachers import FILE
from ovit_engine.utils.torch_files import load_file
from tests.training.conftest import tiny_recipe
from tests.training.test_restart import KilledError, broken, check_same, run

DISTILL = r"""
  - magnitude_prune: {start: 1st, sparsity: 0.5, targets: ['re:blocks.*(qkv|fc1)\.weight']}
  - distill: {logits: 1.0, tokens: 0.5}
"""


def recipe(modifiers: str = DISTILL, epochs: int = 2, **teacher: Any) -> Recipe:
    plain = tiny_recipe(modifiers, epochs=epochs, extra="batch_size: 512")
    return with_training(plain, teacher=teacher or None)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose weights a teacher may have."""
    folder = tmp_path_factory.mktemp("dense")
    run(tiny_recipe(epochs=1, extra="batch_size: 512"), folder)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / FILE)["model"]
    return found


def test_the_starting_weights_teach_and_go_with_the_run(tmp_path: Path, dense: Path) -> None:
    unbroken = run(recipe(), tmp_path / "unbroken", checkpoint=dense)
    before = load_file(dense / "last.pt")["model"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path / "unbroken").items())
    assert unbroken.engine.run.teacher is None
    with pytest.raises(KilledError):
        run(recipe(), tmp_path / "broken", stop_after=2, checkpoint=dense)
    resumed = run(recipe(), tmp_path / "broken", resume=tmp_path / "broken")  # the checkpoint is not named again
    check_same(resumed, unbroken)


def test_without_its_file_a_run_does_not_go_on_with_another_teacher(tmp_path: Path, dense: Path) -> None:
    with pytest.raises(KilledError):
        run(recipe(), tmp_path, stop_after=2, checkpoint=dense)
    assert restore(tmp_path).engine.run.teacher is not None
    (tmp_path / FILE).write_bytes(b"no")
    with pytest.raises(ValueError, match=rf"{FILE}' is damaged"):
        run(recipe(), tmp_path, resume=tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(ValueError, match="saved with another teacher"):
        run(recipe(), tmp_path, resume=tmp_path)


def test_another_model_may_teach(tmp_path: Path) -> None:
    args = {"img_size": 8, "patch_size": 2, "embed_dim": 24, "depth": 1, "num_heads": 2}
    teacher = timm.create_model("vit_small_patch16_224", in_chans=1, num_classes=10, **args)
    torch.save(teacher.state_dict(), tmp_path / "weights.pt")
    logits = DISTILL.replace(", tokens: 0.5", "")
    named = {"model": "vit_small_patch16_224", "checkpoint": str(tmp_path / "weights.pt")}
    run(recipe(logits, epochs=1, model_args=args, **named), tmp_path / "run")  # as many classes as what it teaches
    assert all(torch.equal(t, teacher.state_dict()[n]) for n, t in weights(tmp_path / "run").items())
    with pytest.raises(ValueError, match=r"training.teacher: .*weights.pt' does not fit the model"):
        run(recipe(logits, checkpoint=named["checkpoint"]), tmp_path / "same")
    with pytest.raises(ValueError, match="no modifier of the recipe learns from one"):
        run(recipe("[]", model_args=args, **named), tmp_path / "none")


@pytest.mark.parametrize(
    ("teacher", "message"),
    [
        ("{modle: x}", r"^r.yaml:2:13: training.teacher has no option 'modle'"),
        ("deit", r"^r.yaml:2:12: training.teacher: .*'deit'"),
        ("{model_args: {depth: 1}}", "^r.yaml:2:12: training.teacher: model_args go with a model: 'same' takes those"),
        ("{checkpoint: 1}", r"^r.yaml:2:25: training.teacher.checkpoint: input should be a valid string: 1"),
    ],
)
def test_teachers_that_a_recipe_can_not_name(teacher: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.parse(f"training:\n  teacher: {teacher}\nmodifiers: []\n", file="r.yaml")


def test_teachers_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"training.teacher: timm has no model 'vit_tni'; did you mean"):
        run(recipe(model="vit_tni"), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"training.teacher: no checkpoint 'gone.pt'"):
        run(recipe(checkpoint="gone.pt"), tmp_path)


def test_a_run_that_distills_is_broken_off_at_any_step(tmp_path: Path) -> None:
    unbroken = run(recipe(), tmp_path / "unbroken")
    check_same(broken(recipe(), tmp_path / "broken", [1, 3]), unbroken)
