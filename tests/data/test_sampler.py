"""The order of training: complete, a function of seed and epoch, in batches of like length."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from mixlora_exp.data.sampler import WINDOW, BucketSampler, FixedSampler


def lengths(count: int) -> list[int]:
    return [random.Random(count + i).randint(20, 400) for i in range(count)]


def order(count: int, batch: int = 16, seed: int = 42, epoch: int = 0) -> list[int]:
    sampler = BucketSampler(lengths(count), batch, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


@pytest.mark.parametrize("count", [1, 5, 16, 17, 100, 16 * WINDOW, 16 * WINDOW + 33, 1500])
@pytest.mark.parametrize("batch", [1, 16])
def test_every_index_comes_once(count: int, batch: int) -> None:
    assert sorted(order(count, batch)) == list(range(count))
    assert len(BucketSampler(lengths(count), batch, 0)) == count


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert order(200) == order(200)
    found = {tuple(order(200, seed=s, epoch=e)) for s in (0, 1, 42) for e in (0, 1, 2)}
    assert len(found) == 9
    sampler = BucketSampler(lengths(200), 16, 42)
    first = list(sampler)
    assert list(sampler) == first, "reading it changes nothing"
    sampler.set_epoch(1)
    assert list(sampler) == order(200, epoch=1)
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_order_does_not_depend_on_global_random_state() -> None:
    random.seed(1)
    first = order(100)
    random.seed(2)
    assert order(100) == first


def test_batches_have_like_lengths() -> None:
    sizes, batch = lengths(1600), 16
    found = order(1600, batch)
    spreads = [
        max(sizes[i] for i in found[start : start + batch])
        - min(sizes[i] for i in found[start : start + batch])
        for start in range(0, 1600, batch)
    ]
    # Lengths span 380; a window of 32 batches cuts that to about 380 / 32 for each.
    assert sum(spreads) / len(spreads) < 30
    padded = sum(
        batch * max(sizes[i] for i in found[start : start + batch])
        for start in range(0, 1600, batch)
    )
    assert padded < 1.05 * sum(sizes)


def test_batches_do_not_come_by_length() -> None:
    sizes = lengths(320)
    found = order(320)
    means = [sum(sizes[i] for i in found[s : s + 16]) / 16 for s in range(0, 320, 16)]
    rises = sum(a < b for a, b in pairwise(means))
    assert 3 < rises < 16


def test_incomplete_batch_comes_last() -> None:
    sizes = [10] * 32 + [1000] * 3
    for epoch in range(5):
        sampler = BucketSampler(sizes, 16, seed=0)
        sampler.set_epoch(epoch)
        found = list(sampler)
        for start in (0, 16):
            batch = [sizes[i] for i in found[start : start + 16]]
            assert batch == sorted(batch), "whole batches are sorted"
        assert len(found) == 35
    # Which examples are left over changes with the epoch.
    rests = set()
    for epoch in range(5):
        sampler = BucketSampler(sizes, 16, seed=0)
        sampler.set_epoch(epoch)
        rests.add(tuple(sorted(list(sampler)[32:])))
    assert len(rests) > 1


def test_the_fixed_order_is_one_for_all_epochs_and_takes_no_notice_of_lengths() -> None:
    sampler = FixedSampler(100, 42)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) == first
    assert sorted(first) == list(range(100))
    assert first != list(FixedSampler(100, 43))
    assert len(sampler) == 100
