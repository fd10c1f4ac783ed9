"""What comes too late, and says so: surgery on a model that is compiled."""

from typing import Any

import pytest
import torch
from torch import nn

from ovit_engine import Engine
from tests.loops import PRUNE, X, Y, hooks_on, mlp, recipe


@pytest.mark.parametrize("run", [False, True], ids=["not run", "run"])
def test_surgery_after_compile_says_where_to_put_the_line(run: bool) -> None:
    """Attach prepares too. Masks need no surgery: they may come at any time."""
    model = mlp()
    compiled: Any = torch.compile(model, backend="eager")
    if run:
        compiled(X)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine = Engine(compiled, recipe("quantize: {}"), steps_per_epoch=9, epochs=1)
    for late in (engine.prepare, lambda: engine.attach(optimizer)):
        with pytest.raises(RuntimeError, match=r"replaces layers, and the model is compiled already: call engine.prep"):
            late()
    assert hooks_on(optimizer) == 0
    Engine(compiled, recipe(PRUNE), steps_per_epoch=10, epochs=4).attach(optimizer)


def test_surgery_after_compile_in_place_is_refused() -> None:
    model = mlp()
    model.compile(backend="eager")
    with pytest.raises(RuntimeError, match="the model is compiled already"):
        Engine(model, recipe("quantize: {}"), steps_per_epoch=9, epochs=1).prepare()


@pytest.mark.parametrize("run", [False, True], ids=["not run", "run"])
@pytest.mark.parametrize("kept", ["function", "module"])
def test_what_was_compiled_around_the_model_is_compiled_again_after_surgery(kept: str, run: bool) -> None:
    """Nothing shows that a function, or a wrapper that the user kept, has compiled the model."""
    model = mlp()
    function: Any = torch.compile(model if kept == "module" else lambda x: model(x), backend="eager")
    if run:
        function(X)
    engine = Engine(model, recipe("quantize: {start: 1st}"), steps_per_epoch=4, epochs=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    engine.attach(optimizer)
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.mse_loss(function(X), Y).backward()
        optimizer.step()
    engine.detach()
    assert bool(model[0].input_quantizer.observed)
    assert torch.equal(function(X), model(X))


@pytest.mark.parametrize(("what", "compiled"), [("quantize: {start: 1st}", 2), ("constant_mask: {}", 1)])
def test_only_surgery_lets_go_of_what_was_compiled(what: str, compiled: int) -> None:
    """Guards of torch 2.11 do not see a new class of a module, so compiled functions are made anew."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    function = torch.compile(lambda x: x + 1, backend=backend)
    function(X)
    Engine(mlp(), recipe(what), steps_per_epoch=4, epochs=1).prepare()
    function(X)
    assert len(graphs) == compiled
