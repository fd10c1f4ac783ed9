"""What a GPU refuses, and what it takes: the same on the simulated device as on CUDA (`-m gpu` runs it on either)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.devices import ACCELERATOR

pytestmark = pytest.mark.gpu

HERE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
PLACES = torch.tensor([1, 0])

REFUSED: dict[str, Callable[[Tensor], object]] = {
    "element by element": lambda x: x + HERE,
    "a number there, a matrix here": lambda x: HERE * x.sum(),
    "in place": lambda x: x.mul_(HERE),
    "in place on a number here": lambda x: torch.zeros(()).add_(x.sum()),
    "product": lambda x: x @ HERE,
    "layer": lambda x: nn.Linear(2, 2)(x),
    "convolution": lambda x: nn.Conv1d(2, 2, 1)(x.unsqueeze(0)),
    "joined": lambda x: torch.cat([x, HERE]),
    "stacked numbers": lambda x: torch.stack([x.sum(), HERE.sum()]),
    "mask": lambda x: x.masked_fill(HERE > 2, 0.0),
    "choice": lambda x: torch.where(HERE > 2, x, x),
    "rows": lambda x: x.index_select(0, PLACES),
    "gathered": lambda x: x.gather(1, PLACES.unsqueeze(1)),
    "indices there of a matrix here": lambda x: HERE[x[0].long() - 1],
    "written to places": lambda x: x.__setitem__(PLACES, HERE),
    "classes": lambda x: nn.functional.cross_entropy(x, PLACES),
    "compared": lambda x: torch.equal(x, HERE),
    "list": lambda x: torch._foreach_add([x], [HERE]),
    "a generator here": lambda x: x.normal_(generator=torch.Generator()),
    "a generator there": lambda x: torch.rand(2, generator=torch.Generator(x.device)),
    "order by a generator here": lambda x: torch.randperm(2, generator=torch.Generator(), device=x.device),
}

TAKEN: dict[str, Callable[[Tensor], object]] = {
    "a number here": lambda x: x + torch.tensor(1.0),
    "a number here, chosen": lambda x: torch.where(x > 2, x, torch.tensor(0.0)),
    "a number here, filled in": lambda x: x.masked_fill(x > 2, torch.tensor(0.0)),
    "rows by indices here": lambda x: x[PLACES],
    "values by a mask here": lambda x: x[HERE > 2],
    "zeros at a mask here": lambda x: x.__setitem__(HERE > 2, 0.0),
    "a copy from here": lambda x: x.copy_(HERE),
    "a copy to here": lambda x: torch.zeros(2, 2).copy_(x),
    "a generator there": lambda x: x.normal_(generator=torch.Generator(x.device)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_refuses(what: str) -> None:
    with pytest.raises(RuntimeError, match=r"device|type|indices should be"):
        REFUSED[what](HERE.to(ACCELERATOR))


@pytest.mark.parametrize("what", TAKEN)
def test_it_takes(what: str) -> None:
    TAKEN[what](HERE.to(ACCELERATOR))


def test_an_array_must_come_from_main_memory() -> None:
    with pytest.raises(TypeError, match="can't convert"):
        HERE.to(ACCELERATOR).numpy()


def test_its_random_numbers_are_a_stream_of_their_own() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    torch.rand(4, device=ACCELERATOR)
    assert torch.rand(4).equal(expected)


def test_it_computes_what_the_cpu_computes() -> None:
    x, states = torch.randn(8, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), []
    for place in ("cpu", ACCELERATOR):
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        model = nn.Sequential(*layers).double().to(place)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        for _ in range(3):
            optimizer.zero_grad()
            model(x.to(place)).square().mean().backward()
            optimizer.step()
        states.append(model.cpu().state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-8, atol=1e-9)
