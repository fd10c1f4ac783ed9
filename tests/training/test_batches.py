"""Which images a step takes, and how they are augmented: of seed, epoch and place alone."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from ovit_engine.core.training_options import Training
from ovit_engine.distributed.comm import Comm
from ovit_engine.training.batches import SeededItems, TrainingBatches, part_size


def batches(images: int, part: int, *, rank: int = 0, count: int = 1, **options: Any) -> TrainingBatches:
    settings = {"accumulate": 1, "repeats": 1, "seed": 0, **options}
    comm = Comm()
    comm.rank, comm.count = rank, count
    return TrainingBatches(images, part, comm=comm, **settings)


@given(
    part=st.integers(1, 5),
    accumulate=st.integers(1, 3),
    count=st.integers(1, 4),
    steps=st.integers(1, 4),
    left_over=st.integers(0, 3),
    repeats=st.integers(1, 3),
    seed=st.integers(0, 3),
)
def test_processes_share_the_batches_of_one_and_any_step_can_be_the_first(
    part: int, accumulate: int, count: int, steps: int, left_over: int, repeats: int, seed: int
) -> None:
    whole = part * count * accumulate
    images = steps * whole + min(left_over, whole - 1)
    options = {"accumulate": accumulate, "repeats": repeats, "seed": seed}
    one = batches(images, part * count, **options)
    several = [batches(images, part, rank=rank, count=count, **options) for rank in range(count)]
    assert {each.steps for each in (one, *several)} == {steps}
    for each in (one, *several):
        each.go_to(1, 0)
    expected = list(one)
    assert len(expected) == len(one) == steps * accumulate
    for parts, batch in zip(zip(*several, strict=True), expected, strict=True):
        assert all(len(each) == part for each in parts)
        assert sorted(key for each in parts for key in each) == sorted(batch)
    keys = [key for batch in expected for key in batch]
    assert len({seed for seed, _ in keys}) == len(keys)  # each copy of an image is augmented in its own way
    drawn = [index for _, index in keys]
    assert set(drawn) <= set(range(images))
    assert max(drawn.count(index) for index in drawn) <= repeats
    if repeats == 1 and not left_over:
        assert sorted(drawn) == list(range(images))
    one.go_to(1, steps - 1)
    assert list(one) == expected[-accumulate:]
    one.go_to(2, 0)
    again = list(one)
    assert not {key for batch in again for key in batch} & set(keys)  # another epoch draws anew
    assert images < 8 or [i for batch in again for _, i in batch] != drawn


class Draws(Dataset[Any]):
    """Items that draw from all three random states, as augmentations do."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64)


def test_an_item_depends_on_its_key_alone_and_leaves_random_states_as_they_were() -> None:
    items = SeededItems(Draws())
    first, second = items.__getitems__([(7, 0), (8, 0)])
    assert not (first[1:] == second[1:]).any()
    (again,) = items.__getitems__([(8, 0)])
    assert torch.equal(second, again)
    states = []
    for read in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        if read:
            items.__getitems__([(7, 0)])
        states.append((float(torch.rand(())), np.random.rand(), random.random()))
    assert states[0] == states[1]


def test_workers_change_nothing() -> None:
    found = []
    for workers in (0, 2):
        keys = batches(12, 4)
        keys.go_to(0, 1)
        loader: Any = DataLoader(SeededItems(Draws()), batch_sampler=keys, num_workers=workers)  # type: ignore[arg-type]
        found.append(torch.stack(list(loader)))
    assert found[0].shape == (2, 4, 4)
    assert torch.equal(*found)


def test_a_batch_is_that_of_all_processes() -> None:
    assert part_size(Training(batch_size=24, accumulate=2), 100, paired=False, processes=3) == 4
    with pytest.raises(ValueError, match="batch_size 64, that of all together, does not divide among 3 processes"):
        part_size(Training(batch_size=64), 100, paired=False, processes=3)
    with pytest.raises(ValueError, match=r"batch_size / accumulate / processes must be even, not 3"):
        part_size(Training(batch_size=6, augmentation="deit"), 100, paired=True, processes=2)
    with pytest.raises(ValueError, match="3 training images are too few for accumulate: 1 and 4 processes"):
        part_size(Training(batch_size=64), 3, paired=False, processes=4)
