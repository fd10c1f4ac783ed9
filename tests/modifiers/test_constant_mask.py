"""The zeros of a checkpoint stay zero, and nothing else is held."""

import pytest
import torch
from torch import nn

from ovit_engine import Engine, RecipeError
from tests.loops import mlp, plain, recipe, zeros


def sparse() -> nn.Sequential:
    """60 of the 128 weights of the first layer are zero, and half of its biases."""
    model = mlp()
    with torch.no_grad():
        model[0].weight.view(-1)[:60] = 0.0
        model[0].bias[::2] = 0.0
    return model


def trained(model: nn.Module, options: str = "", steps: int = 4) -> Engine:
    optimizer = torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.1)
    engine = Engine(model, recipe(f"constant_mask: {{{options}}}"), steps_per_epoch=steps, epochs=1)
    with engine.attach(optimizer):
        for _ in range(steps):
            plain(model, optimizer)
    return engine


def test_all_matrices_with_zeros_are_held_if_nothing_is_said() -> None:
    model = sparse()
    before = model[0].weight == 0
    engine = trained(model)
    assert (model[0].weight == 0).equal(before)
    assert engine.run.masks.names() == ["0.weight"]
    assert engine.run.history == [(0, "constant_mask/sparsity", 60 / 128)]
    assert not bool((model[0].bias == 0).any())  # one-dimensional tensors are not taken by themselves


def test_named_targets_only() -> None:
    model = sparse()
    engine = trained(model, "targets: [0.bias]")
    assert engine.run.masks.names() == ["0.bias"]
    assert int((model[0].bias == 0).sum()) == 8
    assert zeros(model[0]) == 0


def test_nothing_to_hold_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"r.yaml:2:\d+: constant_mask: no matrix or convolution has zeros to hold"):
        trained(mlp())
    with pytest.raises(RecipeError, match=r"constant_mask.targets: '2\.weight' has no zeros"):
        trained(sparse(), "targets: ['re:.*weight']")
    with pytest.raises(RecipeError, match=r"constant_mask.targets: target '9\.weight' matches no parameter"):
        trained(sparse(), "targets: [9.weight]")


def test_a_fresh_layer_of_zeros_stays_free_unless_named() -> None:
    model = sparse()
    nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match=r"'2\.weight' is all zeros, which looks like a fresh layer"):
        engine = trained(model)
    assert engine.run.masks.names() == ["0.weight"]
    assert zeros(model[2]) < 16
    model = sparse()
    nn.init.zeros_(model[2].weight)  # type: ignore[arg-type]
    trained(model, "targets: [2.weight]")
    assert zeros(model[2]) == 16


def test_a_second_writer_of_the_same_mask_is_an_error() -> None:
    prune = "magnitude_prune: {start: 2st, sparsity: 0.5, targets: [0.weight]}"
    engine = Engine(sparse(), recipe("constant_mask: {}", prune), steps_per_epoch=4, epochs=1)
    with pytest.raises(RecipeError, match=r"the mask of 0\.weight"):
        engine.prepare()


def test_a_resumed_run_does_not_take_chance_zeros() -> None:
    model = sparse()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = Engine(model, recipe("constant_mask: {}"), steps_per_epoch=4, epochs=1).attach(optimizer)
    plain(model, optimizer)
    state, weights = engine.state_dict(), model.state_dict()
    weights["2.weight"][0, 3] = 0.0
    other = mlp()
    other.load_state_dict(weights)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    resumed = Engine(other, recipe("constant_mask: {}"), steps_per_epoch=4, epochs=1)
    resumed.load_state_dict(state)
    resumed.attach(optimizer)
    plain(other, optimizer)
    assert (zeros(other[0]), zeros(other[2])) == (60, 0)


def test_zeros_that_are_two_of_four_are_promised_as_such() -> None:
    model = sparse()
    groups = model[2].weight.detach().view(-1, 4)  # type: ignore[union-attr, operator]
    with torch.no_grad():
        groups[:, ::2] = 0.0
    masks = trained(model).run.masks
    assert (masks.pattern("0.weight"), masks.pattern("2.weight")) == ("unstructured", "2:4")
