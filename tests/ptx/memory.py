"""The memory kernels reach: ranges of this process's own, and nothing else."""

from __future__ import annotations

import numpy as np

from .program import PtxError

_FIRST = 4096  # numpy takes an array at address 0 for one it has to allocate


class _Space:
    """All of the process's memory but the first page, to numpy."""

    __array_interface__ = {"version": 3, "typestr": "|u1", "shape": ((1 << 47) - _FIRST,), "data": (_FIRST, False)}  # noqa: RUF012


# Indexed with addresses (minus the first, in values). Only what was allowed is ever touched.
_BYTES = np.asarray(_Space())
VIEWS = {1: _BYTES, 2: _BYTES.view(np.uint16), 4: _BYTES.view(np.uint32), 8: _BYTES.view(np.uint64)}
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Memory:
    """Device memory. Kernels may read what was allowed, and write it unless it is read-only."""

    def __init__(self):
        self._ranges: list[tuple[int, int, bool]] = []
        self._tables: dict[bool, tuple[np.ndarray, np.ndarray]] = {}

    def allow(self, address: int, size: int, writable: bool = True) -> None:
        """Lets kernels use ``size`` bytes from ``address`` on."""
        if size > 0:
            self._ranges.append((address, address + size, writable))
            self._tables.clear()

    def _table(self, write: bool) -> tuple[np.ndarray, np.ndarray]:
        """First and past-the-end addresses of what may be used, sorted. Ranges that overlap are one; those that merely touch
        are not, since nothing that begins in one tensor may end in the next."""
        if write not in self._tables:
            ranges: list[list[int]] = []
            for first, last, writable in sorted(self._ranges):
                if write and not writable:
                    continue
                if ranges and first < ranges[-1][1]:
                    ranges[-1][1] = max(ranges[-1][1], last)
                else:
                    ranges.append([first, last])
            # Two sentinels keep the search inside.
            firsts = np.array([0, *(r[0] for r in ranges)], np.int64)
            lasts = np.array([0, *(r[1] for r in ranges)], np.int64)
            self._tables[write] = firsts, lasts
        return self._tables[write]

    def check(self, addresses: np.ndarray, size: int, write: bool) -> None:
        """Raises unless each of ``addresses`` (int64) is a multiple of ``size`` and the ``size`` bytes there may be used."""
        if len(addresses) == 0:
            return
        crooked = addresses & (size - 1) != 0
        if crooked.any():
            raise PtxError(f"{size} bytes at an address that is not a multiple: {_some(crooked, addresses)}")
        firsts, lasts = self._table(write)
        place = np.searchsorted(firsts, addresses, "right") - 1
        bad = (addresses < 0) | (addresses + size > lasts[place])
        if bad.any():
            what = (
                "writes {} bytes of memory that it may not write" if write else "reads {} bytes of memory that is not its own"
            )
            raise PtxError(f"{what.format(size)}: {_some(bad, addresses)}")

    def load(self, addresses: np.ndarray, size: int, count: int) -> list[np.ndarray]:
        """``count`` values of ``size`` bytes from each of the addresses."""
        self.check(addresses, size * count, write=False)
        first = (addresses - _FIRST) >> (size.bit_length() - 1)
        return [VIEWS[size][first + i] for i in range(count)]

    def store(self, addresses: np.ndarray, size: int, values: list[np.ndarray]) -> None:
        """Writes ``values``, of ``size`` bytes each, to each of the addresses."""
        self.check(addresses, size * len(values), write=True)
        first = (addresses - _FIRST) >> (size.bit_length() - 1)
        for i, value in enumerate(values):
            VIEWS[size][first + i] = value


def _some(bad: np.ndarray, addresses: np.ndarray) -> str:
    return ", ".join(f"{a:#x}" for a in addresses[bad][:4]) + (f" ({int(bad.sum())} threads)" if bad.sum() > 1 else "")
