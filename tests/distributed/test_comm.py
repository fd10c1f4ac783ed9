"""What must be the same in all processes, and ranges that they share; the processes are played by lists here."""

from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ovit_engine.distributed.comm import SINGLE_PROCESS, Comm, GroupComm, digest, world
from ovit_engine.quant import INT8_SYMMETRIC, UINT8_AFFINE, CurrentMinMax, FakeQuantize, share_ranges

T = TypeVar("T")


class Played(GroupComm):
    """Exchanges with processes that are lists."""

    def __init__(self, *others: Any) -> None:
        self.others = others
        self.count = len(others) + 1

    def gather(self, value: T) -> list[T]:
        return [value, *self.others]


def test_a_single_process_exchanges_with_itself() -> None:
    comm, tensor = world(), torch.ones(2)
    assert comm is SINGLE_PROCESS
    assert (comm.rank, comm.count, comm.is_main) == (0, 1, True)
    assert comm.gather("x") == ["x"]
    assert comm.gather_entries({3: "x"}) == {3: "x"}
    assert comm.sum(tensor) is comm.max(tensor) is comm.broadcast(tensor) is tensor
    assert list(comm.exchange([tensor], [2], [[0]], [tensor])) == [[tensor]]
    assert list(comm.exchange(None, [0], [[0]], [tensor])) == []
    assert comm.sharers([torch.device("cpu")]) == {torch.device("cpu"): 1}
    comm.assert_equal(lambda: pytest.fail("facts cost time"), "now")


def test_equal_facts_pass() -> None:
    facts = {"a": 1, "b": digest(torch.ones(3)), "c": None}
    Played(facts, facts).assert_equal(lambda: {"a": 1, "b": torch.ones(3), "c": None}, "now")


@pytest.mark.parametrize(
    ("mine", "others", "words"),
    [
        ({"a": 1, "b": 2}, [{"a": 1, "b": 3}], r"^b now is not .*: rank 1 differs from rank 0 \(3, not 2\)\."),
        (
            {"a": b"x", "b": 2},
            [{"a": b"y", "b": 3}],
            r"^a now is not the same in all processes: rank 1 differs from rank",
        ),
        ({"a": b"x"}, [{"a": b"y"}] * 2 + [{"a": b"x"}], r"ranks 1, 2 differ from rank 0\. They"),
        ({"a": b"x"}, [{"a": b"y"}] * 20, r"ranks 1, 2, 3, 4, 5, 6, 7, 8 and 12 more differ from rank 0\."),
        ({}, [{"a": b"x"}], r"^a now .*: rank 1 differs"),
        ({"a": 1}, [{}], r"^a now .*: rank 1 differs from rank 0 \(None, not 1\)"),
    ],
)
def test_a_difference_names_the_first_thing_and_the_ranks(mine: Any, others: list[Any], words: str) -> None:
    with pytest.raises(RuntimeError, match=words) as caught:
        Played(*others).assert_equal(lambda: mine, "now")
    assert "\n" not in str(caught.value)


@given(st.integers(1, 40), st.integers(0, 2**32 - 1), st.sampled_from([torch.bool, torch.float32, torch.bfloat16]))
def test_a_digest_tells_tensors_that_differ_in_one_place(size: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    one = torch.randint(0, 2, (size,), generator=generator).to(dtype)
    other = one.clone()
    assert digest(one) == digest(other) == digest(one.repeat_interleave(2)[::2])  # in whichever memory
    other[seed % size] = 1 - other[seed % size].int()
    assert digest(one) != digest(other)
    assert len(digest(one)) == 16


def watcher(tensors: list[Tensor], channels: int | None) -> FakeQuantize:
    grid = UINT8_AFFINE if channels is None else INT8_SYMMETRIC
    quantizer = FakeQuantize(grid, CurrentMinMax(), axis=None if channels is None else 0, channels=channels)
    quantizer.observing.fill_(True)
    for tensor in tensors:
        quantizer.observe(tensor)
    return quantizer


@given(
    st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=4),
    st.integers(0, 2**32 - 1),
    st.sampled_from([None, 1, 5]),
)
def test_shared_ranges_are_the_widest(seen: list[list[bool]], seed: int, channels: int | None) -> None:
    """`seen[process][quantizer]`: whether it watched anything."""
    generator = torch.Generator().manual_seed(seed)
    kinds = [None, channels, None]
    data = [[torch.randn(channels or 4, 6, generator=generator) * 3 for _ in kinds] for _ in seen]
    processes = [
        [watcher([x] if has else [], kind) for x, has, kind in zip(each, flags, kinds, strict=True)]
        for each, flags in zip(data, seen, strict=True)
    ]
    sent: list[list[Tensor]] = []

    class Note(Comm):
        count = 2

        def max(self, tensor: Tensor) -> Tensor:
            sent[-1].append(tensor.clone())
            return tensor

    class Follow(Comm):
        count = 2

        def __init__(self) -> None:
            self.calls = 0

        def max(self, tensor: Tensor) -> Tensor:
            self.calls += 1
            return tensor.copy_(torch.stack([each[self.calls - 1] for each in sent]).amax(0))

    for process in processes:
        sent.append([])
        before = [{name: b.clone() for name, b in q.named_buffers()} for q in process]
        share_ranges(process, Note())
        for quantizer, buffers in zip(process, before, strict=True):
            quantizer.load_state_dict(buffers)
    for process in processes:
        share_ranges(process, Follow())
    for place, kind in enumerate(kinds):
        watched = [each[place].double() for each, flags in zip(data, seen, strict=True) if flags[place]]
        for process in processes:
            quantizer = process[place]
            assert bool(quantizer.observed) == bool(watched)
            if not watched:
                assert float(quantizer.scale.min()) == float(quantizer.scale.max()) == 1.0
                continue
            values = torch.cat(watched, 1)
            low, high = (values.min(), values.max()) if kind is None else (values.min(1)[0], values.max(1)[0])
            torch.testing.assert_close(quantizer.minimum.double(), low)
            torch.testing.assert_close(quantizer.maximum.double(), high)
            width = high.clamp(min=0) - low.clamp(max=0)
            scale = width / 255 if kind is None else torch.maximum(low.abs(), high.abs()) / 127
            torch.testing.assert_close(quantizer.scale.double(), scale, rtol=1e-5, atol=0)
