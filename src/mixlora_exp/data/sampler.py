"""The order of training examples, a function of the seed and, unless it is fixed, the epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from mixlora_exp.config.choices import Order

WINDOW = 32
"""Number of batches whose examples are sorted together: more reduces padding, fewer mixes lengths
better."""


class BucketSampler(Sampler[int]):
    """Yields every index once; each block of `batch_size` indices has examples of similar length.

    Examples are shuffled, sorted by length within windows of `WINDOW` batches and split into
    batches, which are shuffled; an incomplete batch comes last. The same (seed, epoch) gives the
    same order in every process.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch in the next iteration."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        whole = len(order) - len(order) % self.batch_size
        batches = []
        for start in range(0, whole, WINDOW * self.batch_size):
            window = order[start : min(start + WINDOW * self.batch_size, whole)]
            window = window[np.argsort(self.lengths[window], kind="stable")]
            batches += np.split(window, len(window) // self.batch_size)
        for batch in rng.permutation(len(batches)):
            yield from batches[batch].tolist()
        yield from order[whole:].tolist()


class FixedSampler(Sampler[int]):
    """Yields every index once, in the same random order in all epochs, regardless of length."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: the order is the same in all epochs."""

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng([self.seed, 0]).permutation(self.count).tolist()


def sampler_of(
    lengths: Sequence[int], batch_size: int, seed: int, order: Order
) -> BucketSampler | FixedSampler:
    """Return the sampler of a run; `lengths`: of the examples, `batch_size`: per optimizer step."""
    if order is Order.fixed:
        return FixedSampler(len(lengths), seed)
    return BucketSampler(lengths, batch_size, seed)
