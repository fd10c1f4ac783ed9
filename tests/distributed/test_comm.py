"""What must be the same in all processes, and ranges that they share; the processes are played by lists here."""

from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ovit_engine.distributed.comm import Alone, agree, digest, ranks
from ovit_engine.quant import INT8_SYMMETRIC, UINT8_AFFINE, CurrentMinMax, FakeQuantize, share_ranges

T = TypeVar("T")


class Played(Alone):
    """Gathers what the others are said to have."""

    def __init__(self, *others: Any) -> None:
        self.others = others
        self.count = len(others) + 1

    def gather(self, value: T) -> list[T]:
        return [value, *self.others]


def test_a_process_alone_agrees_with_itself() -> None:
    assert ranks().count == 1
    agree(Alone(), {"anything": b"x"}, "now")
    agree(Played({"a": 1}, {"a": 1}), {"a": 1}, "now")


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
        agree(Played(*others), mine, "now")
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

    def note(tensor: Tensor, op: Any, group: Any) -> None:
        sent[-1].append(tensor.clone())

    def reduce(tensor: Tensor, op: Any, group: Any) -> None:
        assert op == dist.ReduceOp.MAX
        tensor.copy_(torch.stack([each[calls] for each in sent]).amax(0))

    with pytest.MonkeyPatch.context() as patch:
        for process in processes:
            sent.append([])
            patch.setattr(dist, "all_reduce", note)
            before = [{name: b.clone() for name, b in q.named_buffers()} for q in process]
            share_ranges(process, None)  # type: ignore[arg-type]
            for quantizer, buffers in zip(process, before, strict=True):
                quantizer.load_state_dict(buffers)
        for process in processes:
            calls = 0

            def follow(tensor: Tensor, op: Any, group: Any) -> None:
                nonlocal calls
                reduce(tensor, op, group)
                calls += 1

            patch.setattr(dist, "all_reduce", follow)
            share_ranges(process, None)  # type: ignore[arg-type]
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


def test_sharing_nothing_asks_nobody() -> None:
    share_ranges([], None)  # type: ignore[arg-type]
