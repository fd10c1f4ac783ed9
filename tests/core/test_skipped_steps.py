"""Short runs in float16, of which the gradient scaler skips the first steps: a run that made all its steps finishes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ovit_engine.training import models, steps, trainer
from ovit_engine.training.checkpoint import load_checkpoint
from ovit_engine.training.runs import restore
from tests.training.conftest import tiny_recipe
from tests.training.test_restart import KilledError, check_same, run

LATE = r"""
  - magnitude_prune: {start: 4st, sparsity: 0.5, targets: ['re:.*(qkv|fc1)\.weight']}
  - quantize: {start: 1st, freeze_observers: 4st}
"""


@pytest.fixture(params=[False, True], ids=["foreach", "fused"])
def skips(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """As on a GPU: float16 and a scaler that begins at 65,536, where the first three steps of a run overflow."""
    make = models.create_optimizer_v2

    class HalfSteps(steps.Steps):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            assert self.scaler.get_scale() == 2.0**16
            head = self._engine.model.get_parameter("head.bias")
            head.register_hook(lambda grad: grad * (torch.inf if self.scaler.get_scale() > 2.0**13 else 1.0))

    monkeypatch.setattr(steps, "mixed_precision", lambda device: (torch.float16, True))
    monkeypatch.setattr(trainer, "Steps", HalfSteps)
    monkeypatch.setattr(
        models, "create_optimizer_v2", lambda *args, **options: make(*args, **options, fused=request.param)
    )


def finish(output: Path, resume: Path | None = None) -> Any:
    """All of a training of five steps, or what is left of it; the warnings of its end are looked at."""
    with pytest.warns(UserWarning, match="skipped") as told:
        trained = run(tiny_recipe(LATE, epochs=1), output, amp=True, resume=resume)
    texts = [str(warning.message) for warning in told]
    assert any(text.startswith("the gradient scaler skipped 3 steps, and 2 of 5 were applied: ") for text in texts), (
        texts
    )
    for what in ("magnitude_prune: ", "quantize: "):
        assert any(text.startswith(what) and "2 of 5 steps and 3 were skipped; " in text for text in texts), texts
    return trained


@pytest.mark.usefixtures("skips")
def test_a_run_whose_first_steps_are_skipped_ends_with_all_that_the_recipe_promises(tmp_path: Path) -> None:
    trained = finish(tmp_path / "whole")
    assert (trained.engine.run.step, trained.engine.run.skipped, trained.engine.finished) == (2, 3, True)
    assert trained.engine.run.masks.sparsity() == 0.5
    back = restore(tmp_path / "whole")
    assert back.engine.finished
    assert back.engine.run.skipped == 3
    assert back.model.get_buffer("blocks.0.mlp.fc1.weight_quantizer.enabled")
    with pytest.raises(KilledError):
        run(tiny_recipe(LATE, epochs=1), tmp_path / "broken", stop_after=4, amp=True)
    assert load_checkpoint(tmp_path / "broken")["engine"]["skipped"] == 3
    check_same(finish(tmp_path / "broken", resume=tmp_path / "broken"), trained)
