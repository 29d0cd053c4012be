"""What a kernel asks of memory, counted while it runs: turns of shared memory and sectors of device memory, beside the
fewest there could be.

    with counting() as counts:
        ...  # anything that launches
    counts.shared["ldmatrix"], counts.device["load"]

Shared memory has 32 banks of 4 bytes; in one turn it serves 128 bytes, one word of each bank. Accesses of 8 and 16 bytes a lane
are served a half and a quarter of a warp at a time, a matrix at a time those of ``ldmatrix``. Device memory moves in sectors of
32 bytes. Caches are not simulated: what is loaded twice counts twice.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np

from . import machine
from .machine import ThreadBlock

WORD, BANKS, SECTOR, LANES = 4, 32, 32, 32


@dataclass
class Count:
    """Instructions of a warp, the bytes they asked for, the units those take (turns, or sectors) and the fewest they could."""

    instructions: int = 0
    bytes: int = 0
    least: int = 0
    units: int = 0

    def add(self, size: int, least: int, units: int) -> None:
        self.bytes, self.least, self.units = self.bytes + size, self.least + least, self.units + units


@dataclass
class Counts:
    """By kind of access; ``shared``: load, store, copy, ldmatrix, stmatrix. ``device``: load, store, copy. ``instructions``: of
    warps, by opcode."""

    shared: dict[str, Count] = field(default_factory=lambda: collections.defaultdict(Count))
    device: dict[str, Count] = field(default_factory=lambda: collections.defaultdict(Count))
    instructions: collections.Counter = field(default_factory=collections.Counter)


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Counts for all kernels launched meanwhile."""
    counts = Counts()

    class Block(_Counting):
        pass

    Block.counts = counts
    with mock.patch.object(machine, "ThreadBlock", Block):
        yield counts


class _Counting(ThreadBlock):
    """A thread block that is counted."""

    counts: Counts

    def _compiled(self, number, masked):
        here = (self.state == 0) & (self.at == number)  # running
        warps = int(here.reshape(-1, LANES).any(1).sum())
        for instruction in self.kernel.blocks[number].instructions:
            self.counts.instructions[".".join(instruction.parts)] += warps
        return super()._compiled(number, masked)

    def load_shared(self, addresses, size, count, guard):
        self._turns("load", addresses, size * count, guard)
        return super().load_shared(addresses, size, count, guard)

    def store_shared(self, addresses, size, values, guard):
        self._turns("store", addresses, size * len(values), guard)
        super().store_shared(addresses, size, values, guard)

    def load_matrices(self, addresses, count, transposed, guard):
        self._turns("ldmatrix", addresses, 16, guard, LANES // 4 * count)
        return super().load_matrices(addresses, count, transposed, guard)

    def store_matrices(self, addresses, values, transposed, guard):
        self._turns("stmatrix", addresses, 16, guard, LANES // 4 * len(values))
        super().store_matrices(addresses, values, transposed, guard)

    def load_global(self, addresses, size, count, guard):
        self._sectors("load", addresses, size * count, self._executing(guard))
        return super().load_global(addresses, size, count, guard)

    def store_global(self, addresses, size, values, guard):
        self._sectors("store", addresses, size * len(values), self._executing(guard))
        super().store_global(addresses, size, values, guard)

    def copy_async(self, to, source, size, count, guard):
        self._turns("copy", to, size, guard)
        reads = self._executing(guard)
        self._sectors("copy", source, size, reads if count is None else reads & (count > 0))
        super().copy_async(to, source, size, count, guard)

    def _executing(self, guard) -> np.ndarray:
        here = np.zeros(self.padded, bool)
        here[self._active(guard)] = True
        return here

    def _turns(self, kind: str, addresses, size: int, guard, lanes: int = LANES) -> None:
        """``lanes``: of a warp, that give an address which is used."""
        count = self.counts.shared[kind]
        together = min(LANES, WORD * BANKS // max(size, WORD))  # lanes served at a time
        for place, here in zip(addresses.reshape(-1, LANES), self._executing(guard).reshape(-1, LANES), strict=True):
            if not here.any():
                continue
            count.instructions += 1
            for first in range(0, lanes, together):
                own = place[first : first + together][here[first : first + together]]
                words = np.unique(own[:, None] // WORD + np.arange(max(size // WORD, 1)))
                if len(words):
                    count.add(len(own) * size, -(-len(words) // BANKS), int(np.bincount(words % BANKS).max()))

    def _sectors(self, kind: str, addresses, size: int, here: np.ndarray) -> None:
        count = self.counts.device[kind]
        for place, lanes in zip(addresses.reshape(-1, LANES), here.reshape(-1, LANES), strict=True):
            if lanes.any():
                count.instructions += 1
                own = np.unique(place[lanes])  # multiples of the size, which divides a sector
                count.add(len(own) * size, -(-len(own) * size // SECTOR), len(np.unique(own // SECTOR)))
