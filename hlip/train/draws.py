"""What a training step draws at random for each study, and what takes the place of one that cannot be read.

All of it depends on the seed, the epoch and the study alone: not on the number of workers, nor on where a run was resumed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset

from .examples import Example

_MOST = 100  # others that are tried: were nine in ten unreadable, one would still be found, but for one time in 30000


class Draws(Dataset):
    """Examples by ``(epoch, index)``; each is given a seed for its texts.

    In the place of a study that cannot be read comes another, drawn at random: one that is not in the batch, if there is one.

    Args:
        dataset: of :class:`hlip.train.examples.Example`, or ``None`` for what cannot be read.
        seed: of the run.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset, self.seed = dataset, seed
        # Shared, so that a loader's workers do not each find out anew.
        self.unreadable = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Example:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Example]:
        """The examples of a batch.

        Raises:
            ValueError: a study cannot be read, nor can any of many others.
        """
        taken = {index for _, index in keys}
        found = []
        for epoch, index in keys:
            example = self._read(epoch, index)
            found.append(self._another(epoch, index, taken) if example is None else example)
        return found

    def _read(self, epoch: int, index: int) -> Example | None:
        seed = mixed_seed(self.seed, epoch, index)
        with seeded(seed):
            example = self.dataset[index]
        self.unreadable[index] = example is None
        return None if example is None else replace(example, seed=seed)

    def _another(self, epoch: int, index: int, taken: set[int]) -> Example:
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, epoch, index))
        order = torch.randperm(len(self), generator=generator).tolist()
        tried = sorted(order, key=taken.__contains__)[:_MOST]  # those of the batch last, otherwise in this order
        for other in tried:
            example = None if self.unreadable[other] else self._read(epoch, other)
            if example is not None:
                taken.add(other)
                return example
        raise ValueError(
            f"{int(self.unreadable.sum())} of {len(self)} studies were found that cannot be read, among them all of "
            f"{len(tried)} drawn at random: too many to go on; see the lines above"
        )


def mixed_seed(*numbers: int) -> int:
    """A seed that differs for other numbers, in whatever place."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds what draws on the CPU while the block runs, and leaves it as it was before."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds GPUs too
    np.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
