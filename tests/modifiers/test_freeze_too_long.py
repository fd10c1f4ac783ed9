"""`dynamic_vit`'s freeze: training that ends before it does never taught the backbone, which is told."""

import pytest
import torch

from ovit_engine import RecipeError
from ovit_engine.tokens import param_groups
from tests.modifiers.gated import batch, engine_for, vit


def trained(freeze: str, steps: int, total: int) -> object:
    model = vit(img_size=16)
    engine = engine_for(model, f"dynamic_vit: {{keep: 0.5, blocks: [1], freeze: {freeze}}}", total)
    optimizer = torch.optim.SGD(param_groups(model), 0.01)
    engine.attach(optimizer)
    for step in range(steps):
        x, y = batch(step)
        optimizer.zero_grad()
        logits = model(torch.nn.functional.interpolate(x, 16))
        engine.loss(torch.nn.functional.cross_entropy(logits, y)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return engine.detach()


def test_a_freeze_to_the_end_is_refused_at_once() -> None:
    with pytest.raises(RecipeError, match=r"^r.yaml:2:\d+: dynamic_vit.freeze: '100%' is the end of training: no step"):
        engine_for(vit(img_size=16), "dynamic_vit: {keep: 0.5, blocks: [1], freeze: 100%}", 10)


def test_training_that_ends_in_the_freeze_is_told() -> None:
    with pytest.raises(
        RuntimeError, match=r"dynamic_vit: training ended before the end of freeze at step 5: .* 4 of 10"
    ):
        trained("5st", 4, 10)
    with pytest.raises(RecipeError, match=r"dynamic_vit.freeze: training ended before a step was made in which more"):
        trained("9st", 9, 10)  # and no warning says that something was done


def test_one_step_after_it_is_enough() -> None:
    with pytest.warns(UserWarning, match="the optimizer applied 6 of 10 steps"):  # too short for other reasons
        trained("5st", 6, 10)
