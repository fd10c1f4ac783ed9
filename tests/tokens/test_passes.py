"""What the hooks remember of forward passes: no more than may be asked for, and nothing that bars torch.func."""

import gc

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from ovit_engine.tokens.replays import Passes
from tests.tokens.models import IMAGES
from tests.tokens.training import attached, loss_of, prepared


@pytest.mark.parametrize("line", ["dynamic_vit: {keep: 0.7}", "tome: {r: 3}"])
def test_passes_without_a_step_pile_up_nowhere(line: str) -> None:
    """As in a training after the engine's, in which nobody says that a step is over."""
    model, engine, _ = attached(line)
    model.train()
    for _ in range(5):
        loss_of(engine).backward()  # type: ignore[no-untyped-call]
    gc.collect()
    assert len(model._token_hooks.passes._open) == 1


def test_of_passes_without_a_graph_two_are_kept_at_most() -> None:
    passes, x = Passes(), torch.zeros(2)
    passes.begin(x, training=True)
    passes.check_last("tokens")
    for _ in range(5):
        passes.begin(x, training=True)
    assert len(passes._open) == 2
    held = passes.begin(x.clone().requires_grad_(), training=True)
    assert held.grad_fn is not None
    with pytest.raises(RuntimeError, match="needs backward after each forward pass"):
        passes.check_last("tokens")
    passes.begin_step()
    passes.check_last("tokens")


def test_gradients_of_single_images() -> None:
    model, _, _ = prepared("tome: {r: 3}")
    model.train()
    for block in model.blocks:
        block.attn.fused_attn = False  # functorch has no rule for it
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        output: Tensor = functional_call(model, weights, (image[None],))
        return output.square().mean()

    found = vmap(grad(loss), in_dims=(None, 0))(weights, IMAGES[:2])
    for number in range(2):
        (alone,) = torch.autograd.grad(model(IMAGES[number : number + 1]).square().mean(), [model.head.weight])
        assert torch.allclose(found["head.weight"][number], alone, atol=1e-6)
